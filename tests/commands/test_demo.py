"""`vsrplug demo`, cut to a few steps: every part of it runs and leaves what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vsrplug import load_backbone, load_plugins
from vsrplug.commands import demo

from .conftest import Job


def test_everything_the_demo_leaves(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["data.clips=2", "data.size=[128,128]", "protocol.clips.clips=1", "protocol.clips.size=[64,96]"]
    demo.run(job("demo", tmp_path, *small, "trainer.max_steps=3", "trainer.accelerator=cpu", "datamodule.batch_size=1"))
    printed = " ".join(capsys.readouterr().err.split())
    assert "bit for bit" in printed
    assert "with plug-ins" in printed
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["protocol"] == "demo_small_bd_y"
    assert 0 < figures["parameters"]["trainable"] < figures["parameters"]["total"]
    with Image.open(tmp_path / "comparison.png") as picture:
        assert min(picture.size) > 200
    model = load_plugins(load_backbone("basicvsr_tiny"), tmp_path / "plugins.safetensors")
    assert list(model.plugins) == ["seem", "memory_bank"]


def test_the_shipped_backbone_beats_bicubic_on_photographs_it_never_saw() -> None:
    from vsrplug.backbones import Bicubic
    from vsrplug.data import DemoClips
    from vsrplug.degradations import BI
    from vsrplug.metrics import psnr

    clip = DemoClips("test", clips=1, frames=6, size=(128, 160))[0]
    hr = torch.stack(list(clip.frames()))
    lr = BI()(hr)[None]
    with torch.inference_mode():
        ours, bicubic = (
            psnr(network.eval()(lr)[0], hr, "y").mean() for network in (load_backbone("basicvsr_tiny"), Bicubic())
        )
    assert ours > bicubic + 0.5
