"""Intervals against all resamples there are, Student, and the rate at which they hold the truth."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from vsrplug.reporting.intervals import Gain, Resampling, paired

SIX = [0.31, 0.02, 0.17, -0.08, 0.44, 0.21]


def test_the_interval_is_a_quantile_of_all_resamples_there_are() -> None:
    """Six clips have 6^6 resamples, few enough to list; the level is that of Hesterberg's correction."""
    means = np.mean(list(product(SIX, repeat=6)), axis=1)
    tail = stats.norm.cdf(-np.sqrt(6 / 5) * stats.t.ppf(0.975, 5))
    assert tail == pytest.approx(0.00243, abs=1e-5)
    found = Resampling(resamples=50_000).interval(SIX)
    assert found == pytest.approx((np.quantile(means, tail), np.quantile(means, 1 - tail)), abs=0.006)


def test_of_two_or_three_clips_it_is_their_spread() -> None:
    assert Resampling().interval([0.1, 0.4]) == pytest.approx((0.1, 0.4))
    assert Resampling().interval([0.1, 0.4, -0.2]) == pytest.approx((-0.2, 0.4))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_of_many_clips_it_is_the_normal_approximation(confidence: float) -> None:
    values = np.random.default_rng(1).exponential(0.1, 500)
    half = stats.norm.ppf((1 + confidence) / 2) * values.std(ddof=1) / np.sqrt(len(values))
    low, high = Resampling(confidence).interval(list(values)) or (0, 0)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_it_holds_the_truth_as_often_as_it_says_where_the_plain_percentile_does_not() -> None:
    """Eight clips; 300 worlds whose mean difference is 0.1."""
    rng, held, plain = np.random.default_rng(0), 0, 0
    for world in rng.normal(0.1, 0.2, (300, 8)):
        low, high = Resampling(resamples=1000).interval(list(world)) or (0, 0)
        held += low <= 0.1 <= high
        drawn = world[rng.integers(8, size=(1000, 8))].mean(1)
        plain += np.quantile(drawn, 0.025) <= 0.1 <= np.quantile(drawn, 0.975)
    assert 0.92 < held / 300 < 0.98
    assert plain / 300 < 0.92


def test_one_seed_gives_one_interval() -> None:
    first = Resampling(seed=3).interval(SIX)
    assert first == Resampling(seed=3).interval(SIX)
    assert first != Resampling(seed=4).interval(SIX)


def test_one_clip_has_no_interval_and_equal_frames_no_difference() -> None:
    assert Resampling().interval([0.1]) is None
    infinite = {"a": float("inf"), "b": 30.0}
    assert paired([(infinite, {"a": 20.0, "b": 20.0})], Resampling()) is None
    assert paired([(infinite, infinite)], Resampling()) is None


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match=f"^confidence={confidence} must lie between 0 and 1, such as 0.95$"):
        Resampling(confidence)


def test_too_few_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^resamples=99 are too few for an interval; give at least 100$"):
        Resampling(resamples=99)


def test_differences_are_those_of_the_same_clip() -> None:
    """Clips differ by 10 dB, networks by a tenth: unpaired, nothing could be said."""
    first, second = {"a": 20.1, "b": 30.2, "c": 25.3}, {"c": 25.0, "b": 30.0, "a": 20.0}
    gain = paired([(first, second)], Resampling())
    assert gain is not None
    assert gain.clips == pytest.approx({"a": 0.1, "b": 0.2, "c": 0.3})
    assert gain.mean == pytest.approx(0.2)
    assert gain.interval == pytest.approx((0.1, 0.3))
    assert gain.sure
    later = {clip: value - 0.4 for clip, value in first.items()}
    both = paired([(first, second), (later, second)], Resampling())
    assert both is not None
    assert both.clips == pytest.approx({"a": -0.1, "b": 0.0, "c": 0.1})
    assert not both.sure


def test_other_clips_are_not_compared() -> None:
    assert paired([], Resampling()) is None
    assert paired([({"a": 1.0, "b": 1.0}, {"a": 1.0})], Resampling()) is None
    assert paired([({"a": 1.0}, {"a": 1.0}), ({"b": 1.0}, {"b": 1.0})], Resampling()) is None


def test_a_difference_is_sure_on_either_side_of_zero() -> None:
    assert Gain(-0.2, {}, (-0.3, -0.1)).sure
    assert not Gain(0.2, {}, (0.0, 0.4)).sure
    assert not Gain(0.2, {}, None).sure
