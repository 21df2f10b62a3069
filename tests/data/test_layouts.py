"""REDS, Vimeo-90K, UDM10 and SPMCS as they are unpacked, and what is said when they are not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vsrplug.data import TrainingClips, reds, spmcs, udm10, vimeo90k
from vsrplug.degradations import BI

LISTED = {"train": ["00001/0001", "00001/0003", "00002/0001"], "test": ["00001/0002", "00003/0010"]}
UDM10 = ("archpeople", "archwall", "auditorium", "band", "caffe", "camera", "clap", "lake", "photography", "polyflow")


def frames(folder: Path, names: list[str], size: tuple[int, int] = (8, 4)) -> None:
    folder.mkdir(parents=True)
    for t, name in enumerate(names):
        Image.fromarray(np.full((*reversed(size), 3), t, np.uint8)).save(folder / name)


def links(folder: Path, source: Path, names: list[str]) -> None:
    """A clip whose frames are all one file: 270 clips of 100 frames would take a while to write."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).symlink_to(source)


def make_reds(root: Path, clips: list[str], validation: str = "val_sharp", length: int = 100) -> None:
    root.mkdir(exist_ok=True)
    Image.new("RGB", (8, 4)).save(root / "frame.png")
    for clip in clips:
        as_downloaded = f"val_sharp/{int(clip) - 240:03d}"
        place = as_downloaded if int(clip) >= 240 and validation == "val_sharp" else f"train_sharp/{clip}"
        links(root / place, root / "frame.png", [f"{t:08d}.png" for t in range(length)])


def make_vimeo90k(root: Path) -> None:
    for split, names in LISTED.items():
        for name in names:
            frames(root / "sequences" / name, [f"im{t}.png" for t in range(1, 8)], (28, 16))
        (root / f"sep_{split}list.txt").write_text("\n".join(names) + "\n\n")


@pytest.mark.parametrize("validation", ["val_sharp", "train_sharp"])
def test_reds_is_the_same_as_downloaded_and_as_regrouped(
    tmp_path: Path, validation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["vsrplug.data.reds"], "_FRAMES", 2)  # 27,000 files are slow to make
    every = [f"{clip:03d}" for clip in range(270)]
    make_reds(tmp_path, every, validation, length=2)
    reds4 = ["000", "011", "015", "020"]
    assert [clip.name for clip in reds(tmp_path, "test")] == reds4
    train = [clip.name for clip in reds(tmp_path)]
    assert len(train) == 266
    assert sorted(train + reds4) == every
    assert [clip.name for clip in reds(tmp_path, "test", "official")] == every[240:]
    assert [clip.name for clip in reds(tmp_path, "train", "official")] == every[:240]


def test_reds4_alone_is_enough_to_test(tmp_path: Path) -> None:
    make_reds(tmp_path, ["000", "011", "015", "020"])
    assert [len(clip) for clip in reds(tmp_path, "test")] == [100] * 4
    with pytest.raises(ValueError, match=r"266 of 266 clips are missing \(001, 002, 003, 004, ...\); .* must hold"):
        reds(tmp_path)


def test_reds_refuses(tmp_path: Path) -> None:
    make_reds(tmp_path, ["000", "011", "020"])
    with pytest.raises(ValueError, match=r"1 of 4 clips are missing \(015\); .*val_sharp/000 to 029, or, as BasicSR"):
        reds(tmp_path, "test")
    make_reds(tmp_path, ["015"])
    (tmp_path / "train_sharp" / "011" / "00000099.png").unlink()
    with pytest.raises(ValueError, match=r"clip 011 of REDS has 99 frames, expected 100: unpack .*sharp/011 again"):
        reds(tmp_path, "test")
    with pytest.raises(ValueError, match=r"got split='val', partition='reds4'"):
        reds(tmp_path, "val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got split='test', partition='REDS4'"):
        reds(tmp_path, "test", "REDS4")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"no folder .*reds; data sets are looked for under paths.data"):
        reds(tmp_path / "reds")


