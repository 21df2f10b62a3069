"""Jobs side by side: joblib's figures are the serial ones, nobody writes into another's folder, GPUs are shared out.

What Slurm would be given is read from the script that `sbatch` gets; a job that it interrupts goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import joblib
import pytest
import submitit
import torch
from hydra.core.utils import JobReturn, JobStatus
from joblib.externals.loky import get_reusable_executor
from lightning import Trainer
from omegaconf import DictConfig

from vsrplug.callbacks import Progress
from vsrplug.commands import sweep, train
from vsrplug.evaluation import Report
from vsrplug.json_files import write_json

from .conftest import Job
from .test_sweep import figures

FORK = multiprocessing.get_context("fork")  # locks are between processes; forks need no imports
Run = Callable[..., Any]


@pytest.fixture
def fork() -> Iterator[Run]:
    """Starts `work(connection)` in a process of its own and returns this end of the connection and the process."""
    started = []

    def start(work: Callable[[Connection], None]) -> tuple[Connection, Any]:
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that a process that fails is heard of
        started.append(process)
        return ours, process

    yield start
    for process in started:
        process.kill()
        process.join()


def said(capfd: pytest.CaptureFixture[str], line: str) -> None:
    """Waits for a process to say it."""
    heard = ""
    while line not in heard:
        heard += capfd.readouterr().err
        time.sleep(0.01)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread each, as this process has, since sums depend on their number; and none left behind."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    get_reusable_executor().shutdown(wait=True)


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_two_jobs_at_once_have_the_figures_of_one_after_another(
    vsrplug: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, list[str]]
) -> None:
    choices = ["plugins=none,memory_bank", "seed=0,1", *tiny["train"], "trainer.max_steps=2"]
    for folder, launcher in (("serial", []), ("joblib", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"])):
        monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path / folder))
        vsrplug("train", "-m", *choices, *launcher)
    assert len(figures(tmp_path / "serial")) == 4
    assert figures(tmp_path / "joblib") == figures(tmp_path / "serial")
    measured = {}
    for folder in ("serial", "joblib"):
        files = tmp_path.glob(f"{folder}/sweeps/*/.measured/*.json")
        measured[folder] = {file.name: json.loads(file.read_text())["clips"] for file in files}
    assert measured["joblib"] == measured["serial"] != {}
    assert not list(tmp_path.rglob(".*.json.*"))  # nothing half written


def test_files_of_processes_that_write_the_same_one_are_always_whole(fork: Run, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"

    def write(end: Connection) -> None:
        for i in range(200):
            write_json({"psnr": i, "more": "x" * 20_000}, file)
        end.send("done")

    ends = [fork(write)[0] for _ in range(2)]
    while not file.exists():
        time.sleep(0.001)
    reads = 0
    while not all(end.poll() for end in ends):
        assert len(json.loads(file.read_text())["more"]) == 20_000
        reads += 1
    assert reads
    assert [end.recv() for end in ends] == ["done", "done"]
    assert os.listdir(tmp_path) == ["figures.json"]


def test_what_jobs_have_in_common_is_measured_once_also_side_by_side(
    fork: Run, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job("train", tmp_path, f"hydra.sweep.dir={tmp_path}")
    monkeypatch.setattr(sweep, "in_sweep", lambda: True)

    def work(end: Connection) -> None:
        def measure() -> tuple[Report, dict[str, torch.Tensor]]:
            end.send("measuring")
            time.sleep(0.2)
            return Report("demo", {"a": {"psnr": 20.0, "ssim": 0.8}}, "not asked for", os.getpid()), {}

        report, _ = sweep.measured_once({"protocol": "demo"}, torch.nn.Linear(1, 1).requires_grad_(False), measure)
        end.send(report)

    torch.manual_seed(0)  # which the forks share: the same network
    ends = [fork(work)[0] for _ in range(3)]
    said = [[end.recv()] for end in ends]
    for one, end in zip(said, ends, strict=True):
        if one == ["measuring"]:
            one.append(end.recv())
    assert sorted(len(one) for one in said) == [1, 1, 2]
    assert len({one[-1].seconds for one in said}) == 1


@pytest.mark.parametrize(
    ("n_jobs", "visible", "expected"),
    [
        (2, None, ["0", "1"]),
        (2, "4,6,7", ["4", "6"]),
        (4, "4,6", ["4", "4", "6", "6"]),
        (-1, None, ["0", "1", "2"]),  # of three cores
        (3, "0", [None, None, None]),  # there is nothing to choose
        (1, None, [None]),
    ],
)
def test_processes_side_by_side_keep_a_gpu_each(
    n_jobs: int,
    visible: str | None,
    expected: list[str | None],
    fork: Run,
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job("train", tmp_path, "hydra/launcher=joblib", f"hydra.launcher.n_jobs={n_jobs}", f"hydra.sweep.dir={tmp_path}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4 if visible is None else len(visible.split(",")))
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def work(end: Connection) -> None:
        while True:  # one job after another
            sweep.take_gpu()
            end.send(os.environ.get("CUDA_VISIBLE_DEVICES"))
            end.recv()

    started = [fork(work) for _ in expected]
    has = [end.recv() for end, _ in started]
    assert sorted(has, key=str) == [one or visible for one in expected]
    for (end, _), gpu in zip(started, has, strict=True):
        end.send("next job")
        assert end.recv() == gpu
    if expected[0] is not None:  # of a process that dies, the next one has the place
        late, _ = fork(work)
        said(capfd, "All GPUs are taken by processes that a sweep left behind; waiting for one to end\n")
        assert not late.poll()
        started[-1][1].kill()
        assert late.recv() == has[-1]


def test_a_folder_has_one_process_at_a_time(
    fork: Run, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a sweep that was killed has left running is not run a second time beside it."""
    job("train", tmp_path)
    monkeypatch.setattr(sweep, "in_sweep", lambda: True)
    waiting = f"Another process works in {tmp_path}; waiting for it to end\n"

    def work(end: Connection) -> None:
        with sweep.place():
            end.send("in")
            end.recv()
        end.send("out")

    first, process = fork(work)
    assert first.recv() == "in"
    second, _ = fork(work)
    said(capfd, waiting)
    assert not second.poll()
    process.kill()
    assert second.recv() == "in"
    third, _ = fork(work)
    said(capfd, waiting)
    assert not third.poll()
    second.send("go")
    assert (second.recv(), third.recv()) == ("out", "in")


