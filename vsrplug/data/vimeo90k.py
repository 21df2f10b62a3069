"""Vimeo-90K's septuplets: clips of seven frames of 448x256, told apart by lists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from vsrplug.data.clip import Clip
from vsrplug.data.frame_folder import FrameFolder
from vsrplug.data.sources import existing_folder

Split = Literal["train", "test"]
Motion = Literal["all", "fast", "medium", "slow", "motion"]

_FRAMES = 7
# The names under which the lists by motion are passed around; the first that is there is read.
_BY_MOTION = ("sep_{}_testset.txt", "{}_testset.txt", "meta_info_Vimeo90K_test_{}_GT.txt")


class Septuplet:
    """Seven frames, `im1.png` to `im7.png`. The folder is not looked into before a frame is: there are 64,612 of them.

    Args:
        folder: where the frames are.
        name: what the clip is called.
    """

    __slots__ = ("folder", "name")

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name

    def __len__(self) -> int:
        return _FRAMES

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, read from the first frame's header."""
        return self._frames().size

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Frames [start, stop), each (3, h, w) float32 RGB in [0, 1]; only their files are opened."""
        return self._frames().frames(start, stop)

    def _frames(self) -> FrameFolder:
        clip = FrameFolder(self.folder)
        if len(clip) != _FRAMES:
            raise ValueError(
                f"septuplet {self.folder} has {len(clip)} images, expected im1.png to im{_FRAMES}.png: unpack it again"
            )
        return clip


def vimeo90k(root: str | Path, split: Split = "train", motion: Motion = "all") -> list[Clip]:
    """Vimeo-90K: `sequences/00001/0001/im1.png` and so on under `root`, and beside them the lists of the splits.

    `sep_trainlist.txt` (64,612 septuplets) and `sep_testlist.txt` (7,824) come with the data. The test set by motion is
    in lists of their own, 1,225 fast, 4,977 medium and 1,613 slow (nine with black frames are in none): EDVR's
    authors publish them as `meta_info_Vimeo90K_test_fast_GT.txt` and so on in BasicSR, others as `fast_testset.txt`.
    Vimeo90K-Motion of MANA (paper 000), the 6 % that move most, was not published: `vsrplug motion` makes the list.
    Clips are called `00001/0001` and so on, as in the lists. That super-resolution is measured on the fourth frame is
    the protocols' affair.

    Source: T. Xue et al., "Video Enhancement with Task-Oriented Flow", IJCV 2019.

    Args:
        root: the folder of `sequences` and the lists, `vimeo_septuplet` as it is unpacked.
        split: `"train"` or `"test"`.
        motion: `"fast"`, `"medium"`, `"slow"` or `"motion"` for that part of the test set, or `"all"`.

    Raises:
        FileNotFoundError: there is no folder `root`, or no list of what is asked for.
        ValueError: an unknown split or motion, a list that is none, or septuplets that it names and that are missing.
    """
    if split not in get_args(Split) or motion not in get_args(Motion):
        raise ValueError(
            f"Vimeo-90K is split into 'train' and 'test', its motion is one of "
            f"{', '.join(map(repr, get_args(Motion)))}; got split={split!r}, motion={motion!r}"
        )
    if motion != "all" and split == "train":
        raise ValueError(f"only the test set is divided by motion: give split='test' with motion={motion!r}")
    root = existing_folder(root)
    listed = _read(_list_of(root, split, motion))
    sequences, parts = root / "sequences", {name[:5] for name in listed}
    folders = (folder for folder in _folders(sequences) if folder.name in parts)
    # A listing of each folder: to ask for 64,612 of them one by one takes minutes on a network disk.
    present = {f"{folder.name}/{clip.name}" for folder in folders for clip in _folders(folder)}
    missing = [name for name in listed if name not in present]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(listed)} septuplets of the {_described(split, motion)} are not in {sequences} "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): unpack vimeo_septuplet.zip again"
        )
    return [Septuplet(sequences / name, name) for name in listed]


def _list_of(root: Path, split: Split, motion: Motion) -> Path:
    """The list's file."""
    names = [f"sep_{split}list.txt"] if motion == "all" else [pattern.format(motion) for pattern in _BY_MOTION]
    for name in names:
        if (root / name).is_file():
            return root / name
    makers = {"all": "it comes with vimeo_septuplet.zip", "motion": "the command vsrplug motion makes it"}
    where = makers.get(motion, "BasicSR has it in basicsr/data/meta_info")
    raise FileNotFoundError(
        f"there is no list of the {_described(split, motion)} in {root}: expected {' or '.join(names)}; {where}"
    )


def _read(path: Path) -> list[str]:
    """The septuplets that a list names, such as `00001/0266`, one a line, whatever follows on the line."""
    names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    wrong = next((name for name in names if not re.fullmatch(r"\d{5}/\d{4}", name)), None if names else "nothing")
    if wrong is not None:
        raise ValueError(f"{path} is no list of septuplets: it has {wrong!r} where 00001/0001 was expected")
    return names


def _folders(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        return
    with os.scandir(path) as entries:
        yield from (Path(entry.path) for entry in entries if entry.is_dir())


def _described(split: Split, motion: Motion) -> str:
    return f"{split} set" if motion == "all" else f"{motion} part of the test set"
