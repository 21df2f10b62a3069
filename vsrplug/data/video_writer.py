"""`VideoWriter`: restored frames to a video file with the timing, colour tags and sound of another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import torch
from torch import Tensor

from vsrplug.data.video_properties import FINEST, VideoProperties

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # ending -> FFmpeg's name

# SWS_CS_* of each matrix: swscale has one number for the two kinds of BT.601
_SWSCALE = {6: 5}


class VideoWriter:
    """Encodes frames as H.264 (MPEG-4 part 2 where PyAV has no libx264), 8 bits, 4:2:0; 4:4:4 for odd sizes.

    A context manager. The file is written beside its place and renamed at the end: it is whole, or, after an error, not
    there, and what was at its place before stays.

    Args:
        path: where to, ending in one of `FORMATS`.
        size: height and width of the frames to come.
        properties: timing, colour and pixel shape; the matrix is chosen by the size where it is unspecified. Frames
            are to be given upright, `rotation` is not looked at.
        crf: constant rate factor of libx264, 0 (lossless) to 51.
        sound: a file whose audio streams are copied, packet by packet, or None.

    Raises:
        ValueError: an unknown ending, a crf out of range, or sound that the format cannot hold.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        size: tuple[int, int],
        properties: VideoProperties,
        crf: int = 18,
        sound: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.partial")
        self.count = 0
        if self.path.suffix.lower() not in FORMATS:
            raise ValueError(f"cannot write {self.path}: videos end in {', '.join(FORMATS)}")
        if isinstance(crf, bool) or not isinstance(crf, int) or not 0 <= crf <= 51:
            raise ValueError(f"crf={crf} must be a whole number from 0 (lossless) to 51; try 18")
        self.properties = properties.for_size(*size)
        with ExitStack() as stack:
            stack.callback(self.temporary.unlink, missing_ok=True)
            self.output = self._open(stack)
            self.stream = self._video_stream(*size, crf)
            self.sound = self._copied(sound, stack)
            self.next_packet = next(self.sound, None)
            self._stack = stack.pop_all()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is not None:
                return
            try:
                self._mux(self.stream.encode(None))
                self._mux_sound(None)
                self.output.close()
            except av.error.FFmpegError as failure:
                raise OSError(f"cannot write {self.path}: {failure}") from failure
            os.replace(self.temporary, self.path)

    def missing(self, number: int) -> bool:
        """Always: an unfinished video cannot be continued."""
        return True

    def write(self, number: int, frame: Tensor) -> None:
        """Encode the frame (3, h, w) in [0, 1]; `number` counts up from 0.

        Raises:
            OSError: it cannot be written, the disk may be full.
        """
        picture = av.VideoFrame.from_ndarray(to_uint8(frame).permute(1, 2, 0).contiguous().numpy(), format="rgb24")
        matrix = self.properties.matrix
        picture = picture.reformat(
            format=self.stream.pix_fmt,
            dst_colorspace=_SWSCALE.get(matrix, matrix),
            dst_color_range=self.properties.colour_range,
        )
        picture.colorspace = matrix
        unit = self.stream.codec_context.time_base
        times = self.properties.times
        picture.pts = self.count if times is None else round(times[self.count] / unit)
        picture.time_base = unit
        self.count += 1
        try:
            self._mux(self.stream.encode(picture))
        except av.error.FFmpegError as failure:
            raise OSError(f"cannot write {self.path}: {failure}") from failure

    def _open(self, stack: ExitStack) -> av.container.OutputContainer:
        try:
            output = av.open(str(self.temporary), "w", format=FORMATS[self.path.suffix.lower()])
        except av.error.FFmpegError as failure:
            raise OSError(f"cannot write {self.path}: {failure}") from failure
        stack.callback(_close, output)
        return output

    def _video_stream(self, height: int, width: int, crf: int) -> av.VideoStream:
        codec = encoder()
        options = {"crf": str(crf)} if codec == "libx264" else {"qmin": "2", "qmax": "4"}
        stream = self.output.add_stream(codec, rate=self.properties.rate, options=options)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if (height % 2 or width % 2) and codec == "libx264" else "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / self.properties.rate if self.properties.times is None else FINEST
        context.sample_aspect_ratio = self.properties.aspect
        context.color_range = self.properties.colour_range
        context.color_primaries = self.properties.primaries
        context.color_trc = self.properties.transfer
        context.colorspace = self.properties.matrix
        return stream

    def _copied(self, sound: str | Path | None, stack: ExitStack) -> Iterator[av.Packet]:
        """Packets of every audio stream, each with its output stream, from which the video's start is subtracted."""
        if sound is None:
            return iter(())
        source = stack.enter_context(av.open(str(sound)))
        outputs = {}
        for stream in source.streams.audio:
            name = stream.codec_context.name if stream.codec_context else "unknown"
            if stream.codec.canonical_name not in self.output.supported_codecs:
                raise ValueError(
                    f"{self.path.suffix} cannot hold the sound of {sound} ({name}); write an .mkv, or convert the "
                    f"sound first: ffmpeg -i {sound} -c:v copy -c:a aac converted.mkv"
                )
            outputs[stream.index] = self.output.add_stream_from_template(stream)
            outputs[stream.index].metadata.update(stream.metadata)
        if not outputs:
            return iter(())
        return self._packets(source, outputs)

    def _packets(self, source: av.container.InputContainer, outputs: dict[int, av.AudioStream]) -> Iterator[av.Packet]:
        for packet in source.demux(*(source.streams[index] for index in outputs)):
            if packet.dts is None or packet.pts is None:  # the last one of a stream is empty
                continue
            late = round(self.properties.start / packet.time_base)
            packet.pts, packet.dts = packet.pts - late, packet.dts - late
            packet.stream = outputs[packet.stream_index]
            yield packet

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            self._mux_sound(packet.dts * packet.time_base)
            self.output.mux(packet)

    def _mux_sound(self, until: Fraction | None) -> None:
        """Write the sound up to a time, so that the muxer need not wait for it; all that is left for None."""
        while self.next_packet is not None and (
            until is None or self.next_packet.dts * self.next_packet.time_base <= until
        ):
            self.output.mux(self.next_packet)
            self.next_packet = next(self.sound, None)


def encoder() -> str:
    """The encoder there is: PyAV's wheels bring libx264, other builds may not."""
    return "libx264" if "libx264" in av.codec.codecs_available else "mpeg4"


def to_uint8(frame: Tensor) -> Tensor:
    """[0, 1] -> 0 to 255, rounded."""
    return (frame * 255).round().clamp(0, 255).to(torch.uint8)


def _close(output: av.container.OutputContainer) -> None:
    """Close what an error left open; what the trailer says no longer matters."""
    try:
        output.close()
    except av.error.FFmpegError:
        return
