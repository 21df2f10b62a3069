"""`Precomputed`: masks that another segmenter made, as label images or as COCO run lengths."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vsrplug.masks.words import MOST

if TYPE_CHECKING:
    from vsrplug.data.clip import Clip

_ENDINGS = (".json", ".png", ".tif", ".tiff", ".bmp")


class Precomputed:
    """Masks of SAM 2, a tracker, or annotators: `root/<clip>/` holds one file for each low-resolution frame.

    A file is a label image (grey or palette; 0 is no object, every other value one mask), or JSON as
    segment-anything's `amg.py --convert-to-rle` writes and SA-1B has: a list of records with `"segmentation"`, or
    `{"annotations": [...]}` around it, where a segmentation is `{"size": [h, w], "counts": ...}`, run lengths down the
    columns, compressed or not. Files are taken in the order of their names.

    Masks are sorted by area, the largest first, equal ones by label or by their place in the file. Of more than `count`
    the smallest are dropped; missing ones are empty.

    Args:
        root: the folder.
        count: `m`, masks of a frame.

    Raises:
        FileNotFoundError: there is no such folder, or none for a clip.
        ValueError: `count` is out of range, or a file cannot be read or is of another resolution.
    """

    def __init__(self, root: str | Path, count: int = MOST) -> None:
        _check_count(count)
        self.root = Path(root).expanduser()
        self.count = count
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder of label images or run lengths {self.root}")

    @property
    def settings(self) -> dict[str, Any]:
        """What the masks depend on."""
        return {"source": "precomputed", "root": str(self.root), "count": self.count}

    def of_clip(self, clip: Clip, start: int, frames: Tensor) -> Tensor:
        """Masks (t, count, h, w), float32, 0 or 1, of LR frames (t, 3, h, w), of which the first has number `start`.

        Raises:
            FileNotFoundError: there is no folder for the clip.
            ValueError: it has another number of files than the clip has frames; or as the class says.
        """
        files = _files(self.root / clip.name)
        if len(files) != len(clip):
            raise ValueError(
                f"{self.root / clip.name} has {len(files)} files of masks, but clip {clip.name!r} has {len(clip)} "
                "frames"
            )
        height, width = frames.shape[-2:]
        masks = np.zeros((len(frames), self.count, height, width), np.float32)
        for planes, file in zip(masks, files[start : start + len(frames)], strict=True):
            found = read_masks(file)
            if found.shape[1:] != (height, width):
                raise ValueError(
                    f"{file} has masks of {found.shape[1]}x{found.shape[2]}, but the low-resolution frames are "
                    f"{height}x{width}; masks are made of those"
                )
            largest = largest_first(found, self.count)
            planes[: len(largest)] = largest
        return torch.from_numpy(masks)


def largest_first(masks: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """The `count` largest of masks (m, h, w), or all, the largest first; equal ones keep their order."""
    order = np.argsort(-masks.sum((1, 2)), kind="stable")
    return masks[order[:count]]


def read_masks(file: Path) -> NDArray[np.bool_]:
    """All masks (m, h, w) of a label image or a file of run lengths.

    Raises:
        ValueError: it cannot be read as one; the message names the file.
    """
    try:
        return _from_json(json.loads(file.read_text())) if file.suffix == ".json" else _from_labels(file)
    except Exception as error:  # decoders raise a zoo of types
        raise ValueError(f"{file} cannot be read as masks: {error}") from error


def decode_rle(rle: dict[str, Any]) -> NDArray[np.bool_]:
    """One mask (h, w) from COCO run lengths, `{"size": [h, w], "counts": text or numbers}`.

    Raises:
        ValueError: the runs do not add up to the size.
    """
    height, width = rle["size"]
    counts = _runs(rle["counts"]) if isinstance(rle["counts"], str) else list(rle["counts"])
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"run lengths add up to {sum(counts)}, not to {height}x{width}")
    values = np.arange(len(counts)) % 2 == 1  # the first run is background
    return np.repeat(values, counts).reshape(width, height).T


def _runs(text: str) -> list[int]:
    """Runs from COCO's text: five bits a character, lowest first, a sixth for "more follows"; from the fourth run on,
    the difference to the run before the last."""
    runs: list[int] = []
    value = shift = 0
    for character in text.encode():
        chunk = character - 48
        value |= (chunk & 31) << shift
        shift += 5
        if chunk & 32:
            continue
        if chunk & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _from_json(content: Any) -> NDArray[np.bool_]:
    records: Iterable[Any] = content["annotations"] if isinstance(content, dict) else content
    masks = [decode_rle(record.get("segmentation", record)) for record in records]
    if not masks:
        raise ValueError("it has no masks, so their size is unknown; use a label image of zeros for an empty frame")
    return np.stack(masks)


def _from_labels(file: Path) -> NDArray[np.bool_]:
    with Image.open(file) as image:
        labels = np.asarray(image)
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise ValueError("a label image has one whole number a pixel: a grey or palette image of 8 or 16 bits")
    values = np.unique(labels)
    return labels[None] == values[values != 0][:, None, None]


@lru_cache(maxsize=4)  # asked for once a frame
def _files(folder: Path) -> list[Path]:
    from vsrplug.data.frame_folder import in_order

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} with the masks of that clip")
    files = [file for file in folder.iterdir() if file.suffix in _ENDINGS and not file.name.startswith(".")]
    return sorted(files, key=in_order)


def _check_count(count: int) -> None:
    if not 1 <= count <= MOST:
        raise ValueError(f"a frame has 1 to {MOST} masks, got count={count}")
