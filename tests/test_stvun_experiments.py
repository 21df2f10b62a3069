"""Each row of STVUN's table 3 is what the paper says: fusion, what is decoded, data, schedule, size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vsrplug.commands import build, train

from .test_experiments import ROOT, composed

# Row -> fusion, whether decoded features are shared, and the parameters the paper has, in millions.
ROWS = {
    "table3_stvun": ("efst", True, 30.9),
    "table3_without_efst": ("early", True, 30.5),
    "table3_without_decoded": ("efst", False, 30.9),
    "table3_alignment_and_fusion": ("pcd_tsa", True, 32.4),
}


def test_there_is_a_file_for_each_row_and_none_besides() -> None:
    assert sorted(file.stem for file in (ROOT / "stvun").glob("*.yaml")) == ["demo", *sorted(ROWS)]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_the_paper_says(name: str, tmp_path: Path) -> None:
    cfg = composed(tmp_path, f"experiment=stvun/{name}")
    fusion, shared, millions = ROWS[name]
    network = cfg.backbone
    assert (network.name, network.fusion, network.share_decoded) == ("stvun", fusion, shared)
    assert (network.channels, network.frames, network.scale, network.path) == (64, 7, 4, None)
    assert (cfg.datamodule.frames, cfg.datamodule.patch, cfg.datamodule.batch_size) == (7, 128 // 4, 32)
    assert cfg.losses.pixel._target_ == "vsrplug.losses.l1"
    assert cfg.plugins == {}
    assert (cfg.protocol.colour, cfg.protocol.degradation) == ("rgb", cfg.degradation)
    assert build.make(cfg.degradation).scale == 4
    optimizer = build.make(cfg.optim.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    schedule = build.make(cfg.optim.schedule)(optimizer)
    assert (type(optimizer).__name__, cfg.trainer.max_steps) == ("Adam", 300_000)
    assert (schedule.base_lrs, schedule.step_size, schedule.gamma) == ([1e-4], 100_000, 0.5)
    with torch.device("meta"):
        model = build.make(network)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.08)
    learns = {key.split(".")[1] for key in build.make(cfg.tuning).trained(torch.nn.ModuleDict({"backbone": model}))}
    assert learns == {"encoder", "fusion", "decoder"}


def test_the_two_phases_are_the_papers(tmp_path: Path) -> None:
    """Section 3.3 and eq. 12."""
    cfg = composed(tmp_path, "backbone=stvun", "tuning=stvun_two_phase", "optim=adam_halved")
    tuning = build.make(cfg.tuning)
    first, second = tuning.phases.values()
    assert [(phase.steps, phase.lr) for phase in (first, second)] == [(300_000, 1e-4), (400_000, 5e-5)]
    assert first.losses == {"pixel": 1}
    assert second.losses == {"interpolated": 1, "pixel": 1, "between": 1}
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"backbone": build.make(cfg.backbone)})
    learns = [{key.split(".")[1] for key in phase.trained(model)} for phase in (first, second)]
    assert learns == [{"encoder", "fusion", "decoder"}, {"encoder", "fusion", "decoder", "pwcnet"}]


def test_the_demo_recipe_trains_saves_and_measures_frames_in_between(tmp_path: Path) -> None:
    small = [
        "backbone.channels=4",
        "trainer.max_steps=2",
        "trainer.accelerator=cpu",
        "data.clips=1",
        "data.size=[96,96]",
    ]
    small += ["protocol.clips.clips=1", "protocol.clips.frames=9", "protocol.clips.size=[64,64]"]
    cfg = composed(tmp_path, "experiment=stvun/demo", *small)
    psnr = train.run(cfg)
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["psnr"] == psnr
    assert {"psnr", "ssim", "psnr_seen", "ssim_seen"} <= figures["clips"]["test_0000"].keys()
    assert figures["compared"].keys() == {"bicubic", "backbone"}
    assert (tmp_path / "comparison.png").is_file()
    assert (tmp_path / "backbone.safetensors").is_file()
