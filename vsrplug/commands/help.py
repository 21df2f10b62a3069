"""`vsrplug COMMAND --help`: what the command does, the choices it reads, and its keys with their comments."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from vsrplug.commands.arguments import CONFIG_DIR, split
from vsrplug.commands.keys import CONF, known_keys, options


def asked_for(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return bool({"-h", "--help"} & set(arguments))


def help_text(config: str, arguments: Sequence[str] = ()) -> str:
    """What a command does, the groups that it reads, each with what it takes by itself first, and its own keys.

    Args:
        config: the command.
        arguments: its command line, which may name a folder of further options (`--config-dir`).
    """
    folders = [CONF, *_config_dirs(arguments)]
    groups = {name: taken for name, taken in known_keys(config)[0].items() if name != "hydra"}
    lines = [*_about(config), "", f"usage: vsrplug {config}{' [group=choice] ...' * bool(groups)} [key=value] ..."]
    for group, taken in groups.items():
        lines += ["", f"  {group}={taken}", *_choices([name for name in options(group, folders) if name != taken])]
    for start in reversed(_starts(config)):
        lines += ["", *_keys(start)]
    lines += ["", f"vsrplug {config} --cfg job prints every key that it would run with, those of the groups too."]
    return "\n".join(lines)


def _choices(names: Sequence[str]) -> list[str]:
    """Those of a folder share a paragraph, which begins with the folder."""
    lines = []
    for folder in sorted({name.rpartition("/")[0] for name in names}):
        inside = ", ".join(name.rpartition("/")[2] for name in names if name.rpartition("/")[0] == folder)
        text = f"{folder}/: {inside}" if folder else f"or {inside}"
        lines += textwrap.wrap(text, 112, initial_indent=6 * " ", subsequent_indent=8 * " ", break_on_hyphens=False)
    return lines


def _config_dirs(arguments: Sequence[str]) -> list[Path]:
    words = [word for argument in split(arguments)[0] for word in argument.split("=", 1)]
    return [Path(value) for option, value in itertools.pairwise(words) if option in CONFIG_DIR]


def _text(config: str) -> str:
    return (CONF / f"{config}.yaml").read_text(encoding="utf-8")


def _starts(config: str) -> list[str]:
    """This file and those that it starts from."""
    return [config, *(name for start in re.findall(r"^  - (\w+)$", _text(config), flags=re.MULTILINE)
                      if start != "_self_" for name in _starts(start))]  # fmt: skip


def _about(config: str) -> list[str]:
    """The comment at the head of the file."""
    return [line.removeprefix("# ") for line in _text(config).partition("defaults:")[0].splitlines()]


def _keys(config: str) -> list[str]:
    """What follows the defaults, comments too, without Hydra's own."""
    body = re.split(r"^defaults:\n(?:[ #].*\n)+", _text(config), maxsplit=1, flags=re.MULTILINE)[1]
    own = re.sub(r"^hydra:\n(?: .*\n?)+", "", body, flags=re.MULTILINE).strip()
    return own.splitlines()
