"""`Real`: clips degraded as videos of unknown history are, for networks that have to cope with those.

Blur, resizing, noise, JPEG and video compression, twice over and of random strength: Real-ESRGAN's second-order model
(Wang et al. 2021, section 3) as RealBasicVSR trains with it (Chan et al. 2022; paper 002). In a video the strength of
each changes little from frame to frame: every parameter walks at random (002, stochastic degradation scheme). Ranges
and steps are those of the authors' training, mmagic's `realbasicvsr_wogan-c64b20-2x30x8_8xb2-lr1e-4-300k_reds.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import av
import torch
from torch import Tensor

from vsrplug._corruption import (
    Mode,
    blur,
    blur_kernel,
    compress_video,
    content_generator,
    gaussian_noise,
    jpeg,
    poisson_noise,
    resize,
    sharpen,
)
from vsrplug._degradation_order import (
    FIRST,
    MODES,
    SECOND,
    SIZES,
    Dice,
    Order,
    Parameters,
    Walk,
    check_probabilities,
    check_walk,
    freeze,
)

__all__ = ["Order", "Parameters", "Real", "Walk", "sharpen"]


@dataclass(frozen=True)
class Reduction:
    """What was drawn for the last resizing, to the final size, and for the sinc filter after it."""

    before_codec: bool
    mode: Mode
    sinc: bool
    size: int
    omega: list[float]


@dataclass(frozen=True)
class Real:
    """Second-order random degradation of clips, on 8 bits.

    `first`, then video compression; `second`, then video compression, and before or after that, either being equally
    likely, the reduction to the final size with a sinc filter.

    `degrade(hr, generator)` is a function of the frames and the generator. Called without one, as evaluation does,
    `Real` seeds by the content: the same clip always gives the same result. Other builds of FFmpeg and other
    processors may give other grey levels.

    What it is given, it degrades as a whole. So a training window is no crop of the degraded clip: the grids of its
    resizing, the blocks of its codecs and the bits spent on it are its own, those of the margin around it included.

    Not as in the configuration: the bits of video compression go with the area, so that a frame of any size is spoiled
    alike; beta walks, where mmagic draws it anew for each frame; Poisson noise is Real-ESRGAN's, on values in [0, 1],
    where mmagic has it on [0, 255] (its predecessor, with which the authors trained, did not), 16 times weaker.

    Args:
        scale: `s`.
        first: the first round.
        second: the second, which is milder.
        codecs: encoders of PyAV's FFmpeg, equally likely.
        bits_per_pixel: of video compression, for each pixel of hr; 0.153 to 1.53 are 1e4 to 1e5 bits for 256 x 256.
        sinc: probability of the last filter.
        omega: its cut-off frequency, in radians a pixel.
        walk: False keeps every parameter of a clip at its first value.
        sharpen: sharpen hr beforehand, as in RealBasicVSR's training, whose target is sharpened alike.

    Shape:
        hr: (t, 3, H, W) in [0, 1] -> (t, 3, H / s, W / s), on the 8-bit grid, dtype and device of hr. Computed on the
            CPU.

    Raises:
        ValueError: numbers out of range, a codec that PyAV does not have; frames of another shape, or whose size does
            not divide by the scale.
        TypeError: hr is not a float tensor.
    """

    scale: int = 4
    first: Order = FIRST
    second: Order = SECOND
    codecs: Sequence[str] = ("libx264", "h264", "mpeg4")
    bits_per_pixel: tuple[float, float] = (0.153, 1.53)
    sinc: float = 0.8
    omega: Walk = (1.0472, 3.1416, 0.0628)
    walk: bool = True
    sharpen: bool = False

    def __post_init__(self) -> None:
        freeze(self)
        if self.scale < 1:
            raise ValueError(f"scale is a whole number of at least 1, got {self.scale}")
        check_walk("omega", self.omega, 0.01)
        check_probabilities(self, "sinc")
        if len(self.bits_per_pixel) != 2 or not 0 < self.bits_per_pixel[0] <= self.bits_per_pixel[1]:
            raise ValueError(f"bits_per_pixel={self.bits_per_pixel}: expected the lowest, above 0, and the highest")
        for codec in self.codecs:
            if not _encodes(codec):
                raise ValueError(
                    f"codecs: this PyAV's FFmpeg has no video encoder {codec!r}; try libx264, mpeg4 or mpeg2video"
                )
        if not self.codecs:
            raise ValueError("codecs: name one encoder or more, such as mpeg4")

    def __call__(self, hr: Tensor) -> Tensor:
        """Degrade a clip, always in the same way."""
        self._check(hr)
        return self.degrade(hr, content_generator(hr))

    def degrade(self, hr: Tensor, generator: torch.Generator) -> Tensor:
        """Degrade a clip (t, 3, H, W) -> (t, 3, H / s, W / s) as the generator says."""
        self._check(hr)
        first, second, last = self.draw(len(hr), generator)
        height, width = hr.shape[-2:]
        clip = (sharpen(frame) if self.sharpen else frame for frame in hr.float().cpu())
        frames = [_spoil(frame, first, i, generator) for i, frame in enumerate(clip)]
        frames = compress_video(_alike(frames), first.codec, first.bits_per_pixel * height * width)
        frames = _alike([_spoil(_in_unit(frame), second, i, generator) for i, frame in enumerate(frames)])
        small = height // self.scale, width // self.scale
        if last.before_codec:
            frames = _reduce(frames, last, small)
        frames = compress_video(frames, second.codec, second.bits_per_pixel * height * width)
        if not last.before_codec:
            frames = _reduce(frames, last, small)
        return (torch.stack(frames).to(hr.dtype) / 255).to(hr.device)

    def draw(self, frames: int, generator: torch.Generator) -> tuple[Parameters, Parameters, Reduction]:
        """What happens to a clip of so many frames in the first round, the second, and at last; not yet the noise."""
        dice = Dice(generator, frames, self.walk)
        first, second = (order.draw(dice, self.codecs, self.bits_per_pixel) for order in (self.first, self.second))
        before, mode, sinc, size = dice.chance(0.5), dice.pick(MODES), dice.chance(self.sinc), dice.pick(SIZES)
        return first, second, Reduction(before, mode, sinc, size, dice.walk(self.omega))

    def _check(self, hr: Tensor) -> None:
        if hr.ndim != 4 or hr.shape[1] != 3 or not len(hr):
            raise ValueError(f"Real degrades clips (t, 3, H, W), t at least 1, got {tuple(hr.shape)}")
        if not hr.is_floating_point():
            raise TypeError(f"hr must be a float tensor in [0, 1], got {hr.dtype}; divide 8-bit frames by 255")
        if hr.shape[-2] % self.scale or hr.shape[-1] % self.scale:
            raise ValueError(
                f"a frame of {hr.shape[-1]} x {hr.shape[-2]} (w x h) does not divide by the scale {self.scale}; crop "
                f"it first: crop_to_multiple(hr, {self.scale})"
            )


def _spoil(frame: Tensor, drawn: Parameters, i: int, generator: torch.Generator) -> Tensor:
    """One round but for the video compression: (3, h, w) in [0, 1] -> (3, h', w') uint8."""
    height, width = frame.shape[-2:]
    if drawn.kernel:
        at = {"angle": drawn.angle[i], "beta": drawn.beta[i], "omega": drawn.omega[i]}
        frame = blur(frame, blur_kernel(drawn.kernel, drawn.size, sigma=drawn.sigma[i], **at))
    even = [2 * max(1, int(size * drawn.factor[i] / 2)) for size in (height, width)]  # as video has it
    frame = resize(frame, (even[0], even[1]), drawn.mode)
    add = gaussian_noise if drawn.noise == "gaussian" else poisson_noise
    return jpeg(_in_bytes(add(frame, drawn.strength[i], drawn.grey, generator)), drawn.quality[i])


def _reduce(frames: list[Tensor], drawn: Reduction, size: tuple[int, int]) -> list[Tensor]:
    """(3, h, w) uint8 -> (3, *size) uint8."""
    reduced = (resize(_in_unit(frame), size, drawn.mode) for frame in frames)
    if drawn.sinc:
        kernels = (blur_kernel("sinc", drawn.size, omega=omega) for omega in drawn.omega)
        reduced = (blur(frame, kernel) for frame, kernel in zip(reduced, kernels, strict=True))
    return [_in_bytes(frame) for frame in reduced]


def _alike(frames: list[Tensor]) -> list[Tensor]:
    """All of the size of the first: a video has one."""
    size = frames[0].shape[-2], frames[0].shape[-1]
    return [frames[0], *(_in_bytes(resize(_in_unit(frame), size, "bilinear")) for frame in frames[1:])]


def _in_bytes(frame: Tensor) -> Tensor:
    return (frame * 255).round().clamp(0, 255).to(torch.uint8)


def _in_unit(frame: Tensor) -> Tensor:
    return frame.float() / 255


def _encodes(codec: str) -> bool:
    try:
        return av.Codec(codec, "w").type == "video"
    except av.codec.codec.UnknownCodecError:
        return False
