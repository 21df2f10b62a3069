"""The file of one clip's masks: a header, and for every frame tiles that are read one by one.

Layout, little-endian: 8 bytes `VSRMASK1`; the length of the header and the CRC-32 of header and index, uint32 each; the
header, JSON; the index, a uint32 for the length of every tile; the tiles; the CRC-32 of all that, uint32. A frame is
cut into tiles of 64 x 64 words, rows first. It has few different words, so a tile is the sorted table of them, byte
planes apart, and a number into it for every pixel, one or two bytes, compressed by zlib, which adds a checksum.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from vsrplug.masks.errors import DamagedMasksError
from vsrplug.masks.words import Words

MAGIC = b"VSRMASK1"
SUFFIX = ".masks"
TILE = 64
_LEAD = struct.Struct("<II")
_BAD = (ValueError, KeyError, TypeError, IndexError, struct.error, zlib.error)


@dataclass(frozen=True)
class Header:
    """What the masks were made of and how.

    Args:
        settings: the mask source's, plain data.
        count: masks a pixel, at most 64.
        size: height and width of the frames.
        hashes: `frame_hash` of every frame.
    """

    settings: dict[str, Any]
    count: int
    size: tuple[int, int]
    hashes: tuple[str, ...]


class CacheFile:
    """Masks of a clip on disk. Reading a window decodes only the tiles it touches; no file stays open.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedMasksError: it is no such file, or is damaged; while reading, a tile is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                self.header, lengths = _read_header(file.read)
                start = file.tell()
        except _BAD as error:
            raise damaged(path, error) from error
        self.version = version(stat)
        self._rows, self._columns = (-(-side // TILE) for side in self.header.size)
        self._offsets = start + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if stat.st_size != self._offsets[-1] + 4:
            raise damaged(path, ValueError(f"it has {stat.st_size} bytes, not {self._offsets[-1] + 4}"))

    def read(self, numbers: Iterable[int], top: int, left: int, height: int, width: int) -> Words:
        """Words (t, height, width) of the frames of these numbers, cut at (top, left)."""
        numbers = list(numbers)
        first, last = top // TILE, (top + height - 1) // TILE
        words = np.empty((len(numbers), height, width), np.uint64)
        with self.path.open("rb", buffering=0) as file:
            for frame, number in zip(words, numbers, strict=True):
                base = number * self._rows * self._columns
                for row in range(first, last + 1):
                    self._read_row(file, base, row, frame, top, left)
        return words

    def _read_row(self, file: FileIO, base: int, row: int, out: Words, top: int, left: int) -> None:
        """Fill what the tiles of one row have of the rectangle `out`, which begins at (top, left)."""
        height, width = out.shape
        first, last = left // TILE, (left + width - 1) // TILE
        at = base + row * self._columns
        begin = int(self._offsets[at + first])
        file.seek(begin)
        block = file.read(int(self._offsets[at + last + 1]) - begin)
        up, down = max(row * TILE, top), min((row + 1) * TILE, top + height)
        for column in range(first, last + 1):
            shape = tuple(min(TILE, s - TILE * i) for s, i in zip(self.header.size, (row, column), strict=True))
            low, high = (int(self._offsets[at + i]) - begin for i in (column, column + 1))
            try:
                tile = decode_tile(block[low:high], (shape[0], shape[1]))
            except _BAD as error:
                raise damaged(self.path, error) from error
            start, stop = max(column * TILE, left), min((column + 1) * TILE, left + width)
            out[up - top : down - top, start - left : stop - left] = tile[
                up - row * TILE : down - row * TILE, start - column * TILE : stop - column * TILE
            ]


def version(stat: os.stat_result) -> tuple[int, int, int]:
    """Another one when a file was replaced."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def encode_frame(words: Words) -> list[bytes]:
    """The tiles of a frame's words (h, w), rows first."""
    h, w = words.shape
    return [_encode_tile(words[y : y + TILE, x : x + TILE]) for y in range(0, h, TILE) for x in range(0, w, TILE)]


def _encode_tile(words: Words) -> bytes:
    table, numbers = np.unique(words, return_inverse=True)
    planes = table.astype("<u8").view(np.uint8).reshape(-1, 8).T
    kind = np.dtype(np.uint8 if len(table) <= 256 else "<u2")
    content = struct.pack("<H", len(table)) + planes.tobytes() + numbers.astype(kind).tobytes()
    return zlib.compress(content, 9)


def decode_tile(blob: bytes, shape: tuple[int, int]) -> Words:
    """The words of one tile of `shape`; ValueError or zlib.error where it is not one."""
    content = zlib.decompress(blob)
    (count,) = struct.unpack_from("<H", content)
    planes = np.frombuffer(content, np.uint8, 8 * count, 2).reshape(8, count)
    table = np.ascontiguousarray(planes.T).view("<u8")[:, 0]
    numbers = np.frombuffer(content, np.uint8 if count <= 256 else "<u2", offset=2 + 8 * count)
    return table[numbers].reshape(shape)


def write_header(header: Header, lengths: Iterable[int]) -> bytes:
    """All that comes before the tiles."""
    text = json.dumps(asdict(header), sort_keys=True).encode()
    index = np.asarray(list(lengths), "<u4").tobytes()
    return MAGIC + _LEAD.pack(len(text), zlib.crc32(text + index)) + text + index


def _read_header(read: Any) -> tuple[Header, Any]:
    """The header and the lengths of all tiles, from a file's `read`."""
    if read(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin like a file of masks")
    size, checksum = _LEAD.unpack(read(_LEAD.size))
    text = read(size)
    fields = json.loads(text)
    header = Header(fields["settings"], fields["count"], tuple(fields["size"]), tuple(fields["hashes"]))
    tiles = len(header.hashes) * -(-header.size[0] // TILE) * -(-header.size[1] // TILE)
    index = read(4 * tiles)
    if zlib.crc32(text + index) != checksum:
        raise ValueError("the checksum of its header does not fit")
    return header, np.frombuffer(index, "<u4", tiles)


def check_whole(path: Path) -> None:
    """Raise DamagedMasksError if any byte of the file is not what was written."""
    checksum, block, rest = 0, b"", b""
    with path.open("rb") as file:
        while block := file.read(2**20):
            block = rest + block
            block, rest = block[:-4], block[-4:]  # the last four bytes are the checksum
            checksum = zlib.crc32(block, checksum)
    if rest != struct.pack("<I", checksum):
        raise damaged(path, ValueError("its checksum does not fit"))


def damaged(path: Path, reason: Exception) -> DamagedMasksError:
    """The error for a file that cannot be read."""
    return DamagedMasksError(f"{path} is damaged, or is no file of masks ({reason}); `vsrplug masks` makes it anew")
