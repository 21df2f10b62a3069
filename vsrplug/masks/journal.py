"""`Journal`: an unfinished clip, in a file that a kill at any moment leaves readable."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from vsrplug.masks.cache_file import TILE, Header, encode_frame, write_header
from vsrplug.masks.words import Words

_RECORD = struct.Struct("<II32s")  # length of index and tiles, CRC-32 of all but itself, the frame's hash


def partial_path(path: Path) -> Path:
    """Where the masks of an unfinished clip lie."""
    return path.with_name(f".{path.name}.partial")


class Journal:
    """A line that says what is made, then one record a frame, each with its checksum.

    Args:
        path: the file that the clip's masks become.
        file: the unfinished one, open for reading and appending, without a buffer, and locked. What an earlier run left
            in it is kept as far as it is whole, and of the same settings, count and size.
        settings, count: of the mask source.
        size: height and width of the frames.
    """

    def __init__(self, path: Path, file: BinaryIO, settings: dict[str, Any], count: int, size: tuple[int, int]) -> None:
        self.path = path
        self.file = file
        self.header = Header(settings, count, size, ())
        self.hashes: list[str] = []
        self.lengths: list[tuple[int, ...]] = []  # of the tiles of every frame
        self._tiles = -(-size[0] // TILE) * -(-size[1] // TILE)
        self._ends = [self._begin()]  # where records end
        self._read()

    def add(self, digest: str, words: Words) -> None:
        """Append the masks of the next frame."""
        tiles = encode_frame(words)
        content = struct.pack(f"<{len(tiles)}I", *map(len, tiles)) + b"".join(tiles)
        self._append(_RECORD.pack(len(content), zlib.crc32(digest.encode() + content), digest.encode()) + content)
        self._remember(digest, tuple(map(len, tiles)))

    def forget(self, number: int) -> None:
        """Drop the frames from this one on."""
        self.file.truncate(self._ends[number])
        del self.hashes[number:], self.lengths[number:], self._ends[number + 1 :]

    def finish(self) -> None:
        """Put the file together under another name, rename it, and remove what it was made of."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        header = Header(self.header.settings, self.header.count, self.header.size, tuple(self.hashes))
        try:
            with temporary.open("wb") as out:
                lead = write_header(header, (length for frame in self.lengths for length in frame))
                out.write(lead)
                checksum = zlib.crc32(lead)
                for end, lengths in zip(self._ends[1:], self.lengths, strict=True):
                    self.file.seek(end - sum(lengths))
                    tiles = self.file.read(sum(lengths))
                    out.write(tiles)
                    checksum = zlib.crc32(tiles, checksum)
                out.write(struct.pack("<I", checksum))
            os.replace(temporary, self.path)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            temporary.unlink(missing_ok=True)
        partial_path(self.path).unlink()

    def _begin(self) -> int:
        """Write the first line, or find it; a file that begins otherwise is emptied. Returns where it ends."""
        what = {"settings": self.header.settings, "count": self.header.count, "size": self.header.size}
        line = json.dumps(what, sort_keys=True).encode() + b"\n"
        self.file.seek(0)
        if self.file.read(len(line)) != line:
            self.file.truncate(0)
            self._append(line)
        return len(line)

    def _read(self) -> None:
        """Find the whole records of an earlier run, and cut off what a kill left after them."""
        self.file.seek(self._ends[0])
        while len(lead := self.file.read(_RECORD.size)) == _RECORD.size:
            size, checksum, name = _RECORD.unpack(lead)
            content = self.file.read(size)
            if len(content) < size or zlib.crc32(name + content) != checksum:
                break
            self._remember(name.decode(), struct.unpack_from(f"<{self._tiles}I", content))
        self.file.truncate(self._ends[-1])

    def _remember(self, digest: str, lengths: tuple[int, ...]) -> None:
        self.hashes.append(digest)
        self.lengths.append(lengths)
        self._ends.append(self._ends[-1] + _RECORD.size + 4 * len(lengths) + sum(lengths))

    def _append(self, content: bytes) -> None:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> OSError:
        return OSError(
            f"{self.path} could not be written ({error}); the masks made so far are kept, and the same command goes on "
            "from them"
        )
