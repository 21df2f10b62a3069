"""`vsrplug train`: a run killed at any moment goes on to the same weights; what it leaves; sweeps; wrong choices."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vsrplug import load_plugins
from vsrplug.backbones import basicvsr_tiny
from vsrplug.commands import build, evaluate, train
from vsrplug.official import load_official
from vsrplug.plugged import fingerprint

from .conftest import Job

COMMAND = [sys.executable, "-c", "from vsrplug.commands import main; main()"]
SCRIPT = [str(Path(sys.executable).with_name("vsrplug"))]  # Lightning starts the script again for the second process
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def same(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def killed_at_random(command: list[str], folder: Path, within: float) -> Path:
    """Within so many seconds of its first checkpoint, which is what this returns; the last, that is.

    A run that was over before its kill is run again.
    """
    checkpoint, metrics = folder / "checkpoints" / "last.ckpt", folder / "metrics.json"
    while True:
        running = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        while not checkpoint.exists() and running.poll() is None:
            time.sleep(0.01)
        time.sleep(random.SystemRandom().uniform(0, within))
        running.send_signal(signal.SIGKILL)
        _, errors = running.communicate()
        assert checkpoint.exists(), errors
        if not metrics.exists():
            assert running.returncode == -signal.SIGKILL, errors
            return checkpoint
        shutil.rmtree(folder)


STAGED = [
    "tuning=staged", "tuning.phases.plugins.steps=4", "+tuning.phases.plugins.freeze=['*.seem.*']",
    "++tuning.phases.all.steps=5", "++tuning.phases.end={rates:{backbone.forward_trunk.*:0.125}}",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "tuning", [["tuning=full", "+tuning.rates={backbone.forward_trunk.*: 0.125}"], STAGED], ids=["full", "staged"]
)
def test_a_run_killed_at_a_random_moment_and_resumed_gives_the_same_weights(
    job: Job, tmp_path: Path, tiny: dict[str, list[str]], tuning: list[str]
) -> None:
    """Averages, schedule, rates, clipping, SEEM's masks, an auxiliary loss and the whole backbone at once."""
    overrides = [
        *tiny["train"],
        *("plugins=[seem,memory_bank]", *tuning, "callbacks=ema", "callbacks.ema.decay=0.9"),
        *("trainer.max_steps=14", "trainer.gradient_clip_val=0.5"),
        "+losses.weights={*/quantisation: 0.1}",
    ]
    train.run(job("train", tmp_path / "whole", *overrides))
    command = [*COMMAND, "train", *overrides, f"hydra.run.dir={tmp_path / 'killed'}"]
    whole = figures(tmp_path / "whole")
    checkpoint = killed_at_random(command, tmp_path / "killed", within=whole["training_seconds"])
    saved = torch.load(checkpoint, weights_only=True)
    step, seconds = saved["global_step"], saved["callbacks"]["Timer"]["time_elapsed"]["train"]
    resumed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("plugins.safetensors", "backbone.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "killed" / name), (name, step)
    killed = figures(tmp_path / "killed")
    assert whole["clips"] == killed["clips"]
    assert whole["compared"] == killed["compared"]  # the backbone of before is the untrained one, not the resumed
    assert killed["training_seconds"] >= seconds > 0  # of both parts
    lines = resumed.stderr.splitlines()
    assert f"Going on from {checkpoint}" in lines
    shown = re.findall(r"^step (\d+)/14  pixel ", resumed.stderr, flags=re.MULTILINE)
    assert [int(number) for number in shown] == [number for number in (4, 8, 12) if number > step]
    for noise in ("Traceback", "Warning", "deprecated", "litlogger", "GPU available", "exists and is not empty"):
        assert noise not in resumed.stderr
    assert resumed.stdout == ""


@pytest.mark.parametrize("tuning", [["tuning=full"], STAGED], ids=["full", "staged"])
def test_a_run_killed_while_it_is_measured_ends_with_the_same_averages(
    job: Job, tmp_path: Path, tiny: dict[str, list[str]], tuning: list[str]
) -> None:
    """Its last step is done, so that nothing is trained when it goes on; measuring takes minutes on whole clips."""
    overrides = [*tiny["train"], "plugins=[seem,memory_bank]", *tuning, "callbacks=ema", "trainer.max_steps=10"]
    train.run(job("train", tmp_path, *overrides))
    whole = figures(tmp_path)
    learned = {file: file.rename(tmp_path / f"whole.{file.name}") for file in tmp_path.glob("*.safetensors")}
    assert len(learned) == 2
    (tmp_path / "metrics.json").unlink()
    train.run(job("train", tmp_path, *overrides))
    assert all(same(*files) for files in learned.items())
    timed = {"seconds", "training_seconds"}
    again = figures(tmp_path)
    assert {key: again[key] for key in whole.keys() - timed} == {key: whole[key] for key in whole.keys() - timed}


@pytest.mark.slow
def test_two_processes_with_half_the_batch_are_one_with_the_whole(
    job: Job, tmp_path: Path, tiny: dict[str, list[str]]
) -> None:
    """The devices' gradients are averaged, and their samples are the samples of one device, dealt out."""
    # With Adam's own epsilon a gradient that is all but zero would become a whole step in the sign of its rounding.
    overrides = [*tiny["train"], "plugins=memory_bank", "trainer.max_steps=3", "+optim.optimizer.eps=1e-5"]
    train.run(job("train", tmp_path / "one", *overrides, "datamodule.batch_size=2"))
    two = [*overrides, "trainer.devices=2", "+trainer.strategy=ddp", f"hydra.run.dir={tmp_path / 'two'}"]
    done = subprocess.run([*SCRIPT, "train", *two], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / name / "plugins.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        assert torch.allclose(value, other[key], atol=1e-6), key
    assert done.stderr.count("protocol demo_bd_y") == 1  # one of them measures
    assert figures(tmp_path / "two")["psnr"] == pytest.approx(figures(tmp_path / "one")["psnr"], abs=1e-3)


@pytest.fixture
def tuned(job: Job, tmp_path: Path, tiny: dict[str, list[str]]) -> Path:
    """A folder after three steps of a memory bank."""
    train.run(job("train", tmp_path / "tuned", *tiny["train"], "plugins=memory_bank", "trainer.max_steps=3"))
    return tmp_path / "tuned"


def test_a_run_leaves_weights_figures_logs_and_a_picture(
    tuned: Path, job: Job, tmp_path: Path, tiny: dict[str, list[str]]
) -> None:
    written = figures(tuned)
    torch.manual_seed(0)
    backbone = basicvsr_tiny()
    bank = sum(p.numel() for p in load_plugins(backbone, tuned / "plugins.safetensors").plugins.parameters())
    total = sum(p.numel() for p in backbone.parameters())
    assert written["parameters"] == {"total": total + bank, "trainable": bank}
    assert list(written["compared"]) == ["bicubic", "backbone"]
    assert not (tuned / "backbone.safetensors").exists()  # it did not change
    assert {"comparison.png", "metrics.json", "plugins.safetensors"} <= {file.name for file in tuned.iterdir()}
    assert list(tuned.glob("tensorboard/events*"))
    (table,) = tuned.glob("csv/*/metrics.csv")
    assert {"train/pixel", "train/memory_bank/quantisation"} <= set(next(csv.reader(table.open())))
    # Evaluating the file gives the figures of the run that wrote it.
    again = job("evaluate", tmp_path / "again", *tiny["evaluate"], f"plugins_file={tuned / 'plugins.safetensors'}")
    assert evaluate.run(again) == written["psnr"]
    assert figures(tmp_path / "again")["clips"] == written["clips"]


def test_the_same_command_in_a_finished_folder_changes_nothing(
    tuned: Path, job: Job, tiny: dict[str, list[str]]
) -> None:
    before = shutil.copy(tuned / "plugins.safetensors", tuned / "before.safetensors")
    tables = {*tuned.glob("csv/*")}
    train.run(job("train", tuned, *tiny["train"], "plugins=memory_bank", "trainer.max_steps=3"))
    assert same(tuned / "plugins.safetensors", before)
    assert tables < {*tuned.glob("csv/*")}  # the first table is still there


def test_a_run_that_goes_on_with_other_choices_says_so(
    tuned: Path, job: Job, tiny: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """More steps are a reason to do so; another rate most likely is a mistake."""
    command = [*tiny["train"], "plugins=memory_bank"]
    train.run(job("train", tuned, *command, "trainer.max_steps=3"))
    assert "other choices" not in capsys.readouterr().err
    train.run(job("train", tuned, *command, "trainer.max_steps=4", "optim.optimizer.lr=0.01"))
    said = "optim.optimizer.lr=0.01 (was 0.0002), optim.schedule.T_max=4 (was 3), trainer.max_steps=4 (was 3)\n"
    begun = f"Goes on with the checkpoint of {tuned}, which was begun with other choices: "
    assert begun + said in capsys.readouterr().err
    for other, refused in (
        (["plugins=efst"], "another backbone or plug-ins"),
        (["plugins=memory_bank", "tuning=full"], "another tuning or optimizer"),
    ):
        with pytest.raises(ValueError, match=rf"last\.ckpt is of a run with {refused}; give what it had"):
            train.run(job("train", tuned, *tiny["train"], *other, "trainer.max_steps=4"))
        capsys.readouterr()
    train.run(job("train", tuned, *command, "trainer.max_steps=3"))
    assert "other choices" not in capsys.readouterr().err  # it was begun with these, whoever tried what since


def test_a_folder_of_another_model_is_refused(
    tuned: Path, vsrplug: Callable[..., None], tiny: dict[str, list[str]]
) -> None:
    checkpoint = tuned / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    with pytest.raises(
        SystemExit, match=rf"^vsrplug train: {checkpoint} is of a run with another backbone or plug-ins"
    ):
        vsrplug("train", *tiny["train"], "plugins=seem", f"hydra.run.dir={tuned}")
    assert checkpoint.read_bytes() == before


def test_full_tuning_without_plugins_leaves_a_backbone(job: Job, tmp_path: Path, tiny: dict[str, list[str]]) -> None:
    train.run(job("train", tmp_path, *tiny["train"], "tuning=full", "trainer.max_steps=2", "seed=4"))
    assert not (tmp_path / "plugins.safetensors").exists()
    torch.manual_seed(4)
    backbone = basicvsr_tiny()
    first = fingerprint(backbone)
    assert not load_official(backbone, tmp_path / "backbone.safetensors").missing
    assert fingerprint(backbone) != first
    written = figures(tmp_path)
    assert written["parameters"]["trainable"] == written["parameters"]["total"]
    assert list(written["compared"]) == ["bicubic", "backbone"]
    again = tmp_path / "again"
    overrides = ["backbone=basicvsr_tiny", f"backbone.path={tmp_path / 'backbone.safetensors'}"]
    assert evaluate.run(job("evaluate", again, *tiny["evaluate"], *overrides)) == written["psnr"]


@pytest.mark.parametrize("tuning", ["lora", "plugins_and_bias"])
def test_what_is_tuned_without_plugins_is_a_small_file(
    job: Job, tmp_path: Path, tiny: dict[str, list[str]], tuning: str
) -> None:
    overrides = ["plugins=none", f"tuning={tuning}", "trainer.max_steps=2", "backbone=basicvsr_tiny"]
    train.run(job("train", tmp_path, *tiny["train"], *overrides))
    written = figures(tmp_path)
    names = set(load_file(tmp_path / "plugins.safetensors"))
    assert names
    assert all((".lora_" in name) if tuning == "lora" else name.endswith(".bias") for name in names)
    assert (tmp_path / "backbone.safetensors").exists() is (tuning != "lora")  # under LoRA it is what it was
    given = ["backbone=basicvsr_tiny", f"plugins_file={tmp_path / 'plugins.safetensors'}"]
    assert evaluate.run(job("evaluate", tmp_path / "again", *tiny["evaluate"], *given)) == written["psnr"]
    assert written["psnr"] != written["compared"]["backbone"]["psnr"]


def test_a_window_network_takes_the_same_choices(
    job: Job, tmp_path: Path, tiny: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Longer training clips than its window, validation and evaluation of whole clips."""
    small = ["backbone=edvr", "backbone.channels=32", "backbone.extract_blocks=1", "backbone.reconstruct_blocks=1"]
    clips = ["datamodule.frames=7", "protocol.clips.frames=5", "trainer.val_check_interval=2", "trainer.max_steps=2"]
    train.run(job("train", tmp_path, *tiny["train"], *small, *clips, "plugins=[seem,memory_bank]"))
    assert "The backbone has no weights and does not learn: give backbone.path=FILE" in capsys.readouterr().err
    written = figures(tmp_path)
    assert list(written["compared"]) == ["bicubic", "backbone"]
    assert written["psnr"] != written["compared"]["backbone"]["psnr"]
    (table,) = tmp_path.glob("csv/*/metrics.csv")
    validated = [row["val/demo_bd_y/psnr"] for row in csv.DictReader(table.open()) if row["val/demo_bd_y/psnr"]]
    assert [float(value) for value in validated] == [pytest.approx(written["psnr"], abs=1e-4)]


def test_the_frozen_baseline_is_measured_and_not_trained(
    vsrplug: Callable[..., None], tmp_path: Path, tiny: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    vsrplug("train", *tiny["train"], "plugins=none", "tuning=plugins_only", f"hydra.run.dir={tmp_path}")
    written = figures(tmp_path)
    assert written["parameters"]["trainable"] == 0
    assert list(written["compared"]) == ["bicubic"]  # once, not as its own competitor
    assert not (tmp_path / "checkpoints").exists()
    assert not list(tmp_path.glob("*.safetensors"))
    assert "Nothing to train" in capsys.readouterr().err
    vsrplug("train", *tiny["train"], "backbone=basicvsr_tiny", f"hydra.run.dir={tmp_path / 'shipped'}")
    assert "has no weights" not in capsys.readouterr().err


def test_a_sweep_gives_every_combination_a_folder_of_its_own(
    vsrplug: Callable[..., None], tmp_path: Path, tiny: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path))
    vsrplug("train", "-m", "plugins=none,[memory_bank],[]", "trainer.max_steps=1", *tiny["train"])
    folders = {file.parent for file in tmp_path.glob("sweeps/*/*/metrics.json")}
    assert len(folders) == 3
    plugins = {figures(folder)["choices"]["plugins"]: folder for folder in folders}
    assert plugins.keys() == {"none", "memory_bank"}
    assert len({folder.parent for folder in folders}) == 1
    assert (plugins["memory_bank"] / "plugins.safetensors").exists()
    assert (plugins["memory_bank"] / "checkpoints").is_dir() is False  # every_n_train_steps=2: none was due
    assert [*(plugins["memory_bank"]).glob("tensorboard/events*")]


def test_a_sweeps_folders_are_called_after_the_choices(
    vsrplug: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path))
    monkeypatch.setattr(train, "run", lambda cfg: (build.output_dir() / "here").touch())
    vsrplug("train", "-m", "backbone=basicvsr,edvr", "plugins=none,[seem,memory_bank]", "seed=0")
    assert {path.parent.name for path in tmp_path.glob("sweeps/*/*/here")} == {
        f"backbone={backbone},plugins={plugins}"
        for backbone in ("basicvsr", "edvr")
        for plugins in ("none", "seem+memory_bank")
    }


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ("trainer: {max_step: 3}", "lightning.Trainer: there is no argument 'max_step'; did you mean 'max_steps'"),
        ("trainr: {max_steps: 3}", "there is no configuration key 'trainr'; did you mean 'trainer'"),
        ("optim: {optimiser: {lr: 1}}", "there is no configuration key 'optim.optimiser'; did you mean 'optim.optimi"),
        (
            "losses: {weight: {pixel: 1}}",
            "there is no configuration key 'losses.weight'; did you mean 'losses.weights'",
        ),
        ("callbacks: {checkpont: {monitor: a}}", "there is no entry 'callbacks.checkpont'; did you mean 'callbacks.ch"),
        ("data: {clip: 3}", "vsrplug.data.DemoClips: there is no argument 'clip'; did you mean 'clips'"),
        ("protocol: {clips: {sizes: [8, 8]}}", "vsrplug.data.DemoClips: there is no argument 'sizes'; did you mean 's"),
        ("plugins: {sem: {sites: [fused]}}", "there is no entry 'plugins.sem'"),
        ("datamodule: {patches: 8}", "vsrplug.VSRDataModule: there is no argument 'patches'; did you mean 'patch'"),
        ("tuning: {training: ['*']}", "vsrplug.tuning.Tuning: there is no argument 'training'; did you mean 'train'"),
    ],
)
def test_a_misspelt_key_of_an_experiment_fails_before_anything_is_made(
    vsrplug: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    experiment: str,
    message: str,
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{experiment}\n")
    monkeypatch.setattr(train, "run", lambda cfg: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as caught:
        vsrplug("train", "--config-dir", str(tmp_path), "experiment=mine", f"hydra.run.dir={tmp_path / 'run'}")
    assert str(caught.value).startswith(f"vsrplug train: {message}")
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+losses.weights.flaw=0.1"],
            "losses: there is no loss that matches 'flaw'; did you mean 'flow'? Known: pixel,",
        ),
        (
            ["tuning.train=[plugins.memory_bonk.*]"],
            "tuning: there is no parameter that matches 'plugins.memory_bonk.*'",
        ),
        (["datamodule.frames=9"], "clip 'train_0000' has 8 frames, but training windows have frames=9"),
        (["datamodule.patch=32"], "clip 'train_0000' has frames of 64x64, that is 16x16 low-resolution pixels"),
        (["backbone=edvr", "backbone.channels=32"], "this EDVR takes windows of 5 frames, got 3"),
    ],
)
def test_what_cannot_be_trained_ends_in_one_line(
    vsrplug: Callable[..., None], tmp_path: Path, tiny: dict[str, list[str]], overrides: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        vsrplug("train", *tiny["train"], "plugins=memory_bank", f"hydra.run.dir={tmp_path}", *overrides)
    assert str(caught.value).startswith(f"vsrplug train: {message}")
    assert "\n" not in str(caught.value)


def test_a_keyboard_interrupt_says_how_to_go_on(
    vsrplug: Callable[..., None], tmp_path: Path, tiny: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vsrplug.module.VSRModule.training_step", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(
            SystemExit, match=rf"interrupted; go on with the same command and hydra\.run\.dir={tmp_path}"
        ):
            vsrplug("train", *tiny["train"], "plugins=memory_bank", f"hydra.run.dir={tmp_path}")
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_damaged_or_foreign_checkpoint_is_refused(
    vsrplug: Callable[..., None], tmp_path: Path, tiny: dict[str, list[str]]
) -> None:
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()

    def attempt() -> str:
        with pytest.raises(SystemExit) as caught:
            vsrplug("train", *tiny["train"], "plugins=memory_bank", f"hydra.run.dir={tmp_path}")
        return str(caught.value)

    checkpoint.write_bytes(b"PK\x03\x04 cut short")
    assert attempt().startswith(f"vsrplug train: {checkpoint} is damaged, or holds more than data, and was not read (")
    torch.save({"state": train.fit}, checkpoint)  # a pickle that names code
    assert attempt().startswith(f"vsrplug train: {checkpoint} is damaged, or holds more than data, and was not read (")
    assert checkpoint.exists()
