"""Which jobs the command of a sweep asks for."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


def planned(hydra: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The overrides of every job, in the order in which Hydra's own sweeper starts them.

    Args:
        hydra: the part `hydra` of the `multirun.yaml` that Hydra writes into a sweep's folder.

    Returns:
        Nothing where another sweeper, such as a search, chooses the jobs as it goes, or where a list of choices
        depends on the files of the configuration (`glob`).
    """
    sweeper = hydra.get("sweeper") or {}
    if not str(sweeper.get("_target_", "")).endswith(".BasicSweeper"):
        return []
    given = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    given += (hydra.get("overrides") or {}).get("task") or []
    choices: dict[str, list[str]] = {}
    try:
        for override in OverridesParser.create().parse_overrides(given):
            key = override.get_key_element()
            swept = override.is_sweep_override()
            words = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
            choices[key] = [f"{key}={word}" for word in words]
    except HydraException:
        return []
    return list(product(*choices.values())) if choices else []
