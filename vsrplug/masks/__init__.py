"""Object masks of low-resolution frames: sources that make them, and the cache that training reads.

A mask source is a callable, frames (t, 3, h, w) in [0, 1] -> masks (t, m, h, w), 0 or 1, the largest mask of a frame
first, and planes of zeros where it has fewer than m. `vsrplug masks` keeps what a slow source makes in a folder.
"""

from __future__ import annotations

from vsrplug.masks.cached import CachedMasks
from vsrplug.masks.controls import Grid, NoMasks, OtherFrame
from vsrplug.masks.errors import DamagedMasksError, MasksError
from vsrplug.masks.precomputed import Precomputed
from vsrplug.masks.segment_anything import SegmentAnything
from vsrplug.masks.superpixels import Superpixels
from vsrplug.masks.words import pack, unpack

__all__ = [
    "CachedMasks",
    "DamagedMasksError",
    "Grid",
    "MasksError",
    "NoMasks",
    "OtherFrame",
    "Precomputed",
    "SegmentAnything",
    "Superpixels",
    "pack",
    "unpack",
]
