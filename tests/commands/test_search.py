"""A search: the trials that Optuna would choose, those that fall behind stopped, and gone on with when killed."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from omegaconf import DictConfig

from vsrplug.commands import build, jobs, train
from vsrplug.json_files import write_json

Run = Callable[..., Any]
SITES = ["[fused]", "[backward_output,forward_output]", "[backward_output,forward_output,fused]"]
ENTRIES = [64, 128, 256, 512]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_a_search_tries_what_optuna_would_and_goes_on_after_a_kill(
    vsrplug: Run, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job takes no time here; those with 64 entries fail."""

    def figure(sites: str, entries: int, lr: float) -> float:
        return 20 + len(sites) / 100 + entries / 1000 - abs(float(np.log10(lr)) + 3)

    tried: list[tuple[str, int, float]] = []
    left = 8

    def run(cfg: DictConfig) -> float:
        nonlocal left
        done = jobs.finished(cfg, build.output_dir())
        if done is not None:
            return done
        if not left:
            raise KeyboardInterrupt
        left -= 1
        bank = cfg.plugins.memory_bank
        choice = (f"[{','.join(bank.sites)}]", int(bank.entries), float(cfg.optim.optimizer.lr))
        tried.append(choice)
        if bank.entries == 64:
            raise ValueError("too few")
        write_json({"psnr": figure(*choice), "job": jobs.digest(cfg)}, build.output_dir() / "metrics.json")
        return figure(*choice)

    monkeypatch.setattr(train, "run", run)
    search = ["train", "-m", "search=memory_bank", "hydra.sweeper.n_trials=14", "seed=1"]
    with pytest.raises(KeyboardInterrupt):
        vsrplug(*search)
    assert len(tried) == 8
    left = 100
    vsrplug(*search)

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    expected = []
    for _ in range(14):
        trial = study.ask()
        sites, entries = trial.suggest_categorical("sites", SITES), trial.suggest_categorical("entries", ENTRIES)
        choice = (sites, entries, trial.suggest_float("lr", 2e-4, 2e-2, log=True))
        expected.append(choice)
        if entries == 64:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, figure(*choice))
    assert list(dict.fromkeys(tried)) == expected
    failed = [choice for choice in expected if choice[1] == 64]
    assert 0 < len(failed) < 14
    assert sorted(tried) == sorted(expected + [choice for choice in expected[:8] if choice in failed])  # tried again
    (folder,) = runs.glob("sweeps/search=memory_bank,seed=1")
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert best["best_value"] == study.best_value
    assert len(list(folder.glob("*/failed.json"))) == len(failed)
    assert "too few\nThe sweep goes on without" in capsys.readouterr().err


def trials(runs: Path) -> list[dict[str, Any]]:
    """What the jobs of a search left, times left out, in the order in which they were started."""
    found: dict[int, dict[str, Any]] = {}
    for file in runs.glob("sweeps/*/*/metrics.json"):
        number = yaml.safe_load((file.parent / ".hydra" / "hydra.yaml").read_text())["hydra"]["job"]["num"]
        figures = {key: value for key, value in json.loads(file.read_text()).items() if "seconds" not in key}
        curve = {int(step): psnr for step, psnr in json.loads((file.parent / "curve.json").read_text()).items()}
        found[number] = figures | {"folder": file.parent, "name": file.parent.name, "curve": curve}
    return [found[number] for number in sorted(found)]


@pytest.mark.slow
def test_trials_that_fall_behind_are_stopped_and_reported_as_such(
    vsrplug: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, list[str]]
) -> None:
    search = ["train", "-m", "search=memory_bank", "hydra.sweeper.n_trials=4", *tiny["train"], "trainer.max_steps=6"]
    search += ["trainer.val_check_interval=2", "callbacks.pruning.pruner.n_startup_trials=2"]
    vsrplug(*search, "optim.optimizer.lr=choice(1e-2,1)")
    found = trials(runs)
    assert len(found) == 4
    done: list[dict[int, float]] = []
    for trial in found:
        curve = trial["curve"]
        behind = [
            step
            for step in curve
            if len(done) >= 2
            and step < 6
            and max(v for s, v in curve.items() if s <= step) < np.median([c[step] for c in done])
        ]
        assert trial.get("pruned") == (behind[0] if behind else None)
        assert list(curve) == list(range(2, (trial.get("pruned") or 6) + 1, 2))
        if behind:
            assert trial["psnr"] == curve[behind[0]]
            assert not (trial["folder"] / "plugins.safetensors").exists()
        else:
            assert trial["psnr"] == pytest.approx(curve[6], abs=1e-4)  # the last validation is the protocol's figure
            done.append(curve)
    stopped = [trial for trial in found if "pruned" in trial]
    assert 0 < len(stopped) < 3

    vsrplug("report", str(next(runs.glob("sweeps/*"))))
    with next(runs.glob("sweeps/*/table.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["missing"] for row in rows if row["missing"]) == sorted(
        f"seed 0 pruned (at step {trial['pruned']}, with {trial['psnr']:.3f} dB)" for trial in stopped
    )
    assert sum(bool(row["psnr"]) for row in rows) == len(done)
    page = next(runs.glob("sweeps/*/report.html")).read_text()
    assert f"{len(done)} of 4 jobs are done, {len(stopped)} pruned." in page

    # Killed after two trials: the same command chooses the same ones, takes the figures that are there, and goes on.
    shutil.copytree(runs, tmp_path / "killed")
    for trial in trials(tmp_path / "killed")[2:]:
        shutil.rmtree(trial["folder"])
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path / "killed"))
    kept = [(trial["folder"] / "metrics.json").stat().st_mtime_ns for trial in trials(tmp_path / "killed")]
    vsrplug(*search, "optim.optimizer.lr=choice(1e-2,1)")
    again = trials(tmp_path / "killed")
    assert [t | {"folder": 0} for t in again] == [t | {"folder": 0} for t in found]
    assert [(trial["folder"] / "metrics.json").stat().st_mtime_ns for trial in again[:2]] == kept
