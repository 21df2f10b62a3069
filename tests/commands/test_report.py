"""`vsrplug report` on folders that Hydra and the other commands made themselves."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from vsrplug.commands import build, evaluate, main, train
from vsrplug.evaluation import Report
from vsrplug.json_files import write_json

from .conftest import Job

FILES = ("report.html", "table.csv", "table.md", "table.tex")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pretend(cfg: DictConfig) -> float:
    """A job that takes no time: better with plug-ins, and one seed of one of them raises."""
    plugins = ",".join(cfg.plugins or ()) or "none"
    if plugins == "seem" and cfg.seed == 1:
        raise ValueError("step 3: the loss is NaN")
    gain = {"none": 0.1, "seem": 0.3, "seem,memory_bank": 0.6}[plugins] + 0.01 * cfg.seed
    clips = {name: {"psnr": psnr + gain * factor, "ssim": 0.8} for name, psnr, factor in (("a", 20, 1), ("b", 30, 2))}
    figures = Report("demo_bd_y", clips, "not asked for", 0.1)
    parameters = {"total": 10, "trainable": 5}
    written = {"parameters": parameters, "choices": build.choices() | {"plugins": plugins}, "seed": cfg.seed}
    write_json(figures.to_dict() | written, build.output_dir() / "metrics.json")
    return figures.psnr


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three combinations with two seeds each; one raised, and one was never begun."""
    runs = tmp_path_factory.mktemp("report") / "it's here"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VSRPLUG_RUNS", str(runs))
        patch.setattr(train, "run", pretend)
        choices = ["plugins=none,[seem],[seem,memory_bank]", "seed=0,1", "tuning=full"]
        patch.setattr("sys.argv", ["/usr/bin/vsrplug", "train", "-m", "backbone=basicvsr_tiny_untrained", *choices])
        main()
    (folder,) = (runs / "sweeps").iterdir()
    assert "=" in folder.name
    assert "," in folder.name
    shutil.rmtree(next(folder.glob("*memory_bank,seed=0*")))
    return folder


