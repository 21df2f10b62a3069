"""What the table for people says of a row, whatever its form; and the notes under it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from .intervals import Gain
from .jobs import Job
from .rows import Row, Section

NONE = "-"
ENOUGH = 6  # clips: with fewer, an interval of 95 % would reach beyond all that resampling can give


@dataclass(frozen=True)
class Column:
    """A column of the table for people.

    Args:
        title: its heading.
        cell: what it says of a row.
        words: whether it holds words, which stand on the left; figures stand on the right.
        marked: whether the best row is marked in it.
        spare: whether the terminal, which is narrow, does without it.
    """

    title: str
    cell: Callable[[Row], str]
    words: bool = False
    marked: bool = False
    spare: bool = False


def columns(section: Section) -> list[Column]:
    """The columns of a section; those that would be empty are left out."""
    rows = section.rows
    extras = [Column(key, partial(_extra, key), words=True) for key in section.extras]
    all_columns = [
        Column("#", lambda row: str(row.number)),
        Column("backbone", lambda row: row.job.backbone, words=True),
        Column("plug-ins", lambda row: row.job.plugins, words=True),
        Column("tuning", lambda row: row.job.tuning, words=True),
        *extras,
        Column("seeds", _seeds),
        Column("PSNR dB", lambda row: _spread(row.psnr, row.deviations and row.deviations[0], 3), marked=True),
        Column("SSIM", lambda row: _spread(row.ssim, row.deviations and row.deviations[1], 4), spare=True),
        Column("over backbone, dB", lambda row: gain_text(row.over_backbone)),
        Column("over control, dB", lambda row: gain_text(row.over_control)),
        Column("over convolutions, dB", lambda row: gain_text(row.over_convolutions), spare=True),
        Column("trained", lambda row: NONE if not row.figures else f"{row.figures[0].trainable:,}"),
        Column("GFLOP", lambda row: _mean([f.gflop for f in row.figures], ",.2f"), spare=True),
        Column("training s", lambda row: _mean([f.training_seconds for f in row.figures], ",.0f"), spare=True),
    ]
    return [column for column in all_columns if column.words or any(column.cell(row) != NONE for row in rows)]


def gain_text(gain: Gain | None) -> str:
    """`+0.123 [+0.051, +0.199] (#2)`."""
    if gain is None:
        return NONE
    interval = f" [{gain.interval[0]:+.3f}, {gain.interval[1]:+.3f}]" if gain.interval else ""
    against = f" (#{gain.against})" if gain.against else ""
    return f"{gain.mean:+.3f}{interval}{against}"


def notes(section: Section) -> list[str]:
    """What the table cannot say in a cell: how to read it, which row is best, what has no control, what is missing."""
    lines = [
        "Means over clips and seeds; ± is the standard deviation over seeds. In brackets the "
        f"{100 * section.how.confidence:g} % interval of a difference, over clips (paired bootstrap). Backbone: as it "
        "was, frozen. Control, with its number: the same run without plug-ins, or tuning=full where the tuning trains "
        "plug-ins alone."
    ]
    clips = min((len(figures.clips) for row in section.rows for figures in row.figures), default=0)
    if 1 < clips < ENOUGH:
        lines[0] += (
            f" Of {clips} clips no resampling leaves more than their spread: it holds the mean of all clips that there "
            f"could be {1 - 0.5 ** (clips - 1):.0%} of the time at best."
        )
    if any(row.over_convolutions for row in section.rows):
        lines[0] += " Convolutions, with their number: residual_convolutions of as many parameters, within 5 %."
    for backbone, verdict in section.verdicts.items():
        leader, rival, lead = verdict.leader.number, verdict.rival.number, gain_text(verdict.lead)
        if verdict.sure:
            lines.append(f"{backbone}: #{leader} is best; of the others #{rival} comes closest, {lead} dB behind it.")
        elif verdict.lead.mean <= 0:
            lines.append(
                f"{backbone}: no row is best. #{leader} has the highest mean, but {lead} dB over the seeds that "
                f"#{rival} has, too."
            )
        else:
            why = "the interval has zero in it" if verdict.lead.interval else "there is no interval"
            lines.append(f"{backbone}: no row is best. #{leader} is ahead of #{rival} by {lead} dB, but {why}.")
    for row in section.rows:
        if row.control_differs:
            settings = ", ".join(row.control_differs[:4]) + (" ..." if len(row.control_differs) > 4 else "")
            lines.append(f"#{row.number} has no control: the run without plug-ins differs in {settings}.")
    return lines + [f"Missing in #{row.number}: {missing(row)}." for row in section.rows if missing(row)]


def missing(row: Row) -> str:
    """`seed 1 failed (the error), seed 2 not started`; nothing where all is done."""
    jobs = [job for job in row.jobs if job.figures is None]
    seeds = ["" if job.seed is None else f"seed {job.seed} " for job in jobs]
    reasons = [f" ({one_line(job.error)})" if job.error else "" for job in jobs]
    return ", ".join(f"{s}{job.state}{reason}" for s, job, reason in zip(seeds, jobs, reasons, strict=True))


def counts(jobs: Iterable[Job]) -> str:
    """`10 of 12 jobs are done, 1 failed, 1 not started`."""
    states = [job.state for job in jobs]
    others = [f"{states.count(s)} {s}" for s in dict.fromkeys(states) if s != "done"]
    return ", ".join([f"{states.count('done')} of {len(states)} jobs are done", *others])


def one_line(text: str) -> str:
    """Without line breaks."""
    return " ".join(text.split())


def _extra(key: str, row: Row) -> str:
    return row.extra.get(key, NONE)


def _seeds(row: Row) -> str:
    done, asked = len(row.figures), len(row.jobs)
    return str(done) if done == asked else f"{done} of {asked}"


def _spread(mean: float | None, deviation: float | None, digits: int) -> str:
    if mean is None:
        return NONE
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _mean(values: list[float | None], style: str) -> str:
    known = [value for value in values if value is not None]
    return format(fmean(known), style) if known else NONE
