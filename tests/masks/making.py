"""Caches of masks that are known, made by the code under test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsrplug.data.clip import Clip
from vsrplug.degradations import crop_to_multiple
from vsrplug.masks.cached import cache_path
from vsrplug.masks.making import make_clip
from vsrplug.masks.words import Words, as_tensor, unpack

SETTINGS: dict[str, Any] = {"source": "test"}


def levels_as_masks(lr: Tensor) -> Tensor:
    """64 masks of frames (..., 3, h, w), of every pixel by itself: the bits of its colours, and thresholds of them.

    What is done to a frame is then done to its masks, whatever it is.
    """
    levels = (lr * 255).round().long()
    bits = [levels[..., c, :, :] >> bit & 1 for c in range(3) for bit in range(8)]
    steps = [(levels.sum(-3) > 19 * step).long() for step in range(40)]
    return torch.stack([*bits, *steps], -3).float()


def make_cache(
    folder: Path,
    clips: Sequence[Clip],
    degradation: Any = None,
    masks: Callable[[Tensor], Tensor] = levels_as_masks,
    count: int = 64,
    settings: dict[str, Any] = SETTINGS,
) -> Path:
    for clip in clips:
        frames = list(clip.frames())
        if degradation is not None:
            frames = [degradation(crop_to_multiple(frame[None], degradation.scale))[0] for frame in frames]
        path = cache_path(folder, clip.name)
        assert make_clip(path, frames, lambda _, batch: masks(batch), settings, count)
    return folder


def write_words(path: Path, words: Words) -> Path:
    """A file of these words (t, h, w), of noise."""
    planes = unpack(as_tensor(words), 64).float()
    noise = torch.rand(len(words), 3, *words.shape[1:], generator=torch.Generator().manual_seed(0))
    make_clip(path, noise, lambda start, frames: planes[start : start + len(frames)], SETTINGS, 64)
    return path
