"""`vsrplug report FOLDER`: one table of what runs left, as CSV, Markdown and LaTeX, and as a page with charts."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vsrplug.commands.application import command
from vsrplug.commands.arguments import split
from vsrplug.reporting import Resampling, csv_table, latex, markdown, page, read_jobs, rich_table, sections
from vsrplug.reporting.columns import counts, notes


def main() -> None:
    """Entry point of `vsrplug report`; a word may be the folder alone."""
    options, words = split(sys.argv[1:])
    sys.argv[1:] = [*options, *map(_quoted, words)]
    command("report", run)


def run(cfg: DictConfig) -> None:
    """Write `table.csv`, `table.md`, `table.tex` and `report.html` into the folder, and print the table.

    Raises:
        ValueError: no folder is given, or no run has left anything in it.
        FileNotFoundError: there is no such folder.
    """
    if OmegaConf.is_missing(cfg, "folder"):
        raise ValueError("folder=... is missing: the folder of a sweep, or one that holds several runs")
    folder = Path(str(cfg.folder)).expanduser()
    how = Resampling(cfg.confidence, cfg.resamples, cfg.seed)
    jobs = read_jobs(folder)
    found, left = sections(jobs, how)
    counted = [job for section in found for row in section.rows for job in row.jobs]
    missing = [job for job in counted if job.figures is None]
    files = {
        "table.csv": csv_table(found),
        "table.md": markdown(found),
        "table.tex": latex(found),
        "report.html": page(folder.resolve().name, found, left, missing),
    }
    for name, text in files.items():
        _write(folder / name, text)
    console = Console()
    for section in found:
        console.print(rich_table(section))
        for note in notes(section):
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{counts(counted)}. {', '.join(files)} are in {folder}", markup=False, soft_wrap=True)


def _quoted(word: str) -> str:
    """A folder, alone or after `folder=`, in quotes: that of a sweep has `=` and commas in its name."""
    folder = word.removeprefix("folder=")
    alone = folder == word and (Path(word).exists() or not re.match(r"[+~]{0,2}[\w.@]+=", word))
    if not alone and (folder == word or folder.startswith(("'", '"'))):
        return word
    return "folder='" + folder.replace("'", "\\'") + "'"


def _write(path: Path, text: str) -> None:
    """Write under a temporary name and rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
