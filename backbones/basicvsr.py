"""`BasicVSR`: bidirectional recurrent propagation with flow alignment. Chan et al., CVPR 2021 (papers 002, 003)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context, Flows
from vsrplug.site import SiteSpec

from ..plugins._blocks import warp
from ._blocks import ResidualTrunk, in_chunks
from ._flows import neighbour_flows
from ._reconstruction import PixelShuffleHead
from .lucas_kanade import LucasKanade
from .spynet import SPyNet


class BasicVSR(PixelShuffleHead):
    """A clip, any number of frames, to the clip enlarged.

    Sites (`h~` and `psi` as in SEEM, eq. 13 and 14): `input`, the frames, which feed flow, trunks and skip alike;
    `{backward,forward}_warped`, the previous feature after alignment, given `source` (before it) and `flow`;
    `{backward,forward}_input`, psi, what enters the residual blocks; `{backward,forward}_output`, h~, which is
    propagated on and fused; `fused`, before the up-sampling. The first step of a direction has nothing to warp.

    Args:
        channels: width of the propagated features.
        blocks: residual blocks of each direction.
        scale: 1, 2, 3 or 4; official weights have 4.
        flow: any module `(reference, supporting) -> flow (b, 2, h, w)` in LR pixels, x then y; None makes a `SPyNet`.
        reconstruction_channels: width at the high resolution.
        checkpointing: compute the residual blocks again in the backward pass instead of keeping their activations:
            the same gradients, less memory, more time.

    Raises:
        ValueError: a scale it cannot build.
    """

    window: ClassVar[int | None] = None
    multiple: ClassVar[int] = 1
    official_names: ClassVar[tuple[tuple[str, str], ...]] = (
        *((pattern.replace("^", r"^spynet\."), f"spynet.{ours}") for pattern, ours in SPyNet.official_names),
        (r"^upsample([12])\.upsample_conv\.", r"upconv\1."),
        (r"^(backward|forward)_resblocks\.", r"\1_trunk."),
    )

    def __init__(
        self,
        channels: int = 64,
        blocks: int = 30,
        scale: int = 4,
        flow: nn.Module | None = None,
        reconstruction_channels: int = 64,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.scale = scale
        feature = SiteSpec(channels, "frame")
        self.sites = {
            "input": SiteSpec(3, "clip"),
            **{f"{way}_{place}": feature for way in ("backward", "forward") for place in ("warped", "input", "output")},
            "fused": SiteSpec(channels, "clip"),
        }
        self.spynet = SPyNet() if flow is None else flow  # the official name, whatever estimates the flow
        self.backward_trunk = ResidualTrunk(channels + 3, channels, blocks, checkpointing)
        self.forward_trunk = ResidualTrunk(channels + 3, channels, blocks, checkpointing)
        self.fusion = nn.Conv2d(2 * channels, channels, 1)
        self.add_head(channels, scale, reconstruction_channels)

    def forward(self, frames: Tensor, context: Context | None = None) -> Tensor:
        """Enlarge a clip.

        Args:
            frames: (b, t, 3, h, w) in [0, 1].
            context: of this pass; `context.flows` is set.

        Returns:
            (b, t, 3, s h, s w), not clamped.
        """
        context = Context(frames) if context is None else context
        return self.restore(context.refine("input", context.pad(self.multiple)), context)

    def restore(self, clip: Tensor, context: Context) -> Tensor:
        """What follows the site `input`: (b, t, 3, h, w), refined or cleaned frames -> (b, t, 3, s h, s w)."""
        b, t, _, h, w = clip.shape
        context.flows = flows = neighbour_flows(self.spynet, clip)
        fused = context.refine("fused", self._fused(clip, flows, context))
        enlarged = in_chunks(self.on_frames, fused.flatten(0, 1), clip.flatten(0, 1), pixels=h * w * self.scale**2)
        return enlarged.unflatten(0, (b, t))

    def _fused(self, clip: Tensor, flows: Flows, context: Context) -> Tensor:
        """Both directions, (b, t, c, h, w). What they were made of is free again before the frames are enlarged."""
        # warped with flows[:, i]: frame i + 1 onto i on the way back, frame i onto i + 1 on the way there
        backward = self._propagate("backward", self.backward_trunk, clip, flows.backward, context)
        forward = self._propagate("forward", self.forward_trunk, clip, flows.forward, context)
        both = torch.cat((torch.stack(backward, 1), torch.stack(forward, 1)), dim=2)
        return F.leaky_relu(self.fusion(both.flatten(0, 1)), 0.1, inplace=True).unflatten(0, clip.shape[:2])

    def _propagate(
        self, way: str, trunk: Callable[..., Tensor], clip: Tensor, flows: Tensor, context: Context
    ) -> list[Tensor]:
        """The features h~ of one direction, in the order of the frames."""
        b, steps, _, h, w = clip.shape
        order = range(steps - 1, -1, -1) if way == "backward" else range(steps)
        feature = clip.new_zeros(b, self.channels, h, w)
        features: dict[int, Tensor] = {}
        for t in order:
            if features:
                source, flow = feature, flows[:, t if way == "backward" else t - 1]
                feature = context.refine(f"{way}_warped", warp(source, flow), t, source=source, flow=flow)
            entering = partial(context.refine, f"{way}_input", t=t)
            feature = trunk(torch.cat((clip[:, t], feature), dim=1), entering)
            feature = features[t] = context.refine(f"{way}_output", feature, t)
        return [features[t] for t in range(steps)]


def basicvsr_tiny() -> BasicVSR:
    """A BasicVSR small enough to travel with the package and to train on two CPU cores (x4, 376,483 parameters).

    Its flow has no weights: a SPyNet learns too slowly from nothing for that.
    """
    return BasicVSR(channels=32, blocks=8, flow=LucasKanade(), reconstruction_channels=16)
