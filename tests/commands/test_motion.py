"""`vsrplug motion`: clips are ranked by how far their pixels go, and a killed run measures none twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from vsrplug.commands import build, motion

SPEEDS = {"00001/0001": 3, "00001/0002": 0, "00002/0001": 1, "00003/0007": 5}  # pixels a frame


@pytest.fixture
def vimeo(tmp_path: Path) -> Path:
    """Septuplets of smooth noise that moves to the right."""
    root = tmp_path / "vimeo90k"
    noise = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 72, 136, generator=torch.manual_seed(0)), 7, 1)[0]
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    for name, speed in SPEEDS.items():
        folder = root / "sequences" / name
        folder.mkdir(parents=True)
        for t in range(7):
            frame = noise[:, :64, 34 - speed * t : 34 - speed * t + 96]
            Image.fromarray(np.uint8(frame.permute(1, 2, 0) * 255)).save(folder / f"im{t + 1}.png")
    (root / "sep_testlist.txt").write_text("\n".join(SPEEDS))
    return root


def config(root: Path, *overrides: str) -> DictConfig:
    with hydra.initialize_config_module("vsrplug.conf", version_base="1.3"):
        return hydra.compose("motion", [f"paths.data={root.parent}", "device=cpu", *overrides])


def test_what_moves_most_is_listed_with_its_motion(vimeo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    motion.run(config(vimeo, "share=0.5"))
    lines = [line.split() for line in (vimeo / "motion_testset.txt").read_text().splitlines()]
    assert [name for name, _ in lines] == ["00003/0007", "00001/0001"]
    assert [float(length) for _, length in lines] == pytest.approx([5, 3], rel=0.1)
    assert "2 of 4 clips, mean flow of" in capsys.readouterr().out
    assert sorted(path.name for path in vimeo.iterdir()) == ["motion_testset.txt", "sep_testlist.txt", "sequences"]
    with hydra.initialize_config_module("vsrplug.conf", version_base="1.3"):
        overrides = ["protocol=vimeo90k_motion_bi_rgb", f"paths.data={vimeo.parent}"]
        protocol = build.make(hydra.compose("evaluate", overrides).protocol)
    assert [clip.name for clip in protocol.clips] == ["00003/0007", "00001/0001"]
    with pytest.raises(FileExistsError, match=r"there is a list .*motion_testset.txt; move it away to make it anew"):
        motion.run(config(vimeo))


def test_a_killed_run_goes_on(vimeo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    original = motion.mean_motion

    def counted(clip: Any, *arguments: Any) -> float:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(clip.name)
        return original(clip, *arguments)

    monkeypatch.setattr(motion, "mean_motion", counted)
    with pytest.raises(KeyboardInterrupt):
        motion.run(config(vimeo, "share=1"))
    partial = vimeo / "motion_testset.txt.partial"
    partial.write_text(partial.read_text() + "00002/0001 1")  # cut short, in the middle of a line
    monkeypatch.setattr(motion, "mean_motion", lambda clip, *rest: measured.append(clip.name) or original(clip, *rest))
    motion.run(config(vimeo, "share=1"))
    assert measured == list(SPEEDS)
    ranked = sorted(SPEEDS, key=lambda name: -SPEEDS[name])
    assert [line.split()[0] for line in (vimeo / "motion_testset.txt").read_text().splitlines()] == ranked


def test_a_share_is_a_share(vimeo: Path) -> None:
    for share in (0, 1.5):
        with pytest.raises(
            ValueError, match=rf"share={share} is a share of the clips, above 0 and at most 1; try 0\.06"
        ):
            motion.run(config(vimeo, f"share={share}"))
