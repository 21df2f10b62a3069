"""Where clips lie on disk, and what is said when they lie elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

import vsrplug.conf
from vsrplug.data import FrameFolder, VideoFile, folder, vid4, video

from .test_video_file import encode, pictures

VID4 = {"calendar": 41, "city": 34, "foliage": 49, "walk": 47}


def frames(path: Path, count: int) -> None:
    path.mkdir(parents=True)
    for t in range(count):
        Image.fromarray(np.full((4, 4, 3), t, np.uint8)).save(path / f"{t:08d}.png")


def make_vid4(root: Path) -> None:
    for name, count in VID4.items():
        frames(root / "GT" / name, count)


def test_a_folder_of_clips(tmp_path: Path) -> None:
    frames(tmp_path / "clip_10", 2)
    frames(tmp_path / "clip_9", 3)
    encode(tmp_path / "film.mp4", pictures(2))
    (tmp_path / "readme.txt").touch()
    (tmp_path / ".cache").mkdir()
    clips = folder(tmp_path)
    assert [(clip.name, len(clip)) for clip in clips] == [("clip_9", 3), ("clip_10", 2), ("film", 2)]
    assert isinstance(clips[2], VideoFile)


def test_a_folder_that_is_one_clip(tmp_path: Path) -> None:
    frames(tmp_path / "walk", 3)
    (clip,) = folder(tmp_path / "walk")
    assert isinstance(clip, FrameFolder)
    assert (clip.name, len(clip)) == ("walk", 3)


def test_some_of_a_folders_clips(tmp_path: Path) -> None:
    for name in ("cows", "dog", "goat"):
        frames(tmp_path / name, 2)
    assert [clip.name for clip in folder(tmp_path, only=["goat", "cows"])] == ["cows", "goat"]
    with pytest.raises(ValueError, match="only: there is no clip 'gaot'; did you mean 'goat'"):
        folder(tmp_path, only=["cows", "gaot"])


def test_folder_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="holds no clips; expected folders of frames, frames, or video files"):
        folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"folder .*empty holds no images"):
        folder(tmp_path)
    frames(tmp_path / "b", 1)
    Image.new("RGB", (4, 4)).save(tmp_path / "preview.png")
    with pytest.raises(ValueError, match=r"holds frames \(preview.png, ...\) beside clips \(b, ...\); move"):
        folder(tmp_path)
    monkeypatch.setenv("VSRPLUG_DATA", "/where/data/is")
    with pytest.raises(FileNotFoundError, match=r"no folder .*none; .* paths.data, .* VSRPLUG_DATA \(/where/data/is\)"):
        folder(tmp_path / "none")


def test_two_clips_of_one_name(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", pictures(1))
    encode(tmp_path / "a.mkv", pictures(1))
    for source in (folder, video):
        with pytest.raises(ValueError, match="holds 2 clips named 'a'; figures are kept by name, rename them"):
            source(tmp_path)


def test_video_files(tmp_path: Path) -> None:
    encode(tmp_path / "b2.mp4", pictures(2))
    encode(tmp_path / "b10.mkv", pictures(1))
    assert [clip.name for clip in video(tmp_path)] == ["b2", "b10"]
    assert [len(clip) for clip in video(tmp_path / "b2.mp4")] == [2]
    with pytest.raises(FileNotFoundError, match="there is no video file"):
        video(tmp_path / "c.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no video files; for frames as images take the source `folder`"):
        video(tmp_path / "empty")


def test_vid4(tmp_path: Path) -> None:
    make_vid4(tmp_path)
    assert {clip.name: len(clip) for clip in vid4(tmp_path)} == VID4


def test_vid4_refuses_another_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSRPLUG_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"no folder .*vid4; .*VSRPLUG_DATA \(not set\): set it, or give"):
        vid4(tmp_path / "vid4")
    with pytest.raises(ValueError, match=r"not Vid4: .*calendar has 0 frames, expected 41; .* must hold GT/calendar, "):
        vid4(tmp_path)
    make_vid4(tmp_path)
    (tmp_path / "GT" / "walk" / "00000046.png").unlink()
    with pytest.raises(ValueError, match=r"walk has 46 frames, expected 47"):
        vid4(tmp_path)


def test_the_configurations_are_the_calls(tmp_path: Path) -> None:
    conf = Path(vsrplug.conf.__file__).parent / "data"
    make_vid4(tmp_path / "vid4")
    paths = {"paths": {"data": str(tmp_path)}}
    assert len(instantiate(OmegaConf.merge(paths, {"data": OmegaConf.load(conf / "vid4.yaml")})).data) == 4
    one = OmegaConf.merge(OmegaConf.load(conf / "folder.yaml"), {"root": str(tmp_path / "vid4" / "GT")})
    assert len(instantiate(one)) == 4
    encode(tmp_path / "a.mp4", pictures(1))
    assert (
        len(instantiate(OmegaConf.merge(OmegaConf.load(conf / "video.yaml"), {"path": str(tmp_path / "a.mp4")}))) == 1
    )


@pytest.mark.realdata
def test_the_real_vid4(real_data: Path) -> None:
    assert sum(len(clip) for clip in vid4(real_data / "vid4")) == 171
