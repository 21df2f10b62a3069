"""What a user sees of a training: TensorBoard's pictures, the bar, the lines of a log; and averages that leave frozen
weights alone."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vsrplug.backbones import Bicubic
from vsrplug.callbacks import EMA, Pictures, Progress


class Enlarge(lightning.LightningModule):
    """Bicubic with a gain, validated as `VSRModule` is."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.9))
        self.frozen = nn.Parameter(torch.randn(1000), requires_grad=False)
        self.bicubic = Bicubic(4)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = (self.bicubic(batch["lr"]) * self.gain - batch["hr"]).abs().mean()
        self.log("train/pixel", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        self.log("val/demo_bd_y/psnr", 24.125, prog_bar=True, batch_size=1)
        return {"sr": self.bicubic(batch["lr"]) * self.gain}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.gain], lr=1e-2)


def samples() -> list[dict[str, Any]]:
    return [
        {"lr": torch.rand(3, 3, 8, 12), "hr": torch.rand(3, 3, 32, 48), "name": name} for name in ("first", "second")
    ]


def fit(
    folder: Path,
    *callbacks: Any,
    module: Enlarge | None = None,
    clips: list[dict[str, Any]] | None = None,
    **arguments: Any,
) -> Enlarge:
    module, clips = module or Enlarge(), clips or samples()
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_steps=4,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=2,
        log_every_n_steps=1,
        **{"logger": False} | arguments,
    )
    trainer.fit(module, DataLoader(clips), DataLoader(clips))
    return module


def test_the_event_file_has_a_row_of_pictures_of_the_first_clip_at_each_validation(tmp_path: Path) -> None:
    clips = samples()
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="tensorboard", version="")]
    module = fit(tmp_path, Pictures(), clips=clips, logger=loggers)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["first: low resolution, bicubic, restored, truth"]
    images = events.Images(events.Tags()["images"][0])
    assert [image.step for image in images] == [2, 4]
    row = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string))).astype(float) / 255
    lr, hr = clips[0]["lr"][1], clips[0]["hr"][1]
    bicubic = module.bicubic(lr[None, None])[0, 0]
    expected = [lr.repeat_interleave(4, 1).repeat_interleave(4, 2), bicubic, bicubic * module.gain.item(), hr]
    for shown, wanted in zip(np.split(row, 4, axis=1), expected, strict=True):
        assert np.abs(shown - wanted.clamp(0, 1).permute(1, 2, 0).numpy()).max() <= 1 / 255


def test_without_tensorboard_there_are_no_pictures(tmp_path: Path) -> None:
    fit(tmp_path, Pictures())
    assert not list(tmp_path.rglob("events*"))


def test_a_log_file_gets_one_line_a_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, Progress())
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("step")]
    assert len(lines) == 2
    for line, step in zip(lines, (2, 4), strict=True):
        assert re.fullmatch(rf"step {step}/4  pixel 0\.\d+  psnr 24\.1\d  [\d.]+ steps/s", line), line


def test_a_terminal_gets_one_bar_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    terminal = Console(file=shown, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("vsrplug.callbacks.Console", lambda stderr: terminal)
    fit(tmp_path, Progress())
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
    assert re.fullmatch(r"step 4/4 ━+ 0:00:00 pixel 0\.\d+  psnr 24\.1\d", last.strip()), last


def test_an_error_in_training_gives_the_terminal_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    monkeypatch.setattr(Enlarge, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, progress)
    assert not progress._bar.live.is_started


def test_averages_do_not_touch_frozen_weights(tmp_path: Path) -> None:
    """decay * w + (1 - decay) * w is not w: of a thousand numbers some would lose their last bit."""
    decay, module = 0.999, Enlarge()
    frozen = module.frozen.detach().clone()
    assert not torch.equal(decay * frozen + (1 - decay) * frozen, frozen)
    fit(tmp_path, EMA(decay), module=module)
    assert torch.equal(module.frozen, frozen)
    assert module.gain.item() != pytest.approx(0.9, abs=1e-4)
