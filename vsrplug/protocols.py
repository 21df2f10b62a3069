"""`Protocol`: everything that has to be said for a number to mean something, under one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vsrplug.metrics import Colour, check_colour_and_border

if TYPE_CHECKING:
    from vsrplug.data.clip import Clip
    from vsrplug.data.training import Degradation


@dataclass(frozen=True)
class Protocol:
    """How a figure is measured; `conf/protocol/*.yaml` are calls of this constructor.

    A model sees every frame of a clip (with `mirror`, then the same in reverse). Its output is clipped and rounded to
    8 bits, then measured frame by frame; a clip's figure is the mean over its frames, the protocol's figure the mean
    over its clips.

    With `between`, a model sees every (between + 1)-th frame from the first on and makes those in between as well. The
    clip ends at the last frame seen. Figures are those of the frames in between, as in STVUN's table 1 (Kang et al.
    2020, 4.1: even frames are given, odd ones are the truth); those of the frames seen are reported besides.

    Args:
        name: what tables and `metrics.json` call it, for instance `"vid4_bi_y"`.
        clips: the ground truth.
        degradation: hr (t, 3, H, W) -> lr (t, 3, H / s, W / s), with `.scale`.
        colour: `"rgb"`, or `"y"` for BT.601 luma.
        border: pixels left out of the metrics on each side.
        skip_frames: frames left out of the metrics at each end of a clip.
        mirror: the model sees the clip followed by itself in reverse, 2 t frames, and its first t are measured. On
            Vimeo-90K's seven frames recurrent networks are evaluated so.
        between: frames left out between each two that the model sees.

    Raises:
        ValueError: no clips, unknown colour, negative border, skip_frames or between, `between` with `mirror`, a clip
            that skip_frames leaves nothing of, a degradation that cannot be called.
    """

    name: str
    clips: Sequence[Clip]
    degradation: Degradation
    colour: Colour
    border: int = 0
    skip_frames: int = 0
    mirror: bool = False
    between: int = 0

    def __post_init__(self) -> None:
        try:
            check_colour_and_border(self.colour, self.border)
        except ValueError as error:
            raise ValueError(f"protocol {self.name!r}: {error}") from None
        if not len(self.clips):
            raise ValueError(f"protocol {self.name!r} has no clips: the data source is empty")
        if not callable(self.degradation):
            raise ValueError(
                f"protocol {self.name!r}: degradation is {self.degradation!r}; expected an object that makes lr of hr, "
                f"on the command line degradation@protocol.degradation={self.degradation}"
            )
        if self.skip_frames < 0:
            raise ValueError(f"protocol {self.name!r}: skip_frames is 0 or more, got {self.skip_frames}")
        if self.between < 0 or (self.between and self.mirror):
            raise ValueError(
                f"protocol {self.name!r}: between is 0 or more, and 0 with mirror=true, got between={self.between} and "
                f"mirror={str(self.mirror).lower()}"
            )
        for clip in self.clips if self.skip_frames else ():  # not otherwise: the embedded clips render when touched
            if len(clip) <= 2 * self.skip_frames:
                raise ValueError(
                    f"protocol {self.name!r} skips the first and the last {self.skip_frames} frames, but clip "
                    f"{clip.name!r} has only {len(clip)} frames"
                )

    def covered(self, count: int) -> int:
        """Of a clip of `count` frames, those up to the last one that the model sees."""
        return count if not self.between else (count - 1) // (self.between + 1) * (self.between + 1) + 1

    def counted(self, count: int) -> list[int]:
        """Which of the frames covered, `count` of them, the figures are of."""
        step = self.between + 1
        return [i for i in range(self.skip_frames, count - self.skip_frames) if step == 1 or i % step]

    def seen(self, count: int) -> list[int]:
        """Which of the frames covered, `count` of them, are seen and measured besides; none without `between`."""
        if not self.between:
            return []
        return [i for i in range(self.skip_frames, count - self.skip_frames) if i % (self.between + 1) == 0]
