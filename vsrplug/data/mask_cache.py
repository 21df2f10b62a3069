"""Masks of whole clips, made once by a mask source and held as bits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vsrplug.data.clip import Clip
from vsrplug.data.transforms import Box

_BUDGET = 512 * 2**20  # bytes a process spends on masks; the clips not used for longest make room


class MaskCache:
    """Masks of the full LR frames, from which training cuts windows: a mask seen in a crop is never another one.

    Eight masks share a byte, so 16 masks of a clip take a 96th part of its float32 LR frames and masks may overlap.
    Every clip whose masks are asked for is read whole once; for long videos make masks beforehand.

    Args:
        clips: the clips.
        source: LR frames (t, 3, h, w) in [0, 1] -> masks (t, m, h, w), 0 or 1.
        low_resolution: a clip -> its LR frames (t, 3, h, w).
    """

    key = "masks"  # of a sample

    def __init__(
        self, clips: Sequence[Clip], source: Callable[[Tensor], Tensor], low_resolution: Callable[[Clip], Tensor]
    ) -> None:
        self.clips = clips
        self.source = source
        self.low_resolution = low_resolution
        self._held: OrderedDict[int, tuple[Tensor, int]] = OrderedDict()  # bits and number of masks, last used last

    def window(self, index: int, start: int, stop: int, box: Box) -> Tensor:
        """Masks (stop - start, m, box.height, box.width), float32, of frames [start, stop) of clip `index`.

        Raises:
            ValueError: the mask source does not return (t, m, h, w) for frames (t, 3, h, w).
        """
        if index not in self._held:
            self._held[index] = self._make(self.clips[index])
            while len(self._held) > 1 and sum(bits.nbytes for bits, _ in self._held.values()) > _BUDGET:
                self._held.popitem(last=False)
        self._held.move_to_end(index)
        bits, count = self._held[index]
        return _unpack(box.cut(bits[start:stop]), count)

    def _make(self, clip: Clip) -> tuple[Tensor, int]:
        lr = self.low_resolution(clip)
        masks = self.source(lr)
        if masks.ndim != 4 or masks.shape[0] != lr.shape[0] or masks.shape[2:] != lr.shape[2:]:
            raise ValueError(
                f"the mask source must return (t, m, h, w) for frames {tuple(lr.shape)} of clip {clip.name!r}, "
                f"it returned {tuple(masks.shape)}"
            )
        return _pack(masks), masks.shape[1]


def _pack(masks: Tensor) -> Tensor:
    """(t, m, h, w), 0 or 1 -> (t, ceil(m / 8), h, w) uint8."""
    return torch.from_numpy(np.packbits(masks.detach().cpu().numpy() > 0.5, axis=1))


def _unpack(bits: Tensor, count: int) -> Tensor:
    """The inverse of `_pack`: (t, ceil(count / 8), h, w) -> (t, count, h, w) float32."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=count)).float()
