"""The page: one HTML file that asks for nothing, from nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from . import charts
from .columns import columns, counts, notes
from .jobs import Job
from .pictures import clip_pictures, sheets
from .rows import Section


def page(title: str, found: Sequence[Section], left: Sequence[Job], missing: Sequence[Job]) -> str:
    """`report.html`: tables, charts, pictures, and what failed or is missing.

    Style, script and pictures are inside; a content security policy forbids the browser to fetch anything.

    Args:
        title: what the report is about.
        found: the sections.
        left: jobs that do not count, because a later one took their place.
        missing: jobs that have no figures.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # crops have an order
    jobs = [job for section in found for row in section.rows for job in row.jobs]
    return environment.from_string(_text("page.html")).render(
        title=title,
        style=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        sections=[_section(section, i) for i, section in enumerate(found)],
        counts=counts(jobs),
        left=left,
        missing=missing,
        versions=_versions(jobs),
    )


def _section(section: Section, index: int) -> dict[str, object]:
    pictures = clip_pictures(section)
    return {
        "id": f"protocol-{index}",
        "section": section,
        "columns": columns(section),
        "notes": notes(section),
        "scatter": Markup(charts.scatter(section)),
        "legend": charts.legend(section),
        "bars": [(clip, Markup(chart)) for clip, chart in charts.bars(section)],
        "clips": max((len(row.figures[0].clips) for row in section.rows if row.figures), default=0),
        "crops": {clip: one.crops for clip, one in pictures.items() if len(one.crops) > 1},
        "maps": {clip: one.maps for clip, one in pictures.items() if one.maps},
        "sheets": sheets(section),
    }


def _versions(jobs: Sequence[Job]) -> list[tuple[str, list[str]]]:
    """Library -> the versions that jobs ran with: more than one is worth knowing."""
    versions: dict[str, dict[str, None]] = {}
    for job in jobs:
        for name, version in (job.figures.versions if job.figures else {}).items():
            versions.setdefault(name, {})[version] = None
    return [(name, list(found)) for name, found in versions.items()]


def _text(name: str) -> str:
    return files("vsrplug.reporting").joinpath(name).read_text(encoding="utf-8")
