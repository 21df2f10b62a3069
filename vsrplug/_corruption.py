"""What spoils a clip, each with its parameters given: blur kernels, resizing, noise, JPEG and video compression.

`vsrplug.real_degradation` chooses the parameters. Frames are (3, h, w), float32 in [0, 1] or uint8.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.filters import get_gaussian_kernel2d
from PIL import Image
from torch import Tensor

Kernel = Literal[
    "isotropic",
    "anisotropic",
    "generalised_isotropic",
    "generalised_anisotropic",
    "plateau_isotropic",
    "plateau_anisotropic",
    "sinc",
]
Mode = Literal["bilinear", "area", "bicubic"]
Noise = Literal["gaussian", "poisson"]


def blur_kernel(
    kind: Kernel,
    size: int,
    *,
    sigma: tuple[float, float] = (1.0, 1.0),
    angle: float = 0.0,
    beta: float = 1.0,
    omega: float = math.pi,
) -> Tensor:
    """One of Real-ESRGAN's blur kernels, (size, size), of sum 1 (Wang et al. 2021, section 3.2 and 3.3).

    With q = x^T S^-1 x, S having the variances sigma^2 along axes turned by the angle: exp(-q / 2), the Gaussian;
    exp(-q^beta / 2), the generalised Gaussian; 1 / (1 + q^beta), the plateau; and, of the distance r to the centre,
    omega J1(omega r) / (2 pi r), the ideal low-pass filter, which rings.

    Args:
        kind: which.
        size: odd.
        sigma: standard deviations along the first and the second axis, in pixels; isotropic kernels have the first.
        angle: of the first axis against the rows, in radians.
        beta: shape of generalised Gaussians and plateaus.
        omega: cut-off frequency of `"sinc"`, in radians a pixel.
    """
    position = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(position, position, indexing="ij")
    if kind == "sinc":
        r = (x.square() + y.square()).sqrt()
        kernel = omega * torch.special.bessel_j1(omega * r) / (2 * math.pi * r)
        kernel[size // 2, size // 2] = omega**2 / (4 * math.pi)  # the limit at r = 0
    else:
        first, second = sigma if kind.endswith("anisotropic") else (sigma[0], sigma[0])
        along = (math.cos(angle) * x + math.sin(angle) * y) / first
        across = (math.cos(angle) * y - math.sin(angle) * x) / second
        q = along.square() + across.square()
        if kind.startswith("plateau"):
            kernel = 1 / (1 + q**beta)
        else:
            kernel = torch.exp(-0.5 * (q**beta if kind.startswith("generalised") else q))
    return (kernel / kernel.sum()).float()


def blur(frames: Tensor, kernel: Tensor) -> Tensor:
    """Frames (..., h, w) filtered by (k, k), symmetric about its centre, as those of `blur_kernel` are.

    By FFT: for 21 x 21 taps that is several times as fast as the sum. The border is reflected, or, of frames too small
    for that, repeated.
    """
    h, w = frames.shape[-2:]
    margin = kernel.shape[-1] // 2
    border = "reflect" if min(h, w) > margin else "replicate"
    padded = F.pad(frames.reshape(1, -1, h, w), (margin,) * 4, border)
    size = [32 * math.ceil(length / 32) for length in padded.shape[-2:]]  # lengths with large factors are slow
    filtered = torch.fft.irfft2(torch.fft.rfft2(padded, size) * torch.fft.rfft2(kernel, size), size)
    return filtered[..., 2 * margin : 2 * margin + h, 2 * margin : 2 * margin + w].reshape(frames.shape)


def sharpen(clip: Tensor, weight: float = 0.5, threshold: float = 10.0, size: int = 51) -> Tensor:
    """Unsharp masking of (..., 3, H, W) in [0, 1], as Real-ESRGAN and RealBasicVSR sharpen their ground truth.

    What differs from its blurred self by more than `threshold` grey levels, softly bounded, gains `weight` times that
    difference. The Gaussian is `size` wide and has OpenCV's sigma for that: 8 for 51.

    Args:
        clip: RGB in [0, 1], any number of frames.
        weight: how much.
        threshold: in 1/255 of the value range.
        size: of the Gaussian, odd.

    Returns:
        (..., 3, H, W) in [0, 1].
    """
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    kernel = get_gaussian_kernel2d(size, (sigma, sigma), device=clip.device, dtype=clip.dtype)[0]
    difference = clip - blur(clip, kernel)
    share = blur((difference.abs() * 255 > threshold).to(clip.dtype), kernel)
    return clip + share * ((clip + weight * difference).clamp(0, 1) - clip)


def resize(frame: Tensor, size: tuple[int, int], mode: Mode) -> Tensor:
    """(3, h, w) -> (3, *size), without smoothing beforehand: that these alias is what is wanted of them."""
    if frame.shape[-2:] == size:
        return frame
    corners = None if mode == "area" else False
    # Of three planes or less, torch's bilinear results depend on the number of threads in their last bits.
    planes = F.pad(frame, (0, 0, 0, 0, 0, 1))[None]
    return F.interpolate(planes, size, mode=mode, align_corners=corners)[0, :3]


def gaussian_noise(frame: Tensor, sigma: float, grey: bool, generator: torch.Generator) -> Tensor:
    """Add noise of standard deviation `sigma`, in grey levels; the same to all channels where `grey`."""
    noise = torch.randn((1 if grey else 3, *frame.shape[-2:]), generator=generator)
    return frame + noise * (sigma / 255)


def poisson_noise(frame: Tensor, scale: float, grey: bool, generator: torch.Generator) -> Tensor:
    """Add shot noise times `scale`.

    As in Real-ESRGAN, a frame with n different grey levels counts 2^ceil(log2 n) photons at white.
    """
    levels = (frame.clamp(0, 1) * 255).round()
    if grey:
        levels = rgb_to_grayscale(levels).round()
    different = int(torch.bincount(levels.flatten().int(), minlength=256).count_nonzero())
    photons = 2 ** math.ceil(math.log2(different))
    light = levels / 255
    return frame + scale * (torch.poisson(light * photons, generator) / photons - light)


def jpeg(frame: Tensor, quality: int) -> Tensor:
    """(3, h, w) uint8 through JPEG, 4:2:0."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def content_generator(hr: Tensor) -> torch.Generator:
    """A generator seeded by the frames themselves: who degrades a clip twice gets the same clip."""
    levels = (hr.cpu() * 255).round().to(torch.uint8).contiguous()
    digest = hashlib.blake2b(f"{tuple(hr.shape)}".encode() + levels.numpy().tobytes(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def compress_video(
    frames: Sequence[Tensor], codec: str, bits: float | None = None, crf: int | None = None
) -> list[Tensor]:
    """Frames (3, h, w) uint8 of one size through a video codec, in memory.

    Args:
        frames: at least one.
        codec: an encoder of PyAV's FFmpeg, such as `"libx264"`, `"mpeg4"`, `"mpeg2video"`.
        bits: a frame, which the encoder aims at; or
        crf: constant rate factor of libx264, 0 (lossless) to 51, for frames at 25 a second.

    Returns:
        As many frames of that size, uint8.
    """
    height, width = frames[0].shape[-2:]
    encoder = av.CodecContext.create(codec, "w")
    # 4:2:0 has even sizes.
    encoder.height, encoder.width, encoder.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
    # One frame a second for a bit rate: rate control then has time to find its rate within a short clip.
    rate = Fraction(1) if crf is None else Fraction(25)
    encoder.framerate, encoder.time_base = rate, 1 / rate
    encoder.thread_count = 1  # what libx264 makes depends on the number of threads
    options: dict[str, str] = {}
    if encoder.name == "libx264":
        # Its macroblock tree reads beyond its rows: unless the width is a multiple of 128, the same frames gave two
        # results.
        options["x264-params"] = "mbtree=0"
    if crf is not None:
        options["crf"] = str(crf)
    elif bits is not None:
        encoder.bit_rate = max(1000, round(bits))
    encoder.options = options
    packets = []
    for number, frame in enumerate(frames):
        even = F.pad(frame[None].float(), (0, width % 2, 0, height % 2), mode="replicate")[0].byte()
        picture = av.VideoFrame.from_ndarray(even.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
        picture.pts = number
        packets += encoder.encode(picture)
    packets += encoder.encode(None)
    decoder = av.CodecContext.create(av.Codec(codec, "w").canonical_name, "r")
    decoder.thread_count = 1
    pictures = [picture for packet in [*packets, None] for picture in decoder.decode(packet)]
    if len(pictures) != len(frames):
        raise RuntimeError(f"{codec} gave {len(pictures)} frames back for {len(frames)}; take another of the codecs")
    decoded = (torch.from_numpy(picture.to_ndarray(format="rgb24")) for picture in pictures)
    return [picture.permute(2, 0, 1)[:, :height, :width] for picture in decoded]
