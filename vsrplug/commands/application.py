"""One command under Hydra: what stands between the command line and its `run`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vsrplug.commands import jobs, sweep
from vsrplug.commands.arguments import split
from vsrplug.commands.build import output_dir
from vsrplug.commands.errors import KnownError, describe_error, describe_override_error, remedy
from vsrplug.commands.help import asked_for, help_text
from vsrplug.commands.keys import check_keys

FULL = "HYDRA_FULL_ERROR"


def command(config: str, run: Callable[[DictConfig], Any]) -> None:
    """Run a command under Hydra; an expected error ends as one line instead of a traceback.

    `HYDRA_FULL_ERROR=1` shows the traceback. In a sweep any error is marked in the job's folder, and the others go on.
    """
    if asked_for(sys.argv[1:]):
        print(help_text(config, sys.argv[1:]))
        return
    full = os.environ.get(FULL)

    @hydra.main(version_base="1.3", config_path="pkg://vsrplug.conf", config_name=config)
    def application(cfg: DictConfig) -> Any:
        _set_full(full)
        quieten_lightning()
        sys.argv.insert(1, config)  # Lightning starts the other processes of several devices with this command line
        try:
            check_keys(cfg, config)
            with sweep.place():
                return run(cfg)
        except Exception as error:
            message = f"{describe_error(error)}{remedy(cfg, error)}"
            if sweep.in_sweep() and not isinstance(error, InterruptedError):
                jobs.mark_failed(output_dir(), error, message)
                print(f"vsrplug {config}: {message}\nThe sweep goes on without {output_dir()}", file=sys.stderr)
                return None  # of a search: a failed trial, which is told apart from a bad one
            if not isinstance(error, KnownError) or isinstance(error, BrokenPipeError) or full == "1":
                raise
            raise SystemExit(f"vsrplug {config}: {message}") from None
        finally:
            del sys.argv[1]
            _set_full("1")

    try:
        sweep.check(sys.argv[1:], config)
        options, overrides = split(sys.argv[1:])
        sys.argv[1:] = sweep.name_folders([*options, *overrides], config)
        _set_full("1")  # else Hydra prints errors of the command line itself, without the nearest names
        application()
    except (HydraException, OmegaConfBaseException) as error:
        if full == "1":
            raise
        raise SystemExit(f"vsrplug {config}: {describe_override_error(error, config)}") from None
    finally:
        _set_full(full)


def quieten_lightning() -> None:
    """Keep Lightning's warnings, but not its advertising, nor what does not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # devices it found, a tip to install its logger
    # Samples come from memory, and a resumed run goes on in the folder it left: neither is a mistake.
    # Frozen normalisation layers are in eval mode on purpose.
    for message in ("does not have many workers", "exists and is not empty", r"module\(s\) in eval mode at the start"):
        warnings.filterwarnings("ignore", message=f".*{message}")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning's own use of torch


def _set_full(value: str | None) -> None:
    os.environ.pop(FULL, None)
    if value is not None:
        os.environ[FULL] = value
