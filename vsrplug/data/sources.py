"""Data sources: where clips lie on disk. Each returns a list of clips, sorted by name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vsrplug.data.clip import Clip
from vsrplug.data.frame_folder import FrameFolder, in_order, is_image
from vsrplug.data.video_file import VideoFile, is_video
from vsrplug.site import unknown_name

_VID4 = {"calendar": 41, "city": 34, "foliage": 49, "walk": 47}  # frames of each clip


def folder(root: str | Path, only: Sequence[str] | None = None) -> list[Clip]:
    """Clips of your own: `root` holds a folder of frames for each clip, video files, or both; or it is one clip itself.

    Args:
        root: the folder.
        only: names of the clips to take, so that training and validation may lie in one folder; None takes all.

    Raises:
        FileNotFoundError: there is no folder `root`.
        ValueError: it is empty, holds frames beside clips, two clips have one name, or `only` names one that is not
            there.
    """
    clips = _of_folder(root)
    if only is None:
        return clips
    named = {clip.name: clip for clip in clips}
    for name in only:
        if name not in named:
            raise ValueError(f"only: {unknown_name('clip', name, named)}")
    return [clip for clip in clips if clip.name in set(only)]


def _of_folder(root: str | Path) -> list[Clip]:
    root = existing_folder(root)
    inside = sorted((path for path in root.iterdir() if not path.name.startswith(".")), key=in_order)
    images = [path for path in inside if is_image(path)]
    clips = [path for path in inside if path.is_dir() or is_video(path)]
    if images and clips:
        raise ValueError(
            f"folder {root} holds frames ({images[0].name}, ...) beside clips ({clips[0].name}, ...); "
            "move either of them away, or name a single clip"
        )
    if images:
        return [FrameFolder(root)]
    if not clips:
        raise ValueError(f"folder {root} holds no clips; expected folders of frames, frames, or video files")
    return _distinct(root, [FrameFolder(path) if path.is_dir() else VideoFile(path) for path in clips])


def video(path: str | Path) -> list[Clip]:
    """The clip of a video file, or those of a folder of video files.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the folder holds no video files, or a file is none.
    """
    path = Path(path)
    if not path.is_dir():
        return [VideoFile(path)]
    files = sorted((file for file in path.iterdir() if is_video(file)), key=in_order)
    if not files:
        raise ValueError(f"folder {path} holds no video files; for frames as images take the source `folder`")
    return _distinct(path, [VideoFile(file) for file in files])


def vid4(root: str | Path) -> list[Clip]:
    """Vid4: calendar, city, foliage and walk, all 171 frames as `GT/<clip>/00000000.png` and so on under `root`.

    Source: C. Liu and D. Sun, "On Bayesian Adaptive Video Super Resolution", TPAMI 2014.

    Raises:
        FileNotFoundError: there is no folder `root`.
        ValueError: a clip or a frame is missing or left over.
    """
    root = existing_folder(root)
    clips: list[Clip] = []
    for name, count in _VID4.items():
        frames = root / "GT" / name
        found = sum(is_image(path) for path in frames.iterdir()) if frames.is_dir() else 0
        if found != count:
            raise ValueError(
                f"this is not Vid4: {frames} has {found} frames, expected {count}; "
                f"{root} must hold {', '.join(f'GT/{clip}' for clip in _VID4)}"
            )
        clips.append(FrameFolder(frames))
    return clips


def existing_folder(root: str | Path) -> Path:
    """The folder, or an error that says where folders come from."""
    root = Path(root)
    if not root.is_dir():
        where = os.environ.get("VSRPLUG_DATA")
        raise FileNotFoundError(
            f"there is no folder {root}; data sets are looked for under paths.data, which is the variable VSRPLUG_DATA "
            f"({where or 'not set'}): set it, or give paths.data=... or the folder itself"
        )
    return root


def _distinct(root: Path, clips: list[Clip]) -> list[Clip]:
    name, times = Counter(clip.name for clip in clips).most_common(1)[0]
    if times > 1:
        raise ValueError(f"folder {root} holds {times} clips named {name!r}; figures are kept by name, rename them")
    return clips
