"""`vsrplug upscale`: what goes in comes out: frames, rate, sound, colour; whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import hydra
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from vsrplug.backbones import Bicubic
from vsrplug.commands import upscale
from vsrplug.data import FrameFolder, VideoFile, video_writer
from vsrplug.data.video_properties import is_constant, read_properties

T, H, W = 20, 32, 48
YUV = (120, 100, 160)  # of the flat clips


def pictures(t: int = T, h: int = H, w: int = W) -> np.ndarray:
    """(t, h, w, 3) uint8, smooth and moving."""
    y, x = np.mgrid[:h, :w]
    return np.stack([np.stack([x * 3 + i, y * 5, (x + y) * 2 + 40], -1).clip(0, 255) for i in range(t)]).astype(
        np.uint8
    )


def video(
    path: Path,
    frames: int = T,
    rate: Fraction | int = 25,
    times: list[int] | None = None,
    tags: tuple[int, int, int, int] = (2, 2, 2, 0),
    flat: bool = False,
    size: tuple[int, int] = (H, W),
    sound: str | None = None,
    rotation: int = 0,
) -> Path:
    """An encoded clip. `tags` are matrix, primaries, transfer, range; `times` are milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10", "bf": "2"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = tags
        if times:
            context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        audio = container.add_stream(sound, rate=48000, layout="mono") if sound else None
        for i, array in enumerate(pictures(frames, *size)):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuv420p")
            if flat:
                planes = np.full((size[0] * 3 // 2, size[1]), YUV[0], np.uint8)
                planes[size[0] : size[0] * 5 // 4], planes[size[0] * 5 // 4 :] = YUV[1], YUV[2]
                frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.colorspace, frame.color_range = tags[0], tags[3]
            frame.pts = times[i] if times else i
            frame.time_base = context.time_base if times else 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio:
            for start in range(0, 48000, 1024):
                wave = np.sin(np.arange(start, start + 1024) / 48000 * 440 * 2 * np.pi).astype(np.float32)
                tone = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
                tone.sample_rate, tone.pts, tone.time_base = 48000, start, Fraction(1, 48000)
                container.mux(audio.encode(tone))
            container.mux(audio.encode())
    return path


def folder(path: Path, frames: int = T) -> Path:
    path.mkdir()
    for i, array in enumerate(pictures(frames)):
        Image.fromarray(array).save(path / f"shot_{i + 1}.png")
    return path


def config(*overrides: str) -> DictConfig:
    with hydra.initialize_config_module("vsrplug.conf", version_base="1.3"):
        return hydra.compose("upscale", ["backbone=bicubic", "device=cpu", *overrides])


def run(source: Path, target: Path | str, *overrides: str) -> None:
    upscale.run(config(f"input='{source}'", f"output='{target}'", "chunk=8", "overlap=2", *overrides))


def restored(path: Path) -> Tensor:
    clip = FrameFolder(path) if path.is_dir() else VideoFile(path)
    return torch.stack(list(clip.frames()))


def sound_of(path: Path) -> list[tuple[bytes, Fraction]]:
    """Packets and their times."""
    with av.open(str(path)) as container:
        return [(bytes(p), p.pts * p.time_base) for p in container.demux(audio=0) if p.size]


def start_of(path: Path) -> Fraction:
    with av.open(str(path)) as container:
        return min(p.pts for p in container.demux(video=0) if p.size) * container.streams.video[0].time_base


def test_a_folder_becomes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = folder(tmp_path / "in"), tmp_path / "new" / "out"
    run(source, target)
    assert [file.name for file in FrameFolder(target).files] == [f"shot_{i + 1}.png" for i in range(T)]
    expected = Bicubic(4)(restored(source)[None])[0]
    assert torch.equal(restored(target), (expected * 255).round().clamp(0, 255) / 255)
    assert sorted(path.name for path in target.parent.iterdir()) == ["out"]
    assert sorted(path.suffix for path in target.iterdir()) == [".png"] * T
    assert f"{T} frames in" in (line := capsys.readouterr().out)
    assert str(target) in line


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001)])
def test_a_video_keeps_rate_frames_and_sound(tmp_path: Path, ending: str, rate: Fraction | int) -> None:
    source, target = video(tmp_path / f"in{ending}", rate=rate, sound="aac"), tmp_path / f"out{ending}"
    run(source, target, "crf=1")
    assert len(VideoFile(target)) == T
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width) == (4 * H, 4 * W)
        assert stream.average_rate == rate
    before, after = sound_of(source), sound_of(target)
    assert [data for data, _ in after] == [data for data, _ in before]
    shift = start_of(target) - start_of(source)
    assert all(abs(b - a - shift) <= Fraction(1, 1000) for (_, a), (_, b) in zip(before, after, strict=True))
    expected = Bicubic(4)(restored(source)[None])[0].clamp(0, 1)
    assert (restored(target) - expected).abs().mean() < 0.01


