"""The data module under Lightning: endless, resumable to the sample, ranks apart, validation by whole clips."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import vsrplug
from vsrplug.data import TrainingClips, VSRDataModule
from vsrplug.degradations import BD, BI, crop_to_multiple
from vsrplug.masks import Superpixels

from .test_training import clip, same

CLIPS = [clip("a"), clip("bb", 9, (60, 60))]


class Recorder(lightning.LightningModule):
    """A network of one weight that remembers what it was shown; it stops by itself, as a kill would, at `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.stop = stop
        self.seen: list[Tensor] = []
        self.validated: list[tuple[int, dict[str, Any]]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.global_step == self.stop:
            raise RuntimeError("killed")
        self.seen.append(batch["lr"].clone())
        return (batch["lr"] * self.weight).mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated.append((self.global_step, batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(**arguments: Any) -> VSRDataModule:
    return VSRDataModule(CLIPS, BI(), **{"frames": 2, "patch": 6, "batch_size": 2} | arguments)


def trainer(folder: Path, steps: int, **arguments: Any) -> lightning.Trainer:
    defaults: dict[str, Any] = {
        "callbacks": [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)],
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "val_check_interval": 3,
    }
    return lightning.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | arguments,
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_killed_run_goes_on_with_the_samples_it_would_have_seen(
    tmp_path: Path, workers: int, accumulate: int
) -> None:
    whole, killed, resumed = Recorder(), Recorder(stop=5), Recorder()
    arguments = {"accumulate_grad_batches": accumulate, "val_check_interval": 100}
    trainer(tmp_path / "whole", 8, **arguments).fit(whole, data())
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path / "killed", 8, **arguments).fit(killed, data(workers=workers))
    last = tmp_path / "killed" / "step=4.ckpt"
    trainer(tmp_path / "resumed", 8, **arguments).fit(resumed, data(workers=workers), ckpt_path=last)
    seen = killed.seen[: 4 * accumulate] + resumed.seen
    assert len(seen) == len(whole.seen) == 8 * accumulate
    assert all(torch.equal(one, other) for one, other in zip(seen, whole.seen, strict=True))
    assert torch.equal(resumed.weight, whole.weight)
    numbered = TrainingClips(CLIPS, BI(), frames=2, patch=6)
    assert torch.equal(torch.cat(whole.seen), torch.stack([numbered[k]["lr"] for k in range(16 * accumulate)]))


def test_another_batch_size_after_resuming_skips_and_repeats_nothing(tmp_path: Path) -> None:
    trainer(tmp_path / "one", 4).fit(Recorder(), data())
    second, third = Recorder(), Recorder()
    trainer(tmp_path / "two", 6).fit(second, data(batch_size=3), ckpt_path=tmp_path / "one" / "step=4.ckpt")
    trainer(tmp_path / "three", 8).fit(third, data(batch_size=1), ckpt_path=tmp_path / "two" / "step=6.ckpt")
    numbered = TrainingClips(CLIPS, BI(), frames=2, patch=6)
    assert torch.equal(torch.cat(second.seen), torch.stack([numbered[k]["lr"] for k in range(8, 14)]))
    assert torch.equal(torch.cat(third.seen), torch.stack([numbered[k]["lr"] for k in range(14, 16)]))


def test_validation_gives_whole_clips_while_training_has_no_end(tmp_path: Path) -> None:
    validation = SimpleNamespace(clips=CLIPS, degradation=BD())
    model = Recorder()
    trainer(tmp_path, 7).fit(model, data(validation=validation, masks=Superpixels(4)))
    assert [step for step, _ in model.validated] == [3, 3, 6, 6]
    for (_, batch), source in zip(model.validated, CLIPS * 2, strict=True):
        hr = crop_to_multiple(source.stored.float() / 255, 4)
        assert batch["name"] == [source.name]
        assert torch.equal(batch["hr"][0], hr)
        assert torch.equal(batch["lr"][0], BD()(hr))
        assert torch.equal(batch["masks"][0], Superpixels(4)(BD()(hr)))


def test_without_validation_training_runs(tmp_path: Path) -> None:
    model = Recorder()
    trainer(tmp_path, 4).fit(model, data())
    assert (len(model.seen), model.validated) == (4, [])


def test_ranks_share_the_numbers_out() -> None:
    numbered = TrainingClips(CLIPS, BI(), frames=2, patch=6)
    shown = []
    for rank in range(2):
        module = data()
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2, global_step=0, accumulate_grad_batches=1)
        shown.append([batch["lr"] for batch in itertools.islice(module.train_dataloader(), 2)])
        module.trainer.global_step = 2
        assert module.state_dict() == {"samples": 8, "step": 2}
    expected = torch.stack([numbered[k]["lr"] for k in range(8)])
    together = torch.stack([torch.cat(batches) for batches in shown], dim=1).flatten(0, 1)
    assert torch.equal(together, expected)


def test_workers_and_loaders_leave_the_samples_and_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    alone = list(itertools.islice(data().train_dataloader(), 5))
    shared = list(itertools.islice(data(workers=2).train_dataloader(), 5))
    assert all(same(one, other) for one, other in zip(alone, shared, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loader_has_no_length() -> None:
    with pytest.raises(TypeError):
        len(data().train_dataloader())


def test_masks_reach_the_batches() -> None:
    batch = next(iter(data(masks=Superpixels(5)).train_dataloader()))
    assert batch["masks"].shape == (2, 2, 5, 6, 6)
    assert set(batch["masks"].unique().tolist()) == {0.0, 1.0}


def test_it_is_found_at_the_top() -> None:
    assert vsrplug.VSRDataModule is VSRDataModule
