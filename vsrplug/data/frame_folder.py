"""`FrameFolder`: a clip whose frames are the image files of one folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class FrameFolder:
    """The image files of one folder as a clip, in the order of their names, where 10 comes after 9.

    Grey and palette images become RGB, an opaque alpha channel is dropped, and 16-bit images keep their precision.

    Args:
        path: the folder. Hidden files and files that are no images are left out.
        name: what the clip is called; the folder's name unless given.

    Attributes:
        name: as above.
        files: the frames' paths.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no images; while reading, an image cannot be decoded, has transparent pixels, or is not of
            the first frame's size. The message names the file.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"there is no folder {path}")
        self.name = name or path.resolve().name
        self.files = sorted((file for file in path.iterdir() if is_image(file)), key=in_order)
        if not self.files:
            raise ValueError(f"folder {path} holds no images; expected files ending in {', '.join(sorted(IMAGES))}")

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the first frame, which all others must have."""
        try:
            with Image.open(self.files[0]) as image:
                return image.height, image.width
        except Exception as error:  # decoders raise a zoo of types
            raise _unreadable(self.files[0], error) from error

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Frames [start, stop), each (3, h, w) float32 RGB in [0, 1]; only their files are opened."""
        for file in self.files[start:stop]:
            frame = read_image(file)
            if frame.shape[-2:] != self.size:
                raise ValueError(
                    f"the frames of a clip must have one size: {file} is {frame.shape[-2]}x{frame.shape[-1]}, "
                    f"but {self.files[0]} is {self.size[0]}x{self.size[1]}"
                )
            yield frame


def read_image(path: Path) -> Tensor:
    """An image file as (3, h, w) float32 RGB in [0, 1]: 8-bit values over 255, 16-bit values over 65535.

    Raises:
        ValueError: the file cannot be decoded, has transparent pixels, or holds neither 8 nor 16 bits a channel.
    """
    try:
        array = _decode(path)
    except Exception as error:  # decoders raise a zoo of types
        raise _unreadable(path, error) from error
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path} holds {array.dtype} values; expected 8 or 16 bits a channel, convert it to PNG")
    top = np.iinfo(array.dtype).max
    if array.shape[2] in (2, 4):
        if (array[..., -1] != top).any():
            raise ValueError(
                f"{path} has transparent pixels, and what lies behind them is unknown; flatten it first, for instance "
                "with: magick in.png -background black -alpha remove -alpha off out.png"
            )
        array = array[..., :-1]
    pixels = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / float(top)
    return pixels.expand(3, -1, -1).contiguous()


def _decode(path: Path) -> np.ndarray:
    """(h, w, c) of uint8 or uint16, c being 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha."""
    with Image.open(path) as image:
        if image.format == "PNG" and _is_deep(path):  # PIL would cut RGB to 8 bits
            with av.open(str(path), options={"err_detect": "explode"}) as container:
                return next(container.decode(video=0)).to_ndarray(format="rgba64le")
        shown: Image.Image = image
        if image.mode not in ("L", "LA", "RGB", "RGBA") and not image.mode.startswith(("I", "F")):
            shown = image.convert("RGBA" if image.has_transparency_data else "RGB")
        array = np.asarray(shown)
    return array.reshape(*array.shape[:2], -1)


def _is_deep(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(25)[24] == 16  # the header's bit depth


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as an image, the file may be damaged: {error}")


def is_image(path: Path) -> bool:
    """Whether the name is that of an image file, and not a hidden one."""
    return path.suffix.lower() in IMAGES and not path.name.startswith(".") and path.is_file()


def in_order(path: Path) -> tuple[list[str | int], str]:
    """Sort key that reads runs of digits as numbers, so that frame_9 comes before frame_10."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name
