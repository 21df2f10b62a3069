"""What a row is compared with: the backbone before, tuning without plug-ins, plain convolutions, and other rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import inf, isclose, isfinite
from statistics import fmean

from .intervals import Gain, Resampling, paired
from .rows import Row, Verdict

WITH_PLUGINS = ("plugins", "masks", "datamodule.masks", "losses.weights")  # settings that come and go with plug-ins

CONVOLUTIONS = "residual_convolutions"
AS_MANY = 0.05  # parameters that differ by less than this share count as equal


def over_backbone(row: Row, rows: list[Row], how: Resampling) -> Gain | None:
    """Over what each job measured before it trained.

    Where that was written down without its clips, the clips are those of a row of the frozen backbone with that very
    PSNR.
    """
    before = [figures.backbone_psnr for figures in row.figures]
    known = [psnr for psnr in before if psnr is not None]
    if not known or len(known) < len(before):
        return None
    frozen = [f for other in rows if other.job.plugins == "none" and not other.trained for f in other.figures]
    pairs = []
    for figures, psnr in zip(row.figures, known, strict=True):
        same = (one.clips for one in frozen if isclose(one.psnr, psnr, rel_tol=0, abs_tol=1e-6))
        clips = figures.backbone_clips or next(same, None)
        if clips is not None:
            pairs.append((figures.clips, clips))
    gain = paired(pairs, how) if len(pairs) == len(known) else None
    mean = fmean(f.psnr for f in row.figures) - fmean(known)
    return gain or (Gain(mean, {}, None) if isfinite(mean) else None)


def over_control(row: Row, rows: list[Row], how: Resampling) -> tuple[Gain | None, list[str]]:
    """Over the same backbone and tuning without plug-ins, or `tuning=full` where that tuning trains plug-ins alone.

    Returns:
        The gain; and, where there is none, the settings in which the nearest run without plug-ins differs.
    """
    if row.job.plugins == "none" or not row.job.known or not row.figures:
        return None, []
    plain = [other for other in rows if other.job.plugins == "none" and other.job.backbone == row.job.backbone]
    alike = [other for other in plain if other.job.tuning == row.job.tuning]
    ignored: tuple[str, ...] = WITH_PLUGINS
    if row.job.tuning == "plugins_only" or (
        alike and all(other.figures for other in alike) and not any(other.trained for other in alike)
    ):
        alike = [other for other in plain if other.job.tuning == "full"]
        ignored = (*WITH_PLUGINS, "tuning")
    differing = {other.number: _differing(row, other, ignored) for other in alike if other.trained and other.job.known}
    if not differing:
        return None, []
    others = {other.number: len(_differing(row, other, ("plugins", "tuning"))) for other in alike}
    nearest = min(differing, key=lambda number: (len(differing[number]), others[number]))
    if differing[nearest]:
        return None, differing[nearest]
    gain = between(row, next(other for other in alike if other.number == nearest), how)
    return (None if gain is None else replace(gain, against=nearest)), []


def over_convolutions(row: Row, rows: list[Row], how: Resampling) -> Gain | None:
    """Over plain convolutions of as many parameters, trained in the same way; only where plug-ins alone learn.

    Of several such rows it is the one whose number of parameters is nearest. Whether they stand at the same sites is
    not looked at.
    """
    if not row.job.known or not row.figures or row.job.tuning != "plugins_only" or row.job.plugins == CONVOLUTIONS:
        return None
    count = row.figures[0].trainable
    off = {
        other.number: abs(other.figures[0].trainable - count)
        for other in rows
        if other.job.plugins == CONVOLUTIONS and other.figures and other.job.known
        if other.job.backbone == row.job.backbone and not _differing(row, other, WITH_PLUGINS)
    }
    nearest = min(off, key=lambda number: off[number], default=None)
    if nearest is None or off[nearest] > AS_MANY * count:
        return None
    gain = between(row, next(other for other in rows if other.number == nearest), how)
    return gain and replace(gain, against=nearest)


def _differing(row: Row, other: Row, ignored: tuple[str, ...]) -> list[str]:
    """Settings that differ, but for those under the keys `ignored`."""
    one, two = row.job.settings, other.job.settings
    return [
        key
        for key in dict.fromkeys([*one, *two])
        if one.get(key) != two.get(key) and not any(key == part or key.startswith(f"{part}.") for part in ignored)
    ]


def between(row: Row, other: Row, how: Resampling) -> Gain | None:
    """Paired by the seeds that both have; where they share none, every seed with every other."""
    one, two = ({job.seed: job.figures.clips for job in r.jobs if job.figures} for r in (row, other))
    common = [(one[seed], two[seed]) for seed in one if seed in two]
    return paired(common or list(product(one.values(), two.values())), how)


def verdicts(rows: list[Row], how: Resampling) -> Iterator[tuple[str, Verdict]]:
    """Backbone -> the row with the highest PSNR, and the other row over which its lead is least sure."""
    for backbone in dict.fromkeys(row.job.backbone for row in rows):
        ranked = sorted(
            (row for row in rows if row.job.backbone == backbone and row.psnr is not None),
            key=lambda row: -(row.psnr or 0),
        )
        leads = []
        for other in ranked[1:]:
            lead = between(ranked[0], other, how) or Gain((ranked[0].psnr or 0) - (other.psnr or 0), {}, None)
            leads.append(Verdict(ranked[0], other, lead))
        if leads:
            yield backbone, min(leads, key=lambda verdict: verdict.lead.interval or (-inf, -inf))
