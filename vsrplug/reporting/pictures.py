"""The pictures that runs left, put together by clip."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .rows import Row, Section

# A job leaves crops of one place in pictures/CLIP/NAME.png, and what its network saw in pictures/CLIP/maps/NAME.png.
FOLDER, MAPS = "pictures", "maps"
RESULT = "result"  # the name of the crop that a job's own network made
FIRST, LAST = ("low resolution", "bicubic", "backbone"), "ground truth"


@dataclass
class ClipPictures:
    """Of one clip.

    Args:
        crops: name -> data URI, all of one place: from the low resolution to the truth.
        maps: (name, data URI): masks, confidence, attention.
    """

    crops: dict[str, str] = field(default_factory=dict)
    maps: list[tuple[str, str]] = field(default_factory=list)


def clip_pictures(section: Section) -> dict[str, ClipPictures]:
    """Clip -> pictures, of the first seed of every row that is done.

    A crop that several jobs left, such as the truth, is there once. What another job shows under the same name is
    called after that job's row.
    """
    several = len({row.job.backbone for row in section.rows}) > 1
    clips: dict[str, ClipPictures] = {}
    for row in section.rows:
        for clip, file in _files(row):
            found = clips.setdefault(clip.removesuffix(f"/{MAPS}"), ClipPictures())
            name, picture, title = file.stem, data_uri(file), f"#{row.number} {row.title}"
            if clip.endswith(f"/{MAPS}"):
                found.maps.append((f"{title}: {name}", picture))
                continue
            if name == "backbone" and several:
                name = f"backbone {row.job.backbone}"
            if name != RESULT and found.crops.get(name, picture) != picture:
                name = f"{name} (#{row.number})"
            found.crops[title if name == RESULT else name] = picture
    for found in clips.values():
        found.crops = dict(sorted(found.crops.items(), key=lambda crop: _place(crop[0])))
    return clips


def sheets(section: Section) -> list[tuple[str, str]]:
    """(row, data URI) of `comparison.png` of the rows that left no crops."""
    found = []
    for row in section.rows:
        folder = _folder(row)
        if folder and not any(_files(row)) and (folder / "comparison.png").exists():
            found.append((f"#{row.number} {row.title}", data_uri(folder / "comparison.png")))
    return found


def data_uri(file: Path) -> str:
    """A PNG as text that a page can hold."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def _place(name: str) -> int:
    """Results stay in the order of their rows, between what they are compared with."""
    if name.startswith(LAST):
        return len(FIRST) + 1
    return next((i for i, first in enumerate(FIRST) if name.startswith(first)), len(FIRST))


def _folder(row: Row) -> Path | None:
    return next((job.folder for job in row.jobs if job.figures is not None), None)


def _files(row: Row) -> Iterator[tuple[str, Path]]:
    """(clip, file); clips may have folders in their names."""
    folder = _folder(row)
    if folder is not None:
        for file in sorted((folder / FOLDER).rglob("*.png")):
            yield file.parent.relative_to(folder / FOLDER).as_posix(), file