def test_vimeo90k_reads_what_its_lists_name_and_nothing_else(tmp_path: Path) -> None:
    make_vimeo90k(tmp_path)
    frames(tmp_path / "sequences" / "00004" / "0001", ["im1.png"])  # in no list
    assert [clip.name for clip in vimeo90k(tmp_path)] == ["00001/0001", "00001/0003", "00002/0001"]
    test = vimeo90k(tmp_path, "test")
    assert [(clip.name, len(clip)) for clip in test] == [("00001/0002", 7), ("00003/0010", 7)]
    centre = next(test[0].frames(3, 4))  # im4.png
    assert torch.equal(centre, torch.full((3, 16, 28), 3 / 255))
    assert [round(frame.max().item() * 255) for frame in test[1].frames()] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("meta_info_Vimeo90K_test_medium_GT.txt", "00003/0010 7 (256,448,3)\n"),
        ("medium_testset.txt", "00003/0010"),
        ("sep_medium_testset.txt", "00003/0010\r\n"),
    ],
)
def test_vimeo90k_by_motion(tmp_path: Path, name: str, line: str) -> None:
    make_vimeo90k(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no list of the medium part .* expected .*_GT.txt; BasicSR has it in"):
        vimeo90k(tmp_path, "test", "medium")
    (tmp_path / name).write_text(line)
    assert [clip.name for clip in vimeo90k(tmp_path, "test", "medium")] == ["00003/0010"]


def test_the_list_of_what_moves_most_is_made_here(tmp_path: Path) -> None:
    make_vimeo90k(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no list of the motion part .*motion_testset.txt.*; the command vsrplug m"
    ):
        vimeo90k(tmp_path, "test", "motion")
    (tmp_path / "motion_testset.txt").write_text("00003/0010 12.5\n")
    assert [clip.name for clip in vimeo90k(tmp_path, "test", "motion")] == ["00003/0010"]


def test_vimeo90k_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*vimeo; data sets are looked for under"):
        vimeo90k(tmp_path / "vimeo")
    with pytest.raises(FileNotFoundError, match=r"no list of the train set in .*: expected sep_trainlist.txt; it"):
        vimeo90k(tmp_path)
    make_vimeo90k(tmp_path)
    with pytest.raises(
        ValueError, match=r"one of 'all', 'fast', 'medium', 'slow', 'motion'; got split='test', motion='quick'"
    ):
        vimeo90k(tmp_path, "test", "quick")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"only the test set is divided by motion: give split='test' with"):
        vimeo90k(tmp_path, motion="slow")
    (tmp_path / "sep_testlist.txt").write_text("00001/0002\n00009/0001\n")
    with pytest.raises(ValueError, match=r"1 of the 2 septuplets of the test set are not in .*\(00009/0001\): unpack"):
        vimeo90k(tmp_path, "test")
    for text, found in (("im1.png\n", "'im1.png'"), ("\n", "'nothing'")):
        (tmp_path / "sep_testlist.txt").write_text(text)
        with pytest.raises(ValueError, match=rf"sep_testlist.txt is no list of septuplets: it has {found} where"):
            vimeo90k(tmp_path, "test")
    (tmp_path / "sequences" / "00002" / "0001" / "im5.png").unlink()
    with pytest.raises(ValueError, match=r"septuplet .*00002/0001 has 6 images, expected im1.png to im7.png"):
        next(vimeo90k(tmp_path)[2].frames())


def test_septuplets_are_trained_on_mirrored(tmp_path: Path) -> None:
    make_vimeo90k(tmp_path)
    sample = TrainingClips(vimeo90k(tmp_path), BI(), frames=7, patch=4, mirror=True, augment=False)[0]
    order = [round(frame.max().item() * 255) for frame in sample["hr"]]
    assert order == [0, 1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1, 0]
    assert sample["lr"].shape == (14, 3, 4, 4)


@pytest.mark.parametrize("place", ["GT/{}", "{}/truth"])
def test_udm10(tmp_path: Path, place: str) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "frame.png")
    for name in UDM10:
        links(tmp_path / place.format(name), tmp_path / "frame.png", [f"{t:04d}.png" for t in range(32)])
    assert {clip.name: len(clip) for clip in udm10(tmp_path)} == dict.fromkeys(UDM10, 32)
    (tmp_path / place.format("lake") / "0031.png").unlink()
    with pytest.raises(ValueError, match=r"not UDM10: .*lake.* has 31 frames, expected 32; .* must hold GT/<clip> or"):
        udm10(tmp_path)


def test_spmcs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not SPMCS: no folder in .* holds a folder `truth`, such as AMVTG_004/truth"):
        spmcs(tmp_path)
    Image.new("RGB", (8, 4)).save(tmp_path / "frame.png")
    for name in ("veni5_015", "AMVTG_004"):
        links(tmp_path / name / "truth", tmp_path / "frame.png", [f"{t:04d}.png" for t in range(1, 32)])
        frames(tmp_path / name / "input4", ["0001.png"])
    assert [(clip.name, len(clip)) for clip in spmcs(tmp_path)] == [("AMVTG_004", 31), ("veni5_015", 31)]
    (tmp_path / "veni5_015" / "truth" / "0031.png").unlink()
    with pytest.raises(ValueError, match=r"not SPMCS: .*veni5_015/truth has 30 frames, expected 31"):
        spmcs(tmp_path)
