"""Rows, deviations, gains, controls and the mark of the best, on figures whose results are known."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import stdev

import pytest

from vsrplug.reporting import Resampling, Row, Section, read_jobs, sections
from vsrplug.reporting.columns import notes

from .conftest import Leave, multirun

BASE = {"a": 20.0, "b": 30.0, "c": 25.0, "d": 24.0}
HOW = Resampling(resamples=1000)


def better(by: float, spread: float = 0.0) -> dict[str, float]:
    """Every clip better by that much, but for a spread whose mean is zero."""
    return {clip: value + by + spread * sign for (clip, value), sign in zip(BASE.items(), (1, -1, 1, -1), strict=True)}


def one(folder: Path) -> Section:
    (section,), _ = sections(read_jobs(folder), HOW)
    return section


def row_of(section: Section, plugins: str, tuning: str = "full") -> Row:
    (row,) = [row for row in section.rows if (row.job.plugins, row.job.tuning) == (plugins, tuning)]
    return row


def test_mean_and_deviation_are_over_seeds(leave: Leave, tmp_path: Path) -> None:
    for seed, by in enumerate((0.1, 0.2, 0.6)):
        leave(better(by), plugins="seem", seed=seed)
    (row,) = one(tmp_path).rows
    assert row.psnr == pytest.approx(24.75 + 0.3)
    assert row.deviations == pytest.approx((stdev((0.1, 0.2, 0.6)), 0.0))


def test_what_did_not_learn_and_a_single_seed_have_no_deviation(leave: Leave, tmp_path: Path) -> None:
    leave(BASE, tuning="plugins_only", trainable=0, seed=0)
    leave(BASE, tuning="plugins_only", trainable=0, seed=1)
    leave(BASE, plugins="seem")
    assert [row.deviations for row in one(tmp_path).rows] == [None, None]


def test_runs_that_differ_in_any_setting_are_not_averaged(leave: Leave, tmp_path: Path) -> None:
    leave(better(0.1), plugins="seem", seed=0)
    leave(better(0.3), plugins="seem", seed=1, config={"trainer": {"max_steps": 3000}})
    leave(better(0.5), plugins="seem", seed=2, config={"paths": {"data": "elsewhere"}})
    rows = one(tmp_path).rows
    assert [(row.extra, [job.seed for job in row.jobs]) for row in rows] == [
        ({"trainer.max_steps": "300"}, [0, 2]),
        ({"trainer.max_steps": "3000"}, [1]),
    ]


def test_a_choice_stands_for_its_settings(leave: Leave, tmp_path: Path) -> None:
    """Only what the word does not tell needs a column."""
    for word, count in (("grid", 16), ("superpixels", 64), ("superpixels", 8)):
        config = {"masks": {"_target_": word, "count": count}}
        leave(BASE, plugins="seem", masks=word, config=config, name=f"{word}{count}")
    assert [row.extra for row in one(tmp_path).rows] == [
        {"masks": "grid"},
        {"masks": "superpixels", "masks.count": "8"},
        {"masks": "superpixels", "masks.count": "64"},
    ]


def test_protocols_are_sections_also_under_one_name(leave: Leave, tmp_path: Path) -> None:
    leave(BASE, protocol="vid4_bi_y", name="a")
    leave(BASE, protocol="vid4_bi_y", config={"protocol": {"border": 8}}, name="b")
    leave(BASE, protocol="demo_bi_y", name="c")
    found, _ = sections(read_jobs(tmp_path), HOW)
    titles = ["demo_bi_y", "vid4_bi_y protocol.border=0", "vid4_bi_y protocol.border=8"]
    assert [section.title for section in found] == titles
    assert [row.number for section in found for row in section.rows] == [1, 2, 3]


def test_a_job_not_begun_stands_in_the_table_of_its_protocol(leave: Leave, tmp_path: Path) -> None:
    multirun(tmp_path, "plugins=none,seem", "+seem.width=8", "seed=0")
    leave(BASE, plugins="bank")
    (section,), _ = sections(read_jobs(tmp_path), HOW)
    assert section.title == "vid4_bi_y"
    assert [(row.title, row.job.state) for row in section.rows] == [
        ("edvr, none, full, seem.width=8", "not started"),
        ("edvr, bank, full", "done"),
        ("edvr, seem, full, seem.width=8", "not started"),
    ]


def test_gain_over_the_backbone_is_that_of_each_job(leave: Leave, tmp_path: Path) -> None:
    """An untrained backbone is another one for every seed."""
    leave(better(0.5, 0.2), plugins="seem", seed=0, before=better(0.4))
    leave(better(0.3, 0.2), plugins="seem", seed=1, before=BASE)
    gain = one(tmp_path).rows[0].over_backbone
    assert gain is not None
    assert gain.mean == pytest.approx(0.2)
    assert gain.clips == pytest.approx({"a": 0.4, "b": 0.0, "c": 0.4, "d": 0.0})
    assert gain.interval == pytest.approx((0.0, 0.4))


def test_gain_over_the_backbone_takes_clips_from_its_own_row(leave: Leave, tmp_path: Path) -> None:
    leave(better(0.3, 0.1), plugins="seem", before=24.75)
    leave(better(0.3, 0.1), plugins="seem", backbone="other", before=24.5)  # of which there is no row
    leave(BASE, tuning="plugins_only", trainable=0, name="frozen")
    rows = {row.job.backbone: row for row in one(tmp_path).rows if row.job.plugins == "seem"}
    gain, alone = rows["edvr"].over_backbone, rows["other"].over_backbone
    assert gain is not None
    assert alone is not None
    assert gain.clips == pytest.approx({"a": 0.4, "b": 0.2, "c": 0.4, "d": 0.2})
    assert gain.sure
    assert alone.mean == pytest.approx(0.55)
    assert (alone.clips, alone.interval) == ({}, None)


def test_the_control_is_the_same_tuning_without_plugins(leave: Leave, tmp_path: Path) -> None:
    """Table 5 of SEEM: what is left when further training is taken off."""
    leave(better(0.3), tuning="full", seed=0)
    leave(better(0.9), tuning="lora", seed=0)
    masks = {"masks": {"count": 64}, "losses": {"weights": {"seem/x": 1}}}
    leave(better(0.5), plugins="seem", tuning="full", seed=0, masks="superpixels", config=masks)
    section = one(tmp_path)
    gain = row_of(section, "seem").over_control
    assert gain is not None
    assert gain.mean == pytest.approx(0.2)
    assert gain.against == row_of(section, "none").number
    assert row_of(section, "none").over_control is None


def test_the_control_of_plugins_alone_is_full_fine_tuning(leave: Leave, tmp_path: Path) -> None:
    leave(BASE, tuning="plugins_only", trainable=0)
    leave(better(0.3), tuning="full")
    leave(better(0.2), plugins="seem", tuning="plugins_only")
    section = one(tmp_path)
    gain = row_of(section, "seem", "plugins_only").over_control
    assert gain is not None
    assert gain.mean == pytest.approx(-0.1)
    assert gain.against == row_of(section, "none").number


def test_a_run_with_other_settings_is_no_control(leave: Leave, tmp_path: Path) -> None:
    leave(better(0.3), config={"trainer": {"max_steps": 9}, "optim": {"lr": 1}})
    leave(better(0.5), plugins="seem", config={"optim": {"lr": 2}})
    row = row_of(one(tmp_path), "seem")
    assert row.over_control is None
    assert row.control_differs == ["trainer.max_steps", "optim.lr"]


def test_seeds_that_both_have_are_paired(leave: Leave, tmp_path: Path) -> None:
    for seed, by in ((0, 0.0), (1, 1.0), (2, 5.0)):
        leave(better(by), seed=seed)
    for seed, by in ((0, 0.2), (1, 1.2), (7, -9.0)):
        leave(better(by), plugins="seem", seed=seed)
    leave(better(2.5), plugins="bank", seed=8)
    section = one(tmp_path)
    seem, bank = row_of(section, "seem").over_control, row_of(section, "bank").over_control
    assert seem is not None
    assert bank is not None
    assert seem.mean == pytest.approx(0.2)
    assert bank.mean == pytest.approx(0.5)  # no seed in common: means of both


def test_the_best_is_marked_where_every_lead_is_sure(leave: Leave, tmp_path: Path) -> None:
    leave(BASE, backbone="edvr")
    leave(better(0.5, 0.1), backbone="edvr", plugins="seem")
    leave(better(0.3, 0.6), backbone="edvr", plugins="worse")
    leave(better(0.2), backbone="edvr", plugins="[a,b]")
    section = one(tmp_path)
    verdict = section.verdicts["edvr"]
    assert (verdict.leader.job.plugins, verdict.rival.job.plugins, verdict.sure) == ("seem", "worse", False)
    assert not any(section.is_best(row) for row in section.rows)


def test_the_best_of_each_backbone(leave: Leave, tmp_path: Path) -> None:
    leave(BASE, backbone="edvr")
    leave(better(0.5, 0.1), backbone="edvr", plugins="seem")
    leave(better(9.0), backbone="basicvsr", plugins="seem")
    leave(better(9.0, 0.1), backbone="basicvsr")
    leave(better(99.0), backbone="alone")
    section = one(tmp_path)
    assert [row.title for row in section.rows if section.is_best(row)] == ["edvr, seem, full"]
    assert set(section.verdicts) == {"edvr", "basicvsr"}


def test_one_clip_and_other_clips_settle_nothing(leave: Leave, tmp_path: Path) -> None:
    leave({"a": 20.0})
    leave({"a": 25.0}, plugins="seem")
    assert not one(tmp_path).verdicts["edvr"].sure
    leave({"b": 21.0}, plugins="bank")
    assert one(tmp_path).verdicts["edvr"].lead.interval is None


def test_a_job_that_was_run_again_counts_once(leave: Leave, tmp_path: Path) -> None:
    old = leave(better(0.1), plugins="seem", name="old")
    os.utime(old / "metrics.json", (1, 1))
    leave(better(0.2), plugins="seem", name="new")
    leave(None, plugins="seem", name="begun anew")
    (section,), left = sections(read_jobs(tmp_path), HOW)
    assert section.rows[0].psnr == pytest.approx(24.95)
    assert [job.name for job in left] == ["old", "begun anew"]


def test_a_row_without_figures_has_no_numbers(leave: Leave, tmp_path: Path) -> None:
    leave(None, plugins="seem")
    leave(BASE)
    row = row_of(one(tmp_path), "seem")
    assert (row.psnr, row.ssim, row.deviations, row.over_backbone, row.over_control) == (None,) * 5


def test_rows_come_frozen_first_then_without_plugins(leave: Leave, tmp_path: Path) -> None:
    for plugins, tuning in (("bank", "full"), ("none", "full"), ("none", "plugins_only"), ("bank", "plugins_only")):
        leave(BASE, plugins=plugins, tuning=tuning)
    assert [row.title for row in one(tmp_path).rows] == [
        "edvr, none, plugins_only", "edvr, none, full", "edvr, bank, full", "edvr, bank, plugins_only",
    ]  # fmt: skip


def test_plain_convolutions_are_those_with_as_many_parameters(leave: Leave, tmp_path: Path) -> None:
    alone = {"tuning": "plugins_only"}
    leave(better(0.5, 0.1), plugins="seem", trainable=1000, **alone)
    leave(better(0.5), plugins="bank", trainable=2000, **alone)  # there are none of its size
    leave(better(0.5), plugins="efst", trainable=1010)  # of the whole backbone, so that the number says little
    convolutions = {"plugins": "residual_convolutions", **alone}
    for count, by, steps in ((1040, 0.1, 300), (970, 0.2, 300), (1000, 0.3, 9), (1060, 0.4, 300)):
        config = {"plugins": {"residual_convolutions": {"width": count}}, "trainer": {"max_steps": steps}}
        leave(better(by), trainable=count, config=config, name=f"c{count}", **convolutions)
    section = one(tmp_path)
    gain = row_of(section, "seem", "plugins_only").over_convolutions
    assert gain is not None
    assert gain.clips == pytest.approx({"a": 0.4, "b": 0.2, "c": 0.4, "d": 0.2})  # those of 970 parameters
    assert section.rows[gain.against - 1 if gain.against else 0].figures[0].trainable == 970
    others = [row for row in section.rows if row.job.plugins != "seem"]
    assert [row.over_convolutions for row in others] == [None] * 6


def test_a_control_that_is_not_done_is_not_replaced(leave: Leave, tmp_path: Path) -> None:
    leave(BASE, tuning="full")
    leave(None, tuning="lora")
    leave(better(0.4), plugins="seem", tuning="lora")
    assert row_of(one(tmp_path), "seem", "lora").over_control is None


def test_of_controls_that_would_do_it_is_the_one_with_the_same_weights(leave: Leave, tmp_path: Path) -> None:
    for weight, by in ((0.1, 0.0), (1.0, 1.0)):
        config = {"losses": {"weights": {"pixel": weight}}}
        leave(better(by), config=config, name=f"none{weight}")
        leave(better(by + 0.2), plugins="efst", config=config, name=f"efst{weight}")
    gains = [row.over_control for row in one(tmp_path).rows if row.job.plugins == "efst"]
    assert [gain and gain.mean for gain in gains] == pytest.approx([0.2, 0.2])


def test_an_infinite_psnr_has_no_difference_and_no_deviation(leave: Leave, tmp_path: Path) -> None:
    """A black clip, restored exactly."""
    black, grey = BASE | {"a": float("inf")}, BASE
    for seed, (plain, with_seem) in enumerate(((black, grey), (grey, black))):
        leave(plain, seed=seed)
        leave(with_seem, plugins="seem", seed=seed)
    row = row_of(one(tmp_path), "seem")
    assert (row.over_control, row.deviations) == (None, None)


def test_the_verdict_holds_over_the_seeds_that_both_have(leave: Leave, tmp_path: Path) -> None:
    leave(better(5.0), seed=0)
    leave(better(-9.0), seed=1)
    leave(better(4.0), plugins="efst", seed=0)
    verdict = notes(one(tmp_path))[1]
    assert verdict == (
        "edvr: no row is best. #2 has the highest mean, but -1.000 [-1.000, -1.000] dB over the seeds that #1 has, too."
    )
