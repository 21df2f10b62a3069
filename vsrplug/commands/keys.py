"""What a command's configuration may hold: every key is checked before anything is made."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from vsrplug import conf
from vsrplug.site import unknown_name

CONF = Path(conf.__file__).parent
LISTS = ("callbacks", "logger", "plugins")  # groups whose entries are constructor calls, under names of choice
READ_BY_NAME = ("losses", "optim", "paths")  # groups that are no constructor calls: their keys are read one by one


def check_keys(cfg: DictConfig, config: str) -> None:
    """Check every key before anything is made: an experiment file can add any, misspelt ones too.

    Raises:
        ValueError: a key that the command does not read, or that a constructor call does not take.
    """
    groups, own = known_keys(config)
    _check_known(cfg, "", [*groups, *own])
    for group in READ_BY_NAME:
        if group in cfg:
            files = (CONF / group).glob("*.yaml")
            _check_known(cfg[group], f"{group}.", [str(key) for file in files for key in _load(file)])
    for group in LISTS:
        entries = {str(name): entry for name, entry in (cfg.get(group) or {}).items() if entry is not None}
        calls = [f"{group}.{name}" for name, entry in entries.items() if "_target_" in entry]
        for name in entries:
            if f"{group}.{name}" not in calls:
                raise ValueError(f"{unknown_name('entry', f'{group}.{name}', calls)} A new one needs a _target_.")
    _check_calls(cfg)


def known_keys(config: str) -> tuple[dict[str, str], list[str]]:
    """Of a primary configuration, with what it starts from: group -> option that it takes by itself, and other keys."""
    primary = _load(CONF / f"{config}.yaml")
    groups: dict[str, str] = {}
    own: list[str] = []
    for default in primary.pop("defaults"):
        if isinstance(default, str):
            more, keys = ({}, []) if default == "_self_" else known_keys(default)
            groups, own = groups | more, own + keys
        else:
            for name, option in default.items():
                chosen = "+".join(option) if isinstance(option, ListConfig) else str(option)
                groups[str(name).removeprefix("override ")] = "null" if option is None else chosen
    return groups, own + [str(key) for key in primary]


def options(group: str, folders: Iterable[Path] = (CONF,)) -> list[str]:
    """What there is to choose in a group, that of the groups inside it too: `clips/edvr_tiny`."""
    found = {file.relative_to(folder / group) for folder in folders for file in (folder / group).rglob("*.yaml")}
    return sorted(file.with_suffix("").as_posix() for file in found)


def _load(file: Path) -> DictConfig:
    return OmegaConf.load(file)


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
