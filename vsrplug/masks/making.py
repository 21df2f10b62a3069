"""`make_clip`: the masks of a clip into its file, frame by frame, going on where an earlier run was killed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from vsrplug.masks.cache_file import version
from vsrplug.masks.journal import Journal, partial_path
from vsrplug.masks.words import MOST, Words, frame_hash, pack


class MaskSource(Protocol):
    """What makes masks: LR frames (t, 3, h, w) in [0, 1] -> (t, count, h, w), 0 or 1, every frame by itself."""

    count: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the masks depend on, plain data; `"source"` is the name of its yaml in `conf/source`."""
        ...

    def __call__(self, frames: Tensor, /) -> Tensor:
        """Make the masks."""
        ...


def make_clip(
    path: Path,
    frames: Iterable[Tensor],
    masks: Callable[[int, Tensor], Tensor],
    settings: dict[str, Any],
    count: int,
    *,
    batch: int = 1,
    made: Callable[[Words], None] = lambda words: None,
) -> bool:
    """Write the masks of a clip to `path`, which is then whole, or not there.

    Frames whose masks an earlier run left in `.<name>.partial` are not made again; a clip begun with other settings or
    of other frames is begun afresh. Batches start at multiples of `batch` however often a run was killed, so that a
    network sees the batches of an undisturbed run.

    Args:
        path: the file.
        frames: the clip's LR frames, (3, h, w) in [0, 1].
        masks: number of the first frame, frames (t, 3, h, w) -> (t, count, h, w).
        settings, count: of the mask source.
        batch: frames given to `masks` at once.
        made: called with the words (h, w) of every frame that was made now.

    Returns:
        False where another process is at this clip.

    Raises:
        ValueError: `count` is more than 64, the source returns something else than (t, count, h, w), or there are no
            frames.
        OSError: the disk is full, or cannot be written. What was made before stays for the next run.
    """
    if count > MOST:
        raise ValueError(f"a pixel's word holds up to {MOST} masks, the source makes count={count}; take count={MOST}")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _version(path)
    with _claim(partial_path(path)) as file:
        if file is None:
            return False
        if _version(path) != before:  # another process finished it between our look and our claim
            partial_path(path).unlink()
            return False
        journal: Journal | None = None
        for start, clip in _batches(frames, batch):
            if journal is None:
                journal = Journal(path, file, settings, count, (clip.shape[-2], clip.shape[-1]))
            hashes = [frame_hash(frame) for frame in clip]
            known = journal.hashes[start : start + len(clip)]
            if known != hashes[: len(known)]:
                journal.forget(start)
                known = []
            if len(known) < len(clip):
                words = pack(_checked(masks(start, clip), (len(clip), count, *clip.shape[-2:])))
                for number in range(len(known), len(clip)):
                    journal.add(hashes[number], words[number])
                    made(words[number])
        if journal is None:
            partial_path(path).unlink()
            raise ValueError(f"a clip without frames has no masks: {path} was not made")
        journal.finish()
    return True


def _version(path: Path) -> tuple[int, int, int] | None:
    return version(path.stat()) if path.exists() else None


def clear_partial(path: Path) -> None:
    """Remove what a run left that was killed after it had finished `path` and before it had tidied up."""
    if partial_path(path).exists():
        with _claim(partial_path(path)) as file:
            if file is not None:
                partial_path(path).unlink()


@contextmanager
def _claim(path: Path) -> Iterator[BinaryIO | None]:
    """The file, made if it is not there, locked against other processes; None where another has it.

    The lock is the system's own: it ends with the process, however that ends, so no claim outlives its worker.
    """
    import fcntl  # not on Windows, where caches can be read but not made

    while True:
        with path.open("a+b", buffering=0) as file:  # a full disk is then an error of the write that met it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            # Between opening and locking, its owner may have finished it and taken it away.
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                yield file
                return


def _checked(masks: Tensor, shape: tuple[int, ...]) -> Tensor:
    if masks.shape != shape:
        raise ValueError(f"the mask source returned {tuple(masks.shape)}, expected (t, count, h, w) = {shape}")
    return masks


def _batches(frames: Iterable[Tensor], size: int) -> Iterator[tuple[int, Tensor]]:
    """Number of the first frame and frames (t, 3, h, w), t being `size` or, at the end, less."""
    frames, start = iter(frames), 0
    while batch := list(islice(frames, size)):
        yield start, torch.stack(batch)
        start += len(batch)
