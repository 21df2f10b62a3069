"""The small JSON files that runs leave: written whole or not at all, read as empty where they are damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vsrplug.plugin_files import whole_file


def read_json(path: Path) -> dict[str, Any]:
    """Nothing where there is no such file, or it is damaged or another's."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Write under a temporary name, which no other process has, and rename.

    Raises:
        ValueError: a value that JSON has no word for: infinity or NaN.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    with whole_file(path) as temporary:
        Path(temporary).write_text(text + "\n", encoding="utf-8")
