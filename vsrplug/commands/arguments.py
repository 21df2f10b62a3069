"""The words of a command line: options, which begin with a dash, and overrides."""

from __future__ import annotations

from collections.abc import Sequence

CONFIG_DIR = ("--config-dir", "-cd")
TAKE_A_WORD = (*CONFIG_DIR, "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options, each followed by its value, and all other words. Hydra takes overrides only in one piece."""
    options: list[str] = []
    others: list[str] = []
    for word in arguments:
        of_an_option = bool(options) and options[-1] in TAKE_A_WORD
        (options if of_an_option or word.startswith("-") else others).append(word)
    return options, others
