"""Losses between a restored clip and the truth, and between an estimated and a true flow."""

from __future__ import annotations

from torch import Tensor

from vsrplug.context import Flows


def charbonnier(sr: Tensor, hr: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Mean of sqrt((sr - hr)^2 + epsilon^2), the loss of BasicVSR (002) and EDVR.

    Args:
        sr, hr: of one shape, in [0, 1].
        epsilon: rounds the corner of the absolute value; BasicVSR's code adds 1e-12, which is 1e-6 squared.
    """
    return ((sr - hr).square() + epsilon**2).sqrt().mean()


def l1(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean absolute difference, the loss of MANA (000, 3.4)."""
    return (sr - hr).abs().mean()


def end_point_error(estimated: Flows, true: Flows) -> Tensor:
    """Mean Euclidean distance between flow vectors, in LR pixels, over both directions.

    It is sqrt(distance^2 + 1e-6), so 0.001 where the flow is exact: the root has no gradient at zero.

    Args:
        estimated: each way (b, t-1, 2, h', w'), h' >= h and w' >= w: those of a network that pads its frames go on to
            the bottom and right of `true`, which does not count.
        true: each way (b, t-1, 2, h, w).
    """
    h, w = true.backward.shape[-2:]
    ways = zip(estimated, true, strict=True)
    distances = (((e[..., :h, :w].float() - t.float()).square().sum(2) + 1e-6).sqrt().mean() for e, t in ways)
    return sum(distances) / 2  # type: ignore[return-value]
