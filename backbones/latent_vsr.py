"""`LatentVSR`: 3-D convolutions over short sequences of frames, with a place for attention after each. Paper 001.

Wang, Dong, Gong, Chen, "Efficient Video Super-Resolution with Latent Attention", Computer Science 50(11A), 2023. The
authors released no code; docs/backbones.md says what the text leaves open and what is done here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.site import SiteSpec

from ._reconstruction import SCALES


class LatentVSR(nn.Module):
    """A clip, any number of frames, to the clip enlarged; all frames of a sequence at once, without motion.

    A clip is cut into sequences of `length` frames that know nothing of each other (section 6.2). The last is filled
    with black frames, and what is made of those is dropped. Every layer is a 3x3x3 convolution with a zero border and
    LeakyReLU(0.2) (eq. 15), added to what it was given, but for the first, which maps the colours. One convolution in
    the frame and a pixel shuffle enlarge (eq. 18 to 21).

    The network holds no attention: the paper's variants are plug-ins at its sites. As it is, it is the paper's Res16.

    Sites:
        `input` (clip, 3 channels): the frames. `layer1` to `layer{layers}` (clip): after each convolution, F_l of
        eq. 17. They are given the clip's own frames, without those that fill the last sequence, so that frames, masks
        and features go together; a plug-in that works in sequences takes the `length` of the network.

    Args:
        channels: width c of the features.
        layers: number of 3-D convolutions, 16 for Res16, 10 under attention.
        length: frames of a sequence, the paper's 7 (section 6.2; 4 in its table 1).
        scale: enlargement, 1 to 4; the paper's is 4.

    Raises:
        ValueError: a scale it cannot build, no layers, no frames.

    Shape:
        frames: (b, t, 3, h, w) in [0, 1], any t, h and w -> (b, t, 3, s h, s w), not clamped.
    """

    window: ClassVar[int | None] = None
    multiple: ClassVar[int] = 1

    def __init__(self, channels: int = 64, layers: int = 16, length: int = 7, scale: int = 4) -> None:
        super().__init__()
        for name, count in (("layers", layers), ("length", length)):
            if count < 1:
                raise ValueError(f"{name} is a count, 1 or more, got {count}")
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; expected one of {', '.join(map(str, SCALES))}")
        self.channels = channels
        self.length = length
        self.scale = scale
        feature = SiteSpec(channels, "clip")
        self.sites = {"input": SiteSpec(3, "clip"), **{f"layer{i}": feature for i in range(1, layers + 1)}}
        self.extractor = nn.ModuleList(nn.Conv3d(channels if i else 3, channels, 3, padding=1) for i in range(layers))
        self.upscale = nn.Conv2d(channels, 3 * scale**2, 3, padding=1)

    def forward(self, frames: Tensor, context: Context | None = None) -> Tensor:
        """Enlarge a clip.

        Args:
            frames: (b, t, 3, h, w) in [0, 1].
            context: of this pass.

        Returns:
            (b, t, 3, s h, s w), not clamped.
        """
        context = Context(frames) if context is None else context
        clip = context.refine("input", context.pad(self.multiple))
        b, t = clip.shape[:2]
        clip = F.pad(clip, (0, 0, 0, 0, 0, 0, 0, -t % self.length))  # black frames
        for i, convolution in enumerate(self.extractor, start=1):
            found = self._over_sequences(convolution, clip)
            clip = found if i == 1 else clip + found
            own = clip[:, :t]
            refined = context.refine(f"layer{i}", own)
            if refined is not own:
                clip = torch.cat((refined, clip[:, t:]), 1) if clip.shape[1] > t else refined
        feature = clip[:, :t].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(self.upscale(feature), self.scale).unflatten(0, (b, t))

    def _over_sequences(self, convolution: nn.Module, clip: Tensor) -> Tensor:
        """One layer: (b, t, c, h, w), t a multiple of `length` -> (b, t, channels, h, w)."""
        sequences = clip.unflatten(1, (-1, self.length)).flatten(0, 1).transpose(1, 2)
        # So laid out, a pixel's channels lie together, as 2-D convolutions and attention of plug-ins take them too.
        found = convolution(sequences.contiguous(memory_format=torch.channels_last_3d))
        return F.leaky_relu(found, 0.2, inplace=True).transpose(1, 2).unflatten(0, (len(clip), -1)).flatten(1, 2)
