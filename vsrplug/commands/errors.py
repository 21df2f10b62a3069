"""Errors as one line: what was given, what was expected, what to try."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from vsrplug.commands.keys import options
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


def describe_override_error(error: HydraException | OmegaConfBaseException) -> str:
    """What is wrong with a command line that Hydra could not make a configuration of."""
    if isinstance(error, OverrideParseException):
        reason = next((line for line in str(error).splitlines() if not line.startswith("Error parsing")), "")
        return f"{error.override!r} cannot be read as key=value: {reason}; quotes keep a value whole, 'key=\"a b\"'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).partition("/")
        if group == "hydra":
            group, _, name = str(error.missing_cfg_file).rpartition("/")
        if found := options(group):
            return unknown_name(f"choice of {group}", name, sorted({*found, *(error.options or ())}))
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        key = str(cause.full_key)
        prefix = key.removesuffix(str(cause.key))
        known = [prefix + str(name) for name in cause.parent_node if not str(name).startswith(("_", "hydra"))]
        new = f" A new one is given with a plus: +{key}=..." if prefix and known else ""
        return unknown_name("configuration key", key, known) + new
    return str(error).splitlines()[0]


def remedy(cfg: DictConfig, error: BaseException) -> str:
    """The commands that make the masks that are missing, or the choice of masks, where that is the error."""
    while error.__cause__ is not None and isinstance(error, HydraException):
        error = error.__cause__
    if "needs object masks" in str(error) and not cfg.get("masks"):
        return "; here, masks=superpixels masks.count=16, or what it was trained with"
    if not isinstance(error, MasksError) or "folder" not in (cfg.get("masks") or {}):
        return ""
    chosen = {str(group): str(option) for group, option in HydraConfig.get().runtime.choices.items()}
    return ": " + " && ".join(commands_for(cfg, chosen))
