"""What a place in a network looks like to a plug-in: `SiteSpec`, and the helpers that speak of sites in errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["frame", "clip"]


@dataclass(frozen=True)
class SiteSpec:
    """A named place in a backbone where a feature may be refined.

    Args:
        channels: width `c` of the feature.
        kind: `"frame"` for (b, c, h, w) at one time step, `"clip"` for (b, t, c, h, w).
        stride: low-resolution pixels per feature pixel, 1 where the feature has the size of the LR frame.
    """

    channels: int
    kind: Kind
    stride: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(map(repr, get_args(Kind)))}")
        if self.channels < 1 or self.stride < 1:
            raise ValueError(f"channels and stride are counts, got channels={self.channels}, stride={self.stride}")


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names of `known` most like `name`, best first: what an error message offers."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that does not exist: what was given, the nearest, and everything there is."""
    known = list(known)
    close = nearest(name, known)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return f"there is no {what} {name!r}{hint} Known: {', '.join(known) or 'none'}."