def blended(source: Path, times: tuple[float, ...]) -> Tensor:
    """What Bicubic makes of a clip at a multiple of its rate."""
    expected = Bicubic(4)(restored(source)[None], times=times)[0].clamp(0, 1)
    expected[-len(times) :] = expected[-len(times) - 1]
    return expected


@pytest.mark.parametrize("count", [2, 4])
def test_a_multiple_of_the_rate_keeps_duration_and_sound(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = video(tmp_path / "in.mp4", rate=Fraction(30000, 1001), sound="aac"), tmp_path / "out.mp4"
    run(source, target, "crf=1", f"fps=x{count}")
    found = read_properties(target)
    assert found.rate == count * Fraction(30000, 1001)
    assert len(VideoFile(target)) == count * T
    assert f"{count * T} frames in" in capsys.readouterr().out
    lasting = [len(VideoFile(path)) / read_properties(path).rate for path in (source, target)]
    assert lasting[0] == lasting[1]
    before, after = sound_of(source), sound_of(target)
    assert [data for data, _ in after] == [data for data, _ in before]
    shift = start_of(target) - start_of(source)
    assert all(abs(b - a - shift) <= Fraction(1, 1000) for (_, a), (_, b) in zip(before, after, strict=True))
    expected = blended(source, tuple(k / count for k in range(1, count)))
    assert (restored(target) - expected).abs().mean() < 0.01


def test_a_multiple_of_a_variable_rate_lies_between_its_times(tmp_path: Path) -> None:
    times = [0, 40, 80, 100, 120, 200, 210, 300, 333, 400]
    run(video(tmp_path / "in.mp4", frames=10, times=times), tmp_path / "out.mp4", "fps=x2")
    with av.open(str(tmp_path / "out.mp4")) as container:
        given = sorted(p.pts * p.time_base for p in container.demux(video=0) if p.size)
    expected = [0, 20, 40, 60, 80, 90, 100, 110, 120, 160, 200, 205, 210, 255, 300, 316.5, 333, 366.5, 400, 433.5]
    assert [float((time - given[0]) * 1000) for time in given] == pytest.approx(expected, abs=0.1)


def test_a_folder_at_a_multiple_is_numbered_and_goes_on(tmp_path: Path, computed: list[int]) -> None:
    source = folder(tmp_path / "shots")
    run(source, tmp_path / "whole", "fps=x2")
    assert [file.name for file in FrameFolder(tmp_path / "whole").files] == [f"{i:08d}.png" for i in range(2 * T)]
    assert (restored(tmp_path / "whole") - blended(source, (0.5,))).abs().max() <= 0.5 / 255 + 1e-6
    chunks = len(computed) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upscale.FrameWriter, "write", killed_at(35, upscale.FrameWriter))
        with pytest.raises(KilledError):
            run(source, tmp_path / "out", "fps=x2")
    computed.clear()
    run(source, tmp_path / "out", "fps=x2")
    assert 0 < len(computed) < chunks
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out")]
    assert files[0] == files[1]
    run(source, tmp_path / "out.mp4", "fps=x2")
    assert read_properties(tmp_path / "out.mp4").rate == 50


