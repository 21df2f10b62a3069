"""The table as CSV, Markdown, LaTeX, and on the terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .columns import Column, columns, missing, notes, one_line
from .rows import Row, Section


def csv_table(found: Iterable[Section]) -> str:
    """One line a combination, figures unrounded."""
    text = io.StringIO()
    records = [_record(section, row) for section in found for row in section.rows]
    keys = dict.fromkeys(key for record in records for key in record)
    extras = [key for key in keys if key.startswith("setting ")]
    writer = csv.DictWriter(text, [*(key for key in keys if key not in extras), *extras], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def markdown(found: Iterable[Section]) -> str:
    """One table a protocol, the best row in bold, notes under it."""

    def cell(text: str) -> str:
        return re.sub(r"([\\|*_<>\[\]`])", r"\\\1", text)

    parts = []
    for section in found:
        shown = columns(section)
        lines = [f"## {cell(section.title)}", "", _bar(cell(column.title) for column in shown)]
        lines.append(_bar("---" if column.words else "---:" for column in shown))
        for row in section.rows:
            bold = ["**" if column.marked and section.is_best(row) else "" for column in shown]
            lines.append(_bar(b + cell(column.cell(row)) + b for b, column in zip(bold, shown, strict=True)))
        parts.append("\n".join([*lines, "", *(f"- {cell(note)}" for note in notes(section))]).rstrip())
    return "\n\n".join(parts) + "\n"


def latex(found: Iterable[Section]) -> str:
    r"""One `table` a protocol, for `\usepackage{booktabs}`; notes are comments."""
    parts = ["% needs \\usepackage{booktabs}"]
    for section in found:
        shown = columns(section)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{Protocol {_escape(section.title)}.}}"]
        lines += [r"\begin{tabular}{" + "".join("l" if column.words else "r" for column in shown) + "}", r"\toprule"]
        lines += [_line_of(_escape(column.title) for column in shown), r"\midrule"]
        for row in section.rows:
            cells = [_escape(column.cell(row)) for column in shown]
            best = [column.marked and section.is_best(row) for column in shown]
            lines.append(_line_of(rf"\textbf{{{c}}}" if b else c for c, b in zip(cells, best, strict=True)))
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", *(f"% {one_line(note)}" for note in notes(section))]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def rich_table(section: Section) -> Table:
    """For the terminal, which is narrow: words in one column, and some figures left out."""
    table = Table(title=f"protocol {section.title}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    number, *figures = [column for column in columns(section) if not column.words and not column.spare]
    table.add_column(number.title, justify="right", no_wrap=True)
    table.add_column("combination", overflow="fold")
    for column in figures:
        wraps = column.title.startswith("over")  # interval and control go to lines of their own where they must
        table.add_column(column.title, justify="right", no_wrap=not wraps)
    for row in section.rows:
        cells = [Text(column.cell(row), _style(column, section.is_best(row))) for column in figures]
        table.add_row(number.cell(row), Text(row.title), *cells, style="" if row.figures else "dim")
    return table


def _style(column: Column, best: bool) -> str:
    return "bold green" if column.marked and best else ""


def _record(section: Section, row: Row) -> dict[str, object]:
    record: dict[str, object] = {
        "number": row.number,
        "protocol": section.title,
        "backbone": row.job.backbone,
        "plugins": row.job.plugins,
        "tuning": row.job.tuning,
        "seeds_done": len(row.figures),
        "seeds": len(row.jobs),
        "psnr": row.psnr,
        "psnr_deviation": row.deviations and row.deviations[0],
        "ssim": row.ssim,
        "ssim_deviation": row.deviations and row.deviations[1],
    }
    gains = {"backbone": row.over_backbone, "control": row.over_control, "convolutions": row.over_convolutions}
    for name, gain in gains.items():
        low, high = (gain and gain.interval) or (None, None)
        record |= {f"over_{name}": gain and gain.mean, f"over_{name}_low": low, f"over_{name}_high": high}
    first = row.figures[0] if row.figures else None
    seconds = [f.training_seconds for f in row.figures if f.training_seconds is not None]
    return (
        record
        | {"control": row.over_control and row.over_control.against}
        | {"convolutions": row.over_convolutions and row.over_convolutions.against}
        | {"trainable": first and first.trainable, "parameters": first and first.total, "gflop": first and first.gflop}
        | {"training_seconds": fmean(seconds) if seconds else None, "best": int(section.is_best(row))}
        | {"missing": missing(row)}
        | {f"setting {key}": value for key, value in row.extra.items()}
    )


def _bar(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _line_of(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escape(text: str) -> str:
    marks: Mapping[str, str] = {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
        "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
        **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    }  # fmt: skip
    escaped = "".join(marks.get(letter, letter) for letter in text)
    return re.sub(r"(?<![\w.])([+-])(?=\d)", r"$\1$", escaped)  # a minus, not a hyphen
