"""Optical flow between the frames of a clip, as the recurrent networks need it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vsrplug.context import Flows

from ._blocks import in_chunks


def neighbour_flows(estimate: nn.Module, clip: Tensor) -> Flows:
    """Flow between neighbouring frames in both directions, all pairs in one batch as far as memory is bounded.

    Args:
        estimate: `(reference, supporting) -> flow (n, 2, h, w)` in pixels, x then y.
        clip: (b, t, 3, h, w) in [0, 1].

    Returns:
        Each way (b, t-1, 2, h, w); of one frame, no flows.
    """
    b, t, _, h, w = clip.shape
    if t == 1:
        return Flows(clip.new_zeros(b, 0, 2, h, w), clip.new_zeros(b, 0, 2, h, w))
    earlier, later = clip[:, :-1].flatten(0, 1), clip[:, 1:].flatten(0, 1)
    flow = in_chunks(estimate, torch.cat((earlier, later)), torch.cat((later, earlier)), pixels=h * w)
    backward, forward = flow.unflatten(0, (2, b, t - 1))
    return Flows(backward, forward)
