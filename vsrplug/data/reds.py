"""REDS: 270 clips of 100 frames of 1280x720, and the two ways in which they are divided into training and test."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from vsrplug.data.clip import Clip
from vsrplug.data.frame_folder import FrameFolder
from vsrplug.data.sources import existing_folder

Split = Literal["train", "test"]
Partition = Literal["reds4", "official"]

_TRAINING, _VALIDATION, _FRAMES = 240, 30, 100  # clips of the two public parts, frames of each clip
_TEST: dict[Partition, tuple[str, ...]] = {
    "reds4": ("000", "011", "015", "020"),
    "official": tuple(f"{clip:03d}" for clip in range(_TRAINING, _TRAINING + _VALIDATION)),
}


def reds(root: str | Path, split: Split = "train", partition: Partition = "reds4") -> list[Clip]:
    """REDS: `train_sharp/000/00000000.png` and so on under `root`.

    The 30 official validation clips count as 240 to 269: they are looked for as `train_sharp/240` to `269`, where
    BasicSR's regrouping puts them, and as `val_sharp/000` to `029`, as they are downloaded. Their low-resolution frames
    are not needed: `bi` makes the same.

    Source: S. Nah et al., "NTIRE 2019 Challenge on Video Deblurring and Super-Resolution", CVPRW 2019.

    Args:
        root: the folder of `train_sharp`.
        split: `"train"` or `"test"`.
        partition: what is tested on. `"reds4"`: clips 000, 011, 015 and 020, the other 266 for training (EDVR, BasicVSR
            and papers since). `"official"`: clips 240 to 269, the other 240 for training.

    Raises:
        FileNotFoundError: there is no folder `root`.
        ValueError: an unknown split or partition, or a clip that is missing or has not 100 frames.
    """
    if split not in get_args(Split) or partition not in _TEST:
        raise ValueError(
            f"REDS is split into 'train' and 'test' by the partition 'reds4' or 'official', got split={split!r}, "
            f"partition={partition!r}"
        )
    root = existing_folder(root)
    test = _TEST[partition]
    every = (f"{clip:03d}" for clip in range(_TRAINING + _VALIDATION))
    places = {name: _place(root, name) for name in (test if split == "test" else every)}
    if split == "train":
        places = {name: place for name, place in places.items() if name not in test}
    missing = [name for name, place in places.items() if not place.is_dir()]
    if missing:
        raise ValueError(
            f"this is not REDS: {len(missing)} of {len(places)} clips are missing ({', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}); {root} must hold train_sharp/000 to 239 and val_sharp/000 to "
            "029, or, as BasicSR regroups them, train_sharp/000 to 269"
        )
    clips: list[Clip] = []
    for name, place in places.items():
        clip = FrameFolder(place, name)
        if len(clip) != _FRAMES:
            raise ValueError(f"clip {name} of REDS has {len(clip)} frames, expected {_FRAMES}: unpack {place} again")
        clips.append(clip)
    return clips


def _place(root: Path, name: str) -> Path:
    """The folder of a clip; of a validation clip, the one that exists."""
    place = root / "train_sharp" / name
    as_downloaded = int(name) - _TRAINING
    if as_downloaded < 0 or place.is_dir():
        return place
    return root / "val_sharp" / f"{as_downloaded:03d}"
