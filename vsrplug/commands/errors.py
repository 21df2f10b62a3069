"""Errors as one line: what was given, what was expected, what to try."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from vsrplug.commands.keys import known_keys, options
from vsrplug.commands.mask_commands import commands_for
from vsrplug.masks.errors import MasksError
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


def describe_override_error(error: HydraException | OmegaConfBaseException, config: str) -> str:
    """What is wrong with a command line of which Hydra could not make the configuration of a command."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        reason = next((line for line in text.splitlines() if not line.startswith("Error parsing")), "")
        return f"{error.override!r} cannot be read as key=value: {reason}; quotes keep a value whole, 'key=\"a b\"'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).partition("/")
        if group == "hydra":
            group, _, name = str(error.missing_cfg_file).rpartition("/")
        return unknown_name(f"choice of {group}", name, sorted({*options(group), *(error.options or ())}))
    if several := re.match(r"Ambiguous value for argument '(([^=]+)=(.*))'", text):
        given, key, values = several.groups()
        return f"{given!r} is several values: -m runs one after another, {key}=[{values}] takes them at once"
    if key := re.match(r"Could not override '(.+)'", text):
        return _unknown_key(key[1], error.__cause__, config) + "".join(
            f" Here it is {name}=..." for name in re.findall(r"Did you mean to override (\S+)\?", text)
        )
    return text.splitlines()[0]


def _unknown_key(key: str, cause: BaseException | None, config: str) -> str:
    """With the nearest of the names at its level, or where the same name is deeper inside."""
    groups, own = known_keys(config)
    known, more = [name for name in (*groups, *own) if name != "hydra"], ""
    parent = cause.parent_node if isinstance(cause, OmegaConfBaseException) else None
    if isinstance(cause, OmegaConfBaseException) and isinstance(parent, DictConfig) and "." in str(cause.full_key):
        key, name = str(cause.full_key), str(cause.key)
        prefix = key.removesuffix(name)
        known = [prefix + str(other) for other in parent if not str(other).startswith(("_", "hydra"))]
        inside = [prefix + path for path in _paths(parent) if path.endswith(f".{name}")]
        if inside:
            return f"there is no configuration key {key!r}; did you mean {' or '.join(map(repr, inside))}?"
        if prefix == "plugins." and name in options("plugins"):
            more = f" Choose it first: plugins={name}."
        elif "_target_" in parent and name in inspect.signature(get_method(parent["_target_"])).parameters:
            more = f" One that the file leaves out takes a plus: +{key}=..."
    return unknown_name("configuration key", key, known) + more


def _paths(cfg: DictConfig) -> Iterator[str]:
    for key in cfg:
        yield str(key)
        if not OmegaConf.is_interpolation(cfg, key) and OmegaConf.is_dict(inner := cfg._get_node(key)):
            yield from (f"{key}.{path}" for path in _paths(inner))


def remedy(cfg: DictConfig, error: BaseException) -> str:
    """The commands that make the masks that are missing, or the choice of masks, where that is the error."""
    while error.__cause__ is not None and isinstance(error, HydraException):
        error = error.__cause__
    if "needs object masks" in str(error) and not cfg.get("masks"):
        return "; here, masks=superpixels masks.count=16, or what it was trained with"
    if "masks.count" in str(error) and not cfg.get("masks"):
        return "; a plug-in reads object masks: leave masks=none out, or choose others"
    if "force=True" in str(error):
        return " On the command line: backbone=... and backbone.path=... of that network."
    if not isinstance(error, MasksError) or "folder" not in (cfg.get("masks") or {}):
        return ""
    chosen = {str(group): str(option) for group, option in HydraConfig.get().runtime.choices.items()}
    return ": " + " && ".join(commands_for(cfg, chosen))
