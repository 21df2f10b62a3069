"""Sweeps: done once, failures marked, killed twice and still the same table."""

from __future__ import annotations

import csv
import html
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from vsrplug.commands import build, jobs, outcome, sweep, train
from vsrplug.json_files import write_json
from vsrplug.reporting import read_jobs

COMMAND = [sys.executable, "-c", "from vsrplug.commands import main; main()"]


def figures(folder: Path) -> dict[str, dict[str, Any]]:
    """Job -> what it measured, times left out."""
    found = {}
    for file in folder.glob("sweeps/*/*/metrics.json"):
        figures = json.loads(file.read_text())
        found[file.parent.name] = {key: value for key, value in figures.items() if "seconds" not in key}
    return found


def table(folder: Path) -> list[dict[str, str]]:
    """The report's."""
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_killed_twice_ends_with_the_figures_of_an_undisturbed_one(
    vsrplug: Callable[..., None], tmp_path: Path, tiny: dict[str, list[str]]
) -> None:
    """Twelve jobs: two plug-ins and none, two ways of tuning, two seeds."""
    arguments = ["train", "-m", "plugins=none,memory_bank,efst", "tuning=plugins_only,full", "seed=0,1"]
    arguments += [*tiny["train"], "trainer.max_steps=4"]

    def run(folder: str, kill_after: int | None = None, within: float = 0.0) -> str:
        """Killed at a random moment of the seconds `within`, once so many jobs are done."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "VSRPLUG_RUNS": str(tmp_path / folder), "COLUMNS": "200"}
        running = subprocess.Popen([*COMMAND, *arguments], env=environment, stderr=subprocess.PIPE, text=True)
        if kill_after is not None:
            while len(figures(tmp_path / folder)) < kill_after and running.poll() is None:
                time.sleep(0.05)
            time.sleep(random.SystemRandom().uniform(0, within))
            running.send_signal(signal.SIGKILL)
        errors = running.communicate()[1]
        assert running.returncode == (0 if kill_after is None else -signal.SIGKILL), errors
        return errors

    run("whole")
    whole = figures(tmp_path / "whole")
    kinds = [f"plugins={p},seed={s},tuning={t}" for p in ("none", "memory_bank", "efst") for s in (0, 1)
             for t in ("plugins_only", "full")]  # fmt: skip
    assert sorted(whole) == sorted(kinds)
    ends = sorted(file.stat().st_mtime for file in tmp_path.glob("whole/sweeps/*/*/metrics.json"))
    job = (ends[-1] - ends[3]) / 8  # seconds that one takes which trains: the first four are of plugins=none
    run("killed", 2, within=job)
    before = len(figures(tmp_path / "killed"))
    assert 2 <= before < 12
    run("killed", before + 1, within=job)  # not before it works: starting takes seconds
    before = len(figures(tmp_path / "killed"))
    errors = run("killed")
    assert errors.count("Done before: ") >= before
    assert figures(tmp_path / "killed") == whole
    assert "Done before" in run("killed")
    tables = {}
    for folder in ("whole", "killed"):
        (sweep_folder,) = tmp_path.glob(f"{folder}/sweeps/*")
        vsrplug("report", str(sweep_folder))
        rows = table(sweep_folder)
        assert [row["training_seconds"] == "" for row in rows] == [row["trainable"] == "0" for row in rows]
        tables[folder] = [row | {"training_seconds": ""} for row in rows]  # no two runs take as long
    assert tables["killed"] == tables["whole"]
    assert [(row["seeds_done"], row["missing"]) for row in tables["whole"]] == [("2", "")] * 6


def test_folders_of_a_sweep_are_named_after_its_command_and_of_a_job_after_what_is_swept() -> None:
    arguments = ["-m", "plugins=none,[seem,memory_bank]", "seed=0,1", "trainer.max_steps=4", "hydra/launcher=joblib"]
    folder, left_out = sweep.name_folders(arguments)[len(arguments) :]
    assert folder == "hydra.sweep.dir='${paths.runs}/sweeps/plugins=none,seem+memory_bank,seed=0,1,trainer.max_steps=4'"
    assert left_out == "hydra.job.config.override_dirname.exclude_keys=['trainer.max_steps']"
    for given in (["plugins=none"], [*arguments, "hydra.sweep.dir=/somewhere"]):
        assert sweep.name_folders(given) == given
    assert len(sweep.name_folders(["-m", "plugins=[none"])) == 3  # the rest is for Hydra to say


def test_failed_jobs_are_marked_and_the_others_finish(
    vsrplug: Callable[..., None], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = {1: ValueError("no such thing; try another"), 2: RuntimeError("something broke")}

    def run(cfg: DictConfig) -> float:
        if cfg.seed in failing:
            raise failing[cfg.seed]
        write_json({"psnr": 1.0}, build.output_dir() / "metrics.json")
        return 1.0

    monkeypatch.setattr(train, "run", run)
    vsrplug("train", "-m", "seed=0,1,2,3")
    assert set(figures(runs)) == {"seed=0", "seed=3"}
    (folder,) = runs.glob("sweeps/*")
    failed = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/failed.json")}
    assert {name: marked["error"].partition(" (")[0] for name, marked in failed.items()} == {
        "seed=1": "no such thing; try another",
        "seed=2": "something broke",
    }
    assert "ValueError: no such thing" in failed["seed=1"]["traceback"]
    assert failed["seed=1"]["choices"]["backbone"] == "basicvsr_tiny"
    assert f"vsrplug train: no such thing; try another\nThe sweep goes on without {folder}/seed=1" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_job_that_raises_and_one_with_nan_are_in_the_report_with_their_errors(
    vsrplug: Callable[..., None], runs: Path, tiny: dict[str, list[str]]
) -> None:
    """A negative rate is refused by the optimizer; an absurd one makes the loss NaN or infinite."""
    rates = ["0.001", "-1", "1e30", "0.002"]
    vsrplug("train", "-m", "plugins=memory_bank", f"optim.optimizer.lr={','.join(rates)}", *tiny["train"],
            "trainer.max_steps=4")  # fmt: skip
    (folder,) = runs.glob("sweeps/*")
    vsrplug("report", str(folder))
    rows = {float(row["setting optim.optimizer.lr"]): row for row in table(folder)}
    assert {rate for rate, row in rows.items() if row["psnr"] and not row["missing"]} == {0.001, 0.002}
    assert rows[-1]["missing"].startswith("seed 0 failed (Invalid learning rate: -1")
    assert re.match(r"seed 0 failed \(.*step \d+.*(NaN|Inf|infinite)", rows[1e30]["missing"])
    page = html.unescape((folder / "report.html").read_text())
    assert "2 of 4 jobs are done, 2 failed." in page
    for rate in (-1.0, 1e30):
        (failed,) = [f for f in folder.glob("*/failed.json") if float(f.parent.name.rpartition("=")[2]) == rate]
        error = json.loads(failed.read_text())
        assert error["error"] in page
        assert error["traceback"] in page
        assert " ".join(error["error"].split()) in rows[rate]["missing"]


def test_ctrl_c_stops_the_whole_sweep(
    vsrplug: Callable[..., None], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(cfg: DictConfig) -> float:
        raise InterruptedError("interrupted; go on with the same command")

    monkeypatch.setattr(train, "run", interrupted)
    with pytest.raises(SystemExit, match="interrupted; go on"):
        vsrplug("train", "-m", "seed=0,1")
    assert not list(runs.glob("sweeps/*/*/failed.json"))


def test_what_seeds_have_in_common_is_measured_once_and_every_job_has_its_figures(
    vsrplug: Callable[..., None], runs: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, list[str]]
) -> None:
    measured: list[str] = []
    evaluate = outcome.evaluate

    def counting(model: Any, *arguments: Any, **keywords: Any) -> Any:
        measured.append(type(getattr(model, "backbone", model)).__name__)
        return evaluate(model, *arguments, **keywords)

    monkeypatch.setattr(outcome, "evaluate", counting)
    small = [argument for argument in tiny["train"] if not argument.startswith("backbone=")]
    vsrplug("train", "-m", "backbone=basicvsr_tiny", "plugins=none", "tuning=plugins_only", "seed=0,1,2", *small)
    assert sorted(measured) == ["BasicVSR", "Bicubic"]
    found = figures(runs)
    assert len(found) == 3
    assert len({json.dumps(job["clips"]) for job in found.values()}) == 1
    assert {job["seed"] for job in found.values()} == {0, 1, 2}


def test_a_job_is_finished_only_with_the_same_configuration(tmp_path: Path, job: Callable[..., DictConfig]) -> None:
    cfg = job("train", tmp_path, "seed=1")
    assert jobs.finished(cfg, tmp_path) is None
    write_json({"psnr": 31.5, "job": jobs.digest(cfg)}, tmp_path / "metrics.json")
    assert jobs.finished(cfg, tmp_path) == 31.5
    assert jobs.finished(job("train", tmp_path, "seed=1", "paths.runs=elsewhere"), tmp_path) == 31.5
    assert jobs.finished(job("train", tmp_path, "seed=2"), tmp_path) is None
    (tmp_path / "metrics.json").write_text("{")
    assert jobs.finished(cfg, tmp_path) is None


def test_a_job_of_another_configuration_is_not_taken_for_this_one(
    vsrplug: Callable[..., None], runs: Path, tiny: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder is the same, as where an experiment's file was edited between two starts."""
    folders = [f"hydra.sweep.dir={runs}", "hydra.sweep.subdir=job"]
    command = ["train", "-m", *tiny["train"], "plugins=memory_bank", "trainer.max_steps=2", "seed=0", *folders]
    weights = []
    for rate in ("1e-3", "5e-2"):
        vsrplug(*command, f"optim.optimizer.lr={rate}")
        weights.append(load_file(runs / "job" / "plugins.safetensors"))
    said = f"Starts afresh in {runs / 'job'}, which was begun with other choices: optim.optimizer.lr=0.05 (was 0.001)\n"
    assert said in capsys.readouterr().err
    assert {file.name for file in (runs / "job" / "checkpoints").iterdir()} == {"before.ckpt", "last.ckpt"}
    alone = ["trainer.max_steps=2", "optim.optimizer.lr=5e-2", f"hydra.run.dir={runs / 'alone'}"]
    vsrplug("train", *tiny["train"], "plugins=memory_bank", "seed=0", *alone)
    alike = load_file(runs / "alone" / "plugins.safetensors")
    assert all(torch.equal(alike[key], value) for key, value in weights[1].items())
    assert not all(torch.equal(alike[key], value) for key, value in weights[0].items())
    vsrplug(*command, "optim.optimizer.lr=-1")
    (job,) = read_jobs(runs / "job")
    assert (job.state, "Invalid learning rate" in job.error) == ("failed", True)
    assert (runs / "job" / "metrics.before.json").exists()


def test_figures_are_shared_only_by_networks_made_in_the_same_way(
    vsrplug: Callable[..., None], runs: Path, tiny: dict[str, list[str]]
) -> None:
    """The number of passes is not among the weights."""
    cleaning = ["plugins=image_cleaning", "plugins.image_cleaning.zero_init=false"]
    vsrplug("evaluate", "-m", *tiny["evaluate"], *cleaning, "plugins.image_cleaning.passes=1,2")
    (sweep_folder,) = runs.glob("sweeps/evaluate,*")
    one, two = (json.loads(file.read_text()) for file in sorted(sweep_folder.glob("*/metrics.json")))
    assert one["psnr"] != two["psnr"]
    assert one["compared"] == two["compared"]
