"""Jobs put in order: one section a protocol, one row a combination, and what each row is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .comparisons import over_backbone, over_control, over_convolutions, verdicts
from .intervals import Resampling
from .jobs import STATES, Job
from .rows import Row, Section


def sections(jobs: Iterable[Job], how: Resampling) -> tuple[list[Section], list[Job]]:
    """Rows and comparisons.

    A job of which there is another with the same combination and seed does not count: what is done goes before what is
    not, and what is later before what is earlier.

    Args:
        jobs: what `read_jobs` found.
        how: makes the intervals.

    Returns:
        The sections, and the jobs that do not count.
    """
    groups: dict[tuple[object, ...], list[Job]] = {}
    left: list[Job] = []
    for job in jobs:
        groups.setdefault((job.label, job.known, *sorted(job.settings.items())), []).append(job)
    by_protocol: dict[tuple[object, ...], list[list[Job]]] = {}
    for group in sorted(groups.values(), key=lambda one: not one[0].known):
        seeds: dict[int | None, Job] = {}
        for job in sorted(group, key=lambda one: (STATES.index(one.state), -one.when)):
            if seeds.setdefault(job.seed, job) is not job:
                left.append(job)
        kept = sorted(seeds.values(), key=lambda one: (one.seed is None, one.seed))
        key: tuple[object, ...] = (group[0].protocol, *_protocol(group[0]).items())
        if not group[0].known:  # of the protocol it has no more than the name
            key = next((other for other in by_protocol if other[0] == group[0].protocol), key)
        by_protocol.setdefault(key, []).append(kept)
    found = []
    for rows_of_jobs in by_protocol.values():
        rows = [Row(0, kept) for kept in sorted(rows_of_jobs, key=_order)]
        found.append(Section(rows[0].job.protocol, {}, rows, how))
    found.sort(key=lambda section: section.protocol)
    for number, row in enumerate((row for section in found for row in section.rows), 1):
        row.number = number
    for section in found:
        _tell_apart(section, [other for other in found if other.protocol == section.protocol])
        for row in section.rows:
            row.over_backbone = over_backbone(row, section.rows, how)
            row.over_convolutions = over_convolutions(row, section.rows, how)
            row.over_control, row.control_differs = over_control(row, section.rows, how)
        section.verdicts = dict(verdicts(section.rows, how))
    return found, left


def _order(jobs: list[Job]) -> Any:
    job = jobs[0]
    plain = job.plugins == "none"
    frozen = plain and job.tuning in ("plugins_only", "-")
    settings = sorted(job.settings.items())
    return job.backbone, not plain, not frozen, job.tuning, job.plugins, [_natural(f"{k}={v}") for k, v in settings]


def _natural(text: str) -> list[str | int]:
    """8 before 64."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text))]


def _protocol(job: Job) -> dict[str, str]:
    return {key: value for key, value in job.settings.items() if key.startswith("protocol.")}


def _tell_apart(section: Section, same_name: list[Section]) -> None:
    """Find the settings that differ where the words are the same: of protocols, and of rows."""
    protocols = [next((_protocol(row.job) for row in other.rows if row.job.known), {}) for other in same_name]
    for key, value in protocols[same_name.index(section)].items():
        if any(protocol.get(key) != value for protocol in protocols if protocol):
            section.settings[key] = value
    for row in section.rows:
        if row.job.known:
            alike = [other.job for other in section.rows if other.job.label == row.job.label and other.job.known]
            row.extra = _extra(row.job, alike)
        else:
            row.extra = dict(row.job.settings)


def _extra(job: Job, alike: list[Job]) -> dict[str, str]:
    """The words that tell a job from those with the same label; then the settings that tell it from the same words."""
    words = dict.fromkeys(group for other in alike for group in other.words)
    extra = {word: job.words.get(word, "-") for word in words if len({other.words.get(word) for other in alike}) > 1}
    keys = dict.fromkeys(key for other in alike for key in other.settings)
    for key in keys:
        group = key.split(".")[0]
        told = [other for other in alike if all(other.words.get(w) == job.words.get(w) for w in ("experiment", group))]
        if len({other.settings.get(key) for other in told}) > 1:
            extra[key] = job.settings.get(key, "-")
    return extra
