"""A row: one combination with all its seeds. A section: the rows of one protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from statistics import fmean, stdev

from .figures import Figures
from .intervals import Gain, Resampling
from .jobs import Job


@dataclass
class Row:
    """One combination of backbone, plug-ins and tuning, with all its seeds.

    Args:
        number: in the tables and charts, from 1.
        jobs: one a seed, in the order of the seeds.
        extra: setting -> value, where other rows have the same words and another value.
        over_backbone: PSNR over that of the backbone before.
        over_control: PSNR over that of fine-tuning without plug-ins.
        over_convolutions: PSNR over that of plain convolutions of as many parameters.
        control_differs: settings in which the nearest run without plug-ins differs, where there is no control.
    """

    number: int
    jobs: list[Job]
    extra: dict[str, str] = field(default_factory=dict)
    over_backbone: Gain | None = None
    over_control: Gain | None = None
    over_convolutions: Gain | None = None
    control_differs: list[str] = field(default_factory=list)

    @property
    def job(self) -> Job:
        """Any of them, for what they have in common."""
        return next((job for job in self.jobs if job.known), self.jobs[0])

    @property
    def figures(self) -> list[Figures]:
        """Of the jobs that are done."""
        return [job.figures for job in self.jobs if job.figures is not None]

    @property
    def trained(self) -> bool:
        """Whether anything learned."""
        return any(figures.trainable for figures in self.figures)

    @property
    def psnr(self) -> float | None:
        """Mean over clips and seeds, dB; None while no seed is done."""
        return fmean(figures.psnr for figures in self.figures) if self.figures else None

    @property
    def ssim(self) -> float | None:
        """Mean over clips and seeds."""
        return fmean(figures.ssim for figures in self.figures) if self.figures else None

    @property
    def deviations(self) -> tuple[float, float] | None:
        """Standard deviations over seeds of PSNR and SSIM; None where nothing learned, of one seed, or if infinite."""
        if not self.trained or len(self.figures) < 2 or not all(isfinite(f.psnr) for f in self.figures):
            return None
        return stdev(f.psnr for f in self.figures), stdev(f.ssim for f in self.figures)

    @property
    def title(self) -> str:
        """Its words, for charts and notes."""
        words = [self.job.backbone, self.job.plugins, self.job.tuning]
        return ", ".join([*words, *(f"{key}={value}" for key, value in self.extra.items())])


@dataclass(frozen=True)
class Verdict:
    """Which row of a backbone is best, and whether that is sure.

    Args:
        leader: the row with the highest PSNR.
        rival: the row that comes closest, by the lower end of the interval of the leader's lead.
        lead: over that row.
    """

    leader: Row
    rival: Row
    lead: Gain

    @property
    def sure(self) -> bool:
        """Whether the leader is above every other row by an interval without zero."""
        return self.lead.interval is not None and self.lead.interval[0] > 0


@dataclass
class Section:
    """One protocol.

    Args:
        protocol: its name.
        settings: setting -> value of the protocol, where another section has the same name and another value.
        rows: in order: backbone, frozen before trained, without plug-ins before with.
        how: the intervals were made.
        verdicts: backbone -> which of its rows is best; none where there is nothing to compare.
    """

    protocol: str
    settings: dict[str, str]
    rows: list[Row]
    how: Resampling
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The protocol's name, and what tells it from another of that name."""
        return " ".join([self.protocol, *(f"{key}={value}" for key, value in self.settings.items())])

    @property
    def extras(self) -> list[str]:
        """Settings that need a column."""
        return list(dict.fromkeys(key for row in self.rows for key in row.extra))

    def is_best(self, row: Row) -> bool:
        """Whether a row is the best of its backbone beyond doubt."""
        return any(verdict.sure and verdict.leader is row for verdict in self.verdicts.values())
