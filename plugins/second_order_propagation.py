"""Second-order propagation: a recurrent branch that sees two steps back, not one.

Paper: Chan, Zhou, Xu, Loy, "BasicVSR++: Improving Video Super-Resolution with Enhanced Propagation and Alignment",
CVPR 2022, section 3.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.plugin import Plugin
from vsrplug.site import Kind

from ._blocks import warp


class SecondOrderPropagation(nn.Module):
    """Refine a recurrent feature with the feature of two steps before: F + W2 lrelu(W1 [F, warp(F_2, s_2)]).

    F_2 is what the branch propagated two steps before, s_2 the flow from here to there (`compose_flows` makes it of two
    flows of one step). Where the step between was occluded or its alignment failed, F_2 may still know the place.
    BasicVSR++ merges the two features inside its deformable alignment; here two 3x3 convolutions do, on top of
    whatever alignment the network has. The second convolution starts at zero: the module is the identity until trained.

    Args:
        channels: width c of the features.
        zero_init: start as the identity; False to train a network from scratch.

    Shape:
        feature, earlier: (b, c, h, w), flow: (b, 2, h, w) -> (b, c, h, w)

    Example:
        >>> flow = compose_flows(flows[t], flows[t - 1])  # flows[t]: from frame t to frame t - 1, (b, 2, h, w)
        >>> feature = second_order(feature, features[t - 2], flow)
    """

    def __init__(self, channels: int, zero_init: bool = True) -> None:
        super().__init__()
        first = nn.Conv2d(2 * channels, channels, 3, padding=1)
        last = nn.Conv2d(channels, channels, 3, padding=1)
        self.merge = nn.Sequential(first, nn.LeakyReLU(0.1), last)
        if zero_init:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, feature: Tensor, earlier: Tensor, flow: Tensor) -> Tensor:
        """Bring in the feature of two steps before.

        Args:
            feature: (b, c, h, w), of this step: aligned to its frame, or already refined there.
            earlier: (b, c, h, w), propagated two steps before, as it was there (not yet aligned).
            flow: (b, 2, h, w) in pixels of the feature, x then y: lives on this frame and points into the earlier one.

        Returns:
            (b, c, h, w) in the dtype of `feature`.

        Raises:
            ValueError: the three do not belong together.
        """
        b, _, h, w = feature.shape
        if earlier.shape != feature.shape or flow.shape != (b, 2, h, w):
            raise ValueError(
                f"second-order propagation of a feature {tuple(feature.shape)} takes an earlier one of that shape and "
                f"a flow {(b, 2, h, w)}, got {tuple(earlier.shape)} and {tuple(flow.shape)}"
            )
        aligned = warp(earlier, flow).to(feature.dtype)
        return feature + self.merge(torch.cat((feature, aligned), dim=1)).to(feature.dtype)


def compose_flows(near: Tensor, far: Tensor) -> Tensor:
    """The flow across two steps: s_2(p) = s_near(p) + s_far(p + s_near(p)), which BasicVSR++ calls flow_n2.

    `far` is read where `near` points, between pixels bilinearly and as zero outside the frame, like the official code.

    Args:
        near: (b, 2, h, w) in pixels, x then y, from this frame to the one a step before.
        far: (b, 2, h, w), from that frame to the one before it.

    Returns:
        (b, 2, h, w), float32 at least: a sum of half-precision flows would lose what is left of their fractions.
    """
    dtype = torch.promote_types(near.dtype, torch.float32)
    return near.to(dtype) + warp(far.to(dtype), near)


class SecondOrderPropagationPlugin(Plugin):
    """Second-order propagation in a recurrent network with optical flow, such as BasicVSR.

    At a warped site, before the residual blocks as in BasicVSR++, the feature of two steps before joins the aligned
    feature of one step before; at an output site it joins what the residual blocks made. It is what the branch
    propagated there, refined itself; at an output site, as this plug-in left it. The first two steps of a direction
    have nothing to bring and stay as they are: clips of three frames and more learn.

    The direction is read from the site's name. A foreign site is named by its user, after its order: `forward_output`,
    say, for a submodule that is called from the first frame to the last. As foreign networks set no flows,
    `context.flows` has to be set before the call.

    Args:
        channels: width of the sites.
        sites: where it goes: names such as `backward_warped`, `forward_output` or `forward_2_output`.
        zero_init: as in `SecondOrderPropagation`.

    Raises:
        ValueError: a site of another name.
    """

    default_sites: ClassVar[tuple[str, ...]] = ("backward_warped", "forward_warped")
    kinds: ClassVar[tuple[Kind, ...]] = ("frame",)

    def __init__(self, channels: int, *, sites: Sequence[str] | None = None, zero_init: bool = True) -> None:
        super().__init__(channels, sites=sites)
        for site in self.sites:
            if not re.fullmatch(r"(backward|forward)_(\w+_)?(warped|output)", site):
                raise ValueError(
                    f"second-order propagation cannot go to site {site!r}: it takes the warped and output sites of one "
                    "direction, named like 'backward_warped' or 'forward_output'; name a foreign site after its order"
                )
        self.at = nn.ModuleDict({site: SecondOrderPropagation(channels, zero_init) for site in self.sites})

    def forward(
        self,
        feature: Tensor,
        context: Context,
        *,
        site: str,
        t: int | None = None,
        source: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        """Refine the feature of step t, (b, c, h, w), from the third step of the direction on.

        Args:
            source: at a warped site, the feature of the step before, before it was aligned.

        Raises:
            ValueError: the network sets no flows or flows of another clip, or the site gives no step or no source.
        """
        direction, place = site.partition("_")[0], site.rpartition("_")[2]
        flows = self._flows(context, site, direction)
        if t is None or (place == "warped" and source is None):
            missing = "no time step `t`" if t is None else "no `source`, the feature before alignment"
            raise ValueError(
                f"second-order propagation at site {site!r}: the network gives {missing}; use an output site that is "
                "called once a frame, such as 'forward_output'"
            )
        back = -1 if direction == "forward" else 1
        propagated = context.memo  # (self, site, step) -> what the branch propagated at that step
        if place == "warped":
            propagated[self, site, t + back] = source
        if (self, site, t + 2 * back) in propagated:
            # flows.forward[i] lives on frame i + 1 and flows.backward[i] on frame i, each points one step back
            near = t - 1 if direction == "forward" else t
            flow = _in_pixels_of(feature, compose_flows(flows[:, near], flows[:, near + back]))
            feature = self.at[site](feature, propagated[self, site, t + 2 * back], flow)
        if place == "output":
            propagated[self, site, t] = feature
        return feature

    @staticmethod
    def _flows(context: Context, site: str, direction: str) -> Tensor:
        """The flows of a direction, (b, t-1, 2, h, w), checked."""
        if context.flows is None:
            raise ValueError(
                f"second-order propagation at site {site!r} needs optical flow, and this network sets none; use one "
                "that estimates flow, such as BasicVSR, or set context.flows = Flows(backward, forward) before the call"
            )
        flows: Tensor = getattr(context.flows, direction)
        b, t = context.frames.shape[:2]
        if flows.ndim != 5 or flows.shape[:3] != (b, t - 1, 2):
            raise ValueError(
                f"second-order propagation at site {site!r}: flows of a clip {tuple(context.frames.shape)} are "
                f"{(b, t - 1, 2)} + (h, w), got {tuple(flows.shape)}; see vsrplug.context.Flows"
            )
        return flows


def _in_pixels_of(feature: Tensor, flow: Tensor) -> Tensor:
    """A flow in LR pixels, in pixels of the feature, at a site with a stride."""
    h, w = feature.shape[-2:]
    if flow.shape[-2:] == (h, w):
        return flow
    x, y = F.interpolate(flow, size=(h, w), mode="area").unbind(1)
    return torch.stack((x * (w / flow.shape[-1]), y * (h / flow.shape[-2])), dim=1)
