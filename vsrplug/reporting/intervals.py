"""How sure a difference between two networks is, measured on the same clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

import numpy as np
from scipy import stats

BATCH = 1_000_000  # numbers drawn at once


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Args:
        confidence: of the interval, between 0 and 1.
        resamples: sets of clips that are drawn.
        seed: of the drawing; one seed gives one interval.

    Raises:
        ValueError: a confidence or a number of resamples that is none.
    """

    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence} must lie between 0 and 1, such as 0.95")
        if self.resamples < 100:
            raise ValueError(f"resamples={self.resamples} are too few for an interval; give at least 100")

    def interval(self, differences: Sequence[float]) -> tuple[float, float] | None:
        """Interval of the mean over clips of paired differences, by the expanded percentile bootstrap.

        Clips are drawn with replacement. The plain percentile interval is too narrow for few clips, by
        sqrt((n - 1) / n) and by a normal quantile where Student's belongs; its level is raised to make up for both
        (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.3). What the training owes to its
        seed is not in it.

        Args:
            differences: one a clip.

        Returns:
            Lower and upper end; None for fewer than two clips.
        """
        values = np.asarray(differences, dtype=np.float64)
        n = len(values)
        if n < 2:
            return None
        quantile = stats.t.ppf((1 + self.confidence) / 2, n - 1) * np.sqrt(n / (n - 1))
        found = stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=1 - 2 * stats.norm.sf(quantile),
            n_resamples=self.resamples,
            method="percentile",
            rng=np.random.default_rng(self.seed),
            batch=max(1, BATCH // n),
        ).confidence_interval
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Gain:
    """A difference in PSNR, dB.

    Args:
        mean: over clips and seeds.
        clips: clip -> difference, mean over seeds; empty where only means are known.
        interval: its ends; None where there is none.
        against: the number of the row it is measured against; None for the backbone before.
    """

    mean: float
    clips: Mapping[str, float]
    interval: tuple[float, float] | None
    against: int | None = None

    @property
    def sure(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def paired(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], how: Resampling) -> Gain | None:
    """The first of each pair less the second, clip by clip, then the mean over pairs.

    Args:
        pairs: clip -> PSNR of both, one pair a seed.
        how: makes the interval.

    Returns:
        None without pairs, for pairs that were not measured on the same clips, and where a PSNR is infinite.
    """
    if not pairs or any(set(one) != set(pairs[0][0]) for pair in pairs for one in pair):
        return None
    if not all(isfinite(value) for pair in pairs for one in pair for value in one.values()):
        return None
    clips = {clip: fmean(first[clip] - second[clip] for first, second in pairs) for clip in pairs[0][0]}
    return Gain(fmean(clips.values()), clips, how.interval(list(clips.values())))
