"""Each row of MANA's table 2 is what the paper says: memory, data, stages, rates, losses, measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vsrplug.commands import build, train

from .test_experiments import ROOT, composed

ROWS = {"table2_no_memory": 0, **{f"table2_n{size}": size for size in (128, 256, 512, 1024)}}


def test_there_is_a_file_for_each_row_and_none_besides() -> None:
    assert sorted(file.stem for file in (ROOT / "mana").glob("*.yaml")) == sorted(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_the_paper_says(name: str, tmp_path: Path) -> None:
    cfg = composed(tmp_path, f"experiment=mana/{name}")
    network = cfg.backbone
    assert (network.name, network.channels, network.encoder_blocks, network.decoder_blocks) == ("mana", 128, 5, 40)
    assert (network.memory_size, network.frames, network.scale, network.path) == (ROWS[name], 7, 4, None)
    assert (cfg.data._target_, cfg.data.split) == ("vsrplug.data.vimeo90k", "train")
    assert (cfg.datamodule.frames, cfg.datamodule.patch, cfg.datamodule.batch_size) == (7, 64, 16)
    assert not cfg.datamodule.mirror
    assert (cfg.protocol.name, cfg.protocol.degradation) == ("vimeo90k_bi_rgb", cfg.degradation)
    assert cfg.losses.pixel._target_ == "vsrplug.losses.l1"
    optimizer = cfg.optim.optimizer
    assert (optimizer._target_, optimizer.lr, list(optimizer.betas)) == ("torch.optim.Adam", 1e-4, [0.5, 0.99])
    assert cfg.plugins == {}


@pytest.mark.parametrize("name", ["table2_n256", "table2_n512"])
def test_the_stages_train_what_the_paper_says(name: str, tmp_path: Path) -> None:
    cfg = composed(tmp_path, f"experiment=mana/{name}")
    model, tuning = build.make_model(cfg), build.make(cfg.tuning)
    everything = {parameter for parameter, _ in model.named_parameters()}
    bank = {f"backbone.memory_bank.{part}" for part in ("memory", "output.weight", "output.bias")}
    first, second, third = tuning.phases.values()
    assert [(phase.steps, phase.lr) for phase in tuning.phases.values()] == [
        (90_000, 1e-4),
        (30_000, 1e-4),
        (30_000, 1e-5),
    ]
    assert sum(phase.steps for phase in tuning.phases.values()) == cfg.trainer.max_steps
    assert cfg.optim.schedule is None
    assert (first.trained(model), first.losses) == (everything - bank, {"pixel": 1})
    assert (second.trained(model), second.losses) == ({"backbone.memory_bank.memory"}, {"*/quantisation": 1})
    assert (third.trained(model), third.losses) == (everything, {"pixel": 1})
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == {"table2_n256": 14_317_508, "table2_n512": 14_333_892}[name]


def test_without_memory_the_second_stage_is_left_out(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "experiment=mana/table2_no_memory")
    model, tuning = build.make_model(cfg), build.make(cfg.tuning)
    assert tuning.apply(model) == sum(p.numel() for p in model.parameters()) == 14_317_508 - 64 * 256 - 65 * 128
    optimizer = build.make(cfg.optim.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    assert list(cfg.optim.schedule.milestones) == [90_000]
    schedule = build.make({**cfg.optim.schedule, "milestones": [2]})(optimizer)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])
    assert cfg.trainer.max_steps == 120_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table2_n128", "table2_no_memory"])
def test_a_row_runs_to_its_figures(name: str, tmp_path: Path) -> None:
    """On septuplets of 64x48 and a small network; the memory moves in its own stage alone."""
    for clip in range(1, 3):
        folder = tmp_path / "vimeo90k" / "sequences" / "00001" / f"{clip:04d}"
        folder.mkdir(parents=True)
        for t in range(1, 8):
            Image.effect_noise((64, 48), 40).convert("RGB").save(folder / f"im{t}.png")
    (tmp_path / "vimeo90k" / "sep_trainlist.txt").write_text("00001/0001\n")
    (tmp_path / "vimeo90k" / "sep_testlist.txt").write_text("00001/0002\n")
    small = [f"backbone.{key}={value}" for key, value in {"channels": 32, "encoder_blocks": 1}.items()]
    small += ["backbone.decoder_blocks=1", f"paths.data={tmp_path}", "trainer.accelerator=cpu"]
    small += ["datamodule.patch=8", "datamodule.batch_size=1", "datamodule.workers=0", "trainer.val_check_interval=2"]
    staged: list[Any] = [f"tuning.phases.{phase}.steps=2" for phase in ("network", "memory", "all")]
    steps = 4 if ROWS[name] == 0 else 6
    stages = ["optim.schedule.milestones=[2]"] if ROWS[name] == 0 else staged
    train.run(composed(tmp_path / "run", f"experiment=mana/{name}", *small, *stages, f"trainer.max_steps={steps}"))
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (figures["protocol"], list(figures["clips"])) == ("vimeo90k_bi_rgb", ["00001/0002"])
    weights = load_file(tmp_path / "run" / "backbone.safetensors")
    assert ("memory_bank.memory" in weights) == (ROWS[name] > 0)
    assert all(value.isfinite().all() for value in weights.values())
