"""The `vsrplug masks` commands that make the masks which another command misses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vsrplug import conf
from vsrplug.commands import build
from vsrplug.masks.cache_file import SUFFIX, CacheFile
from vsrplug.masks.errors import DamagedMasksError


def commands_for(cfg: DictConfig, chosen: Mapping[str, str]) -> list[str]:
    """The `vsrplug masks` commands that make what another command reads with `masks=cached`.

    Args:
        cfg: that command's configuration.
        chosen: option of each group it runs with, Hydra's `runtime.choices`.
    """
    folder = Path(str(cfg.masks.folder)).expanduser()
    source = _source(folder, cfg.masks.count)
    wanted = []
    if "input" in cfg:  # of upscale: its frames are the low-resolution ones
        path = Path(str(cfg.input))
        given = (
            ["data=folder", _override("data.root", path)]
            if path.is_dir()
            else ["data=video", _override("data.path", path)]
        )
        wanted.append([*given, "degradation=none"])
    if "data" in cfg:
        wanted.append(_group(cfg.data, chosen, "data") + _group(cfg.degradation, chosen, "degradation"))
    if "protocol" in cfg:
        clips, degradation = cfg.protocol.clips, cfg.protocol.degradation
        data = _group(clips, chosen, "data", "data@protocol.clips")
        wanted.append(data + _group(degradation, chosen, "degradation", "degradation@protocol.degradation"))
    return [" ".join(["vsrplug masks", *source, *given, _override("out", folder)]) for given in wanted]


def _group(node: DictConfig, chosen: Mapping[str, str], group: str, key: str | None = None) -> list[str]:
    """Overrides that choose an option of a group and change it into `node`."""
    option = chosen.get(key or group, "???")
    return [f"{group}={option}", *_changes(build.as_plain(node), group, option)]


def _source(folder: Path, count: int) -> list[str]:
    """The source that made the folder's masks, or else the paper's."""
    file = next(folder.rglob(f"*{SUFFIX}"), None)
    try:
        settings = {} if file is None else dict(CacheFile(file).header.settings)
    except DamagedMasksError:
        settings = {}
    option = settings.pop("source", "segment_anything")
    checkpoint = settings.pop("checkpoint", "sam_vit_h_4b8939.pth")
    named = [_override("checkpoint", checkpoint)] if option == "segment_anything" else []
    return [f"source={option}", *named, *_changes(settings or {"count": count}, "source", option)]


def _changes(values: dict[str, Any], group: str, option: str) -> list[str]:
    """An override for every value that the option's yaml does not have."""
    file = Path(conf.__file__).parent / group / f"{option}.yaml"
    known: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}
    changed = {key: value for key, value in values.items() if key in known and value not in (None, known[key])}
    return [_override(f"{group}.{key}", value) for key, value in changed.items()]


def _override(key: str, value: Any) -> str:
    """`key=value`, quoted for Hydra and the shell where that is needed."""
    text = str(value).replace(" ", "") if isinstance(value, list) else str(value)
    if re.fullmatch(r"[\w./~:,+@\[\]-]+", text):
        return f"{key}={text}"
    return shlex.quote(f'{key}="{text}"')
