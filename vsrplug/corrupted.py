"""Low resolution that something spoils afterwards: `BINoise`, a sensor's noise, and `BICompression`, a video file.

What a network trained for `BI` meets in use, one thing at a time; `vsrplug.real_degradation` has everything at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vsrplug._corruption import compress_video, content_generator
from vsrplug.degradations import BI


@dataclass(frozen=True)
class BINoise:
    """`BI`, then white Gaussian noise, rounded to 8 bits and clipped.

    Training draws the noise anew for each sample; called, it is drawn from the clip's content: the same clip is always
    spoiled in the same way.

    Args:
        scale: `s`.
        sigma: standard deviation of the noise, in grey levels of 255.

    Shape:
        hr: (..., 3, H, W) in [0, 1] on the 8-bit grid -> (..., 3, H / s, W / s).

    Raises:
        ValueError: a negative sigma; scale and sizes as `BI` has it.
        TypeError: hr is not a float tensor.
    """

    scale: int = 4
    sigma: float = 10.0

    def __post_init__(self) -> None:
        BI(self.scale)
        if self.sigma < 0:
            raise ValueError(f"sigma is a standard deviation in grey levels, 0 or more, got {self.sigma}")

    def __call__(self, hr: Tensor) -> Tensor:
        """Make lr (..., 3, H / s, W / s) of hr (..., 3, H, W), always in the same way."""
        return self.degrade(hr, content_generator(hr))

    def degrade(self, hr: Tensor, generator: torch.Generator) -> Tensor:
        """Make lr (..., 3, H / s, W / s) of hr (..., 3, H, W) with the generator's noise."""
        lr = BI(self.scale)(hr)
        noise = torch.randn(lr.shape, generator=generator).to(lr)
        return (lr * 255 + self.sigma * noise).round().clamp(0, 255) / 255


@dataclass(frozen=True)
class BICompression:
    """`BI`, then H.264 (libx264, 4:2:0, 25 frames a second) at a constant rate factor, in memory.

    The clip is coded as a whole, in training as a whole window. 25 is the middle of the three factors of Li et al.,
    "COMISR", ICCV 2021.

    Args:
        scale: `s`.
        crf: constant rate factor, 0 (the best) to 51.

    Shape:
        hr: (t, 3, H, W) in [0, 1] on the 8-bit grid -> (t, 3, H / s, W / s).

    Raises:
        ValueError: a factor outside of 0 to 51, hr is not a clip; scale and sizes as `BI` has it.
        TypeError: hr is not a float tensor.
    """

    scale: int = 4
    crf: int = 25

    def __post_init__(self) -> None:
        BI(self.scale)
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf is H.264's constant rate factor, 0 to 51, got {self.crf}")

    def __call__(self, hr: Tensor) -> Tensor:
        """Make lr (t, 3, H / s, W / s) of hr (t, 3, H, W)."""
        if hr.ndim != 4 or hr.shape[1] != 3 or not len(hr):
            raise ValueError(f"BICompression codes clips (t, 3, H, W), t at least 1, got {tuple(hr.shape)}")
        frames = (BI(self.scale)(hr) * 255).round().to(torch.uint8).cpu()
        coded = compress_video(list(frames), "libx264", crf=self.crf)
        return (torch.stack(coded).to(hr.dtype) / 255).to(hr.device)
