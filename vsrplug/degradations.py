"""How a low-resolution clip is made: `BI`, `BD`, `BDDUF`, `STVUN`, and the MATLAB bicubic `imresize` under them.

A degradation maps hr (..., H, W) to lr (..., H/s, W/s), both RGB in [0, 1] on the 8-bit grid: it stands for "write the
frame as an 8-bit file, shrink the file, write an 8-bit file". It computes in float64 from whole grey levels, so that
float32 and float64 clips give the same bytes, and frame by frame, so that memory does not grow with the clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Border = Literal["symmetric", "reflect", "replicate"]


def imresize(clip: Tensor, scale_factor: float) -> Tensor:
    """MATLAB's bicubic `imresize(clip, scale_factor)`, on real numbers: neither rounded nor clipped.

    Cubic kernel with a = -0.5 (Keys 1981), stretched by 1 / scale_factor when shrinking, half-sample symmetric border.
    `F.interpolate` has this kernel but another border, hence the padding. Computed in float64: in float32 its sampling
    positions drift by 0.03 grey levels over a wide frame at x3.

    Args:
        clip: (..., h, w), any values, any size.
        scale_factor: a ratio of whole numbers, such as 4, 0.25 or 1 / 3.

    Returns:
        (..., ceil(scale_factor h), ceil(scale_factor w)), dtype of `clip`.

    Raises:
        ValueError: the scale factor is not positive, or not a ratio of whole numbers, the lower one 1000 at most.
    """
    ratio = Fraction(scale_factor).limit_denominator(1000)
    if ratio <= 0 or not math.isclose(ratio, scale_factor, rel_tol=1e-9):
        raise ValueError(
            f"scale_factor must be a positive ratio of whole numbers (such as 4, 0.25, 1 / 3), got {scale_factor}"
        )
    height, width = (math.ceil(size * ratio) for size in clip.shape[-2:])
    step = ratio.denominator  # only a padding by whole steps moves the sampling grid by whole samples
    margin = step * math.ceil(
        (3 / min(ratio, Fraction(1)) + 1) / step
    )  # the kernel reaches 2 / ratio, the last centre 1 / ratio
    planes = clip.reshape(1, -1, *clip.shape[-2:]).double()
    planes = _extend(_extend(planes, -2, margin, margin, "symmetric"), -1, margin, margin, "symmetric")
    resized = F.interpolate(planes, scale_factor=float(ratio), mode="bicubic", antialias=True)
    first = int(margin * ratio)
    resized = resized[..., first : first + height, first : first + width]
    return resized.to(clip.dtype).reshape(*clip.shape[:-2], height, width)


def crop_to_multiple(hr: Tensor, scale: int) -> Tensor:
    """The top left part of hr (..., H, W) whose sizes divide by `scale`: what a data set does before it degrades.

    Raises:
        ValueError: nothing would be left.
    """
    height, width = (size - size % scale for size in hr.shape[-2:])
    if not (height and width):
        raise ValueError(f"a frame of {_size(hr)} is smaller than one low-resolution pixel at scale {scale}")
    return hr[..., :height, :width]


@dataclass(frozen=True)
class BI:
    """Bicubic: MATLAB `imresize(hr, 1 / scale)`, then rounded to 8 bits.

    Shape:
        hr: (..., H, W) in [0, 1] on the 8-bit grid -> (..., H / s, W / s).

    Raises:
        ValueError: the size does not divide by the scale, or the scale is not positive.
        TypeError: hr is not a float tensor.
    """

    scale: int = 4

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def __call__(self, hr: Tensor) -> Tensor:
        """Make lr (..., H / s, W / s) of hr (..., H, W)."""
        return _on_8_bits(hr, self.scale, lambda frame: imresize(frame, 1 / self.scale))


@dataclass(frozen=True)
class BD:
    """Blur and down-sample as BasicVSR does (`BD_degradation.m`): its own grid is the one of `imresize`.

    An even 12 x 12 Gaussian, sigma 1.6, replicate border, around samples at 0-based s / 2 - 1, + s, + 2 s ...: taps at
    -5 to +6, so the centre of mass lies half a pixel on, in the middle of the s x s block. Not the data of `BDDUF`.

    Shape:
        hr: (..., H, W) in [0, 1] on the 8-bit grid -> (..., H / s, W / s).

    Raises:
        ValueError: the size does not divide by the scale, or the scale is odd (an even kernel has no centre there).
        TypeError: hr is not a float tensor.
    """

    scale: int = 4

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if self.scale % 2:
            raise ValueError(
                f"BD is defined for even scales (its kernel is 12 x 12), got scale={self.scale}; use BI or BDDUF"
            )

    def __call__(self, hr: Tensor) -> Tensor:
        """Make lr (..., H / s, W / s) of hr (..., H, W)."""
        taps = _gaussian(torch.arange(12) - 5.5, 1.6)
        first = self.scale // 2 - 1 - 5
        return _on_8_bits(hr, self.scale, lambda frame: _blur_and_sample(frame, taps, first, self.scale, "replicate"))


@dataclass(frozen=True)
class BDDUF:
    """Blur and down-sample as DUF and PFNL do: 13 x 13 Gaussian, sigma 1.6, reflect border, every s-th pixel from 0.

    At x4 its grid lies 1.5 HR pixels off the one of `BI` and `BD`: an x4 bicubic of it is shifted, by convention.

    Shape:
        hr: (..., H, W) in [0, 1] on the 8-bit grid -> (..., H / s, W / s).

    Raises:
        ValueError: the size does not divide by the scale, or the scale is not positive.
        TypeError: hr is not a float tensor.
    """

    scale: int = 4

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def __call__(self, hr: Tensor) -> Tensor:
        """Make lr (..., H / s, W / s) of hr (..., H, W)."""
        return _on_8_bits(hr, self.scale, lambda frame: _blur_from_zero(frame, 1.6, self.scale))


@dataclass(frozen=True)
class STVUN:
    """The degradation of STVUN (Kang et al. 2020, section 3.3): a Gaussian, then every s-th pixel from 0.

    The paper names no sigma; the authors' demo takes DUF's kernel with sigma 0.4 s, so that at x4 this equals `BDDUF`
    and at other scales it does not.

    Shape:
        hr: (..., H, W) in [0, 1] on the 8-bit grid -> (..., H / s, W / s).

    Raises:
        ValueError: the size does not divide by the scale, or the scale is not positive.
        TypeError: hr is not a float tensor.
    """

    scale: int = 4

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def __call__(self, hr: Tensor) -> Tensor:
        """Make lr (..., H / s, W / s) of hr (..., H, W)."""
        return _on_8_bits(hr, self.scale, lambda frame: _blur_from_zero(frame, 0.4 * self.scale, self.scale))


def _on_8_bits(hr: Tensor, scale: int, shrink: Callable[[Tensor], Tensor]) -> Tensor:
    """`shrink` each frame as float64 grey levels 0 to 255, round to whole ones, clip; back in [0, 1]."""
    if not hr.is_floating_point():
        raise TypeError(f"hr must be a float tensor in [0, 1], got {hr.dtype}; divide 8-bit frames by 255")
    if hr.shape[-2] % scale or hr.shape[-1] % scale:
        raise ValueError(
            f"a frame of {_size(hr)} does not divide by the scale {scale}; crop it first: crop_to_multiple(hr, {scale})"
        )
    frames = hr.reshape(-1, *hr.shape[-3:]) if hr.ndim > 3 else hr[None]
    lr = torch.stack([_half_up(shrink(_half_up(frame.double() * 255))).clamp(0, 255) for frame in frames])
    return (lr.to(hr.dtype) / 255).reshape(*hr.shape[:-2], *lr.shape[-2:])


def _half_up(levels: Tensor) -> Tensor:
    """Round as MATLAB does for positive numbers; `torch.round` takes halves to the even neighbour."""
    return torch.floor(levels + 0.5)


def _blur_from_zero(frame: Tensor, sigma: float, scale: int) -> Tensor:
    """DUF's kernel is SciPy's `gaussian_filter` of a point: cut off at 4 sigma, 13 taps for 1.6."""
    radius = int(4 * sigma + 0.5)
    return _blur_and_sample(frame, _gaussian(torch.arange(-radius, radius + 1), sigma), -radius, scale, "reflect")


def _blur_and_sample(frame: Tensor, taps: Tensor, first: int, scale: int, border: Border) -> Tensor:
    """Separable filter of (..., H, W), the first tap of output i at `first + scale * i`; -> (..., H / s, W / s)."""
    planes = frame.reshape(-1, 1, *frame.shape[-2:])
    after = first + len(taps) - scale  # how far the taps of the last output reach beyond the frame
    planes = _extend(_extend(planes, -2, -first, after, border), -1, -first, after, border)
    taps = taps.to(planes)
    planes = F.conv2d(planes, taps.view(1, 1, -1, 1), stride=(scale, 1))
    planes = F.conv2d(planes, taps.view(1, 1, 1, -1), stride=(1, scale))
    return planes.reshape(*frame.shape[:-2], *planes.shape[-2:])


def _gaussian(positions: Tensor, sigma: float) -> Tensor:
    """Weights (n,) in float64 of sum 1."""
    weights = torch.exp(-positions.double().square() / (2 * sigma**2))
    return weights / weights.sum()


def _extend(clip: Tensor, dim: int, before: int, after: int, border: Border) -> Tensor:
    """Pad one dimension, by any amount; `F.pad` lacks `symmetric`, and reflects less than one frame. Negative crops."""
    size = clip.shape[dim]
    position = torch.arange(-before, size + after, device=clip.device)
    if border == "replicate":
        source = position.clamp(0, size - 1)
    elif border == "symmetric":  # c b a | a b c | c b a
        source = position % (2 * size)
        source = torch.minimum(source, 2 * size - 1 - source)
    else:  # c b | a b c | b a
        period = max(2 * size - 2, 1)
        source = position % period
        source = torch.minimum(source, period - source)
    return clip.index_select(dim, source)


def _check_scale(scale: int) -> None:
    if scale < 1:
        raise ValueError(f"scale is a whole number of at least 1, got {scale}")


def _size(clip: Tensor) -> str:
    return f"{clip.shape[-1]} x {clip.shape[-2]} (w x h)"
