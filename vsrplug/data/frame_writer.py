"""`FrameWriter`: restored frames to a folder of PNG files; a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image
from torch import Tensor

from vsrplug.data.frame_folder import is_image
from vsrplug.data.video_writer import to_uint8

RECORD = ".upscale.json"  # hidden, so that nothing takes it for a frame


class FrameWriter:
    """Writes frames into `<folder>.partial` and renames it at the end: the folder is whole or not there.

    A context manager. When the partial folder was begun with the same settings, the frames in it are kept.

    Args:
        folder: where to. An existing one is replaced at the end, and must hold nothing but images.
        names: file name of each frame.
        settings: what the frames depend on, plain data; a partial folder with others is begun afresh.

    Raises:
        ValueError: the folder holds other things than images, or the partial folder is not one of ours.
    """

    def __init__(self, folder: str | Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.partial = self.folder.with_name(f"{self.folder.name}.partial")
        self.names = names
        others = [] if not self.folder.is_dir() else [p.name for p in self.folder.iterdir() if not _replaceable(p)]
        if others:
            raise ValueError(
                f"folder {self.folder} would be replaced, but holds more than images: {', '.join(sorted(others)[:3])}; "
                "name another output"
            )
        record = self.partial / RECORD
        if (
            self.partial.exists()
            and not record.is_file()
            and (not self.partial.is_dir() or any(self.partial.iterdir()))
        ):
            raise ValueError(f"{self.partial} is in the way, and was not left by an unfinished run; move it away")
        if record.is_file() and _read(record) != _plain(settings):
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        if not record.is_file():
            temporary = record.with_suffix(".tmp")
            temporary.write_text(json.dumps(_plain(settings), indent=2) + "\n")
            os.replace(temporary, record)
        self.kept = {name for name in names if (self.partial / name).is_file()}

    def __enter__(self) -> FrameWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        old = self.folder.with_name(f".{self.folder.name}.old")
        if self.folder.is_dir():
            os.replace(self.folder, old)
        os.replace(self.partial, self.folder)
        shutil.rmtree(old, ignore_errors=True)
        # Only now: a kill before the renaming leaves a folder that can be continued.
        (self.folder / RECORD).unlink()

    def missing(self, number: int) -> bool:
        """Whether the frame was not there when this run began."""
        return self.names[number] not in self.kept

    def write(self, number: int, frame: Tensor) -> None:
        """Write the frame (3, h, w) in [0, 1] as an 8-bit PNG file, under a temporary name that is then renamed."""
        path = self.partial / self.names[number]
        temporary = path.with_name(f".{path.name}.tmp")
        Image.fromarray(to_uint8(frame).permute(1, 2, 0).contiguous().numpy()).save(temporary, format="PNG")
        os.replace(temporary, path)


def _replaceable(path: Path) -> bool:
    return is_image(path) or path.name == RECORD


def _plain(settings: Mapping[str, Any]) -> Any:
    """As it will be read back."""
    return json.loads(json.dumps(settings))


def _read(record: Path) -> Any:
    try:
        return json.loads(record.read_text())
    except json.JSONDecodeError:
        return None
