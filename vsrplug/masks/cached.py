"""`CachedMasks`: masks that `vsrplug masks` made, found by the content of a frame, or by clip and crop in training."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vsrplug.masks.cache_file import SUFFIX, CacheFile, Header, version
from vsrplug.masks.errors import MasksError
from vsrplug.masks.words import MOST, as_tensor, frame_hash, unpack

if TYPE_CHECKING:
    from vsrplug.data.clip import Clip
    from vsrplug.data.transforms import Box

_OPEN = 1024  # files whose headers a process keeps
_REMEDY = "; `vsrplug masks` makes them"


class CachedMasks:
    """A mask source that only reads. A frame is found by its content, so masks of other frames are never used.

    Masks of a frame are sorted by area, the largest first: a smaller `count` than the cache was made with gives the
    largest.

    Args:
        folder: where `vsrplug masks out=...` put them.
        count: `m`, masks a frame.

    Raises:
        MasksError: there is no such folder, or, while reading, masks are missing, damaged, or of other frames.
        ValueError: `count` is not within 1 to 64 or more than the cache has, or its files were made with settings that
            differ.
    """

    def __init__(self, folder: str | Path, count: int = MOST) -> None:
        if not 1 <= count <= MOST:
            raise ValueError(f"a frame has 1 to {MOST} masks, got count={count}")
        self.folder = Path(folder).expanduser()
        self.count = count
        if not self.folder.is_dir():
            raise MasksError(f"there is no folder of masks {self.folder}{_REMEDY}")
        self._files: OrderedDict[Path, CacheFile] = OrderedDict()
        self._frames: dict[str, tuple[Path, int]] = {}  # hash -> where its masks are, of the files read so far
        self._unread: list[Path] | None = None
        self._first: tuple[Path, Header] | None = None
        self._sizes: dict[tuple[int, int], Path] = {}  # of frames -> a file that has such

    def __call__(self, frames: Tensor) -> Tensor:
        """Masks (t, count, h, w), float32, 0 or 1, of frames (t, 3, h, w) in [0, 1]; on the frames' device."""
        words = np.empty((len(frames), *frames.shape[-2:]), np.uint64)
        for number, frame in enumerate(frames):
            path, at = self._find(frame, number)
            words[number] = self.file(path).read([at], 0, 0, *frames.shape[-2:])[0]
        return unpack(as_tensor(words).to(frames.device), self.count).float()

    def file(self, path: Path) -> CacheFile:
        """The masks of one clip, once it is known that they fit the others and have enough planes."""
        known = self._files.get(path)
        if known is None or known.version != version(os.stat(path)):
            known = self._files[path] = CacheFile(path)
            self._check(path, known.header)
            while len(self._files) > _OPEN:
                self._files.popitem(last=False)
        self._files.move_to_end(path)
        return known

    def _check(self, path: Path, header: Header) -> None:
        if header.count < self.count:
            raise ValueError(
                f"{path} holds {header.count} masks a frame, but count={self.count} are asked for; take "
                f"masks.count={header.count}, or make more of them in another folder"
            )
        self._first = self._first or (path, header)
        self._sizes.setdefault(header.size, path)
        if header.settings != self._first[1].settings:
            raise ValueError(
                f"{path} was made with other settings than {self._first[0]}: "
                f"{differences(header.settings, self._first[1].settings)}; keep one folder for each"
            )

    def _find(self, frame: Tensor, number: int) -> tuple[Path, int]:
        """File and number of the frame; files are read in order, and only until the frame turns up."""
        digest = frame_hash(frame)
        if self._unread is None:
            self._unread = sorted(self.folder.rglob(f"*{SUFFIX}"), reverse=True)
        while digest not in self._frames and self._unread:
            path = self._unread.pop()
            for at, known in enumerate(self.file(path).header.hashes):
                self._frames.setdefault(known, (path, at))
        if digest not in self._frames:
            height, width = frame.shape[-2:]
            others = [] if (height, width) in self._sizes else list(self._sizes.items())[:1]
            hint = "".join(f" (those of {path} are {size[0]}x{size[1]})" for size, path in others)
            raise MasksError(
                f"{self.folder} has no masks of frame {number} of these {height}x{width} low-resolution frames{hint}"
                f"{_REMEDY}"
            )
        return self._frames[digest]


class ClipMasks:
    """Masks of training windows, from the crop only, as words that are unpacked on the device.

    That the masks of a clip were made of its own frames is checked with its first frame, when the clip is first used.

    Args:
        cache: where from.
        clips: the clips.
        first_frame: a clip -> its first LR frame (3, h, w).

    Raises:
        MasksError: a clip has no masks, or they are of another clip or resolution.
    """

    key = "mask_words"  # of a sample

    def __init__(self, cache: CachedMasks, clips: Sequence[Clip], first_frame: Callable[[Clip], Tensor]) -> None:
        self.cache = cache
        self.clips = clips
        self.first_frame = first_frame
        self._checked: set[int] = set()
        there = set(cache.folder.rglob(f"*{SUFFIX}"))  # to ask for 64,612 one by one takes minutes on a network disk
        missing = [clip.name for clip in clips if cache_path(cache.folder, clip.name) not in there]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise MasksError(f"{cache.folder} has no masks of clip {missing[0]!r}{more}{_REMEDY}")
        self._file(0)

    def window(self, index: int, start: int, stop: int, box: Box) -> Tensor:
        """Words (stop - start, box.height, box.width), int64, of frames [start, stop) of clip `index`."""
        return as_tensor(self._file(index).read(range(start, stop), *box))

    def _file(self, index: int) -> CacheFile:
        clip = self.clips[index]
        path = cache_path(self.cache.folder, clip.name)
        file = self.cache.file(path)
        if index not in self._checked:
            check_frames(path, file.header, len(clip), self.first_frame(clip))
            self._checked.add(index)
        return file


def cache_path(folder: Path, name: str) -> Path:
    """Where the masks of a clip lie; a name with slashes, such as Vimeo's `00001/0266`, becomes folders.

    Raises:
        ValueError: the name would lead out of the folder.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"a clip named {name!r} cannot name a file; rename it")
    return folder.joinpath(*parts[:-1], parts[-1] + SUFFIX)


def check_frames(path: Path, header: Header, length: int, first: Tensor) -> None:
    """Raise MasksError if masks are not of a clip with so many frames that begins with the frame `first` (3, h, w)."""
    size = tuple(first.shape[-2:])
    if header.size != size or len(header.hashes) != length:
        raise MasksError(
            f"{path} holds masks of {len(header.hashes)} frames of {header.size[0]}x{header.size[1]}, but the clip has "
            f"{length} low-resolution frames of {size[0]}x{size[1]}{_REMEDY}"
        )
    if length and header.hashes[0] != frame_hash(first):
        raise MasksError(
            f"{path} holds masks of other frames than the clip's: of another clip, or another degradation{_REMEDY}"
        )


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """`key 1 instead of 2`, for each setting that differs."""
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return ", ".join(f"{key} {one.get(key)!r} instead of {other.get(key)!r}" for key in keys)
