"""What stands in for object masks in a control experiment: nothing, a grid, or the masks of another frame."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor


class NoMasks:
    """Planes of zeros: what a module that reads masks gains by its parameters alone.

    Args:
        count: `m`, planes a frame.

    Raises:
        ValueError: `count` is not positive, or frames are not (t, 3, h, w).
    """

    def __init__(self, count: int = 16) -> None:
        self.count = _positive(count)

    @property
    def settings(self) -> dict[str, Any]:
        """What the masks depend on."""
        return {"source": "no_masks", "count": self.count}

    def __call__(self, frames: Tensor) -> Tensor:
        """Zeros (t, count, h, w), float32, for frames (t, 3, h, w); on the frames' device."""
        _checked(frames)
        return torch.zeros(len(frames), self.count, *frames.shape[-2:], device=frames.device)


class Grid:
    """Rectangular cells that know nothing of the picture: the same number of masks, without its objects.

    A plane is always the same place, so a module may learn from it where in the frame it is, which the planes of
    objects, sorted by area, do not tell.

    Args:
        count: `m`, planes a frame. Cells are `floor(sqrt(m))` rows of as many columns as fit; planes beyond are zeros.

    Raises:
        ValueError: `count` is not positive, frames are not (t, 3, h, w) or have fewer pixels than there are cells a
            row or column.
    """

    def __init__(self, count: int = 16) -> None:
        self.count = _positive(count)

    @property
    def settings(self) -> dict[str, Any]:
        """What the masks depend on."""
        return {"source": "grid", "count": self.count}

    def __call__(self, frames: Tensor) -> Tensor:
        """Masks (t, count, h, w), float32, 0 or 1, for frames (t, 3, h, w); on the frames' device."""
        _checked(frames)
        t, _, h, w = frames.shape
        rows = isqrt(self.count)
        columns = self.count // rows
        if h < rows or w < columns:
            raise ValueError(f"{rows}x{columns} cells do not fit frames of {h}x{w}; take a smaller count")
        row = torch.arange(h, device=frames.device) * rows // h
        column = torch.arange(w, device=frames.device) * columns // w
        cell = row[:, None] * columns + column
        masks = cell == torch.arange(self.count, device=frames.device)[:, None, None]
        return masks.float().expand(t, -1, -1, -1).clone()


class OtherFrame:
    """Masks that another source makes, each given to the frame half a clip later: objects, in the wrong place.

    Args:
        source: the source, frames (t, 3, h, w) -> masks (t, m, h, w), the largest first.
        count: how many of them are kept.

    Raises:
        ValueError: the clip has one frame, so that there is no other, or the source makes fewer masks.
    """

    def __init__(self, source: Callable[[Tensor], Tensor], count: int = 16) -> None:
        self.source = source
        self.count = _positive(count)

    @property
    def settings(self) -> dict[str, Any]:
        """What the masks depend on."""
        return {"of": "another frame", **getattr(self.source, "settings", {}), "count": self.count}

    def __call__(self, frames: Tensor) -> Tensor:
        """Masks (t, count, h, w) of frames (t, 3, h, w), moved by t / 2 frames; those that leave the end come first."""
        if len(frames) < 2:
            raise ValueError("masks of another frame need a clip of two frames or more, got one")
        masks = self.source(frames)
        if masks.shape[1] < self.count:
            raise ValueError(f"count={self.count} masks are asked for, the source makes {masks.shape[1]}")
        return masks[:, : self.count].roll(len(frames) // 2, dims=0)


def _positive(count: int) -> int:
    if count < 1:
        raise ValueError(f"count must be positive, got count={count}")
    return count


def _checked(frames: Tensor) -> None:
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"masks are of frames (t, 3, h, w), got {tuple(frames.shape)}; give one clip a call")
