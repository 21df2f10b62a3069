"""What a job's folder says of it: with which choices it was begun, that it is done, that it failed or was stopped."""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vsrplug.commands import build
from vsrplug.json_files import read_json, write_json

BEGUN, FAILED, METRICS = "job.json", "failed.json", "metrics.json"
CHECKPOINT = "checkpoints/last.ckpt"


def configuration(cfg: DictConfig) -> dict[str, Any]:
    """Everything that decides a job's result; where its files lie does not."""
    plain = {key: value for key, value in build.as_plain(cfg).items() if key != "paths"}
    text = json.dumps(plain, sort_keys=True, default=str).replace(str(build.output_dir()), "")
    return json.loads(text)


def digest(cfg: DictConfig) -> str:
    """Of `configuration`."""
    text = json.dumps(configuration(cfg), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def finished(cfg: DictConfig, folder: Path) -> float | None:
    """The PSNR of a job that was finished in this folder with the same configuration, or None."""
    figures = read_json(folder / METRICS)
    psnr = figures.get("psnr") if figures.get("job") == digest(cfg) else None
    return None if psnr is None else float(psnr)


def start(cfg: DictConfig, folder: Path, *, afresh: bool) -> list[str]:
    """Leave `job.json` with the choices of a job that begins in this folder; an earlier error is removed.

    Args:
        cfg: the job's configuration.
        folder: where it works.
        afresh: whether a checkpoint of other choices is set aside, and figures in any case: as `before.ckpt` and
            `metrics.before.json` they are not taken for this job's.

    Returns:
        How the choices differ from those which the checkpoint was begun with, `optim.optimizer.lr=0.01 (was 0.001)`;
        nothing where there is no checkpoint.
    """
    (folder / FAILED).unlink(missing_ok=True)
    checkpoint = folder / CHECKPOINT
    before, now = read_json(folder / BEGUN).get("choices"), configuration(cfg)
    differ = _differences(before, now) if before and checkpoint.exists() else []
    if afresh and differ:
        checkpoint.replace(checkpoint.with_name("before.ckpt"))
    if afresh and (folder / METRICS).exists():
        (folder / METRICS).replace(folder / "metrics.before.json")
    if not (before and checkpoint.exists()):
        write_json({"job": digest(cfg), "choices": now}, folder / BEGUN)
    return differ


def mark_failed(folder: Path, error: BaseException, message: str) -> None:
    """Leave `failed.json` with the error and the job's choices in its folder."""
    text = "".join(traceback.format_exception(error))
    write_json({"error": message, "traceback": text, "choices": build.choices()}, folder / FAILED)


def mark_pruned(cfg: DictConfig, folder: Path, curve: Mapping[int, float], **more: Any) -> float:
    """Leave a `metrics.json` that says `pruned`: the PSNR at the step at which a search stopped the job, and no more.

    Args:
        cfg: the job's configuration.
        folder: where the file goes.
        curve: step -> PSNR at the validations.
        more: for `metrics.json`, as it is.

    Returns:
        The last PSNR of the curve.
    """
    step = max(curve)
    figures = {"psnr": curve[step], "pruned": step, "protocol": cfg.protocol.name, "seed": cfg.seed, "job": digest(cfg)}
    write_json(figures | {"choices": build.choices()} | more, folder / METRICS)
    return curve[step]


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """As `key=now (was before)`; of a branch that is on one side alone, no more than that."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        found = [_differences(before.get(name), now.get(name), f"{key}.{name}".lstrip(".")) for name in names]
        return [line for lines in found for line in lines]
    one, other = ("{...}" if isinstance(value, dict) else value for value in (before, now))
    return [] if before == now else [f"{key}={other} (was {one})"]