def test_a_sweep_of_hydras_with_a_failure_and_a_gap(
    sweep: Path, vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    vsrplug("report", str(sweep))
    plain, seem, both = rows(sweep)
    assert [(row["plugins"], row["tuning"]) for row in (plain, seem, both)] == [
        ("none", "full"), ("seem", "full"), ("seem + memory_bank", "full"),
    ]  # fmt: skip
    assert [(row["seeds_done"], row["seeds"]) for row in (plain, seem, both)] == [("2", "2"), ("1", "2"), ("1", "2")]
    assert float(plain["psnr"]) == pytest.approx(25 + 1.5 * 0.105)
    assert seem["missing"] == "seed 1 failed (step 3: the loss is NaN)"
    assert both["missing"] == "seed 0 not started"
    # Masks, and a loss of its own, come with the plug-in: the run without it is its control, seed by seed.
    assert float(both["over_control"]) == pytest.approx(1.5 * 0.5)
    assert (both["control"], both["best"]) == (plain["number"], "1")
    said = capsys.readouterr().out
    assert "4 of 6 jobs are done, 1 failed, 1 not started." in said
    assert said.endswith(f"table.csv, table.md, table.tex, report.html are in {sweep}\n")
    assert "Missing in #2: seed 1 failed (step 3: the loss is NaN)." in said
    page = (sweep / "report.html").read_text()
    assert "pretend" in page  # of the traceback
    assert not [file for file in sweep.iterdir() if file.name.startswith(".") and file.name.endswith(".tmp")]


def test_the_same_folder_gives_the_same_files(sweep: Path, vsrplug: Callable[..., None]) -> None:
    vsrplug("report", str(sweep))
    first = [(sweep / name).read_bytes() for name in FILES]
    vsrplug("report", "resamples=10000", f"folder={sweep}")
    assert [(sweep / name).read_bytes() for name in FILES] == first
    vsrplug("report", str(sweep), "confidence=0.5")
    assert "50 % interval" in (sweep / "table.md").read_text()


def test_what_follows_an_option_is_no_folder(
    sweep: Path, vsrplug: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    vsrplug("report", "--cfg", "job", str(sweep))
    assert f"folder: {sweep}" in capsys.readouterr().out.replace('"', "")


def test_a_refused_start_in_a_finished_folder_leaves_its_figures_their_choices(
    vsrplug: Callable[..., None], tmp_path: Path, tiny: dict[str, list[str]]
) -> None:
    begun = ["train", *tiny["train"], "plugins=memory_bank", "trainer.max_steps=2", f"hydra.run.dir={tmp_path / 'run'}"]
    vsrplug(*begun)
    for other in (["tuning=full"], ["plugins=efst"]):
        with pytest.raises(SystemExit, match="is of a run with another"):
            vsrplug(*begun, *other)
        vsrplug("report", str(tmp_path))
        (row,) = rows(tmp_path)
        assert (row["plugins"], row["tuning"], row["seeds_done"]) == ("memory_bank", "plugins_only", "1")


def test_what_runs_leave_is_what_is_read(
    job: Job, vsrplug: Callable[..., None], tmp_path: Path, tiny: dict[str, list[str]]
) -> None:
    """The figures and the picture of `train` and `evaluate` themselves."""
    frozen = train.run(job("train", tmp_path / "frozen", *tiny["train"]))
    tuned = [*tiny["train"], "plugins=memory_bank", "trainer.max_steps=1"]
    psnr = train.run(job("train", tmp_path / "tuned", *tuned))
    file = f"plugins_file={tmp_path / 'tuned' / 'plugins.safetensors'}"
    evaluate.run(job("evaluate", tmp_path / "measured", *tiny["evaluate"], file))
    vsrplug("report", f"folder={tmp_path}")
    found = {(row["plugins"], row["tuning"]): row for row in rows(tmp_path)}
    bank = found["memory_bank", "plugins_only"]
    assert float(found["none", "plugins_only"]["psnr"]) == frozen
    assert float(bank["psnr"]) == float(found["memory_bank", "-"]["psnr"]) == psnr
    assert float(bank["over_backbone"]) == pytest.approx(psnr - frozen, abs=1e-9)
    assert (found["none", "plugins_only"]["trainable"], int(bank["trainable"]) > 0) == ("0", True)
    page = (tmp_path / "report.html").read_text()
    (crops,) = (json.loads(text) for text in re.findall(r'type="application/json"[^>]*>(.*?)</script>', page))
    (names,) = crops.values()
    # The two runs with the same file have the same result; the frozen one's is the others' backbone.
    own = [name for name in names if name.startswith("#")]
    assert [name for name in names if name not in own] == ["low resolution", "bicubic", "backbone", "ground truth"]
    assert len(own) == 3
    assert names[own[0]] == names["backbone"] != names[own[1]] == names[own[2]]
    assert page.count("memory_bank, recall at ") == 2 * 3 * 2  # runs, sites, as caption and as alternative text
    assert "Where the results differ most" not in page  # comparison.png is for runs without crops


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"folder=\.\.\. is missing: the folder of a sweep, or one that holds several runs"),
        (["{path}/none"], "there is no folder {path}/none; expected that of a sweep, or of several runs"),
        (["{path}/a=b,c"], "there is no folder {path}/a=b,c; expected that of a sweep, or of several runs"),
        (
            ["{path}"],
            "no run has left anything in {path}: expected folders with metrics.json, such as `vsrplug train -m",
        ),
        (["{path}", "confidence=95"], r"confidence=95 must lie between 0 and 1, such as 0\.95"),
    ],
)
def test_errors_are_one_line(vsrplug: Callable[..., None], tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"^vsrplug report: {message.format(path=tmp_path)}") as caught:
        vsrplug("report", *(argument.format(path=tmp_path) for argument in arguments))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_key(vsrplug: Callable[..., Any], tmp_path: Path) -> None:
    for words in ([str(tmp_path), "confidense=0.9"], ["confidense=0.9", str(tmp_path)]):
        with pytest.raises(SystemExit, match=r"^vsrplug report: there is no configuration key 'confidense'; did you"):
            vsrplug("report", *words)
