"""What a clip is to everything that reads one: a name, a length, and frames decoded on demand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Clip(Protocol):
    """A short video. A data source is a `Sequence` of these.

    Three more attributes are used where a clip has them: `size`, height and width of its frames, known without decoding
    one; `pixels`, (t, 3, H, W) uint8, when the whole clip lies in memory (windows are then cut without decoding); and
    `flows(scale) -> Flows`, the true motion at 1 / scale of the size.
    """

    @property
    def name(self) -> str:
        """What reports call it, for instance `"calendar"`."""
        ...

    def __len__(self) -> int:
        """Number of frames."""
        ...

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Frames [start, stop), each (3, h, w) float32 RGB in [0, 1], decoded one at a time."""
        ...
