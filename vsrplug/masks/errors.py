"""`MasksError`: masks that are not there, or not those of the frames."""

from __future__ import annotations


class MasksError(ValueError):
    """Masks are missing, damaged, or of other frames.

    The message says which and that `vsrplug masks` makes them; commands add the whole command line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)


class DamagedMasksError(MasksError):
    """A file of masks cannot be read."""
