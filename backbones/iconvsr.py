"""`IconVSR`: BasicVSR with information refill and coupled propagation. Chan et al., CVPR 2021 (paper 002)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from vsrplug.context import Context, Flows, PaddingMode
from vsrplug.site import SiteSpec

from ..plugins._blocks import warp
from ._blocks import ResidualTrunk, in_chunks
from ._flows import neighbour_flows
from ._reconstruction import PixelShuffleHead
from .basicvsr import BasicVSR
from .edvr import WindowFusion
from .spynet import SPyNet


class IconVSR(PixelShuffleHead):
    """A clip, any number of frames, to the clip enlarged.

    Every `keyframe_stride`-th frame and the last are keyframes: a window around each is aligned and fused as in EDVR,
    and the result refills what both directions propagate there. The forward direction sees what the backward one made
    of each frame, and its features alone are enlarged. Frames of any size are mirrored to `multiple` inside, and the
    result is cropped.

    Sites: those of `BasicVSR`, and `keyframe` (frame, with t), the fused feature of a keyframe, called once for each
    before anything is propagated. `{backward,forward}_warped` comes before the refill, `{backward,forward}_input` after
    it; `fused` holds the forward features on their way to the up-sampling.

    Args:
        channels: width of the propagated features and of the keyframes', a multiple of 8, the deformable groups.
        blocks: residual blocks of each direction.
        keyframe_stride: every how many frames there is a keyframe.
        temporal_padding: frames on either side of a keyframe in its window; official weights have 2 (REDS) or 3
            (Vimeo-90K).
        scale: 1, 2, 3 or 4; official weights have 4.
        flow: any module `(reference, supporting) -> flow (b, 2, h, w)` in LR pixels, x then y; None makes a `SPyNet`.
        reconstruction_channels: width at the high resolution.
        checkpointing: as in `BasicVSR`.

    Raises:
        ValueError: a scale it cannot build, or a stride or padding that is no such count.

    Source: Chan et al., "BasicVSR: The Search for Essential Components in Video Super-Resolution and Beyond", CVPR
    2021, "From BasicVSR to IconVSR". Layout of weights: BasicSR.
    """

    window: ClassVar[int | None] = None
    multiple: ClassVar[int] = 4
    padding_mode: ClassVar[PaddingMode] = "reflect"
    official_names: ClassVar[tuple[tuple[str, str], ...]] = (*BasicVSR.official_names, *WindowFusion.official_names)

    def __init__(
        self,
        channels: int = 64,
        blocks: int = 30,
        keyframe_stride: int = 5,
        temporal_padding: int = 2,
        scale: int = 4,
        flow: nn.Module | None = None,
        reconstruction_channels: int = 64,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if keyframe_stride < 1 or temporal_padding < 0:
            raise ValueError(
                "keyframe_stride is 1 or more and temporal_padding 0 or more, got "
                f"keyframe_stride={keyframe_stride}, temporal_padding={temporal_padding}"
            )
        self.channels = channels
        self.scale = scale
        self.keyframe_stride = keyframe_stride
        self.temporal_padding = temporal_padding
        feature = SiteSpec(channels, "frame")
        self.sites = {
            "input": SiteSpec(3, "clip"),
            "keyframe": feature,
            **{f"{way}_{place}": feature for way in ("backward", "forward") for place in ("warped", "input", "output")},
            "fused": SiteSpec(channels, "clip"),
        }
        self.edvr = WindowFusion(channels, 2 * temporal_padding + 1)
        self.spynet = SPyNet() if flow is None else flow  # the official name, whatever estimates the flow
        self.backward_fusion = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.backward_trunk = ResidualTrunk(channels + 3, channels, blocks, checkpointing)
        self.forward_fusion = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.forward_trunk = ResidualTrunk(2 * channels + 3, channels, blocks, checkpointing)
        self.add_head(channels, scale, reconstruction_channels)

    def forward(self, frames: Tensor, context: Context | None = None) -> Tensor:
        """Enlarge a clip.

        Args:
            frames: (b, t, 3, h, w) in [0, 1].
            context: of this pass; `context.flows` is set, those of the padded frames.

        Returns:
            (b, t, 3, s h, s w), not clamped.
        """
        context = Context(frames) if context is None else context
        clip = context.refine("input", context.pad(self.multiple, self.padding_mode))
        b, t, _, h, w = clip.shape
        context.flows = flows = neighbour_flows(self.spynet, clip)
        fused = context.refine("fused", self._fused(clip, flows, context))
        enlarged = in_chunks(self.on_frames, fused.flatten(0, 1), clip.flatten(0, 1), pixels=h * w * self.scale**2)
        h, w = frames.shape[-2:]
        return enlarged.unflatten(0, (b, t))[..., : h * self.scale, : w * self.scale]

    def _fused(self, clip: Tensor, flows: Flows, context: Context) -> Tensor:
        """The forward features, (b, t, c, h, w). What made them is free again before the frames are enlarged."""
        refills = self._refills(clip, context)
        backward = self._propagate("backward", [(frame,) for frame in clip.unbind(1)], flows.backward, refills, context)
        seen = list(zip(clip.unbind(1), backward, strict=True))
        return torch.stack(self._propagate("forward", seen, flows.forward, refills, context), 1)

    def _refills(self, clip: Tensor, context: Context) -> dict[int, Tensor]:
        """Keyframe -> its window's fused feature (b, c, h, w), as many windows at once as memory is meant for."""
        b, t, _, h, w = clip.shape
        keyframes = sorted({*range(0, t, self.keyframe_stride), t - 1})
        size = 2 * self.temporal_padding + 1
        indices = [frame for keyframe in keyframes for frame in keyframe_window(keyframe, t, self.temporal_padding)]
        windows = clip[:, indices].unflatten(1, (len(keyframes), size)).flatten(0, 1)
        fused = in_chunks(self.edvr, windows, pixels=size * h * w).unflatten(0, (b, len(keyframes)))
        return {frame: context.refine("keyframe", fused[:, at], frame) for at, frame in enumerate(keyframes)}

    def _propagate(
        self, way: str, seen: Sequence[Sequence[Tensor]], flows: Tensor, refills: Mapping[int, Tensor], context: Context
    ) -> list[Tensor]:
        """The features of one direction, in the order of the frames; `seen` is what it is given of each frame."""
        fusion, trunk = self.get_submodule(f"{way}_fusion"), self.get_submodule(f"{way}_trunk")
        steps, frame = len(seen), seen[0][0]
        feature = frame.new_zeros(len(frame), self.channels, *frame.shape[-2:])
        features: dict[int, Tensor] = {}
        for t in range(steps - 1, -1, -1) if way == "backward" else range(steps):
            if features:
                source, flow = feature, flows[:, t if way == "backward" else t - 1]
                feature = context.refine(f"{way}_warped", warp(source, flow), t, source=source, flow=flow)
            if t in refills:
                refilled = torch.cat((feature, refills[t]), dim=1)
                feature = fusion(refilled.contiguous(memory_format=torch.channels_last))
            feature = trunk(torch.cat((*seen[t], feature), dim=1), partial(context.refine, f"{way}_input", t=t))
            feature = features[t] = context.refine(f"{way}_output", feature, t)
        return [features[t] for t in range(steps)]


def keyframe_window(keyframe: int, count: int, padding: int) -> list[int]:
    """The frames around a keyframe of a clip of `count`, `padding` on either side.

    Beyond the ends stand the frames that the official code puts there: with a padding of 2, a clip continues to the
    left with 3, 4 and to the right with its fourth and its fifth frame from the end. That takes a window's length of
    frames; in a shorter clip, which the official code refuses, frames that do not exist are mirrored back into it.
    """
    last = count - 1
    frames = []
    for frame in range(keyframe - padding, keyframe + padding + 1):
        if frame < 0:
            frame = padding - frame
        elif frame > last:
            frame = 2 * last - padding - frame
        frames.append(last - abs(frame % (2 * last) - last) if last else 0)
    return frames
