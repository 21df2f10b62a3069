"""UDM10: ten clips of 32 frames, for test."""

from __future__ import annotations

from pathlib import Path

from vsrplug.data.clip import Clip
from vsrplug.data.frame_folder import FrameFolder, is_image
from vsrplug.data.sources import existing_folder

_CLIPS = ("archpeople", "archwall", "auditorium", "band", "caffe", "camera", "clap", "lake", "photography", "polyflow")
_FRAMES = 32


def udm10(root: str | Path) -> list[Clip]:
    """UDM10: `GT/archpeople/0000.png` and so on under `root`, or PFNL's layout, `archpeople/truth/0000.png`.

    Source: P. Yi et al., "Progressive Fusion Video Super-Resolution Network via Exploiting Non-Local Spatio-Temporal
    Correlations" (PFNL), ICCV 2019.

    Raises:
        FileNotFoundError: there is no folder `root`.
        ValueError: a clip or a frame is missing or left over.
    """
    root = existing_folder(root)
    clips: list[Clip] = []
    for name in _CLIPS:
        frames = root / "GT" / name if (root / "GT").is_dir() else root / name / "truth"
        found = sum(is_image(path) for path in frames.iterdir()) if frames.is_dir() else 0
        if found != _FRAMES:
            raise ValueError(
                f"this is not UDM10: {frames} has {found} frames, expected {_FRAMES}; {root} must hold GT/<clip> or "
                f"<clip>/truth for each of {', '.join(_CLIPS)}"
            )
        clips.append(FrameFolder(frames, name))
    return clips
