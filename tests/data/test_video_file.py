"""Video files: frames by number equal those of a plain decode, and damage is named."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vsrplug.data import VideoFile

T, H, W = 25, 48, 64


def pictures(t: int = T) -> np.ndarray:
    """(t, h, w, 3) uint8: a gradient that moves, so that frames differ and compress well."""
    y, x = np.mgrid[:H, :W]
    return np.stack([np.stack([x * 2 + 3 * i, y * 4, x + y + 0 * i], -1) % 256 for i in range(t)]).astype(np.uint8)


def encode(path: Path, frames: np.ndarray, codec: str = "libx264", pix_fmt: str = "yuv420p", **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path


def decoded(path: Path) -> torch.Tensor:
    """The oracle: all frames, decoded in one go."""
    with av.open(str(path)) as container:
        arrays = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


FORMATS = {  # b-frames, several key frames, formats with and without frame times
    "a.mp4": {"codec": "libx264", "bf": "3", "g": "8"},
    "a.mkv": {"codec": "libx264", "bf": "2", "g": "7"},
    "a.avi": {"codec": "mpeg4", "g": "6"},
    "a.ts": {"codec": "mpeg2video", "bf": "2", "g": "9"},
    "a.mpg": {"codec": "mpeg1video", "bf": "2", "g": "9"},
    "a.h264": {"codec": "libx264", "bf": "3", "g": "8"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_frames_by_number(tmp_path: Path, name: str) -> None:
    path = encode(tmp_path / name, pictures(), **FORMATS[name])
    expected = decoded(path)
    clip = VideoFile(path)
    assert (clip.name, len(clip)) == ("a", len(expected))
    assert len(clip) == T
    assert torch.equal(torch.stack(list(clip.frames())), expected)
    for start, stop in ((0, 3), (5, 9), (8, 9), (14, 20), (T - 1, None), (T - 3, 99)):
        assert torch.equal(torch.stack(list(clip.frames(start, stop))), expected[start:stop]), (start, stop)
    assert list(clip.frames(7, 7)) == []
    assert list(clip.frames(T)) == []


def test_lossless_rgb_is_exact(tmp_path: Path) -> None:
    frames = pictures(3)
    clip = VideoFile(encode(tmp_path / "a.mkv", frames, "ffv1", "bgr0"))
    assert torch.equal(torch.stack(list(clip.frames())), torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)


def test_more_than_8_bits_are_kept(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(1024, size=(H, W, 3)) * 64
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = W, H, "gbrp10le"
        frame = av.VideoFrame.from_ndarray(deep.astype(np.uint16), format="rgb48le")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (frame,) = VideoFile(tmp_path / "a.mkv").frames()
    expected = torch.from_numpy(deep / 64 / 1023).permute(2, 0, 1)
    assert (frame - expected).abs().max() < 1e-3  # 8 bits would be off by 2e-3


def test_colours_follow_the_tags_of_the_file(tmp_path: Path) -> None:
    colour = np.zeros((1, H, W, 3), np.uint8) + np.array([200, 40, 90], np.uint8)
    for matrix in (1, 5):  # BT.709, BT.601
        path = tmp_path / f"{matrix}.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = W, H, "yuv444p"
            stream.codec_context.colorspace = matrix
            frame = av.VideoFrame.from_ndarray(colour[0], format="rgb24")
            frame = frame.reformat(format="yuv444p", dst_colorspace={1: "ITU709", 5: "ITU601"}[matrix])
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        (found,) = VideoFile(path).frames()
        assert (found * 255 - torch.tensor([200.0, 40, 90]).view(3, 1, 1)).abs().max() <= 3, matrix


def test_frames_are_decoded_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = VideoFile(encode(tmp_path / "a.mp4", pictures(60), g="5"))
    assert len(clip) == 60
    made = []
    true = av.VideoFrame.to_ndarray
    monkeypatch.setattr(
        "vsrplug.data.video_file._to_tensor", lambda frame: made.append(frame.pts) or torch.from_numpy(true(frame))
    )
    list(islice(clip.frames(40), 2))
    assert len(made) == 2


def test_a_file_with_one_frame(tmp_path: Path) -> None:
    clip = VideoFile(encode(tmp_path / "a.mp4", pictures(1)))
    assert len(clip) == 1
    assert next(clip.frames()).shape == (3, H, W)


@pytest.mark.parametrize("content", [b"not a video" * 50, b"\0" * 5000])
def test_a_file_that_is_no_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read as a video, the file may be damaged: ."):
        VideoFile(tmp_path / "a.mp4")


def test_an_empty_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"video file .*a\.mp4 is empty"):
        VideoFile(tmp_path / "a.mp4")
    with pytest.raises(FileNotFoundError, match=r"there is no video file .*b\.mp4"):
        VideoFile(tmp_path / "b.mp4")


def test_sound_alone(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"a\.mp4 has no video stream"):
        VideoFile(tmp_path / "a.mp4")


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(256, size=(T, H, W, 3), dtype=np.uint8)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for array in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=r"a\.mp4 is damaged near frame 1\d"):
        len(VideoFile(path))


def test_damage_inside_the_stream_is_found_where_it_is(tmp_path: Path) -> None:
    """A packet of the fifth frame is overwritten: frames before it are read, it is not."""
    noise = np.random.default_rng(0).integers(256, size=(10, H, W, 3), dtype=np.uint8)
    path = encode(tmp_path / "a.mkv", noise, "mpeg4")
    with av.open(str(path)) as container:
        payload = [bytes(packet) for packet in container.demux(video=0)][4]
    content = path.read_bytes()
    at = content.index(payload) + len(payload) // 2
    path.write_bytes(content[:at] + bytes([255, 0] * 20) + content[at + 40 :])
    clip = VideoFile(path)
    assert len(list(clip.frames(0, 4))) == 4
    with pytest.raises(ValueError, match=r"a\.mkv is damaged near frame 4: ."):
        list(clip.frames())


def test_frames_of_different_sizes_are_refused(tmp_path: Path) -> None:
    small = encode(tmp_path / "small.h264", pictures(2), bf="0")
    big = encode(tmp_path / "big.h264", pictures(2).repeat(2, 2), bf="0")
    (tmp_path / "a.h264").write_bytes(small.read_bytes() + big.read_bytes())
    with pytest.raises(ValueError, match=r"one size: in .*a\.h264, frame 2 is 48x128, those before are 48x64"):
        list(VideoFile(tmp_path / "a.h264").frames())


@pytest.mark.parametrize(("height", "width", "matrix"), [(720, 1280, 1), (480, 640, 5)], ids=["HD", "SD"])
def test_untagged_video_has_the_matrix_that_players_assume(
    tmp_path: Path, height: int, width: int, matrix: int
) -> None:
    colour = np.full((2, height, width, 3), (200, 40, 90), dtype=np.uint8)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for array in colour:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame = frame.reformat(format="yuv444p", dst_colorspace=matrix)
            frame.colorspace = 2  # unspecified
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    read = next(VideoFile(tmp_path / "a.mkv").frames())[:, 0, 0] * 255
    assert (read - torch.tensor([200.0, 40, 90])).abs().max() < 2
