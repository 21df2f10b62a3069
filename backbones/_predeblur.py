"""EDVR's pre-deblurring: features of blurred frames, cleaned on a pyramid before they are aligned."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..plugins._blocks import ResidualBlock


class Predeblur(nn.Module):
    """Features of single frames through a pyramid of three levels, as in EDVR's deblurring tracks.

    Args:
        channels: width `c` of the features.
        hr_input: the frames have the size of the result; two strided convolutions reduce them by 4 first.

    Shape:
        frames: (n, 3, h, w), h and w multiples of 4 (of 16 with `hr_input`) -> (n, c, h, w), or (n, c, h/4, w/4).

    Source: Wang et al., "EDVR", CVPRW 2019, section 3.4 and figure 2 (PreDeblur module).
    """

    def __init__(self, channels: int, hr_input: bool = False) -> None:
        super().__init__()

        def halve() -> nn.Conv2d:
            return nn.Conv2d(channels, channels, 3, stride=2, padding=1)

        self.hr_input = hr_input
        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        if hr_input:
            self.stride_conv_hr1 = halve()
            self.stride_conv_hr2 = halve()
        self.stride_conv_l2 = halve()
        self.stride_conv_l3 = halve()
        self.resblock_l3 = ResidualBlock(channels)
        self.resblock_l2_1 = ResidualBlock(channels)
        self.resblock_l2_2 = ResidualBlock(channels)
        self.resblock_l1 = nn.ModuleList(ResidualBlock(channels) for _ in range(5))

    def forward(self, frames: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, c, h, w), or (n, c, h/4, w/4) with `hr_input`."""
        level1 = F.leaky_relu(self.conv_first(frames), 0.1)
        if self.hr_input:
            level1 = F.leaky_relu(self.stride_conv_hr1(level1), 0.1)
            level1 = F.leaky_relu(self.stride_conv_hr2(level1), 0.1)
        level2 = F.leaky_relu(self.stride_conv_l2(level1), 0.1)
        level3 = F.leaky_relu(self.stride_conv_l3(level2), 0.1)
        level2 = self.resblock_l2_1(level2) + enlarge(self.resblock_l3(level3))
        coarse = enlarge(self.resblock_l2_2(level2))
        for block in self.resblock_l1[:2]:
            level1 = block(level1)
        level1 = level1 + coarse
        for block in self.resblock_l1[2:]:
            level1 = block(level1)
        return level1


def enlarge(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, c, 2 h, 2 w), bilinear."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
