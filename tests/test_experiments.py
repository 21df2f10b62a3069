"""Each row of the SEEM paper's tables is what it says: network, weights, sites, what learns, batch, measurement."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image

import vsrplug.conf
from vsrplug.backbones import BasicVSR
from vsrplug.commands import build, train
from vsrplug.commands.errors import describe_error
from vsrplug.commands.keys import check_keys

ROOT = Path(vsrplug.conf.__file__).parent / "experiment"
EDVR = ("reference", "fused", "reconstructed")  # eq. 8, 9
FORWARD, BACKWARD = ("forward_input", "forward_output"), ("backward_input", "backward_output")  # eq. 13, 14
FILES = {
    "edvr_reds": ("EDVR_M_x4_SR_REDS_official-32075921.pth", "basicsr_edvr_m_official"),
    "edvr_vimeo90k": ("EDVR_L_x4_SR_Vimeo90K_official-162b54e4.pth", "basicsr_edvr_l_7frames"),
    "basicvsr_reds": ("BasicVSR_REDS4-543c8261.pth", "basicsr_basicvsr_30"),
    "basicvsr_vimeo90k": ("BasicVSR_Vimeo90K_BIx4-2a29695a.pth", "basicsr_basicvsr_30"),
}


class Row(NamedTuple):
    weights: str
    sites: tuple[str, ...]
    learns: str
    protocol: str


VIMEO, REDS4, VID4 = "vimeo90k_bi_rgb", "reds4_bi_rgb", "vid4_bi_y"
ROWS = {
    "table1_edvr": Row("edvr_reds", (), "nothing", REDS4),
    "table1_edvr_seem": Row("edvr_reds", EDVR, "everything", REDS4),
    "table1_basicvsr": Row("basicvsr_reds", (), "nothing", REDS4),
    "table1_basicvsr_seem": Row("basicvsr_reds", BACKWARD + FORWARD, "everything", REDS4),
    "table2_edvr": Row("edvr_reds", (), "nothing", REDS4),
    "table2_edvr_seem_only": Row("edvr_reds", EDVR, "plug-ins", REDS4),
    "table3_edvr": Row("edvr_vimeo90k", (), "nothing", VIMEO),
    "table3_edvr_seem": Row("edvr_vimeo90k", EDVR, "everything", VIMEO),
    "table3_basicvsr": Row("basicvsr_vimeo90k", (), "nothing", VIMEO),
    "table3_basicvsr_seem": Row("basicvsr_vimeo90k", BACKWARD + FORWARD, "everything", VIMEO),
    "table4_edvr": Row("edvr_vimeo90k", (), "nothing", VID4),
    "table4_edvr_seem": Row("edvr_vimeo90k", EDVR, "everything", VID4),
    "table4_basicvsr": Row("basicvsr_vimeo90k", (), "nothing", VID4),
    "table4_basicvsr_seem": Row("basicvsr_vimeo90k", BACKWARD + FORWARD, "everything", VID4),
    "table5_edvr_finetuned": Row("edvr_vimeo90k", (), "everything", VID4),
    "table5_edvr_seem": Row("edvr_vimeo90k", EDVR, "everything", VID4),
    "table5_basicvsr_finetuned": Row("basicvsr_vimeo90k", (), "everything", VID4),
    "table5_basicvsr_seem": Row("basicvsr_vimeo90k", BACKWARD + FORWARD, "everything", VID4),
    "table6_basicvsr": Row("basicvsr_vimeo90k", (), "nothing", VID4),
    "table6_basicvsr_forward": Row("basicvsr_vimeo90k", FORWARD, "everything", VID4),
    "table6_basicvsr_backward": Row("basicvsr_vimeo90k", BACKWARD, "everything", VID4),
    "table6_basicvsr_both": Row("basicvsr_vimeo90k", BACKWARD + FORWARD, "everything", VID4),
}


def composed(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    folder.mkdir(exist_ok=True)
    with open_dict(cfg):
        OmegaConf.set_readonly(cfg.hydra, False)
        cfg.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(cfg)
        del cfg["hydra"]
    check_keys(cfg, "train")
    return cfg


def test_there_is_a_file_for_each_row_and_none_besides() -> None:
    assert sorted(file.stem for file in (ROOT / "seem").glob("*.yaml")) == sorted(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_the_paper_says(name: str, tmp_path: Path) -> None:
    row, cfg = ROWS[name], composed(tmp_path, f"experiment=seem/{name}")
    edvr, vimeo90k = row.weights.startswith("edvr"), row.weights.endswith("vimeo90k")
    assert Path(cfg.backbone.path).name == FILES[row.weights][0]
    assert (cfg.data._target_, cfg.data.split) == (f"vsrplug.data.{'vimeo90k' if vimeo90k else 'reds'}", "train")
    assert (cfg.datamodule.batch_size, cfg.datamodule.patch) == (4 if edvr else 6, 64)  # 4.2
    assert cfg.datamodule.frames == (7 if vimeo90k else 5 if edvr else 15)
    assert cfg.datamodule.mirror == (vimeo90k and not edvr)
    assert (cfg.protocol.name, cfg.protocol.degradation) == (row.protocol, cfg.degradation)
    assert cfg.degradation._target_ == "vsrplug.degradations.BI"
    # Of EDVR and BasicVSR, whom the paper refers to.
    assert (cfg.optim.optimizer.lr, cfg.optim.schedule.T_max) == ((4e-4, 600000) if edvr else (2e-4, 300000))
    assert dict(cfg.tuning.rates) == ({} if edvr else {"backbone.spynet.*": 0.125})
    assert list(cfg.tuning.train) == (["*"] if row.learns == "everything" else ["plugins.*"])
    assert list(cfg.plugins) == (["seem"] if row.sites else [])
    if row.sites:
        assert tuple(cfg.plugins.seem.sites) == row.sites
        assert (cfg.plugins.seem.masks, cfg.masks._target_) == (64, "vsrplug.masks.CachedMasks")  # 4.2
    else:
        assert cfg.masks is None


def one_of_each(rows: dict[str, Row]) -> list[str]:
    """Rows that differ in more than the measurement."""
    return list({row._replace(protocol=""): name for name, row in reversed(rows.items())}.values())


@pytest.mark.parametrize("name", one_of_each(ROWS))
def test_a_row_is_made_and_its_official_weights_would_fit(name: str, tmp_path: Path, golden: ModuleType) -> None:
    row = ROWS[name]
    cfg = composed(tmp_path, f"experiment=seem/{name}", "backbone.path=null")
    model = build.make_model(cfg)
    entries = golden.full_size(FILES[row.weights][1])["state_dict"]
    official = {key: tuple(shape) for key, shape, _ in entries if key not in ("spynet.mean", "spynet.std")}
    assert {key: tuple(value.shape) for key, value in model.backbone.state_dict().items()} == official
    counts = {
        "nothing": 0,
        "plug-ins": sum(p.numel() for p in model.plugins.parameters()),
        "everything": sum(p.numel() for p in model.parameters()),
    }
    tuning = build.make(cfg.tuning)
    assert tuning.apply(model) == counts[row.learns]
    if row.learns != "nothing":
        optimizer = build.make(cfg.optim.optimizer)(tuning.groups(model, cfg.optim.optimizer.lr))
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {"x1": 4e-4} if row.weights.startswith("edvr") else {"x0.125": 2.5e-5, "x1": 2e-4}


def test_weights_that_are_not_there_are_missed_before_anything_else(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "experiment=seem/table1_edvr_seem", f"paths.weights={tmp_path}", f"paths.data={tmp_path}")
    with pytest.raises(InstantiationException) as caught:
        train.run(cfg)
    text = describe_error(caught.value)
    assert f"there is no weights file {tmp_path}/EDVR_M_x4_SR_REDS_official-32075921.pth; official ones are" in text
    assert "BasicSR's docs/ModelZoo.md" in text
    assert "backbone.path=" in text
    assert "VSRPLUG_WEIGHTS" in text


ABLATION = {  # of BasicVSR++ -> alignment and branches
    "ablation_a": ("flow", ["backward_1", "forward_1"]),
    "ablation_b": ("first_order", ["backward_1", "forward_1"]),
    "ablation_c": ("second_order", ["backward_1", "forward_1"]),
    "ablation_basicvsr_pp": ("second_order", ["backward_1", "forward_1", "backward_2", "forward_2"]),
}


def test_there_is_a_file_for_each_row_of_basicvsr_pp_and_none_besides() -> None:
    assert sorted(file.stem for file in (ROOT / "basicvsr_pp").glob("*.yaml")) == sorted(ABLATION)


@pytest.mark.parametrize("name", ABLATION)
def test_a_row_of_basicvsr_pp_is_made_and_trains_as_the_paper_says(name: str, tmp_path: Path) -> None:
    cfg = composed(tmp_path, f"experiment=basicvsr_pp/{name}")
    assert (cfg.data._target_, cfg.data.partition, cfg.data.split) == ("vsrplug.data.reds", "reds4", "train")
    assert (cfg.datamodule.frames, cfg.datamodule.patch, cfg.datamodule.batch_size) == (30, 64, 8)
    assert (cfg.protocol.name, cfg.protocol.degradation) == (REDS4, cfg.degradation)
    assert (cfg.optim.optimizer.lr, cfg.optim.schedule.T_max) == (1e-4, 600000)
    assert Path(cfg.backbone.flow.path).name == "spynet_20210409-c6c1bd09.pth"
    cfg.backbone.flow.path = None
    model = build.make_model(cfg)
    alignment, branches = ABLATION[name]
    assert model.backbone.alignment == alignment
    assert list(model.backbone.backbone) == branches
    assert list(model.backbone.deform_align) == ([] if alignment == "flow" else branches)
    tuning = build.make(cfg.tuning)
    flow = {key for key, _ in model.named_parameters() if ".spynet." in key}
    everything = {key for key, _ in model.named_parameters()}
    first, second = tuning.phases.values()
    assert (first.steps, first.trained(model), second.trained(model)) == (5000, everything - flow, everything)
    assert second.rates == {"flow": 0.25}


@pytest.mark.slow
def test_a_row_runs_from_its_weights_to_its_figures_and_is_measured_again_elsewhere(tmp_path: Path) -> None:
    """Table 3, BasicVSR + SEEM, on septuplets of 64x48: mirrored in training and in measurement."""
    for clip in range(1, 4):
        folder = tmp_path / "vimeo90k" / "sequences" / "00001" / f"{clip:04d}"
        folder.mkdir(parents=True)
        for t in range(1, 8):
            Image.effect_noise((64, 48), 40).convert("RGB").save(folder / f"im{t}.png")
    (tmp_path / "vimeo90k" / "sep_trainlist.txt").write_text("00001/0001\n00001/0002\n")
    (tmp_path / "vimeo90k" / "sep_testlist.txt").write_text("00001/0003\n")
    (tmp_path / "vimeo90k" / "fast_testset.txt").write_text("00001/0003\n")
    weights = tmp_path / "BasicVSR_Vimeo90K_BIx4-2a29695a.pth"
    torch.save({"params": BasicVSR(8, 1).state_dict()}, weights)
    small = ["backbone.channels=8", "backbone.blocks=1", f"paths.weights={tmp_path}", f"paths.data={tmp_path}"]
    small += ["masks=superpixels", "masks.count=8", "trainer.accelerator=cpu"]
    row = ["experiment=seem/table3_basicvsr_seem", *small]
    short = ["datamodule.patch=8", "datamodule.batch_size=1", "datamodule.workers=0"]
    short += ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    first = train.run(composed(tmp_path / "run", *row, *short))
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (figures["protocol"], list(figures["clips"])) == ("vimeo90k_bi_rgb", ["00001/0003"])
    assert figures["parameters"]["trainable"] == figures["parameters"]["total"]
    tuned: list[Any] = [f"plugins_file={tmp_path / 'run' / 'plugins.safetensors'}", "tuning.train=[]"]
    again = train.run(composed(tmp_path / "fast", *row, *tuned, "protocol=vimeo90k_fast_bi_rgb"))
    assert again == pytest.approx(first, abs=1e-9)
    figures = json.loads((tmp_path / "fast" / "metrics.json").read_text())
    assert (figures["protocol"], figures["parameters"]["trainable"]) == ("vimeo90k_fast_bi_rgb", 0)
