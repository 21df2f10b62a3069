"""What jobs of a sweep share: folders named after the command, figures measured once, and, side by side, a folder and a
GPU each."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vsrplug.commands import build
from vsrplug.commands.arguments import split
from vsrplug.evaluation import Report
from vsrplug.json_files import write_json
from vsrplug.plugged import digests
from vsrplug.plugin_files import write_safetensors

SWEPT = ("train", "evaluate")  # commands that `-m` runs many times
_PLACE: list[FileLock] = []  # among the processes that run jobs side by side; kept for as long as this one lives
_NEEDED = {  # beginnings of arguments -> what they need
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=s": "hydra-submitit-launcher",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
    "search=": "hydra-optuna-sweeper",
}


def check(arguments: Sequence[str], command: str) -> None:
    """Check what Hydra's own errors would not explain.

    Raises:
        SystemExit: a sweep of a command that has none, or with a launcher or a sweeper that is not installed.
    """
    if command not in SWEPT and {"-m", "--multirun"} & set(arguments):
        raise SystemExit(f"vsrplug {command}: -m is for {' and '.join(SWEPT)}; leave it out")
    for argument in arguments:
        for beginning, name in _NEEDED.items():
            if argument.startswith(beginning) and argument != "search=null":
                try:
                    distribution(name)
                except PackageNotFoundError:
                    text = f"{argument} needs {name}; install it: pip install 'vsrplug[sweeps]'"
                    raise SystemExit(f"vsrplug {command}: {text}") from None


def name_folders(arguments: list[str], command: str = "train") -> list[str]:
    """The command line of a sweep with its folder named after it, so that the same command goes on there, and each
    job's after what is swept.

    Unchanged where it is no sweep, or where `hydra.sweep.dir` is given.
    """
    if not {"-m", "--multirun"} & set(arguments) or any(a.startswith("hydra.sweep.dir=") for a in arguments):
        return arguments
    choices = [word for word in split(arguments)[1] if not word.startswith("hydra")]
    name = ",".join(choices if command == "train" else [command, *choices])  # which leave the same files
    folder = "hydra.sweep.dir='${paths.runs}/sweeps/" + build.folder_name(name) + "'"
    try:
        given = OverridesParser.create().parse_overrides(choices)
    except HydraException:  # which Hydra itself will report
        return [*arguments, folder]
    same = ",".join(f"'{o.key_or_group}'" for o in given if not o.is_sweep_override())
    return [*arguments, folder, f"hydra.job.config.override_dirname.exclude_keys=[{same}]"]


def in_sweep() -> bool:
    """Whether this job is one of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@contextmanager
def place() -> Iterator[None]:
    """Of a sweep, a job's folder to itself and, where several jobs run at once, a GPU to itself.

    joblib's processes outlive a sweep that is killed: they finish the jobs they were at. The same sweep, started
    again, waits for them instead of writing into the same folders.
    """
    if not in_sweep():
        yield
        return
    take_gpu()
    folder = build.output_dir()
    lock = _lock(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"Another process works in {folder}; waiting for it to end", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def take_gpu() -> None:
    """Where processes run jobs side by side (joblib), show this one a single GPU, until it ends.

    By processes and not by the number of the job: jobs differ in length. The others get other GPUs; where there are
    more processes than GPUs, they are spread evenly. CPU threads are shared out by joblib itself.
    """
    from hydra.core.hydra_config import HydraConfig

    launcher = HydraConfig.get().launcher
    if "n_jobs" not in launcher or _PLACE:
        return
    import joblib

    processes = launcher.n_jobs if launcher.n_jobs > 0 else joblib.cpu_count() + 1 + launcher.n_jobs
    count = torch.cuda.device_count()
    if processes < 2 or count < 2:
        return
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = names[:count] if len(names) >= count else [str(i) for i in range(count)]
    for attempt in itertools.count():
        for number in range(processes):
            lock = _lock(Path(HydraConfig.get().sweep.dir, f"process {number}"))
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            _PLACE.append(lock)
            # Before the first use of a GPU: of what PyTorch sees, Lightning and all others take the first.
            os.environ["CUDA_VISIBLE_DEVICES"] = names[number % count]
            return
        if not attempt:
            print("All GPUs are taken by processes that a sweep left behind; waiting for one to end", file=sys.stderr)
        time.sleep(1)


def _lock(path: Path) -> FileLock:
    """Of this machine, and gone with the process that holds it; shared file systems do not all have locks."""
    name = hashlib.blake2b(str(path.absolute()).encode(), digest_size=12).hexdigest()
    owner = os.getuid() if hasattr(os, "getuid") else "all"  # others may not write to one's files
    folder = Path(tempfile.gettempdir(), f"vsrplug-locks-{owner}")
    folder.mkdir(exist_ok=True)
    return FileLock(folder / f"{name}.lock")


def measured_once(
    key: dict[str, Any], network: nn.Module, measure: Callable[[], tuple[Report, dict[str, Tensor]]]
) -> tuple[Report, dict[str, Tensor]]:
    """What `measure` gives, figures and pictures, or, in a sweep, what it gave to a job before for the same network and
    the same key.

    The frozen backbone and bicubic up-sampling are the same for every seed and every plug-in.
    """
    if not in_sweep():
        return measure()
    from hydra.core.hydra_config import HydraConfig

    state = sorted(digests(network.state_dict()).items())
    text = json.dumps([type(network).__name__, state, key], sort_keys=True, default=str)
    name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    file = Path(HydraConfig.get().sweep.dir) / ".measured" / f"{name}.json"
    with _lock(file):  # of jobs side by side, one measures and the others wait for it
        try:
            saved = json.loads(file.read_text())
            clips = {clip: {k: float(v) for k, v in figures.items()} for clip, figures in saved["clips"].items()}
            report = Report(saved["protocol"], clips, saved["lpips_reason"], saved["seconds"])
            return report, load_file(file.with_suffix(".safetensors"))
        except (OSError, ValueError, KeyError, SafetensorError):
            report, pictures = measure()
        write_safetensors(pictures, file.with_suffix(".safetensors"))
        write_json(report.to_dict(), file)
    return report, pictures


def key_of(cfg: DictConfig, masks: bool) -> dict[str, Any]:
    """What, besides the network, a figure depends on: protocol, masks where they are used, versions."""
    return {
        "protocol": OmegaConf.to_container(cfg.protocol, resolve=True),
        "masks": OmegaConf.to_container(cfg.masks, resolve=True) if masks and cfg.masks else None,
        "versions": build.versions(),
        "data": str(cfg.paths.data),
        "python": sys.version,
    }


def made_with(cfg: DictConfig, plugins: bool) -> dict[str, Any]:
    """What a network was made with, some of which its weights do not tell, such as a threshold."""
    plain = build.as_plain(cfg)
    made: dict[str, Any] = {"backbone": {key: value for key, value in plain["backbone"].items() if key != "path"}}
    if plugins:
        file = plain.get("plugins_file")
        content = hashlib.blake2b(Path(file).read_bytes() if file else b"", digest_size=12).hexdigest()
        made |= {"plugins": plain.get("plugins"), "file": content}
    return made
