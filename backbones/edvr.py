"""EDVR: a window of frames is aligned by deformable convolutions on a pyramid, fused with attention, reconstructed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.site import SiteSpec

from ..plugins._blocks import ResidualBlock, lrelu
from ._predeblur import Predeblur
from ._reconstruction import PixelShuffleHead
from .pcd_alignment import PCDAlignment, Pyramid
from .tsa_fusion import TSAFusion


class WindowFusion(nn.Module):
    """A window of frames to one feature of its centre: features on a pyramid, alignment to the centre, fusion.

    EDVR reconstructs its frame from it, IconVSR refills its propagation with it.

    Args:
        channels: width `c` of the features.
        frames: length of the window, odd.
        extract_blocks: residual blocks of the feature extraction.
        deform_groups: deformable groups of the alignment; they divide `channels`.
        tsa: fuse by temporal and spatial attention, else by one 1x1 convolution.
        predeblur: extract features by the pre-deblurring pyramid.
        hr_input: that pyramid reduces the frames by 4 first; needs `predeblur`.

    Raises:
        ValueError: arguments that do not go together.

    Shape:
        frames: (b, t, 3, h, w) in [0, 1], t equal to `frames`, h and w multiples of `multiple` -> (b, c, h, w), or
        (b, c, h/4, w/4) with `hr_input`.

    Source: Wang et al., "EDVR", CVPRW 2019, section 3.
    """

    official_names: ClassVar[tuple[tuple[str, str], ...]] = (  # mmagic's key -> ours, below any prefix
        (r"\bpcd_alignment\.", r"pcd_align."),
        (r"\b(offset_conv[123]|feat_conv)\.(l[123])\.conv\.", r"\1.\2."),
        (r"\b(cas_offset_conv[12])\.conv\.", r"\1."),
        (r"\b(feat_fusion|spatial_attn[1234]|spatial_attn_l[123]|spatial_attn_add1)\.conv\.", r"\1."),
        (r"\bfeat_l([23])_conv([12])\.conv\.", r"conv_l\1_\2."),
    )

    def __init__(
        self,
        channels: int = 64,
        frames: int = 5,
        extract_blocks: int = 5,
        deform_groups: int = 8,
        tsa: bool = True,
        predeblur: bool = False,
        hr_input: bool = False,
    ) -> None:
        super().__init__()
        if frames < 1 or frames % 2 == 0:
            raise ValueError(f"frames must be odd, a centre and as many on either side, got {frames}")
        if hr_input and not predeblur:
            raise ValueError("hr_input=True needs predeblur=True: its strided convolutions bring the frames to 1/4")
        self.channels = channels
        self.window = frames
        self.centre = frames // 2
        self.multiple = 16 if hr_input else 4
        if predeblur:
            self.predeblur = Predeblur(channels, hr_input)
            self.conv_1x1 = nn.Conv2d(channels, channels, 1)
        else:
            self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        self.feature_extraction = nn.Sequential(*(ResidualBlock(channels) for _ in range(extract_blocks)))
        self.conv_l2_1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv_l2_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_l3_1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv_l3_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.pcd_align = PCDAlignment(channels, deform_groups)
        self.fusion = TSAFusion(channels, frames) if tsa else nn.Conv2d(frames * channels, channels, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """(b, t, 3, h, w) -> (b, c, h, w)."""
        pyramid = self.extract(frames)
        return self.fuse(self.align(pyramid, pyramid.frame(self.centre)))

    def extract(self, frames: Tensor) -> Pyramid:
        """Features of frames, each on its own: the part of the network that windows of one clip have in common.

        Args:
            frames: (b, t, 3, h, w) in [0, 1], any t, h and w multiples of `multiple`.

        Raises:
            ValueError: a size that is no multiple of `multiple`.
        """
        h, w = frames.shape[-2:]
        if h % self.multiple or w % self.multiple:
            raise ValueError(
                f"extract takes sizes that are multiples of {self.multiple}, got {h} x {w}; pad the clip first with "
                f"Context(frames).pad({self.multiple})"
            )
        return self._coarser(self._level1(frames))

    def align(self, pyramid: Pyramid, reference: Pyramid) -> Tensor:
        """Features of the window and of its reference frame -> all frames aligned to it, (b, t, c, h, w)."""
        # One frame at a time: the sampled columns are nine times a feature, and alignment holds the peak of memory.
        return torch.stack([self.pcd_align(pyramid.frame(t), reference) for t in range(self.window)], dim=1)

    def fuse(self, aligned: Tensor) -> Tensor:
        """(b, t, c, h, w) -> (b, c, h, w)."""
        return self.fusion(aligned if isinstance(self.fusion, TSAFusion) else aligned.flatten(1, 2))

    def _level1(self, frames: Tensor) -> Tensor:
        """(b, t, 3, h, w) -> features of the finest level, (b, t, c, h, w)."""
        flat = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        deblurred = hasattr(self, "predeblur")
        feature = self.conv_1x1(self.predeblur(flat)) if deblurred else lrelu(self.conv_first(flat))
        return self.feature_extraction(feature).unflatten(0, frames.shape[:2])

    def _coarser(self, level1: Tensor) -> Pyramid:
        """Features of the finest level -> all three."""
        level2 = lrelu(self.conv_l2_2(lrelu(self.conv_l2_1(level1.flatten(0, 1)))))
        level3 = lrelu(self.conv_l3_2(lrelu(self.conv_l3_1(level2))))
        return Pyramid(level1, *(level.unflatten(0, level1.shape[:2]) for level in (level2, level3)))


class EDVR(PixelShuffleHead, WindowFusion):
    """Video restoration with enhanced deformable convolutions: one SR frame, the centre's, from a window of LR frames.

    For clips of any length use `SlidingWindow(EDVR())`. Any height and width: frames are padded to `multiple` inside
    and the result is cropped back.

    Sites:
        `input` (clip, 3 channels): the frames; everything, the bilinear base too, sees them refined.
        `features` (clip): level-1 features of all frames; levels 2 and 3 are made from the refined ones.
        `reference` (frame): the centre frame's level-1 feature as the reference of the alignment (paper 003, eq. 8).
            The features that are aligned, the centre's own among them, and levels 2 and 3 stay as they are.
        `aligned` (clip): aligned features. `fused` (frame): after the fusion, given `neighbours`, the aligned features
            (b, t, c, h, w). `reconstructed` (frame): after the residual trunk.
        Frame sites are given the time step of the centre frame.

    Args:
        channels: width of the features, 64 (EDVR-M) or 128 (EDVR-L).
        frames: length of the window, odd.
        extract_blocks: residual blocks of the feature extraction.
        reconstruct_blocks: residual blocks after the fusion, 10 (EDVR-M) or 40 (EDVR-L).
        deform_groups: deformable groups of the alignment; they divide `channels`.
        tsa: fuse by temporal and spatial attention, else by one 1x1 convolution.
        predeblur: extract features by the pre-deblurring pyramid.
        hr_input: frames already have the size of the result (deblurring, compression): `scale` becomes 1 and the sites
            behind the frames have stride 4. Needs `predeblur`, which holds the strided convolutions.
        scale: enlargement, 1 to 4; published weights are for 4.

    Raises:
        ValueError: arguments that do not go together.

    Shape:
        frames: (b, t, 3, h, w) in [0, 1], t equal to `frames` -> (b, 1, 3, s h, s w), not clamped.

    Source: Wang et al., "EDVR", CVPRW 2019; paper 003, section 3.4.1. Layout of weights: BasicSR.
    """

    official_names: ClassVar[tuple[tuple[str, str], ...]] = (  # mmagic's key -> ours
        *WindowFusion.official_names,
        (r"^upsample([12])\.upsample_conv\.", r"upconv\1."),
    )

    def __init__(
        self,
        channels: int = 64,
        frames: int = 5,
        extract_blocks: int = 5,
        reconstruct_blocks: int = 10,
        deform_groups: int = 8,
        tsa: bool = True,
        predeblur: bool = False,
        hr_input: bool = False,
        scale: int = 4,
    ) -> None:
        super().__init__(channels, frames, extract_blocks, deform_groups, tsa, predeblur, hr_input)
        if hr_input and scale != 4:
            raise ValueError(f"hr_input=True reduces by 4 and enlarges by 4; leave scale at 4, got {scale}")
        self.scale = 1 if hr_input else scale
        self.hr_input = hr_input
        stride = 4 if hr_input else 1
        self.sites = {
            "input": SiteSpec(3, "clip"),
            "features": SiteSpec(channels, "clip", stride),
            "reference": SiteSpec(channels, "frame", stride),
            "aligned": SiteSpec(channels, "clip", stride),
            "fused": SiteSpec(channels, "frame", stride),
            "reconstructed": SiteSpec(channels, "frame", stride),
        }
        self.reconstruction = nn.Sequential(*(ResidualBlock(channels) for _ in range(reconstruct_blocks)))
        self.add_head(channels, scale)

    def forward(self, frames: Tensor, context: Context | None = None, extracted: Pyramid | None = None) -> Tensor:
        """Super-resolve the centre frame.

        Args:
            frames: (b, t, 3, h, w) in [0, 1], t equal to `window`.
            context: of this pass; made here where there is none.
            extracted: what `extract` gave for these frames. The sites `input` and `features` are not called then.

        Returns:
            (b, 1, 3, s h, s w), not clamped.

        Raises:
            ValueError: a number of frames other than `window`.
        """
        context = Context(frames) if context is None else context
        if frames.shape[1] != self.window:
            raise ValueError(
                f"this EDVR takes windows of {self.window} frames, got {frames.shape[1]}; for a clip of any length use "
                "SlidingWindow(model)"
            )
        padded = context.pad(self.multiple)
        if extracted is None:
            padded = context.refine("input", padded)
            extracted = self._coarser(context.refine("features", self._level1(padded)))
        reference = extracted.frame(self.centre)
        reference = reference._replace(level1=context.refine("reference", reference.level1, t=self.centre))
        aligned = context.refine("aligned", self.align(extracted, reference))
        fused = context.refine("fused", self.fuse(aligned), t=self.centre, neighbours=aligned)
        trunk = self.reconstruction(fused.contiguous(memory_format=torch.channels_last))
        restored = self.on_frames(context.refine("reconstructed", trunk, t=self.centre), padded[:, self.centre])
        h, w = frames.shape[-2:]
        return restored[..., : h * self.scale, : w * self.scale].unsqueeze(1)
