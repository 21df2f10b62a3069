"""RealBasicVSR's stages and the rows of the slides compose to what they say, and run from one to the other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import vgg19

import vsrplug.conf
from vsrplug.adversarial import AdversarialModule
from vsrplug.commands import build, train
from vsrplug.discriminator import UNetDiscriminator
from vsrplug.module import VSRModule
from vsrplug.real_degradation import Real

from .test_experiments import composed

ROOT = Path(vsrplug.conf.__file__).parent / "experiment" / "real_basicvsr"
#        frames read, mirrored, walking, batch
ROWS = {
    "stage1": (15, True, True, 16),
    "stage1_conventional": (30, False, False, 16),
    "stage1_flip_only": (15, True, False, 16),
    "stage1_larger_batch": (5, True, True, 48),
    "stage2": (15, True, True, 8),
}
SMALL = ["backbone.channels=8", "backbone.propagation_blocks=1", "backbone.cleaning_blocks=1"]
SMALL += ["backbone.reconstruction_channels=4", "data=demo", "data.clips=2", "data.size=[64,64]", "data.frames=6"]
SMALL += ["protocol=demo_real_rgb", "protocol.clips.clips=1", "protocol.clips.size=[64,64]", "protocol.clips.frames=3"]
SMALL += ["datamodule.frames=2", "datamodule.patch=8", "datamodule.batch_size=1", "datamodule.workers=0"]
FLOW = ["backbone.flow.path=null", "backbone.flow.levels=2", "backbone.flow.widths=[4,4,4,4]"]  # in stage 1
SPYNET = ["backbone.flow={_target_: vsrplug.backbones.SPyNet, levels: 2, widths: [4, 4, 4, 4]}"]
SMALL += ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu"]


def test_there_is_a_file_for_each_row_and_none_besides() -> None:
    assert sorted(file.stem for file in ROOT.glob("*.yaml")) == sorted(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_the_slides_and_the_configuration_say(name: str, tmp_path: Path) -> None:
    cfg = composed(tmp_path, f"experiment=real_basicvsr/{name}", f"paths.weights={tmp_path}")
    frames, mirror, walk, batch = ROWS[name]
    samples = cfg.datamodule
    assert (samples.frames, samples.mirror, samples.batch_size, samples.patch) == (frames, mirror, batch, 64)
    assert build.make(cfg.degradation) == Real(walk=walk, sharpen=True)
    assert (cfg.protocol.name, build.make(cfg.protocol.degradation)) == ("reds4_real_rgb", Real())
    assert (cfg.data.partition, cfg.data.split) == ("reds4", "train")
    assert cfg.callbacks.ema.decay == 0.999
    assert cfg.optim.schedule is None
    weights = build.as_plain(cfg.losses.weights)
    assert cfg.losses.pixel._target_ == "vsrplug.losses.l1"
    assert cfg.losses.target._target_ == "vsrplug.real_degradation.sharpen"
    if name == "stage2":
        assert weights == {"pixel": 1.0, "backbone/cleaning": 1.0, "perceptual": 1.0, "adversarial": 0.05}
        assert (cfg.optim.optimizer.lr, cfg.losses.discriminator_lr, cfg.trainer.max_steps) == (5e-5, 1e-4, 150_000)
        assert Path(cfg.backbone.path).name.startswith("realbasicvsr_wogan_c64b20_2x30x8")
        assert Path(cfg.losses.perceptual.path) == tmp_path / "vgg19-dcbb9e9d.pth"
    else:
        assert weights == {"pixel": 1.0, "backbone/cleaning": 1.0}
        assert (cfg.optim.optimizer.lr, cfg.trainer.max_steps, cfg.backbone.path) == (1e-4, 300_000, None)
    assert 2 * frames * batch == 480 or name in ("stage1_conventional", "stage2")  # as many frames a step


@pytest.fixture
def vgg(tmp_path: Path) -> Path:
    """All of VGG19's features, at random."""
    with torch.device("meta"):
        entries = vgg19().features.state_dict()
    torch.manual_seed(0)
    scale = {name: 1 / math.sqrt(max(1, math.prod(value.shape[1:]) / 2)) for name, value in entries.items()}
    state = {f"features.{name}": torch.randn(value.shape) * scale[name] for name, value in entries.items()}
    save_file(state, tmp_path / "vgg19.safetensors")
    return tmp_path / "vgg19.safetensors"


def test_from_one_stage_to_the_other_and_on_after_a_kill(tmp_path: Path, vgg: Path) -> None:
    train.run(composed(tmp_path / "one", "experiment=real_basicvsr/stage1", *SMALL, *FLOW))
    result = tmp_path / "one" / "backbone.safetensors"
    game: list[Any] = ["experiment=real_basicvsr/stage2", *SMALL, *SPYNET, f"backbone.path={result}"]
    game += [f"losses.perceptual.path={vgg}", "losses.discriminator.channels=4"]
    game += ["callbacks.checkpoint.every_n_train_steps=1"]
    train.run(composed(tmp_path / "two", *game))
    figures = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert figures["protocol"] == "demo_real_rgb"
    assert math.isfinite(figures["psnr"])
    before, after = load_file(result), load_file(tmp_path / "two" / "backbone.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    # The same for a run that ends after one step, and goes on from what it saved.
    train.run(composed(tmp_path / "again", *game, "trainer.max_steps=1", "trainer.val_check_interval=1"))
    train.run(composed(tmp_path / "again", *game))
    again = load_file(tmp_path / "again" / "backbone.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in after.items())
    kept = torch.load(tmp_path / "two" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in kept["state_dict"]} == {"model", "discriminator"}
    assert [group["lr"] for group in kept["optimizer_states"][0]["param_groups"]] == [5e-5, 1e-4]


def test_a_discriminator_makes_it_a_game(tmp_path: Path, vgg: Path) -> None:
    plain = composed(tmp_path, "experiment=real_basicvsr/stage1", *SMALL, *FLOW)
    model = build.make_model(plain)
    assert type(train.make_module(plain, model, build.make(plain.protocol))) is VSRModule
    overrides = ["backbone.path=null", f"losses.perceptual.path={vgg}", "losses.discriminator_lr=3e-4"]
    cfg = composed(tmp_path, "experiment=real_basicvsr/stage2", *SMALL, *SPYNET, *overrides)
    module = train.make_module(cfg, model, build.make(cfg.protocol))
    assert isinstance(module, AdversarialModule)
    assert isinstance(module.discriminator, UNetDiscriminator)
    assert module.discriminator_lr == 3e-4
