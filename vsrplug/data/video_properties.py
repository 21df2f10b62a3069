"""`VideoProperties`: what a video file has besides its pixels: times, colour tags, pixel shape, rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av

# Numbers of ITU-T H.273, which FFmpeg uses
UNSPECIFIED = 2
BT709, FCC, BT601_625, BT601_525, SMPTE240M, BT2020 = 1, 4, 5, 6, 7, 9
MATRICES = frozenset({BT709, FCC, BT601_625, BT601_525, SMPTE240M, BT2020})
LIMITED, FULL = 1, 2  # FFmpeg's numbers; 0 is unspecified

# A number of frames a second that is none of these steps is kept by its times, in this unit: MPEG-4 takes no finer one.
FINEST = Fraction(1, 60000)


@dataclass(frozen=True)
class VideoProperties:
    """What is kept from one video to another.

    Args:
        rate: frames a second.
        start: time of the first frame, seconds.
        times: of each frame after the first one, seconds; None where the rate is constant.
        matrix: between RGB and YUV.
        colour_range: `LIMITED` or `FULL`.
        primaries, transfer: as tagged.
        aspect: width of a pixel over its height.
        rotation: degrees that a player turns frames counterclockwise: 0, 90, 180 or 270.
    """

    rate: Fraction
    start: Fraction = Fraction(0)
    times: tuple[Fraction, ...] | None = None
    matrix: int = UNSPECIFIED
    colour_range: int = LIMITED
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    aspect: Fraction = Fraction(1)
    rotation: int = 0

    def for_size(self, height: int, width: int) -> VideoProperties:
        """With a matrix: the one that untagged video of this size is taken to have, BT.709 for HD, BT.601 for SD."""
        if self.matrix in MATRICES:
            return self
        return replace(self, matrix=BT709 if width >= 1280 or height > 576 else BT601_525)

    def upright(self) -> VideoProperties:
        """Of the same video with its frames turned."""
        return replace(self, rotation=0, aspect=1 / self.aspect if self.rotation % 180 else self.aspect)

    def more_frames(self, count: int) -> VideoProperties:
        """Of the same video with `count` frames for each, evenly spaced up to the next; it lasts as long."""
        if self.times is None or count == 1:
            return replace(self, rate=count * self.rate)
        steps = [b - a for a, b in pairwise(self.times)] or [1 / self.rate]
        ways = zip(self.times, [*steps, steps[-1]][: len(self.times)], strict=True)
        times = tuple(time + step * k / count for time, step in ways for k in range(count))
        return replace(self, rate=count * self.rate, times=times)


def read_properties(path: str | Path) -> VideoProperties:
    """The properties of the first video stream of a file.

    Raises:
        ValueError: the first frame cannot be decoded.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
            rates = [stream.guessed_rate, stream.average_rate]
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frame = next(container.decode(stream))
            codec = stream.codec_context
            unit = stream.time_base
            full = codec.color_range == FULL or (codec.pix_fmt or "").startswith("yuvj")
            found = VideoProperties(
                rate=Fraction(25),
                colour_range=FULL if full else LIMITED,
                primaries=codec.color_primaries,
                transfer=codec.color_trc,
                matrix=codec.colorspace,
                aspect=stream.sample_aspect_ratio or Fraction(1),
                rotation=round(frame.rotation / 90) * 90 % 360,
            )
    except (av.error.FFmpegError, StopIteration) as error:
        raise ValueError(f"{path} cannot be read as a video, the file may be damaged: {error}") from error
    found = found.for_size(codec.height, codec.width)
    known = sorted(time for time in times if time is not None)
    rates = [Fraction(rate) for rate in rates if rate]
    if len(set(known)) < len(times) or not unit:  # a format without times
        return replace(found, rate=rates[0]) if rates else found
    seconds = [(time - known[0]) * Fraction(unit) for time in known]
    found = replace(found, start=known[0] * Fraction(unit))
    for rate in rates:
        if is_constant(seconds, rate):
            return replace(found, rate=rate)
    mean = (len(seconds) - 1) / seconds[-1] if len(seconds) > 1 else Fraction(25)
    return replace(found, rate=mean.limit_denominator(1001), times=tuple(seconds))


def is_constant(seconds: Sequence[Fraction], rate: Fraction) -> bool:
    """Whether times from 0 on are those of a constant rate, but for the rounding that containers do (1 ms in mkv)."""
    grid = [time * rate for time in seconds]
    steady = all(round(b) - round(a) == 1 for a, b in pairwise(grid))
    return steady and all(abs(time - round(time)) <= Fraction(1, 4) for time in grid)
