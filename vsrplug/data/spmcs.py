"""SPMCS: some thirty clips of 31 frames of 960x540, for test."""

from __future__ import annotations

from pathlib import Path

from vsrplug.data.clip import Clip
from vsrplug.data.frame_folder import FrameFolder, in_order
from vsrplug.data.sources import existing_folder

_FRAMES = 31


def spmcs(root: str | Path) -> list[Clip]:
    """SPMCS: `AMVTG_004/truth/0001.png` and so on under `root`; every folder with a `truth` is a clip.

    Papers count 30, 31 or 32 clips, so the number is not checked: say it with the figure.

    Source: X. Tao et al., "Detail-Revealing Deep Video Super-Resolution", ICCV 2017.

    Raises:
        FileNotFoundError: there is no folder `root`.
        ValueError: there are no clips, or one of them has not 31 frames.
    """
    root = existing_folder(root)
    folders = sorted((path for path in root.iterdir() if (path / "truth").is_dir()), key=in_order)
    if not folders:
        raise ValueError(f"this is not SPMCS: no folder in {root} holds a folder `truth`, such as AMVTG_004/truth")
    clips: list[Clip] = []
    for folder in folders:
        clip = FrameFolder(folder / "truth", folder.name)
        if len(clip) != _FRAMES:
            raise ValueError(f"this is not SPMCS: {folder / 'truth'} has {len(clip)} frames, expected {_FRAMES}")
        clips.append(clip)
    return clips
