"""From a composed configuration to objects: what the commands share."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from vsrplug.plugged import PluggedModel, attach
from vsrplug.plugin_files import load_plugins


def make(cfg: Any) -> Any:
    """What the constructor call of a yaml makes; None for an empty one."""
    return hydra.utils.instantiate(cfg, _convert_="all") if cfg else None


def make_each(cfg: DictConfig | None) -> dict[str, Any]:
    """Name -> object, of a group that lists constructor calls; entries set to null are left out."""
    return {str(name): make(entry) for name, entry in (cfg or {}).items() if entry is not None}


def make_model(cfg: DictConfig) -> PluggedModel:
    """The backbone with the plug-ins of the configuration, and the weights of `plugins_file` where one is given."""
    plugins = make_each(cfg.get("plugins"))
    model = attach(make(cfg.backbone), **plugins)
    if cfg.get("plugins_file"):
        if plugins:
            return load_plugins(model, cfg.plugins_file)
        return load_plugins(model.backbone, cfg.plugins_file)
    return model


def versions() -> dict[str, str]:
    """What a figure depends on besides the code of an experiment."""
    from importlib.metadata import version

    names = ("vsrplug", "torch", "torchvision", "lightning", "torchmetrics")
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Scalars in all and scalars that learn."""
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def choices() -> dict[str, str]:
    """Which option of every group this job runs with."""
    from hydra.core.hydra_config import HydraConfig

    chosen = HydraConfig.get().runtime.choices
    return {group: str(choice) for group, choice in chosen.items() if not group.startswith("hydra")}


def output_dir() -> Path:
    """The run's own folder."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def as_plain(cfg: DictConfig | ListConfig) -> Any:
    """Resolved, as lists and dicts."""
    return OmegaConf.to_container(cfg, resolve=True)


def device() -> torch.device:
    """Where networks are measured: the GPU if there is one (`CUDA_VISIBLE_DEVICES=` hides it)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interactive() -> bool:
    """Whether somebody watches: progress bars are for people."""
    return sys.stderr.isatty()


def folder_name(overrides: str) -> str:
    """What a sweep calls the folder of one job: its overrides, fit for a path and for people.

    Cut at 100 bytes, where a digest of them all keeps names apart.
    """
    name = re.sub(r"\[([^]]*)\]", lambda found: found[1].replace(",", "+"), overrides)
    name = re.sub(r"[^\w=,.+-]+", "-", name)
    if len(name.encode()) <= 100:
        return name or "defaults"
    digest = hashlib.blake2b(overrides.encode(), digest_size=4).hexdigest()
    return f"{name.encode()[:90].decode(errors='ignore')}~{digest}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
