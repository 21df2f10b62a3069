"""Flow-guided deformable alignment: sample features around where the flow points, by learned offsets and weights.

Paper: Chan, Zhou, Xu, Loy, "BasicVSR++: Improving Video Super-Resolution with Enhanced Propagation and Alignment",
CVPR 2022, section 3.2, eq. 2-6; paper 002.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.plugin import Plugin
from vsrplug.site import Kind

from ._blocks import warp
from ._deformable import POINTS, deformable_convolution


class FlowGuidedDeformableAlignment(nn.Module):
    """Align n features to the reference frame, and merge them, by one deformable convolution along the flows.

    With the sources f_i, their flows s_i, the reference g, and [.] the concatenation:

        o, m = conv_offset([warp(f_1, s_1), g, warp(f_2, s_2), ..., s_1, s_2, ...])
        aligned = deformable([f_1, f_2, ...]; offsets s_i + 10 tanh(o_i), weights sigmoid(m))

    Two sources are the second-order alignment of BasicVSR++, with its names of parameters; one is the first-order kind.
    An official `deform_align.<branch>` loads as it is.

    Args:
        channels: width c of each source and of the result.
        sources: n; BasicVSR++ aligns the features of one and of two steps before.
        groups: deformable groups of all sources together, each with offsets and weights of its own.
        reference_channels: width r of what describes the reference frame; `channels` unless given.
        max_residual: bound of the learned part of the offsets, in pixels.
        zero_init: start with a result of zero, as a branch that is added to something needs; offsets then start near
            the flow instead of on it, since behind two layers of zeros nothing would learn. False starts as BasicVSR++
            does, on the flow and with weights of 1/2.

    Raises:
        ValueError: `groups` cannot be shared out among the sources and their channels.

    Shape:
        sources: (b, n, c, h, w), flows: (b, n, 2, h, w) in pixels of the feature, x then y, reference: (b, r, h, w)
        -> (b, c, h, w).
    """

    def __init__(
        self,
        channels: int,
        sources: int = 1,
        groups: int = 16,
        reference_channels: int | None = None,
        max_residual: float = 10.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if groups % sources or sources * channels % groups:
            possible = sources * math.gcd(channels, max(groups // sources, 1))
            raise ValueError(
                f"{groups} deformable groups cannot be shared out among sources={sources} of channels={channels}; they "
                f"must be a multiple of the first and divide their product: try {possible}"
            )
        self.channels = channels
        self.sources = sources
        self.groups = groups
        self.reference_channels = channels if reference_channels is None else reference_channels
        self.max_residual = max_residual
        bound = 1 / math.sqrt(sources * channels * POINTS)
        self.weight = nn.Parameter(torch.empty(channels, sources * channels, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels))
        last = nn.Conv2d(channels, 3 * POINTS * groups, 3, padding=1)
        self.conv_offset = nn.Sequential(
            nn.Conv2d(sources * (channels + 2) + self.reference_channels, channels, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            last,
        )
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            last.weight.mul_(0.1 if zero_init else 0.0)  # a tenth: offsets of a fraction of a pixel
            if zero_init:
                self.weight.zero_()

    def forward(self, sources: Tensor, flows: Tensor, reference: Tensor, warped: Tensor | None = None) -> Tensor:
        """Align.

        Args:
            sources: (b, n, c, h, w), features of other frames.
            flows: (b, n, 2, h, w), from the reference frame into each of those.
            reference: (b, r, h, w), the reference frame or a feature of it.
            warped: (b, n, c, h, w), the sources warped by the flows, where the caller has them.

        Returns:
            (b, c, h, w) in the dtype of the sources.

        Raises:
            ValueError: the shapes do not belong together.
        """
        b, n, c, (h, w) = len(sources), self.sources, self.channels, sources.shape[-2:]
        expected = ((b, n, c, h, w), (b, n, 2, h, w), (b, self.reference_channels, h, w))
        if (sources.shape, flows.shape, reference.shape) != expected:
            raise ValueError(
                "flow-guided alignment takes sources, flows and reference of {}, {} and {}, got {}, {} and {}".format(
                    *expected, *(tuple(x.shape) for x in (sources, flows, reference))
                )
            )
        if warped is None:
            warped = warp(sources.flatten(0, 1), flows.flatten(0, 1)).unflatten(0, (b, n))
        seen = (warped[:, 0], reference, warped[:, 1:].flatten(1, 2), flows.flatten(1, 2))
        condition = torch.cat([part.to(sources.dtype) for part in seen], dim=1)
        predicted = self.conv_offset(condition.contiguous(memory_format=torch.channels_last))
        residual, mask = predicted.split((2 * POINTS * self.groups, POINTS * self.groups), dim=1)
        # float32 at least: a bfloat16 offset of 64 pixels is known to half a pixel only.
        precise = torch.promote_types(residual.dtype, torch.float32)
        residual = residual.to(precise).tanh().unflatten(1, (n, -1, 2))
        # The convolution counts y then x, the flow x then y; each source has its own share of the groups.
        offset = torch.add(flows.to(precise).flip(2).unsqueeze(2), residual, alpha=self.max_residual)
        aligned = deformable_convolution(
            sources.flatten(1, 2), offset.flatten(1, 3), mask.sigmoid(), self.weight, self.bias
        )
        return aligned.to(sources.dtype)


class FlowGuidedDeformableAlignmentPlugin(Plugin):
    """Adds a `FlowGuidedDeformableAlignment` to what the flow alone aligned: warped + aligned, each site its own.

    It goes where a recurrent network warps the feature of the step before, at sites that give that feature, `source`,
    and the `flow`. Offsets are predicted from the warped feature, the current frame and the flow. The convolution
    starts at zero, and the network with its plain warping.

    Args:
        channels: width of the sites.
        sites: where it goes; by default the warped features of both directions.
        groups, max_residual, zero_init: as in `FlowGuidedDeformableAlignment`.
    """

    default_sites: ClassVar[tuple[str, ...]] = (
        "backward_warped",
        "forward_warped",
        "backward_1_warped",
        "forward_1_warped",
        "backward_2_warped",
        "forward_2_warped",
    )
    kinds: ClassVar[tuple[Kind, ...]] = ("frame",)

    def __init__(
        self,
        channels: int,
        *,
        sites: Sequence[str] | None = None,
        groups: int = 16,
        max_residual: float = 10.0,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict(
            {
                site: FlowGuidedDeformableAlignment(channels, 1, groups, 3, max_residual, zero_init)
                for site in self.sites
            }
        )

    def forward(
        self,
        feature: Tensor,
        context: Context,
        *,
        site: str,
        t: int | None = None,
        source: Tensor | None = None,
        flow: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        """Refine the warped feature of frame t, (b, c, h, w).

        Args:
            feature: (b, c, h, w), `source` warped by `flow`.
            context: of the pass.
            site: name of the site.
            t: the frame the feature is aligned to.
            source: (b, c, h, w), the feature before warping.
            flow: (b, 2, h, w) in pixels of the feature, x then y.
            given: what else the site gives; not read.

        Raises:
            ValueError: the site gives no source or no flow.
        """
        if source is None or flow is None:
            raise ValueError(
                f"flow-guided alignment needs a site that gives source and flow, as 'backward_warped' and "
                f"'forward_warped' of BasicVSR do; {site!r} gives {', '.join(given) or 'nothing'}. Name others with "
                "sites=(...)"
            )
        frame = context.frames[:, t]
        if frame.shape[-2:] != feature.shape[-2:]:  # a site with a stride
            frame = F.interpolate(frame, size=feature.shape[-2:], mode="area")
        return feature + self.at[site](source[:, None], flow[:, None], frame, feature[:, None])