SBATCH = """#!/bin/sh
for script; do :; done
cp "$script" "$SUBMITTED"
echo "Submitted batch job 7"
"""


def test_what_slurm_is_given(
    vsrplug: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("sbatch", SBATCH), ("srun", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SUBMITTED", str(tmp_path / "submitted.sh"))
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path))
    done = JobReturn()
    done.status, done.return_value = JobStatus.COMPLETED, 1.0
    monkeypatch.setattr(submitit.Job, "results", lambda self: [done])
    arguments = ["hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=90", "plugins=none,memory_bank"]
    vsrplug("train", "-m", "hydra/launcher=slurm", *arguments)
    given = re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (tmp_path / "submitted.sh").read_text(), re.MULTILINE)
    assert (
        dict(given).items()
        >= {
            "partition": "gpu",
            "time": "90",
            "signal": "USR2@120",
            "array": "0-1%2",  # no more at once than there are
            "gpus-per-node": "1",
            "cpus-per-task": "4",
            "mem": "32GB",
        }.items()
    )
    (folder,) = tmp_path.glob("sweeps/*")
    assert list(folder.glob(".submitit/*/*_submitted.pkl"))


def test_a_job_that_slurm_interrupts_is_not_marked_and_goes_on_when_it_is_queued_again(
    vsrplug: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, list[str]]
) -> None:
    """submitit answers the signal before the time limit by `sys.exit` in the middle of whatever is being done."""
    choices = ["plugins=memory_bank", "seed=3", *tiny["train"], "trainer.max_steps=4"]
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path / "whole"))
    vsrplug("train", "-m", *choices)
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path / "interrupted"))

    def time_is_up(*_: Any) -> None:
        raise SystemExit(-1)

    def at_step_three(self: Progress, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, time_is_up)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Progress, "on_train_batch_end", at_step_three)
            with pytest.raises(SystemExit):
                vsrplug("train", "-m", *choices)
    finally:
        signal.signal(signal.SIGUSR2, before)
    (checkpoint,) = (tmp_path / "interrupted").glob("sweeps/*/*/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    assert not list(tmp_path.rglob("failed.json"))
    vsrplug("train", "-m", *choices)
    assert figures(tmp_path / "interrupted") == figures(tmp_path / "whole")
    assert len(figures(tmp_path / "whole")) == 1


@pytest.mark.parametrize(
    ("argument", "package"),
    [
        ("hydra/launcher=joblib", "hydra-joblib-launcher"),
        ("hydra/launcher=slurm", "hydra-submitit-launcher"),
        ("hydra/launcher=submitit_local", "hydra-submitit-launcher"),
        ("hydra/sweeper=optuna", "hydra-optuna-sweeper"),
        ("search=memory_bank", "hydra-optuna-sweeper"),
    ],
)
def test_what_is_not_installed_is_named(
    argument: str, package: str, vsrplug: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(sweep, "distribution", absent)
    message = f"vsrplug train: {argument} needs {package}; install it: pip install 'vsrplug[sweeps]'"
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}$"):
        vsrplug("train", "-m", argument)
    sweep.check(["-m", "search=null", "plugins=none", "hydra/launcher=basic"], "train")


def test_every_kind_of_error_in_a_job_is_marked(vsrplug: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in somebody's plug-in is no ValueError, and stops its own job all the same."""
    seen: Counter[int] = Counter()

    def run(cfg: DictConfig) -> float:
        seen[cfg.seed] += 1
        if cfg.seed == 0:
            raise ZeroDivisionError("division by zero")
        return 1.0

    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path))
    monkeypatch.setattr(train, "run", run)
    vsrplug("train", "-m", "seed=0,1")
    (failed,) = tmp_path.rglob("failed.json")
    assert failed.parent.name == "seed=0"
    assert json.loads(failed.read_text())["error"].startswith("division by zero")
    assert seen == {0: 1, 1: 1}
    with pytest.raises(ZeroDivisionError):  # no line of ours: it is a mistake in code
        vsrplug("train", "seed=0")
