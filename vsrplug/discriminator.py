"""`UNetDiscriminator`: tells real frames from restored ones, pixel by pixel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class UNetDiscriminator(nn.Module):
    """Real-ESRGAN's discriminator, with which RealBasicVSR is trained (002): a U-Net under spectral normalisation.

    Wang et al. 2021, section 3.4, figure 6. The first and the last layer are not normalised. On the way up, features
    take the size of those they are added to, so that any frame will do; for multiples of 8 that is the official
    doubling. Each pass in training takes one step of the power iteration.

    Args:
        channels: of the first layer; 64 are 4,376,897 parameters.

    Shape:
        frames: (n, 3, h, w) in [0, 1], 8 x 8 at least -> (n, 1, h, w), logits: positive where a pixel looks real.

    Raises:
        ValueError: no frames (n, 3, h, w), or too small ones.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()

        def normalised(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
            return spectral_norm(nn.Conv2d(inputs, outputs, size, stride, 1, bias=False))

        c = channels
        self.first = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.ModuleList(normalised(n * c, 2 * n * c, size=4, stride=2) for n in (1, 2, 4))
        self.up = nn.ModuleList(normalised(2 * n * c, n * c) for n in (4, 2, 1))
        self.last = nn.ModuleList([normalised(c, c), normalised(c, c)])
        self.logits = nn.Conv2d(c, 1, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (n, 3, h, w) -> logits (n, 1, h, w)."""
        if frames.ndim != 4 or frames.shape[1] != 3 or min(frames.shape[-2:]) < 8:
            raise ValueError(f"the discriminator takes frames (n, 3, h, w) of 8 x 8 or more, got {tuple(frames.shape)}")
        levels = [F.leaky_relu(self.first(frames), 0.2)]
        for down in self.down:
            levels.append(F.leaky_relu(down(levels[-1]), 0.2))
        x = levels.pop()
        for up in self.up:
            skip = levels.pop()
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.leaky_relu(up(x), 0.2) + skip
        for convolution in self.last:
            x = F.leaky_relu(convolution(x), 0.2)
        return self.logits(x)
