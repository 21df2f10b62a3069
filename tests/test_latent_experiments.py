"""Each row of the latent attention paper's tables 1 to 3 is what it says: blocks, sequences, size, phases, data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import vsrplug.conf
from vsrplug.backbones import LatentVSR
from vsrplug.commands import build, train
from vsrplug.plugins import LatentAttentionPlugin

from .test_experiments import composed

ROOT = Path(vsrplug.conf.__file__).parent / "experiment"


class Row(NamedTuple):
    blocks: str  # at layers 1, 3, 5, 7 and 9: S for short range, L for long range
    length: int = 7
    remote: bool = False
    two_stage: bool = False


ROWS = {
    "table1_normal_res16": Row("", 4),
    "table1_normal_satn10": Row("SSSSS", 4),
    "table1_normal_latn10": Row("LLLLL", 4),
    "table1_remote_res16": Row("", 4, remote=True),
    "table1_remote_satn10": Row("SSSSS", 4, remote=True),
    "table1_remote_latn10": Row("LLLLL", 4, remote=True),
    "table2_lsatn_x": Row("SLSLS"),
    "table2_lsatn_l": Row("LLSSS"),
    "table2_lsatn_sl": Row("LSSSL"),
    "table2_lsatn_s": Row("SSSLL"),
    "table2_lsatn_ls": Row("SSLLS"),
    "table3_latn10": Row("LLLLL"),
    "table3_satn10": Row("SSSSS"),
    "table3_vlatn10": Row("LLLLL", two_stage=True),
    "table3_vsatn10": Row("SSSSS", two_stage=True),
}
CLOSED = "plugins.*.log_variance.*"


def test_there_is_a_file_for_each_row_and_none_besides() -> None:
    assert sorted(file.stem for file in (ROOT / "latent").glob("*.yaml")) == sorted(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_the_paper_says(name: str, tmp_path: Path) -> None:
    row, cfg = ROWS[name], composed(tmp_path, f"experiment=latent/{name}", f"paths.data={tmp_path}")
    assert (cfg.datamodule.frames, cfg.datamodule.mirror) == (row.length, False)
    assert cfg.data.root == f"{tmp_path}/latent_normal/train"
    part = "remote" if row.remote else "normal"
    assert (cfg.protocol.name, cfg.protocol.degradation) == (f"latent_{part}_bi_y", cfg.degradation)
    assert cfg.protocol.clips.root == f"{tmp_path}/latent_{'remote' if row.remote else 'normal/test'}"
    assert (cfg.degradation._target_, cfg.degradation.scale) == ("vsrplug.degradations.BI", 4)
    # 7: the optimizer; eq. 22: the loss
    assert (cfg.optim.optimizer.lr, list(cfg.optim.optimizer.betas), cfg.optim.schedule) == (1e-4, [0.9, 0.999], None)
    assert cfg.trainer.gradient_clip_val == 3
    sr, hr = torch.rand(2, 1, 2, 3, 4, 4)
    torch.testing.assert_close(build.make(cfg.losses.pixel)(sr, hr), (sr - hr).square().mean())
    phases = list(build.make(cfg.tuning).phases.values())
    closed = [[CLOSED], []] if row.two_stage else [[CLOSED] if row.blocks else []]  # algorithm 1
    assert [(list(phase.train), list(phase.freeze)) for phase in phases] == [(["*"], freeze) for freeze in closed]
    if row.two_stage:
        satn10 = composed(tmp_path, f"experiment=latent/{name.replace('_v', '_')}")
        assert phases[0].steps == satn10.trainer.max_steps == cfg.trainer.max_steps // 2
        assert [dict(phase.losses) for phase in phases] == [{"pixel": 1.0}, {"pixel": 1.0, "*/kl": 0.0}]

    model = build.make_model(cfg)
    backbone = model.backbone
    assert isinstance(backbone, LatentVSR)
    assert (len(backbone.extractor), backbone.length) == (10 if row.blocks else 16, row.length)
    found = {}
    for plugin in model.plugins.values():
        assert isinstance(plugin, LatentAttentionPlugin)
        assert plugin.length == row.length
        for site in plugin.sites:
            (block,) = plugin.at[site].blocks
            found[site] = type(block).__name__[0]
    assert found == {f"layer{2 * i + 1}": kind for i, kind in enumerate(row.blocks)}
    # 6.1: 1.7 million, give or take 20,000; with the variance or without it
    learns = build.make(cfg.tuning).apply(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert abs(total / 1.7e6 - 1) < 0.01
    assert abs(learns - 1.7e6) < 20_000
    assert (learns < total) == bool(row.blocks)


def test_the_orders_of_table_2_differ_in_nothing_but_the_order(tmp_path: Path) -> None:
    models = [
        build.make_model(composed(tmp_path, f"experiment=latent/{name}")) for name in ROWS if name.startswith("table2")
    ]
    shapes = [sorted(str(tuple(p.shape)) for p in model.parameters()) for model in models]
    assert len(shapes) == 5
    assert all(other == shapes[0] for other in shapes)


@pytest.mark.slow
def test_rows_run_through_both_phases_and_are_measured_again_elsewhere(tmp_path: Path) -> None:
    for place, count in (("latent_normal/train", 2), ("latent_normal/test", 1), ("latent_remote", 1)):
        for clip in range(count):
            folder = tmp_path / place / f"clip{clip}"
            folder.mkdir(parents=True)
            for t in range(9):  # whole sequences and a piece of one
                Image.effect_noise((64, 48), 40).convert("RGB").save(folder / f"{t}.png")
    small = ["backbone.channels=8", "plugins.short_range_attention.embedding=4", f"paths.data={tmp_path}"]
    small += ["datamodule.patch=8", "datamodule.batch_size=1", "datamodule.workers=0", "trainer.accelerator=cpu"]
    small += ["trainer.max_steps=4", "trainer.val_check_interval=4"]
    train.run(composed(tmp_path / "v", "experiment=latent/table3_vsatn10", *small, "tuning.phases.mean.steps=2"))
    figures = json.loads((tmp_path / "v" / "metrics.json").read_text())
    assert (figures["protocol"], list(figures["clips"])) == ("latent_normal_bi_y", ["clip0"])
    assert figures["parameters"]["trainable"] == figures["parameters"]["total"]
    there = train.run(composed(tmp_path / "run", "experiment=latent/table1_normal_satn10", *small))
    run = [f"plugins_file={tmp_path}/run/plugins.safetensors", "tuning.train=[]", "tuning.freeze=[]"]
    measured = {"table1_normal_satn10": "latent_normal_bi_y", "table1_remote_satn10": "latent_remote_bi_y"}
    for name, protocol in measured.items():
        again = train.run(composed(tmp_path / name, f"experiment=latent/{name}", *small, *run))
        figures = json.loads((tmp_path / name / "metrics.json").read_text())
        assert (figures["protocol"], figures["parameters"]["trainable"]) == (protocol, 0)
        assert (again == pytest.approx(there, abs=1e-9)) == ("normal" in name)
