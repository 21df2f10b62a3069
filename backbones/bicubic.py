"""`Bicubic`: MATLAB's `imresize` as a backbone without parameters, the baseline every table starts with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.site import SiteSpec
from vsrplug.space_time import checked_times

REACH = 2  # pixels on each side that the cubic kernel reads


class Bicubic(nn.Module):
    """Each frame enlarged as MATLAB's `imresize(x, s)` does: cubic kernel with a = -0.5, half-sample symmetric border.

    Frames in between are blends of their two neighbours.

    Site: `input`, the frames.

    Args:
        scale: enlargement, a whole number.

    Raises:
        ValueError: a scale below 1.
    """

    window: ClassVar[int | None] = None
    multiple: ClassVar[int] = 1
    channels: ClassVar[int] = 3
    times: ClassVar[tuple[float, ...]] = ()

    def __init__(self, scale: int = 4) -> None:
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale is {scale}; expected 1 or more")
        self.scale = scale
        self.sites = {"input": SiteSpec(3, "clip")}

    def forward(self, frames: Tensor, context: Context | None = None, times: Sequence[float] = ()) -> Tensor:
        """Enlarge every frame.

        Args:
            frames: (b, t, 3, h, w) in [0, 1].
            context: of this pass.
            times: where between each frame, 0, and the next, 1, to blend the two; the last frame is its own next.

        Returns:
            (b, t, 3, s h, s w), not clamped: the kernel overshoots at edges. With `times`, (1 + len(times)) t frames:
            the first, those after it, the second.

        Raises:
            ValueError: times that are not between the two frames.
        """
        context = Context(frames) if context is None else context
        clip = context.refine("input", context.pad(self.multiple))
        if times:
            following = torch.cat([clip[:, 1:], clip[:, -1:]], dim=1)
            blends = (torch.lerp(clip, following, time) for time in checked_times(times))
            clip = torch.stack([clip, *blends], dim=2).flatten(1, 2)
        b, t, _, h, w = clip.shape
        # float32 at least: bfloat16 has fewer digits than an 8-bit frame needs
        images = clip.flatten(0, 1).to(torch.promote_types(clip.dtype, torch.float32))
        for dim, length in ((-2, h), (-1, w)):
            images = images.index_select(dim, _mirrored(length, images.device))
        # antialias=True is what selects a = -0.5; without it torch uses a = -0.75
        size = ((h + 2 * REACH) * self.scale, (w + 2 * REACH) * self.scale)
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        margin = REACH * self.scale
        return images[..., margin:-margin, margin:-margin].unflatten(0, (b, t)).to(clip.dtype)


def _mirrored(size: int, device: torch.device) -> Tensor:
    """Indices -REACH to size + REACH - 1, mirrored at the border with the border pixel repeated."""
    index = torch.arange(-REACH, size + REACH, device=device) % (2 * size)  # one pixel is mirrored more than once
    return torch.minimum(index, 2 * size - 1 - index)
