"""What is read from a folder: jobs done, failed, not finished, and those that a sweep asks for and nobody began."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from vsrplug.reporting import Resampling, read_jobs, sections
from vsrplug.reporting.figures import read_figures
from vsrplug.reporting.plan import planned

from .conftest import Leave, multirun


def test_a_job_that_is_done(leave: Leave, tmp_path: Path) -> None:
    folder = leave({"a": 20.0, "b": 30.0}, plugins="[seem,memory_bank]", seed=3, before={"a": 19.0, "b": 29.5})
    (job,) = read_jobs(tmp_path)
    assert (job.state, job.folder, job.seed) == ("done", folder, 3)
    assert job.label == ("vid4_bi_y", "edvr", "seem + memory_bank", "full")
    assert job.settings["trainer.max_steps"] == "300"
    assert not [key for key in job.settings if key.startswith(("seed", "paths"))]
    assert job.figures is not None
    assert job.figures.psnr == 25.0
    assert job.figures.clips == {"a": 20.0, "b": 30.0}
    assert job.figures.backbone_clips == {"a": 19.0, "b": 29.5}
    assert (job.figures.total, job.figures.trainable) == (50_000, 1000)


def test_jobs_that_failed_or_were_killed(leave: Leave, tmp_path: Path) -> None:
    leave(None, seed=0, name="killed")
    failed = leave(None, seed=1, name="raised")
    (failed / "failed.json").write_text(json.dumps({"error": "no memory", "traceback": "Trace", "choices": {}}))
    jobs = {job.name: job for job in read_jobs(tmp_path)}
    assert (jobs["killed"].state, jobs["killed"].seed) == ("not finished", 0)
    assert (jobs["raised"].state, jobs["raised"].error, jobs["raised"].traceback) == ("failed", "no memory", "Trace")
    assert jobs["raised"].label == jobs["killed"].label


def test_a_job_that_a_search_stopped(leave: Leave, tmp_path: Path) -> None:
    """It has a figure, of too few steps to count."""
    leave({"a": 20.0, "b": 21.0}, plugins="seem", seed=2, more={"pruned": 40})
    (job,) = read_jobs(tmp_path)
    assert (job.state, job.seed, job.figures) == ("pruned", 2, None)
    assert job.error == "at step 40, with 20.500 dB"
    assert job.label == ("vid4_bi_y", "edvr", "seem", "full")


def test_figures_without_a_configuration_are_read_all_the_same(leave: Leave, tmp_path: Path) -> None:
    folder = leave({"a": 20.0}, plugins="seem", seed=1, more={"seed": 1})
    for file in (folder / ".hydra").iterdir():
        file.unlink()
    (job,) = read_jobs(tmp_path)
    assert job.label == ("vid4_bi_y", "edvr", "seem", "full")
    assert job.seed == 1


def test_plugins_of_a_file_are_named(leave: Leave, tmp_path: Path) -> None:
    """`vsrplug evaluate plugins_file=...` is given none on the command line."""
    leave({"a": 20.0}, plugins="none", more={"choices": {"plugins": "seem,bank"}})
    assert read_jobs(tmp_path)[0].plugins == "seem + bank"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"psnr": 2', "metrics.json cannot be read: Expecting"),
        ("[]", "metrics.json cannot be read: 'list' object"),
        ('{"clips": {}}', "metrics.json has no 'protocol'"),
        ('{"protocol": "p", "clips": {"a": {"psnr": NaN}}}', "metrics.json cannot be read: a figure is NaN"),
        ('{"protocol": "p", "clips": {"a": {"psnr": "x"}}}', "metrics.json cannot be read: could not convert"),
        (
            '{"protocol": "p", "clips": {}, "ssim": 1, "parameters": {"total": 1, "trainable": 1}}',
            "metrics.json has no clips",
        ),
    ],
)
def test_damaged_figures_are_a_failure_with_a_reason(leave: Leave, tmp_path: Path, written: str, message: str) -> None:
    (leave({"a": 1.0}) / "metrics.json").write_text(written)
    (job,) = read_jobs(tmp_path)
    assert job.state == "failed"
    assert job.error.startswith(message)


def test_equal_frames_have_an_infinite_psnr(leave: Leave) -> None:
    folder = leave({"a": 1.0})
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text.replace('{"psnr": 1.0', '{"psnr": "inf"'))
    assert read_figures(folder / "metrics.json").psnr == float("inf")


def test_a_folder_that_is_not_there_or_has_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^there is no folder {tmp_path / 'swep'}; expected that of a sweep"):
        read_jobs(tmp_path / "swep")
    with pytest.raises(ValueError, match=rf"^no run has left anything in {tmp_path}: expected folders with metrics.js"):
        read_jobs(tmp_path)


def test_yaml_cut_short_is_a_job_all_the_same(leave: Leave, tmp_path: Path) -> None:
    (leave(None, name="cut") / ".hydra" / "config.yaml").write_text("plugins: {seem: [")
    (job,) = read_jobs(tmp_path)
    assert (job.state, job.plugins) == ("not finished", "none")


@pytest.mark.parametrize(
    "task",
    [
        ["plugins=none,[seem,memory_bank]", "seed=0,1,2", "tuning=full"],
        ["seed=range(0,3)", "plugins=choice(none,seem)", "+losses.weights={pixel: 1, kl: 0.1}"],
        ["optim.optimizer.lr=1e-4,2e-4", "data.size=[64,96]", "~logger", "paths.data='a b=c'"],
        [],
    ],
)
def test_the_plan_is_that_of_hydras_own_sweeper(tmp_path: Path, task: list[str]) -> None:
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(task), None)
    found = planned(multirun(tmp_path, *task))
    assert found == ([tuple(job) for job in jobs] if task else [])


def test_choices_of_a_configuration_are_in_the_plan_and_the_command_line_wins(tmp_path: Path) -> None:
    hydra = multirun(tmp_path, "seed=7", seed="0,1", tuning="full,lora")
    assert planned(hydra) == [("seed=7", "tuning=full"), ("seed=7", "tuning=lora")]


def test_a_search_has_no_plan(tmp_path: Path) -> None:
    assert planned(multirun(tmp_path, "seed=0,1", sweeper="hydra_plugins.optuna.OptunaSweeper")) == []
    assert planned(multirun(tmp_path, "plugins=glob(*)")) == []
    assert planned({}) == []


def test_jobs_that_a_sweep_asks_for_and_nobody_began(leave: Leave, tmp_path: Path) -> None:
    multirun(tmp_path, "plugins=none,seem", "seed=0,1")
    leave({"a": 20.0}, plugins="none", seed=0)
    leave(None, plugins="none", seed=1)
    jobs = {job.name: job for job in read_jobs(tmp_path)}
    assert {name: job.state for name, job in jobs.items()} == {
        "plugins=none,seed=0": "done",
        "plugins=none,seed=1": "not finished",
        "plugins=seem seed=0": "not started",
        "plugins=seem seed=1": "not started",
    }
    first = jobs["plugins=seem seed=0"]
    assert (first.label, first.seed, first.known) == (("vid4_bi_y", "edvr", "seem", "full"), 0, False)


def test_a_job_not_begun_has_the_configuration_of_its_other_seed(leave: Leave, tmp_path: Path) -> None:
    multirun(tmp_path, "plugins=seem", "seed=0,1")
    leave({"a": 20.0}, plugins="seem", seed=0)
    done, missing = read_jobs(tmp_path)
    assert (missing.state, missing.seed, missing.known) == ("not started", 1, True)
    assert missing.settings == done.settings


def test_jobs_not_begun_are_told_apart_by_what_has_no_column(leave: Leave, tmp_path: Path) -> None:
    multirun(tmp_path, "experiment=a,b", "losses=l1,l2")
    first, *others = read_jobs(tmp_path)
    assert first.label == ("-", "-", "-", "-")  # an experiment says what they are, and nobody has asked it yet
    (section,), left = sections([first, *others], Resampling())
    assert left == []
    assert [tuple(row.extra.values()) for row in section.rows] == [("a", "l1"), ("a", "l2"), ("b", "l1"), ("b", "l2")]


def test_an_error_after_the_figures_counts(leave: Leave, tmp_path: Path) -> None:
    folder = leave({"a": 20.0})
    failed = folder / "failed.json"
    failed.write_text(json.dumps({"error": "no memory", "traceback": "", "choices": {}}))
    for later, state in ((-10, "done"), (10, "failed")):
        when = (folder / "metrics.json").stat().st_mtime + later
        os.utime(failed, (when, when))
        (job,) = read_jobs(tmp_path)
        assert job.state == state


@pytest.mark.parametrize("name", ["config", "hydra", "overrides"])
@pytest.mark.parametrize("text", ["abc", "hydra: {runtime: null}", "seed: x", "[1, 2]"])
def test_yaml_of_another_shape_is_a_job_all_the_same(leave: Leave, tmp_path: Path, name: str, text: str) -> None:
    folder = leave({"a": 20.0})
    (folder / ".hydra" / f"{name}.yaml").write_text(text)
    (job,) = read_jobs(tmp_path)
    assert (job.state, job.backbone) == ("done", "edvr")
