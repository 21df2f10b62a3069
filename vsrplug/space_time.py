"""Frames in between: at which times they lie, and which networks make them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def times_between(count: int) -> tuple[float, ...]:
    """The times of `count` frames that divide the way from one frame, 0, to the next, 1, evenly."""
    return tuple(k / (count + 1) for k in range(1, count + 1))


def checked_times(times: Sequence[float]) -> tuple[float, ...]:
    """The times as a tuple.

    Raises:
        TypeError: a number, not a sequence of them.
        ValueError: one that is not between 0 and 1.
    """
    if isinstance(times, (int, float)):
        raise TypeError(f"times is a sequence of numbers, got {times!r}; write times=({times!r},)")
    for time in times:
        if not 0 < time < 1:
            raise ValueError(
                f"times lie between the centre frame, 0, and the next, 1, got {time!r}; the centre frame comes first "
                "in any case, and the next is the centre of the next window"
            )
    return tuple(times)


def interpolates(model: nn.Module) -> bool:
    """Whether the network, plugged or not, makes frames in between: its `forward` takes `times`, and it has `.times`.

    Such a network gives `1 + len(times)` frames for each one that it restores: that frame, then those between it and
    the next, in the order of `times`.
    """
    return hasattr(getattr(model, "backbone", model), "times")


def check_interpolates(model: nn.Module, asked: str) -> None:
    """Raise ValueError if the network makes no frames in between.

    Args:
        model: a network or a `PluggedModel`.
        asked: what asked for them, for instance `"fps=x2"`.
    """
    if not interpolates(model):
        network = getattr(model, "_network", getattr(model, "backbone", model))  # SlidingWindow's, PluggedModel's
        name = type(network).__name__
        raise ValueError(
            f"{asked} needs a network that makes frames in between, which {name} does not; those that do are STVUN "
            "(backbone=stvun) and, by blending, Bicubic (backbone=bicubic)"
        )
