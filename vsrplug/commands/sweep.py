"""What makes a sweep survive: finished jobs are skipped, failed ones marked, and what is common is measured once."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vsrplug.commands import build
from vsrplug.evaluation import Report
from vsrplug.plugged import digests

FAILED = "failed.json"


def name_folders(arguments: list[str]) -> list[str]:
    """The command line of a sweep with its folder named after it, so that the same command goes on there, and each
    job's after what is swept.

    Unchanged where it is no sweep, or where `hydra.sweep.dir` is given.
    """
    if not {"-m", "--multirun"} & set(arguments) or any(a.startswith("hydra.sweep.dir=") for a in arguments):
        return arguments
    choices = [a for a in arguments if not a.startswith(("-", "hydra"))]
    folder = "hydra.sweep.dir='${paths.runs}/sweeps/" + build.folder_name(",".join(choices)) + "'"
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


def share_machine() -> None:
    """Where several jobs run at once, give each its share of the threads, and a GPU of its own."""
    from hydra.core.hydra_config import HydraConfig

    launcher, jobs = HydraConfig.get().launcher, 1
    if "n_jobs" in launcher:
        count = os.cpu_count() or 1
        jobs = count if launcher.n_jobs < 0 else min(launcher.n_jobs, count)
    if jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
        if torch.cuda.is_available():
            torch.cuda.set_device(HydraConfig.get().job.num % torch.cuda.device_count())


def digest(cfg: DictConfig) -> str:
    """Of everything that decides a job's result; where its files lie does not."""
    plain = {key: value for key, value in build.as_plain(cfg).items() if key != "paths"}
    text = json.dumps(plain, sort_keys=True, default=str).replace(str(build.output_dir()), "")
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def finished(cfg: DictConfig, folder: Path) -> float | None:
    """The PSNR of a job that was finished in this folder with the same configuration, or None."""
    try:
        figures = json.loads((folder / "metrics.json").read_text())
        return float(figures["psnr"]) if figures.get("job") == digest(cfg) else None
    except (OSError, ValueError, KeyError):
        return None


def mark_failed(folder: Path, error: BaseException, message: str) -> None:
    """Leave `failed.json` with the error and the job's choices in its folder."""
    text = "".join(traceback.format_exception(error))
    build.write_json({"error": message, "traceback": text, "choices": build.choices()}, folder / FAILED)


def measured_once(key: dict[str, Any], network: nn.Module, measure: Callable[[], Report]) -> Report:
    """What `measure` gives, or, in a sweep, what it gave to a job before for the same network and the same key.

    The frozen backbone and bicubic up-sampling are the same for every seed and every plug-in.
    """
    if not in_sweep():
        return measure()
    from hydra.core.hydra_config import HydraConfig

    state = sorted(digests(network.state_dict()).items())
    text = json.dumps([type(network).__name__, state, key], sort_keys=True, default=str)
    name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    file = Path(HydraConfig.get().sweep.dir) / ".measured" / f"{name}.json"
    try:
        saved = json.loads(file.read_text())
        clips = {clip: {k: float(v) for k, v in figures.items()} for clip, figures in saved["clips"].items()}
        return Report(saved["protocol"], clips, saved["lpips_reason"], saved["seconds"])
    except (OSError, ValueError, KeyError):
        report = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    build.write_json(report.to_dict(), file)
    return report


def key_of(cfg: DictConfig, masks: bool) -> dict[str, Any]:
    """What, besides the network, a figure depends on: protocol, masks where they are used, versions."""
    return {
        "protocol": OmegaConf.to_container(cfg.protocol, resolve=True),
        "masks": OmegaConf.to_container(cfg.masks, resolve=True) if masks and cfg.masks else None,
        "versions": build.versions(),
        "data": str(cfg.paths.data),
        "python": sys.version,
    }
