"""The reconstruction head that EDVR and the BasicVSR family share: pixel shuffles, then two convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (1, 2, 3, 4)


class PixelShuffleHead(nn.Module):
    """A mixin: `add_head` registers `upconv1`, `upconv2`, `conv_hr` and `conv_last` on the network itself, where the
    official files have them, and `head` runs them.

    Scale 4 shuffles by 2 twice, 2 and 3 shuffle once (no `upconv2`), 1 does not shuffle (no `upconv1` either).
    """

    upconv1: nn.Conv2d
    upconv2: nn.Conv2d
    conv_hr: nn.Conv2d
    conv_last: nn.Conv2d
    shuffles: tuple[int, ...]

    def add_head(self, channels: int, scale: int, width: int = 64) -> None:
        """Register the layers; call it where the official constructor does, since the order of keys follows.

        Args:
            channels: width of the feature that `head` will be given.
            scale: enlargement, 1 to 4.
            width: channels at the high resolution.

        Raises:
            ValueError: a scale that pixel shuffles of 2 and 3 do not give.
        """
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; expected one of {', '.join(map(str, SCALES))}")
        self.shuffles = {1: (), 2: (2,), 3: (3,), 4: (2, 2)}[scale]
        for index, factor in enumerate(self.shuffles, start=1):
            out = width if index == len(self.shuffles) else channels
            self.add_module(f"upconv{index}", nn.Conv2d(channels, out * factor**2, 3, padding=1))
        self.conv_hr = nn.Conv2d(width if self.shuffles else channels, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)

    def head(self, feature: Tensor) -> Tensor:
        """(n, channels, h, w) -> residual of the SR frames, (n, 3, s h, s w)."""
        feature = feature.contiguous(memory_format=torch.channels_last)
        for upconv, factor in zip(("upconv1", "upconv2"), self.shuffles, strict=False):
            shuffled = F.pixel_shuffle(self.get_submodule(upconv)(feature), factor)
            feature = F.leaky_relu(shuffled, 0.1, inplace=True)
        return self.conv_last(F.leaky_relu(self.conv_hr(feature), 0.1, inplace=True))

    def on_frames(self, feature: Tensor, frames: Tensor) -> Tensor:
        """The SR frames: what `head` makes of (n, channels, h, w), added to the frames enlarged to that size."""
        residual = self.head(feature)
        if frames.shape[-2:] != residual.shape[-2:]:
            frames = F.interpolate(frames, size=residual.shape[-2:], mode="bilinear", align_corners=False)
        return residual + frames
