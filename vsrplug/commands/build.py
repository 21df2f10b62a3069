"""From a composed configuration to objects: what the commands share."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from vsrplug import conf
from vsrplug.masks.errors import MasksError
from vsrplug.plugged import PluggedModel, attach
from vsrplug.plugin_files import load_plugins, whole_file
from vsrplug.site import unknown_name

KnownError = (
    ValueError,
    TypeError,
    KeyError,
    OSError,
    RuntimeError,
    ImportError,
    HydraException,
    OmegaConfBaseException,
)
LISTS = ("callbacks", "logger", "plugins")  # groups whose entries are constructor calls, under names of choice
READ_BY_NAME = ("losses", "optim", "paths")  # groups that are no constructor calls: their keys are read one by one


def command(config: str, run: Callable[[DictConfig], Any]) -> None:
    """Run a command under Hydra; an expected error ends as one line instead of a traceback.

    `HYDRA_FULL_ERROR=1` shows the traceback. In a sweep any error is marked in the job's folder, and the others go on.
    """

    from vsrplug.commands import sweep  # which stands on this file

    @hydra.main(version_base="1.3", config_path="pkg://vsrplug.conf", config_name=config)
    def application(cfg: DictConfig) -> Any:
        quieten_lightning()
        sys.argv.insert(1, config)  # Lightning starts the other processes of several devices with this command line
        try:
            check_keys(cfg, config)
            with sweep.place():
                return run(cfg)
        except Exception as error:
            message = f"{describe_error(error)}{_remedy(cfg, error)}"
            if sweep.in_sweep() and not isinstance(error, InterruptedError):
                sweep.mark_failed(output_dir(), error, message)
                print(f"vsrplug {config}: {message}\nThe sweep goes on without {output_dir()}", file=sys.stderr)
                return None  # of a search: a failed trial, which is told apart from a bad one
            if not isinstance(error, KnownError) or os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            raise SystemExit(f"vsrplug {config}: {message}") from None
        finally:
            del sys.argv[1]

    try:
        sweep.check_installed(sys.argv[1:])
    except ImportError as error:
        raise SystemExit(f"vsrplug {config}: {error}") from None
    sys.argv[1:] = sweep.name_folders(sys.argv[1:], config)
    application()


def quieten_lightning() -> None:
    """Keep Lightning's warnings, but not its advertising, nor what does not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # devices it found, a tip to install its logger
    # Samples come from memory, and a resumed run goes on in the folder it left: neither is a mistake.
    # Frozen normalisation layers are in eval mode on purpose.
    for message in ("does not have many workers", "exists and is not empty", r"module\(s\) in eval mode at the start"):
        warnings.filterwarnings("ignore", message=f".*{message}")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning's own use of torch


def describe_error(error: BaseException) -> str:
    """The message itself, without the frame that Hydra puts around errors of constructors."""
    while error.__cause__ is not None and isinstance(error, (HydraException, OmegaConfBaseException)):
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has to be given: {error.full_key}=..."
    if isinstance(error, InterpolationToMissingValueError):
        key = str(error).splitlines()[0].rpartition(" ")[2]
        return f"{key} has to be given: {key}=..."
    if isinstance(error, OmegaConfBaseException):
        return str(error).splitlines()[0]
    if isinstance(error, (ValueError, OSError, ImportError)):
        return str(error)
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return f"{message} (HYDRA_FULL_ERROR=1 shows where)"  # it may be a mistake in somebody's code


def _remedy(cfg: DictConfig, error: BaseException) -> str:
    """The commands that make the masks that are missing, or the choice of masks, where that is the error."""
    while error.__cause__ is not None and isinstance(error, HydraException):
        error = error.__cause__
    if "needs object masks" in str(error) and not cfg.get("masks"):
        return "; here, masks=superpixels masks.count=16, or what it was trained with"
    if not isinstance(error, MasksError) or "folder" not in (cfg.get("masks") or {}):
        return ""
    from hydra.core.hydra_config import HydraConfig

    from vsrplug.commands.mask_commands import commands_for

    chosen = {str(group): str(option) for group, option in HydraConfig.get().runtime.choices.items()}
    return ": " + " && ".join(commands_for(cfg, chosen))


def check_keys(cfg: DictConfig, config: str) -> None:
    """Check every key before anything is made: an experiment file can add any, misspelt ones too.

    Raises:
        ValueError: a key that the command does not read, or that a constructor call does not take.
    """
    _check_known(cfg, "", _known_keys(config))
    for group in READ_BY_NAME:
        if group in cfg:
            files = Path(conf.__file__).with_name(group).glob("*.yaml")
            _check_known(cfg[group], f"{group}.", [str(key) for file in files for key in _load(file)])
    for group in LISTS:
        entries = {str(name): entry for name, entry in (cfg.get(group) or {}).items() if entry is not None}
        calls = [f"{group}.{name}" for name, entry in entries.items() if "_target_" in entry]
        for name in entries:
            if f"{group}.{name}" not in calls:
                raise ValueError(f"{unknown_name('entry', f'{group}.{name}', calls)} A new one needs a _target_.")
    _check_calls(cfg)


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


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write under a temporary name, which no other process has, and rename."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with whole_file(path) as temporary:
        Path(temporary).write_text(text + "\n", encoding="utf-8")


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

    Cut at 100 characters, where a digest of them all keeps names apart.
    """
    name = re.sub(r"\[([^]]*)\]", lambda found: found[1].replace(",", "+"), overrides)
    name = re.sub(r"[^\w=,.+-]+", "-", name)
    if len(name) <= 100:
        return name or "defaults"
    return f"{name[:90]}~{hashlib.blake2b(overrides.encode(), digest_size=4).hexdigest()}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def _load(file: Path) -> DictConfig:
    return OmegaConf.load(file)


def _known_keys(config: str) -> list[str]:
    """Keys of a primary configuration: its groups, its own, and those of the one it starts from."""
    primary = _load(Path(conf.__file__).with_name(f"{config}.yaml"))
    known = []
    for default in primary.pop("defaults"):
        if isinstance(default, str):
            known += [] if default == "_self_" else _known_keys(default)
        else:
            known += [str(name).removeprefix("override ") for name in default]
    return [*known, *map(str, primary)]


def _check_known(cfg: DictConfig, prefix: str, known: Iterable[str]) -> None:
    known = [prefix + key for key in dict.fromkeys(known)]
    for key in cfg:
        if prefix + str(key) not in known:
            raise ValueError(unknown_name("configuration key", prefix + str(key), known))


def _check_calls(cfg: Any) -> None:
    """Raise ValueError for a constructor call, however deep, with an argument that the constructor does not have."""
    if isinstance(cfg, DictConfig) and "_target_" in cfg:
        parameters = inspect.signature(hydra.utils.get_method(cfg._target_)).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in map(str, cfg):
            if not key.startswith("_") and key not in parameters and not open_ended:
                raise ValueError(f"{cfg._target_}: {unknown_name('argument', key, parameters)}")
    if isinstance(cfg, (DictConfig, ListConfig)):
        for at in cfg if isinstance(cfg, DictConfig) else range(len(cfg)):
            if not OmegaConf.is_missing(cfg, at):
                _check_calls(cfg[at])
