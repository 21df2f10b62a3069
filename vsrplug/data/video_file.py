"""`VideoFile`: a clip decoded lazily from a video file with PyAV."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import av
import torch
from torch import Tensor

from vsrplug.data.video_properties import BT709, UNSPECIFIED

VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".y4m"})


class _Index(NamedTuple):
    """What one reading of the packets tells. Times are in the stream's own units, and empty where frames have none."""

    length: int
    times: list[int]  # of each frame, ascending
    keys: list[tuple[int, int]]  # time of each key frame, and where to seek for it
    numbers: dict[int, int]  # time -> frame number


class VideoFile:
    """A video file as a clip. One frame is held at a time, whatever the length.

    The first call of `len` or `frames` reads through the file once without decoding, to learn the frames' times;
    `frames(start)` then decodes from the last key frame before `start`. Where a format has no times, frames are counted
    and skipped by decoding them. Colours are converted as the file's tags say; more than 8 bits a channel are kept.

    Args:
        path: the file.

    Attributes:
        name: the file's name without its ending.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged, or has no video stream; the message names it. Damage further on is
            found while reading, as far as the decoder reports it: some conceal it without a word.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.stem
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no video file {self.path}")
        if not self.path.stat().st_size:
            raise ValueError(f"video file {self.path} is empty")
        self._open().close()

    def __len__(self) -> int:
        return self._index.length

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Frames [start, stop), each (3, h, w) float32 RGB in [0, 1], decoded as they are asked for."""
        index = self._index
        wanted = range(index.length)[start:stop]
        if not wanted:
            return
        size: tuple[int, int] | None = None
        due = wanted.start
        for number, frame in self._numbered(wanted.start):
            if number < due:
                continue
            if number > due:
                raise self._damaged(due, "it cannot be decoded")
            size = size or (frame.height, frame.width)
            if (frame.height, frame.width) != size:
                raise ValueError(
                    f"the frames of a clip must have one size: in {self.path}, frame {number} is "
                    f"{frame.height}x{frame.width}, those before are {size[0]}x{size[1]}"
                )
            if frame.is_corrupt:
                raise self._damaged(number, "the decoder marked the frame as corrupt")
            yield _to_tensor(frame)
            due += 1
            if due == wanted.stop:
                return
        raise self._damaged(due, f"the stream ends there, {index.length} frames were announced")

    def _numbered(self, start: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames and their numbers, from the last key frame at or before `start` where it can be found."""
        index = self._index
        keys = [key for key in index.keys if key[0] <= index.times[start]] if index.times and start else []
        if keys:
            time, position = keys[-1]
            with self._open() as container:
                stream = container.streams.video[0]
                container.seek(position, stream=stream)
                packets = container.demux(stream)
                # Containers differ in where a seek lands; what comes before the key frame is of no use.
                key = next((packet for packet in packets if packet.pts == time and packet.is_keyframe), None)
                if key is not None:
                    for frame in self._decode(itertools.chain([key], packets), start):
                        if frame.pts in index.numbers:  # what is shown before the key frame may be broken, but
                            yield index.numbers[frame.pts], frame  # then it lies before `start` as well
                    return
        with self._open() as container:
            for count, frame in enumerate(self._decode(container.demux(video=0), 0)):
                yield index.numbers.get(frame.pts, -1) if index.times else count, frame

    @cached_property
    def _index(self) -> _Index:
        with self._open() as container:
            times: list[int | None] = []
            keys: list[tuple[int, int]] = []
            stream = container.streams.video[0]
            packets = 0
            try:
                for packet in container.demux(stream):
                    if not packet.size:  # the last one is empty, it flushes the decoder
                        continue
                    packets += 1
                    if packet.is_corrupt:
                        raise self._damaged(len(times), "a packet is incomplete")
                    if packet.is_keyframe and packet.pts is not None:
                        keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
                    if not packet.is_discard:  # else outside what an edit list shows
                        times.append(packet.pts)
            except av.error.FFmpegError as error:
                raise self._damaged(len(times), str(error)) from error
            if packets < stream.frames and "mp4" in container.format.name:  # elsewhere the header is a guess
                raise self._damaged(packets, f"the file ends there, its header announces {stream.frames} frames")
        known = sorted(time for time in times if time is not None)
        if len(set(known)) == len(times):
            return _Index(len(known), known, sorted(keys), {time: number for number, time in enumerate(known)})
        with self._open() as container:
            return _Index(sum(1 for _ in self._decode(container.demux(video=0), 0)), [], [], {})

    def _open(self) -> av.container.InputContainer:
        try:
            container = av.open(str(self.path))
        except av.error.FFmpegError as error:
            raise ValueError(f"{self.path} cannot be read as a video, the file may be damaged: {error}") from error
        if not container.streams.video:
            container.close()
            raise ValueError(f"{self.path} has no video stream")
        return container

    def _decode(self, packets: Iterable[av.Packet], start: int) -> Iterator[av.VideoFrame]:
        number = start
        try:
            for packet in packets:
                for frame in packet.decode():
                    yield frame
                    number += 1
        except av.error.FFmpegError as error:
            raise self._damaged(number, str(error)) from error

    def _damaged(self, number: int, why: str) -> ValueError:
        return ValueError(f"{self.path} is damaged near frame {number}: {why}")


def _to_tensor(frame: av.VideoFrame) -> Tensor:
    """(3, h, w) float32 RGB in [0, 1]."""
    deep = any(component.bits > 8 for component in frame.format.components)
    # Untagged, swscale would take BT.601 whatever the size; high definition is BT.709, as players assume.
    untagged, high_definition = frame.colorspace == UNSPECIFIED, frame.width >= 1280 or frame.height > 576
    matrix = BT709 if untagged and high_definition else None
    array = frame.to_ndarray(format="rgb48le" if deep else "rgb24", src_colorspace=matrix)
    return torch.from_numpy(array).permute(2, 0, 1).float().contiguous() / (65535 if deep else 255)


def is_video(path: Path) -> bool:
    """Whether the name is that of a video file, and not a hidden one."""
    return path.suffix.lower() in VIDEOS and not path.name.startswith(".") and path.is_file()
