"""TSA fusion of EDVR: aligned features into one, weighted by attention over time and space."""

from __future__ import annotations

from torch import Tensor, nn

from ..plugins._blocks import lrelu, max_and_mean
from ._predeblur import enlarge


class TSAFusion(nn.Module):
    """Temporal and spatial attention: fuse aligned features into one.

    Each frame is weighted by its correlation with the centre frame, position by position; the fused feature is then
    multiplied by, and added to, what a small pyramid makes of all frames.

    Args:
        channels: width `c` of the features.
        frames: number of frames `t`; the one in the middle is the reference.

    Shape:
        aligned: (b, t, c, h, w), h and w multiples of 4 -> (b, c, h, w).

    Source: Wang et al., "EDVR", CVPRW 2019, section 3.3, eq. 5-8.
    """

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.centre = frames // 2
        self.temporal_attn1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.temporal_attn2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.feat_fusion = nn.Conv2d(frames * channels, channels, 1)
        self.spatial_attn1 = nn.Conv2d(frames * channels, channels, 1)
        self.spatial_attn2 = nn.Conv2d(2 * channels, channels, 1)
        self.spatial_attn3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.spatial_attn4 = nn.Conv2d(channels, channels, 1)
        self.spatial_attn5 = nn.Conv2d(channels, channels, 3, padding=1)
        self.spatial_attn_l1 = nn.Conv2d(channels, channels, 1)
        self.spatial_attn_l2 = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.spatial_attn_l3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.spatial_attn_add1 = nn.Conv2d(channels, channels, 1)
        self.spatial_attn_add2 = nn.Conv2d(channels, channels, 1)

    def forward(self, aligned: Tensor) -> Tensor:
        """(b, t, c, h, w) -> (b, c, h, w)."""
        reference = self.temporal_attn1(aligned[:, self.centre])
        embedded = self.temporal_attn2(aligned.flatten(0, 1)).unflatten(0, aligned.shape[:2])
        correlation = (embedded * reference.unsqueeze(1)).sum(dim=2, keepdim=True)
        weighted = (aligned * correlation.sigmoid()).flatten(1, 2)
        fused = lrelu(self.feat_fusion(weighted))

        attention = lrelu(self.spatial_attn2(max_and_mean(lrelu(self.spatial_attn1(weighted)))))
        coarse = lrelu(self.spatial_attn_l2(max_and_mean(lrelu(self.spatial_attn_l1(attention)))))
        coarse = enlarge(lrelu(self.spatial_attn_l3(coarse)))
        attention = lrelu(self.spatial_attn4(lrelu(self.spatial_attn3(attention)) + coarse))
        attention = self.spatial_attn5(enlarge(attention))
        added = self.spatial_attn_add2(lrelu(self.spatial_attn_add1(attention)))
        return fused * attention.sigmoid() * 2 + added  # doubled: a sigmoid starts near 1/2
