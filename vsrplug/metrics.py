"""PSNR, SSIM and LPIPS of single frames, as the tables of the VSR papers count them.

Frames are (t, 3, H, W) RGB, float in [0, 1] or uint8. Every metric clips and rounds to 8 bits first and returns one
value a frame, (t,) float64: how frames are averaged is for the protocol to say. PSNR and SSIM are written out here:
torchmetrics has the same formulas, but its PSNR takes logarithms in float32 and its SSIM seconds a frame in float64.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

Colour = Literal["rgb", "y"]

_LPIPS_SMALLEST = 31  # below it AlexNet's second pooling has nothing left to pool
_SSIM_WINDOW = 11


class LPIPSUnavailableError(RuntimeError):
    """LPIPS cannot be computed here; the message says why and what to do."""


def to_uint8(frames: Tensor) -> Tensor:
    """Frames in [0, 1] as the 8-bit file they would become: clipped, rounded half up. uint8 passes through."""
    if frames.dtype == torch.uint8:
        return frames
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))  # bfloat16 cannot tell 254.5 from 255
    return (wide.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def luma(frames: Tensor) -> Tensor:
    """BT.601 Y in 16 to 235, MATLAB's `rgb2ycbcr`, of (..., 3, H, W): -> (..., 1, H, W) float64, not rounded.

    Rounding it would cost 0.0006 SSIM; the full-range luma of OpenCV and PIL would cost 1.3 dB.
    """
    red, green, blue = to_uint8(frames).double().unbind(-3)
    return (16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255).unsqueeze(-3)


def psnr(sr: Tensor, hr: Tensor, colour: Colour = "rgb", border: int = 0) -> Tensor:
    """Peak signal-to-noise ratio in dB, (t,) float64. The peak is 255, for Y as well; RGB pools the three errors.

    Args:
        sr, hr: (t, 3, H, W), float in [0, 1] or uint8.
        colour: `"rgb"`, or `"y"` for the luma.
        border: pixels left out on each side.

    Returns:
        One value a frame; `inf` where the frames are equal.

    Raises:
        ValueError: unknown colour, shapes that differ or are not frames, a border that leaves nothing.
    """
    _check(sr, hr, colour, border)
    pairs = zip(sr, hr, strict=True)
    errors = [(_planes(a, colour, border) - _planes(b, colour, border)).square().mean() for a, b in pairs]
    return 10 * torch.log10(255**2 / torch.stack(errors))


def ssim(sr: Tensor, hr: Tensor, colour: Colour = "rgb", border: int = 0) -> Tensor:
    """Structural similarity (Wang et al. 2004), (t,) float64: Gaussian window 11 x 11 with sigma 1.5, valid area only.

    K1 = 0.01, K2 = 0.03, range 255, biased variances; RGB is the mean of three.

    Args:
        sr, hr: (t, 3, H, W), float in [0, 1] or uint8.
        colour: `"rgb"`, or `"y"` for the luma.
        border: pixels left out on each side.

    Returns:
        One value a frame.

    Raises:
        ValueError: unknown colour, shapes that differ or are not frames, less than 11 pixels left by the border.
    """
    _check(sr, hr, colour, border, smallest=_SSIM_WINDOW)
    scores = []
    for a, b in zip(sr, hr, strict=True):
        planes = zip(_planes(a, colour, border), _planes(b, colour, border), strict=True)
        scores.append(torch.stack([_ssim_map(x, y).mean() for x, y in planes]).mean())
    return torch.stack(scores)


def lpips(sr: Tensor, hr: Tensor, border: int = 0) -> Tensor:
    """Learned perceptual distance with AlexNet (Zhang et al. 2018), (t,) float64, lower is better. Always on RGB.

    Its weights are read from torch.hub's cache and never downloaded from here.

    Args:
        sr, hr: (t, 3, H, W), float in [0, 1] or uint8, at least 31 x 31.
        border: pixels left out on each side.

    Raises:
        LPIPSUnavailableError: the weights are not on this machine, or the frames are too small for AlexNet.
        ValueError: shapes that differ or are not frames.
    """
    _check(sr, hr, "rgb", border)
    if min(sr.shape[-2:]) - 2 * border < _LPIPS_SMALLEST:
        raise LPIPSUnavailableError(
            f"AlexNet takes frames of {_LPIPS_SMALLEST} x {_LPIPS_SMALLEST} and more, these are {tuple(sr.shape[-2:])} "
            f"less a border of {border}"
        )
    metric = _lpips_metric(Path(torch.hub.get_dir()), sr.device)
    scores = []
    for a, b in zip(sr, hr, strict=True):
        pair = [(_planes(frame, "rgb", border)[None] / 255).float() for frame in (a, b)]
        scores.append(metric(*pair).double().reshape(()))
        metric.reset()
    return torch.stack(scores)


@lru_cache(maxsize=1)
def _lpips_metric(hub: Path, device: torch.device) -> LearnedPerceptualImagePatchSimilarity:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.DEFAULT.url
    file = hub / "checkpoints" / Path(url).name
    if not file.exists():
        raise LPIPSUnavailableError(f"LPIPS needs AlexNet's weights in {file}; download them from {url}")
    return LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="sum", normalize=True).to(device)


def _check(sr: Tensor, hr: Tensor, colour: str, border: int, smallest: int = 1) -> None:
    check_colour_and_border(colour, border)
    if sr.shape != hr.shape or sr.ndim != 4 or sr.shape[1] != 3:
        raise ValueError(f"sr and hr must both be (t, 3, H, W), got {tuple(sr.shape)} and {tuple(hr.shape)}")
    if min(sr.shape[-2:]) - 2 * border < smallest:
        raise ValueError(
            f"frames of {tuple(sr.shape[-2:])} less a border of {border} are too small, "
            f"at least {smallest} x {smallest} pixels must be left"
        )


def check_colour_and_border(colour: str, border: int) -> None:
    """Raise ValueError where a colour or a border is not one that the metrics take."""
    if colour not in get_args(Colour):
        raise ValueError(f"colour must be one of {', '.join(map(repr, get_args(Colour)))}, got {colour!r}")
    if border < 0:
        raise ValueError(f"border is a number of pixels to leave out on each side, 0 or more, got {border}")


def _planes(frame: Tensor, colour: str, border: int) -> Tensor:
    """(3, H, W) -> (1 or 3, H', W') float64 in grey levels."""
    frame = frame[:, border : frame.shape[1] - border, border : frame.shape[2] - border]
    return luma(frame) if colour == "y" else to_uint8(frame).double()


def _ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """(H, W) twice -> (H - 10, W - 10)."""
    mean_x, mean_y, xx, yy, xy = (_blur(plane) for plane in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return luminance * structure


def _blur(plane: Tensor) -> Tensor:
    """The valid part of the 11-tap Gaussian along both dimensions of (H, W).

    As sums of shifted planes: on a CPU that is ten times faster than a float64 convolution.
    """
    half = _SSIM_WINDOW // 2
    weights = torch.exp(-(torch.arange(-half, half + 1, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    for dim in (0, 1):
        size = plane.shape[dim] - 2 * half
        terms = zip((weights / weights.sum()).tolist(), range(_SSIM_WINDOW), strict=True)
        total = torch.zeros_like(plane.narrow(dim, 0, size))
        for weight, start in terms:
            total.add_(plane.narrow(dim, start, size), alpha=weight)
        plane = total
    return plane
