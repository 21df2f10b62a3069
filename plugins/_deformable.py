"""Modulated deformable convolution of 3x3 kernels (DCNv2) without a compiled extension, and the official pack."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = 9  # of a 3x3 kernel
CPU_SAMPLES, DEVICE_SAMPLES = 2**22, 2**27  # gathered at once: 16 MiB, near what a CPU caches, and 512 MiB elsewhere


def deformable_convolution(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """3x3 convolution, stride 1, padding 1, whose kernel points are moved and weighted at every position.

    Equals `torchvision.ops.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)`, samples beyond the border
    being zero, and takes that function's layouts. Each deformable group is sampled by one `grid_sample` and everything
    is summed in one matrix product: on CPU about 3 times as fast, 6 with the backward pass
    (`benchmarks/deformable.py`). Bands of rows, for large frames, keep the memory bounded. Positions and samples are at
    least float32 whatever the input, since a bfloat16 position has no fraction left beyond 128 pixels.

    Args:
        x: (b, c, h, w).
        offset: (b, 2 * 9 * groups, h, w) in pixels; for each deformable group and each kernel point (row by row), the
            vertical offset and then the horizontal one.
        mask: (b, 9 * groups, h, w), weight of each kernel point.
        weight: (o, c, 3, 3).
        bias: (o,).

    Returns:
        (b, o, h, w).

    Raises:
        ValueError: the shapes of `offset`, `mask` and `weight` do not belong together.

    Source: Zhu et al., "Deformable ConvNets v2", CVPR 2019, eq. 1.
    """
    b, c, h, w = x.shape
    groups = mask.shape[1] // POINTS
    fitting = offset.shape == (b, 2 * POINTS * groups, h, w) and mask.shape == (b, POINTS * groups, h, w)
    if not fitting or groups == 0 or c % groups or weight.shape[1:] != (c, 3, 3):
        raise ValueError(
            f"deformable convolution of {(b, c, h, w)}: offset must be (b, 18 g, h, w), mask (b, 9 g, h, w) and weight "
            f"(o, c, 3, 3), where g divides c; got {tuple(offset.shape)}, {tuple(mask.shape)} and {tuple(weight.shape)}"
        )
    precision = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(precision).reshape(b * groups, c // groups, h, w)
    offset = offset.reshape(b * groups, POINTS, 2, h, w)
    mask = mask.reshape(b * groups, 1, POINTS, h, w)
    kernel = weight.flatten(1).t()
    budget = CPU_SAMPLES if x.device.type == "cpu" else DEVICE_SAMPLES
    rows = max(1, budget // (b * c * POINTS * w))
    pieces = []
    for top in range(0, h, rows):
        band = slice(top, top + rows)
        grid = _sampling_grid(offset[..., band, :].to(precision), top, h)
        samples = F.grid_sample(grouped, grid, align_corners=False).unflatten(2, (POINTS, -1))
        samples = samples * mask[..., band, :].to(precision)
        columns = samples.reshape(b, c * POINTS, -1).to(weight.dtype)
        pieces.append(columns.transpose(1, 2) @ kernel)  # (b, rows w, o): the convolutions after it like channels last
    out = torch.cat(pieces, dim=1).view(b, h, w, -1).permute(0, 3, 1, 2)
    return out if bias is None else out + bias.to(out.dtype)[:, None, None]


def _sampling_grid(offset: Tensor, top: int, height: int) -> Tensor:
    """Offsets (n, 9, 2, rows, w) in pixels, y then x, of the rows from `top` on, of `height` in all -> the grid that
    `grid_sample` reads, (n, 9 rows, w, 2), x then y in [-1, 1].

    Pixel p of n is (2 p + 1) / n - 1: the convention of `align_corners=False`, the only one that allows one pixel.
    """
    n, _, _, rows, w = offset.shape
    step = torch.arange(-1, 2, dtype=offset.dtype, device=offset.device)
    y = (
        torch.arange(top, top + rows, dtype=offset.dtype, device=offset.device)[:, None]
        + step.repeat_interleave(3)[:, None, None]
    )
    x = torch.arange(w, dtype=offset.dtype, device=offset.device) + step.repeat(3)[:, None, None]
    grid_y = torch.add((2 * y + 1) / height - 1, offset[:, :, 0], alpha=2 / height)
    grid_x = torch.add((2 * x + 1) / w - 1, offset[:, :, 1], alpha=2 / w)
    return torch.stack((grid_x, grid_y), dim=-1).view(n, POINTS * rows, w, 2)


class DeformablePack(nn.Module):
    """Deformable convolution that predicts its offsets and masks from a feature: DCNv2Pack of the official code.

    At the start `conv_offset` is zero: no offset, every mask 1/2.

    Args:
        channels: width `c` of the input and of the feature that the offsets come from.
        out_channels: width `o` of the output.
        groups: deformable groups, each `channels / groups` wide, with offsets and masks of its own.

    Raises:
        ValueError: `groups` does not divide `channels`.

    Shape:
        x, offset_feature: (b, c, h, w) -> (b, o, h, w).
    """

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(
                f"{groups} deformable groups do not divide {channels} channels; try {math.gcd(channels, groups)}"
            )
        self.groups = groups
        bound = 1 / math.sqrt(channels * POINTS)
        self.weight = nn.Parameter(torch.empty(out_channels, channels, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.conv_offset = nn.Conv2d(channels, 3 * POINTS * groups, 3, padding=1)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, offset_feature: Tensor) -> Tensor:
        """Convolve `x` at the places that `offset_feature` tells."""
        moved = self.conv_offset(offset_feature)
        offset, mask = moved.split((2 * POINTS * self.groups, POINTS * self.groups), dim=1)
        return deformable_convolution(x, offset, mask.sigmoid(), self.weight, self.bias)
