"""Folders such as sweeps leave, with figures that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

Leave = Callable[..., Path]
CHOICES = {"backbone": "edvr", "tuning": "full", "protocol": "vid4_bi_y", "masks": "none", "experiment": "null"}


@pytest.fixture
def leave(tmp_path: Path) -> Leave:
    """Makes the folder of one job: `leave(psnr, plugins=..., seed=...)`; what is not given is the same for all.

    `psnr` is clip -> dB, or None for a job that was not finished.
    """

    def one(
        psnr: Mapping[str, float] | None,
        *,
        plugins: str = "none",
        seed: int = 0,
        before: Mapping[str, float] | float | None = None,
        trainable: int = 1000,
        config: Mapping[str, Any] | None = None,
        name: str = "",
        more: Mapping[str, Any] | None = None,
        **choices: str,
    ) -> Path:
        chosen = CHOICES | choices
        overrides = [f"plugins={plugins}", f"seed={seed}", *(f"{group}={word}" for group, word in choices.items())]
        folder = tmp_path / (name or ",".join(sorted(overrides)))
        hydra = folder / ".hydra"
        hydra.mkdir(parents=True)
        attached = [word for word in plugins.strip("[]").split(",") if word != "none"]
        whole = {
            "seed": seed,
            "plugins": {word: {"_target_": word} for word in attached},
            "backbone": {"_target_": chosen["backbone"]},
            "tuning": {"_target_": chosen["tuning"]},
            "protocol": {"name": chosen["protocol"], "border": 0},
            "trainer": {"max_steps": 300},
        }
        OmegaConf.save(OmegaConf.merge(whole, dict(config or {})), hydra / "config.yaml")
        OmegaConf.save(OmegaConf.create(overrides), hydra / "overrides.yaml")
        OmegaConf.save({"hydra": {"runtime": {"choices": chosen}}}, hydra / "hydra.yaml")
        if psnr is not None:
            compared: dict[str, Any] = {}
            if isinstance(before, float):
                compared["backbone"] = {"psnr": before, "ssim": 0.8}
            elif before is not None:
                mean = sum(before.values()) / len(before)
                compared["backbone"] = {"psnr": mean, "ssim": 0.8, "clips": by_clip(before)}
            figures = {
                "protocol": chosen["protocol"],
                "psnr": sum(psnr.values()) / len(psnr),
                "ssim": 0.8,
                "clips": by_clip(psnr),
                "seconds": 1.0,
                "parameters": {"total": 50_000, "trainable": trainable},
                "versions": {"torch": "2.15.0"},
                "choices": chosen | {"plugins": ",".join(attached) or "none"},
                "compared": compared,
            }
            (folder / "metrics.json").write_text(json.dumps(figures | dict(more or {})))
        return folder

    return one


def multirun(folder: Path, *task: str, sweeper: str = "hydra._internal.BasicSweeper", **params: str) -> dict[str, Any]:
    """What Hydra writes into the folder of a sweep with these arguments; returns its part `hydra`."""
    choices = {"backbone": "edvr", "tuning": "full", "protocol": "vid4_bi_y", "hydra/launcher": "basic"}
    hydra = {
        "sweeper": {"_target_": sweeper, "params": params or None},
        "overrides": {"hydra": [], "task": list(task)},
        "runtime": {"choices": choices},
    }
    OmegaConf.save({"seed": 0, "hydra": hydra}, folder / "multirun.yaml")
    return hydra


def by_clip(psnr: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {clip: {"psnr": value, "ssim": 0.8} for clip, value in psnr.items()}


def draw(folder: Path, name: str, colour: tuple[int, int, int]) -> None:
    """A PNG of one colour, `folder/name.png`."""
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), colour).save(path)
