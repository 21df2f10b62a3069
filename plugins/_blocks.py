"""What plug-ins and backbones share: the residual block of EDVR and BasicVSR, and backward warping."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.frozen import relu_before


class ResidualBlock(nn.Module):
    """x + conv2(relu(conv1(x))), without normalisation (EDVR, EDSR).

    Weights start Kaiming-normal times 0.1 and biases at zero, as in the official code: a deep trunk starts close to
    the identity.

    Shape:
        x: (b, c, h, w) -> (b, c, h, w)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)
            with torch.no_grad():
                conv.weight.mul_(0.1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        return x + self.conv2(relu_before(self.conv2, self.conv1(x)))


def warp(feature: Tensor, flow: Tensor, padding: str = "zeros") -> Tensor:
    """Sample `feature` where `flow` points: backward warping, bilinear.

    The result at (x, y) is the feature at (x + flow_x, y + flow_y). Positions are computed in float32 at least,
    whatever the dtype of the feature and under autocast: bfloat16 would place a sample only to the nearest pixel.

    Args:
        feature: (n, c, h, w).
        flow: (n, 2, h, w) in pixels, x then y.
        padding: what lies outside, `"zeros"` or `"border"` (the nearest pixel).

    Returns:
        (n, c, h, w) in the feature's dtype.
    """
    h, w = feature.shape[-2:]
    dtype = torch.promote_types(feature.dtype, torch.float32)
    x = torch.arange(w, device=flow.device, dtype=dtype) + flow[:, 0].to(dtype)
    y = torch.arange(h, device=flow.device, dtype=dtype)[:, None] + flow[:, 1].to(dtype)
    # grid_sample counts from -1 to 1 between the centres of the outer pixels; one pixel has no extent to divide by.
    grid = torch.stack((2 * x / max(w - 1, 1) - 1, 2 * y / max(h - 1, 1) - 1), dim=-1)
    sampled = F.grid_sample(feature.to(dtype), grid, mode="bilinear", padding_mode=padding, align_corners=True)
    return sampled.to(feature.dtype)


def lrelu(x: Tensor) -> Tensor:
    """With the slope of EDVR and its kin."""
    return F.leaky_relu(x, 0.1)


def max_and_mean(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, 2 c, h/2, w/2), rounded up: the maximum and the mean of each neighbourhood of 3x3."""
    pooled = (F.max_pool2d(x, 3, stride=2, padding=1), F.avg_pool2d(x, 3, stride=2, padding=1))
    return torch.cat(pooled, dim=1)