def test_times_of_a_variable_rate_are_kept(tmp_path: Path) -> None:
    times = [0, 40, 80, 100, 120, 200, 210, 300, 333, 400]
    source = video(tmp_path / "in.mp4", frames=10, times=times, sound="aac")
    run(source, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        given = sorted(p.pts * p.time_base for p in container.demux(video=0) if p.size)
    assert [round((time - given[0]) * 1000) for time in given] == times


def test_a_late_start_keeps_sound_and_picture_together(tmp_path: Path) -> None:
    source = video(tmp_path / "in.mkv", times=[70 + 40 * i for i in range(T)], sound="aac")
    run(source, tmp_path / "out.mkv")
    late = [sound_of(path)[0][1] - start_of(path) for path in (source, tmp_path / "out.mkv")]
    assert abs(late[1] - late[0]) <= Fraction(1, 1000)


def test_rounded_times_are_a_constant_rate() -> None:
    rate = Fraction(24000, 1001)
    rounded = [Fraction(round(i / rate * 1000), 1000) for i in range(5000)]
    assert is_constant(rounded, rate)
    assert not is_constant(rounded, Fraction(24))  # off by a frame after 42 s
    assert not is_constant([*rounded[:9], *rounded[10:]], rate)


@pytest.mark.parametrize("tags", [(1, 1, 1, 1), (6, 6, 6, 1), (5, 5, 6, 2), (9, 9, 16, 1), (1, 12, 13, 2)])
def test_colours_and_their_tags_are_kept(tmp_path: Path, tags: tuple[int, int, int, int]) -> None:
    source, target = video(tmp_path / "in.mp4", frames=3, tags=tags, flat=True), tmp_path / "out.mp4"
    run(source, target, "crf=0")
    with av.open(str(target)) as container:
        frame = next(container.decode(video=0))
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == tags
    planes = frame.to_ndarray(format=frame.format.name)
    h = 4 * H
    for given, plane in zip(YUV, (planes[:h], planes[h : h * 5 // 4], planes[h * 5 // 4 :]), strict=True):
        assert np.abs(plane.astype(int) - given).max() <= 2  # one for each rounding to 8 bits


def test_untagged_small_video_keeps_its_colours_when_it_becomes_large(tmp_path: Path) -> None:
    """A player takes untagged SD for BT.601 and untagged HD for BT.709, so the result says which it is."""
    source = video(tmp_path / "in.mp4", frames=2, flat=True, size=(160, 320))
    run(source, tmp_path / "out.mp4", "crf=0")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].codec_context.colorspace == 6
        frame = next(container.decode(video=0))
    assert [int(np.median(np.asarray(plane))) for plane in frame.planes] == pytest.approx(YUV, abs=2)


def test_frames_of_a_folder_become_a_tagged_video(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    run(source, tmp_path / "out.mp4", "crf=1", "fps=24000/1001")
    found = read_properties(tmp_path / "out.mp4")
    assert (found.rate, found.matrix, found.colour_range) == (Fraction(24000, 1001), 6, 1)
    expected = Bicubic(4)(restored(source)[None])[0].clamp(0, 1)
    assert (restored(tmp_path / "out.mp4") - expected).abs().mean() < 0.01
    run(source, tmp_path / "hd.mp4", "backbone.scale=30")  # 1440 wide
    assert read_properties(tmp_path / "hd.mp4").matrix == 1
    assert read_properties(tmp_path / "hd.mp4").rate == 25


def test_odd_sizes_are_written_whole(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(pictures(1, 33, 47)[0]).save(tmp_path / "in" / "a.png")
    run(tmp_path / "in", tmp_path / "out.mp4", "backbone.scale=1", "crf=1")
    assert restored(tmp_path / "out.mp4").shape == (1, 3, 33, 47)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].pix_fmt == "yuv444p"


def test_a_turned_video_is_shown_as_before(tmp_path: Path) -> None:
    source = video(tmp_path / "in.mp4", frames=3, rotation=90)
    run(source, tmp_path / "out.mp4", "crf=1")
    expected = Bicubic(4)(restored(source)[None])[0].clamp(0, 1).rot90(1, (-2, -1))
    result = restored(tmp_path / "out.mp4")
    assert result.shape == expected.shape == (3, 3, 4 * W, 4 * H)
    assert (result - expected).abs().mean() < 0.01
    run(source, tmp_path / "out")
    assert restored(tmp_path / "out").shape == expected.shape


def test_without_libx264_mpeg4_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_writer.av.codec, "codecs_available", {"mpeg4"})
    source = video(tmp_path / "in.mp4", times=[0, 40, 90, *range(130, 810, 40)], sound="aac")
    run(source, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    expected = Bicubic(4)(restored(source)[None])[0].clamp(0, 1)
    assert (restored(tmp_path / "out.mp4") - expected).abs().mean() < 0.02


class KilledError(BaseException):
    """Nobody catches it."""


def killed_at(number: int, writer: type) -> Callable[..., None]:
    original = writer.write  # type: ignore[attr-defined]

    def write(self: Any, at: int, frame: Tensor) -> None:
        if at == number:
            raise KilledError
        original(self, at, frame)

    return write


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the clips that the network was given."""
    lengths: list[int] = []
    original = Bicubic.forward

    def forward(self: Bicubic, frames: Tensor, context: Any = None, times: Any = ()) -> Tensor:
        lengths.append(frames.shape[1])
        return original(self, frames, context, times)

    monkeypatch.setattr(Bicubic, "forward", forward)
    return lengths


def test_a_killed_folder_goes_on(tmp_path: Path, computed: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    source = video(tmp_path / "in.mp4", frames=40)
    run(source, tmp_path / "whole")
    chunks = len(computed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upscale.FrameWriter, "write", killed_at(23, upscale.FrameWriter))
        with pytest.raises(KilledError):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"
    assert len(list(partial.glob("*.png"))) == 23
    (partial / ".00000023.png.tmp").write_bytes(b"half a frame")
    computed.clear()
    run(source, tmp_path / "out")
    assert 0 < len(computed) < chunks
    assert not partial.exists()
    assert "17 frames (23 were there already)" in capsys.readouterr().out
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out")]
    assert files[0] == files[1]


def test_other_settings_start_afresh(tmp_path: Path, computed: list[int]) -> None:
    source = folder(tmp_path / "in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upscale.FrameWriter, "write", killed_at(15, upscale.FrameWriter))
        with pytest.raises(KilledError):
            run(source, tmp_path / "out")
    computed.clear()
    run(source, tmp_path / "out", "backbone.scale=2")
    assert sum(computed) > T
    assert restored(tmp_path / "out").shape == (T, 3, 2 * H, 2 * W)


def test_a_failed_video_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = video(tmp_path / "in.mp4", sound="aac"), tmp_path / "out.mp4"
    target.write_bytes(b"an earlier result")
    monkeypatch.setattr(upscale.VideoWriter, "write", killed_at(15, upscale.VideoWriter))
    with pytest.raises(KilledError):
        run(source, target, "overwrite=true")
    assert target.read_bytes() == b"an earlier result"
    with pytest.raises(KilledError):
        run(source, tmp_path / "new.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_overwriting_is_asked_for(tmp_path: Path) -> None:
    source, target = folder(tmp_path / "in", 3), tmp_path / "out"
    target.mkdir()  # empty: nothing to lose
    run(source, target)
    with pytest.raises(FileExistsError, match=r"output folder .*out is not empty; name another, or add overwrite=true"):
        run(source, target)
    (target / "extra.png").write_bytes((target / "shot_1.png").read_bytes())
    run(source, target, "overwrite=true")
    assert sorted(path.name for path in target.iterdir()) == ["shot_1.png", "shot_2.png", "shot_3.png"]
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"would be replaced, but holds more than images: thesis\.tex; name another"):
        run(source, target, "overwrite=true")
    run(source, tmp_path / "out.mp4")
    with pytest.raises(FileExistsError, match=r"output .*out\.mp4 exists; name another, or add overwrite=true"):
        run(source, tmp_path / "out.mp4")
    run(source, tmp_path / "out.mp4", "overwrite=true")


def test_bad_arguments_are_told_in_one_line(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "note").write_text("text")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "letter.txt").write_text("text")
    clip = video(tmp_path / "clip.mp4", frames=2)
    out = tmp_path / "out"
    for given, to, overrides, message in (
        (tmp_path / "none.mp4", out, [], r"there is no input .*none\.mp4; expected a video file or a folder of frames"),
        (tmp_path / "empty", out, [], r"folder .*empty holds no images"),
        (tmp_path / "note", out, [], r"note cannot be read as a video"),
        (
            source,
            tmp_path / "out.webm",
            [],
            r"cannot write .*out\.webm: output is a video ending in \.mp4, \.m4v, \.mov",
        ),
        (source, tmp_path / "note", ["overwrite=true"], r"cannot write .*note: output is a video ending in"),
        (source, source, ["overwrite=true"], r"output .*in is the input itself"),
        (source, out, ["overlap=8"], r"overlap=8 must be smaller than chunk=8; try chunk=24"),
        (source, tmp_path / "a.mp4", ["crf=99"], r"crf=99 must be a whole number from 0 \(lossless\) to 51"),
        (source, tmp_path / "a.mp4", ["fps=slow"], r"fps=slow must be a positive number, a fraction such"),
        (clip, tmp_path / "a.mp4", ["fps=x0"], "fps=x0 leaves no frame; expected x2, x3 and so on"),
        (
            clip,
            tmp_path / "a.mp4",
            ["fps=x2", "backbone=basicvsr_tiny_untrained"],
            r"fps=x2 needs a network that makes frames in between, which BasicVSR does not; those that do are STVUN \(",
        ),
        (clip, tmp_path / "a.mp4", ["fps=30"], r"fps=30 is for folders of frames; the video .*clip\.mp4 keeps its own"),
        (source, tmp_path / "mine", [], r"mine\.partial is in the way, and was not left by an unfinished run"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run(given, to, *overrides)
    with pytest.raises(ValueError, match=r"input=\.\.\. is missing: a video file or a folder of frames"):
        upscale.run(config(f"output={out}"))
    with pytest.raises(ValueError, match=r"output=\.\.\. is missing: a video file \(out\.mp4\), or a folder"):
        upscale.run(config(f"input={source}"))
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_sound_that_does_not_fit_is_told_before_anything_is_computed(tmp_path: Path, computed: list[int]) -> None:
    source = video(tmp_path / "in.mkv", sound="wavpack")
    with pytest.raises(ValueError, match=r"\.mp4 cannot hold the sound of .*in\.mkv \(wavpack\); write an \.mkv, or"):
        run(source, tmp_path / "out.mp4")
    assert not computed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mkv"]
    run(source, tmp_path / "out.mkv")
    assert [data for data, _ in sound_of(tmp_path / "out.mkv")] == [data for data, _ in sound_of(source)]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in", 3)

    def full(self: Any, packets: Any) -> None:
        raise av.error.OSError(28, "No space left on device", "out.mp4")

    monkeypatch.setattr(upscale.VideoWriter, "_mux", full)
    with pytest.raises(OSError, match=r"cannot write .*out\.mp4: .*No space left on device"):
        run(source, tmp_path / "out.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_the_command_line(tmp_path: Path) -> None:
    source = video(tmp_path / "in.mp4", frames=5)
    program = [sys.executable, "-c", "from vsrplug.commands.upscale import main; main()", "backbone=bicubic"]
    good = subprocess.run([*program, f"input={source}", "output=out.mp4"], cwd=tmp_path, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith("5 frames in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]
    assert len(VideoFile(tmp_path / "out.mp4")) == 5
