"""`BasicVSRPlusPlus`: second-order grid propagation with flow-guided deformable alignment. Chan et al., CVPR 2022
(paper 002)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context, Flows
from vsrplug.site import SiteSpec

from ..plugins._blocks import warp
from ..plugins.flow_guided_deformable_alignment import FlowGuidedDeformableAlignment
from ..plugins.second_order_propagation import compose_flows
from ._blocks import ResidualTrunk, in_chunks
from ._flows import neighbour_flows
from ._reconstruction import PixelShuffleHead
from .basicvsr import BasicVSR
from .spynet import SPyNet

Direction = Literal["backward", "forward"]
Alignment = Literal["second_order", "first_order", "flow"]


class BasicVSRPlusPlus(PixelShuffleHead):
    """A clip, any number of frames, to the clip enlarged, or, with `restoration`, to one of the same size.

    Features of single frames are propagated by one branch after another, back and forth; each branch sees what the
    ones before it made of a frame, and aligns its own features of the two frames it comes from.

    Sites: `input` (clip), the frames, which feed flow, features and skip alike; `features` (clip), of single frames;
    `{backward,forward}_{1,2,...}_output` (frame, with t), what a branch propagates on and hands to the next, named by
    direction and how many there were; `fused` (clip), of all branches, before the up-sampling. With `restoration`
    all but `input` have the stride `scale`.

    Args:
        channels: width of the features.
        blocks: residual blocks of each branch.
        max_residue: bound of what is learned of the offsets beside the flow, in pixels.
        restoration: frames have the size of the result (deblurring, denoising, compression): strided convolutions
            reduce them by `scale`, 2 or 4 (more is faster, less is better), and the network's own `scale` is 1.
        scale: 1, 2, 3 or 4; official weights have 4.
        propagation: direction of each branch.
        alignment: "second_order", deformable alignment of the features of one and of two steps before; "first_order",
            of one step before; "flow", that one warped, as in BasicVSR.
        deform_groups: deformable groups of the alignment; official weights have 16.
        flow: any module `(reference, supporting) -> flow (b, 2, h, w)` in pixels, x then y; None makes a `SPyNet`.
        reconstruction_channels: width at the high resolution.
        checkpointing: as in `BasicVSR`.

    Raises:
        ValueError: arguments that it cannot build or that do not go together.

    Source: Chan et al., "BasicVSR++: Improving Video Super-Resolution with Enhanced Propagation and Alignment", CVPR
    2022, section 3. Layout of weights: BasicSR, which is mmagic's but for the names in SPyNet and of the up-sampling.
    """

    window: ClassVar[int | None] = None
    official_names: ClassVar[tuple[tuple[str, str], ...]] = BasicVSR.official_names

    def __init__(
        self,
        channels: int = 64,
        blocks: int = 7,
        max_residue: float = 10.0,
        restoration: bool = False,
        scale: int = 4,
        propagation: Sequence[Direction] = ("backward", "forward", "backward", "forward"),
        alignment: Alignment = "second_order",
        deform_groups: int = 16,
        flow: nn.Module | None = None,
        reconstruction_channels: int = 64,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if restoration and scale not in (2, 4):
            raise ValueError(f"restoration=True reduces the frames by scale, which is 2 or 4 then, got {scale}")
        if not propagation or not set(propagation) <= set(get_args(Direction)):
            raise ValueError(
                f"propagation is a sequence of directions, 'backward' or 'forward' for each branch, got {propagation!r}"
            )
        if alignment not in get_args(Alignment):
            raise ValueError(f"alignment is {alignment!r}; expected one of {', '.join(map(repr, get_args(Alignment)))}")
        self.channels = channels
        self.scale = 1 if restoration else scale
        self.multiple = self.stride = scale if restoration else 1
        self.alignment: Alignment = alignment
        branches = [f"{way}_{[*propagation[:at], way].count(way)}" for at, way in enumerate(propagation)]
        self.sites = {
            "input": SiteSpec(3, "clip"),
            "features": SiteSpec(channels, "clip", self.stride),
            **{f"{branch}_output": SiteSpec(channels, "frame", self.stride) for branch in branches},
            "fused": SiteSpec(channels, "clip", self.stride),
        }
        self.spynet = SPyNet() if flow is None else flow  # the official name, whatever estimates the flow
        self.feat_extract = _extraction(channels, self.stride, checkpointing)
        aligned = {} if alignment == "flow" else dict.fromkeys(branches, 2 if alignment == "second_order" else 1)
        self.deform_align = nn.ModuleDict(
            {
                branch: FlowGuidedDeformableAlignment(channels, sources, deform_groups, max_residual=max_residue)
                for branch, sources in aligned.items()
            }
        )
        self.backbone = nn.ModuleDict(
            {
                branch: ResidualTrunk((2 + at) * channels, channels, blocks, checkpointing)
                for at, branch in enumerate(branches)
            }
        )
        self.reconstruction = ResidualTrunk((1 + len(branches)) * channels, channels, 5, checkpointing)
        self.add_head(channels, scale, reconstruction_channels)

    def forward(self, frames: Tensor, context: Context | None = None) -> Tensor:
        """Enlarge or restore a clip.

        Args:
            frames: (b, t, 3, h, w) in [0, 1].
            context: of this pass; `context.flows` is set, those of the padded frames.

        Returns:
            (b, t, 3, s h, s w), not clamped.
        """
        context = Context(frames) if context is None else context
        clip = context.refine("input", context.pad(self.multiple))
        h, w = clip.shape[-2:]
        fused = context.refine("fused", self._fused(clip, context))
        pixels = h * w * self.scale**2
        restored = in_chunks(self.on_frames, fused.flatten(0, 1), clip.flatten(0, 1), pixels=pixels)
        h, w = frames.shape[-2:]
        return restored.unflatten(0, clip.shape[:2])[..., : h * self.scale, : w * self.scale]

    def _fused(self, clip: Tensor, context: Context) -> Tensor:
        """All branches, (b, t, c, h, w). What they were made of is free again before the frames are enlarged."""
        b, t, _, h, w = clip.shape
        flows = self._flows(clip, context)
        features = in_chunks(self.feat_extract, clip.flatten(0, 1), pixels=h * w).unflatten(0, (b, t))
        known = [context.refine("features", features)]
        for branch in self.backbone:
            known.append(self._propagate(branch, known, flows, context))
        merged = in_chunks(self._merge, *(made.flatten(0, 1) for made in known), pixels=h * w // self.stride**2)
        return merged.unflatten(0, (b, t))

    def _flows(self, clip: Tensor, context: Context) -> Flows:
        """Flows in pixels of the features; the context is given those in pixels of the frames."""
        if self.stride == 1:
            context.flows = neighbour_flows(self.spynet, clip)
            return context.flows
        b, t = clip.shape[:2]
        reduced = F.interpolate(clip.flatten(0, 1), scale_factor=1 / self.stride, mode="bicubic", align_corners=False)
        flows = neighbour_flows(self.spynet, reduced.unflatten(0, (b, t)))
        enlarged = (
            F.interpolate(flow.flatten(0, 1), scale_factor=self.stride, mode="bilinear", align_corners=False)
            for flow in flows
        )
        context.flows = Flows(*(self.stride * flow.unflatten(0, (b, t - 1)) for flow in enlarged))
        return flows

    def _propagate(self, branch: str, known: Sequence[Tensor], flows: Flows, context: Context) -> Tensor:
        """The features of one branch, (b, t, c, h, w), given those of single frames and of the branches before."""
        way, back = ("backward", 1) if branch.startswith("backward") else ("forward", -1)
        b, steps, c, h, w = known[0].shape
        feature = known[0].new_zeros(b, c, h, w)
        done: dict[int, Tensor] = {}
        for t in range(steps - 1, -1, -1) if way == "backward" else range(steps):
            if done:
                feature = self._align(branch, t, back, done, getattr(flows, way), known[0][:, t])
            seen = [made[:, t] for made in known]
            feature = feature + self.backbone[branch](torch.cat((*seen, feature), dim=1))
            feature = done[t] = context.refine(f"{branch}_output", feature, t)
        return torch.stack([done[t] for t in range(steps)], dim=1)

    def _align(
        self, branch: str, t: int, back: int, done: dict[int, Tensor], flows: Tensor, reference: Tensor
    ) -> Tensor:
        """What the branch has `done` of the frames it comes from, aligned to frame t, (b, c, h, w)."""
        near = t if back > 0 else t - 1  # backward flows live on the earlier frame of two, forward flows on the later
        source, flow = done[t + back], flows[:, near]
        if self.alignment == "flow":
            return warp(source, flow)
        sources, along = [source], [flow]
        if self.alignment == "second_order":  # at the second step of a branch there is nothing two steps before
            first = t + 2 * back not in done
            sources.append(torch.zeros_like(source) if first else done[t + 2 * back])
            along.append(torch.zeros_like(flow) if first else compose_flows(flow, flows[:, near + back]))
        return self.deform_align[branch](torch.stack(sources, dim=1), torch.stack(along, dim=1), reference)

    def _merge(self, *features: Tensor) -> Tensor:
        return self.reconstruction(torch.cat(features, dim=1))


def _extraction(channels: int, reduction: int, checkpointing: bool) -> nn.Module:
    """Frames (n, 3, h, w) -> features (n, c, h / reduction, w / reduction)."""
    if reduction == 1:
        return ResidualTrunk(3, channels, 5, checkpointing)
    layers: list[nn.Module] = []
    for inputs in (3, channels)[: reduction // 2]:
        layers += [nn.Conv2d(inputs, channels, 3, stride=2, padding=1), nn.LeakyReLU(0.1, inplace=True)]
    return nn.Sequential(*layers, ResidualTrunk(channels, channels, 5, checkpointing))
