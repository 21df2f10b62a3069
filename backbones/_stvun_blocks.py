"""What of `STVUN` learns beside its flow: dense encoder and decoder, and the fusions that EFST is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context

from ..plugins._blocks import lrelu
from .pcd_alignment import PCDAlignment, Pyramid
from .tsa_fusion import TSAFusion

LEVELS = ("features_1", "features_2", "features_3", "features")  # by the names of their sites
HIDDEN = 48  # channels before the last layer, at every scale


class DenseBlock(nn.Module):
    """Two convolutions, the second of which sees the input too, each with a LeakyReLU(0.1).

    Shape:
        x: (b, channels, h, w) -> (b, out_channels, h, w)
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(2 * channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) -> (b, out_channels, h, w)."""
        return lrelu(self.conv1(torch.cat((lrelu(self.conv0(x)), x), dim=1)))


class Encoder(nn.Module):
    """A convolution and a chain of dense blocks, which all frames share; every block's output is a level (fig. 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(DenseBlock(channels, channels) for _ in LEVELS)

    def forward(self, clip: Tensor, context: Context) -> list[Tensor]:
        """(b, t, 3, h, w) in [-1, 1] -> the levels e^i, each (b, t, c, h, w)."""
        feature = lrelu(self.first(clip.flatten(0, 1).contiguous(memory_format=torch.channels_last)))
        levels = []
        for site, block in zip(LEVELS, self.blocks, strict=True):
            level = context.refine(site, block(feature).unflatten(0, clip.shape[:2]))
            levels.append(level)
            feature = level.flatten(0, 1)
        return levels


class Decoder(nn.Module):
    """At each level three dense blocks, the inputs of one carried on to the next; from the last level the residual.

    Args:
        channels: width c of the features.
        scale: of the residual, s.
    """

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.levels = nn.ModuleList(
            nn.ModuleList(
                DenseBlock(2 * channels * 2**depth, out)
                for depth, out in enumerate((2 * channels, 4 * channels, channels))
            )
            for _ in LEVELS
        )
        self.merges = nn.ModuleList(nn.Conv2d(2 * channels, channels, 1) for _ in LEVELS[1:])
        self.hidden = nn.Conv2d(channels, HIDDEN, 3, padding=1)
        self.last = nn.Conv2d(HIDDEN, 3 * scale**2, 3, padding=1)

    def forward(self, features: Sequence[Tensor], guides: Sequence[Tensor]) -> list[Tensor]:
        """The decoded features D^i of a frame.

        Args:
            features: of the frame, e^i or m^i, each (b, c, h, w).
            guides: the fused features, or the decoded ones of the centre frame, each (b, c, h, w).

        Returns:
            Of each level (b, c, h, w).
        """
        decoded: list[Tensor] = []
        for number, (feature, guide) in enumerate(zip(features, guides, strict=True)):
            if decoded:
                guide = self.merges[number - 1](torch.cat((decoded[-1], guide), dim=1))
            x = torch.cat((feature, guide), dim=1).contiguous(memory_format=torch.channels_last)
            blocks = [*self.levels[number].children()]
            for block in blocks[:-1]:
                x = torch.cat((x, block(x)), dim=1)
            decoded.append(blocks[-1](x))
        return decoded

    def residual(self, decoded: Tensor) -> Tensor:
        """(b, c, h, w) of the last level -> the residual image, (b, 3, s h, s w), in the range of [-1, 1]."""
        return F.pixel_shuffle(self.last(lrelu(self.hidden(decoded))), self.scale)


class EarlyFusion(nn.Module):
    """One 1x1 convolution over all frames: EFST without its weights (table 3, "w/o EFST").

    Shape:
        features: (b, t, c, h, w) -> (b, c, h, w)
    """

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.early_fusion = nn.Conv2d(frames * channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(b, t, c, h, w) -> (b, c, h, w)."""
        return self.early_fusion(features.flatten(1, 2))


class AlignedFusion(nn.Module):
    """EDVR's pyramid, alignment to the centre frame, and attention (table 3, "w/ A&F"), which the levels share.

    Shape:
        features: (b, t, c, h, w), h and w multiples of 4 -> (b, c, h, w)
    """

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.conv_l2_1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv_l2_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_l3_1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv_l3_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.pcd_align = PCDAlignment(channels, deform_groups=8)
        self.tsa = TSAFusion(channels, frames)

    def forward(self, features: Tensor) -> Tensor:
        """(b, t, c, h, w) -> (b, c, h, w)."""
        clip = features.shape[:2]
        level2 = lrelu(self.conv_l2_2(lrelu(self.conv_l2_1(features.flatten(0, 1)))))
        level3 = lrelu(self.conv_l3_2(lrelu(self.conv_l3_1(level2))))
        pyramid = Pyramid(features, level2.unflatten(0, clip), level3.unflatten(0, clip))
        reference = pyramid.frame(clip[1] // 2)
        aligned = [self.pcd_align(pyramid.frame(t), reference) for t in range(clip[1])]
        return self.tsa(torch.stack(aligned, dim=1))
