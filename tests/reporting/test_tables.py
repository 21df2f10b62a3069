"""The table in its four forms, read back."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from vsrplug.reporting import Resampling, Section, csv_table, latex, markdown, read_jobs, rich_table, sections
from vsrplug.reporting.columns import columns, counts, notes

from .conftest import Leave

BASE = {"a": 20.0, "b": 30.0, "c": 25.0}


@pytest.fixture
def section(leave: Leave, tmp_path: Path) -> Section:
    """A frozen row, a control, the best row with two of three seeds, and a row of which there is nothing."""
    leave(BASE, tuning="plugins_only", trainable=0)
    leave({k: v + 0.2 for k, v in BASE.items()}, before=BASE, trainable=90_000)
    for seed, by in enumerate((0.5, 0.6)):
        psnr = {k: v + by for k, v in BASE.items()}
        more = {"gflop": 12.345, "training_seconds": 60.0 + seed}
        leave(psnr, plugins="[seem,bank]", seed=seed, before=BASE, trainable=12_345, more=more)
    failed = leave(None, plugins="[seem,bank]", seed=2)
    (failed / "failed.json").write_text(json.dumps({"error": "NaN | in\nstep 3", "traceback": "", "choices": {}}))
    leave(None, plugins="bank_v2", tuning="lora_50%")
    (found,), _ = sections(read_jobs(tmp_path), Resampling(resamples=500))
    return found


def test_csv_has_the_figures_unrounded(section: Section) -> None:
    frozen, control, best, empty = csv.DictReader(io.StringIO(csv_table([section])))
    assert [row["tuning"] for row in (frozen, control, best, empty)] == ["plugins_only", "full", "full", "lora_50%"]
    assert float(best["psnr"]) == section.rows[2].psnr
    assert float(best["psnr_deviation"]) == pytest.approx(0.1 / 2**0.5)
    assert float(best["over_backbone"]) == pytest.approx(0.55)
    assert float(best["over_backbone_low"]) == pytest.approx(0.55)
    assert (float(best["over_control"]), best["control"]) == (pytest.approx(0.3), control["number"])
    assert [best[key] for key in ("seeds_done", "seeds", "trainable", "parameters")] == ["2", "3", "12345", "50000"]
    assert [best[key] for key in ("gflop", "training_seconds")] == ["12.345", "60.5"]
    assert best["missing"] == "seed 2 failed (NaN | in step 3)"
    assert [row["best"] for row in (frozen, control, best, empty)] == ["0", "0", "1", "0"]
    assert (empty["psnr"], empty["over_control"], empty["missing"]) == ("", "", "seed 0 not finished")


def test_markdown_is_one_table_with_its_protocol_and_notes(section: Section) -> None:
    lines = markdown([section]).splitlines()
    assert lines[0] == r"## vid4\_bi\_y"
    header, ruler, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    assert [cell.strip() for cell in header][:6] == ["#", "backbone", "plug-ins", "tuning", "seeds", "PSNR dB"]
    assert {cell.strip() for cell in ruler} == {"---", "---:"}
    assert {len(row) for row in [header, ruler, *rows]} == {len(header)}
    assert [row[header.index(" seeds ")].strip() for row in rows] == ["1", "1", "2 of 3", "0 of 1"]
    assert rows[2][header.index(" PSNR dB ")] == " **25.550 ± 0.071** "
    assert rows[2][header.index(" over control, dB ")] == r" +0.300 \[+0.300, +0.300\] (#2) "
    assert r"- Missing in #3: seed 2 failed (NaN \| in step 3)." in lines
    assert "- Missing in #4: seed 0 not finished." in lines


def test_columns_without_figures_are_left_out(leave: Leave, tmp_path: Path) -> None:
    leave(BASE)
    (found,), _ = sections(read_jobs(tmp_path), Resampling())
    titles = [column.title for column in columns(found)]
    assert titles == ["#", "backbone", "plug-ins", "tuning", "seeds", "PSNR dB", "SSIM", "trained"]


def test_latex_has_nothing_that_latex_would_take_for_a_command(section: Section) -> None:
    text = latex([section])
    assert r"\caption{Protocol vid4\_bi\_y.}" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line]
    spec = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert spec
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(spec[1])}
    assert all(row.endswith(r" \\") for row in rows)
    assert r"\textbf{25.550 $\pm$ 0.071}" in rows[2]
    assert r"$+$0.300 [$+$0.300, $+$0.300] (\#2)" in rows[2]
    assert r"lora\_50\%" in rows[3]
    assert not re.findall(r"(?<!\\)[%#_&^~](?![ ])", body)
    after = text.split(r"\end{table}")[1].strip().splitlines()
    assert len(after) == len(notes(section))
    assert all(line.startswith("% ") for line in after)  # an error of several lines stays one comment


def test_latex_escapes_a_backslash_once(leave: Leave, tmp_path: Path) -> None:
    leave(BASE, plugins="a\\b{c}^~")
    (found,), _ = sections(read_jobs(tmp_path), Resampling())
    assert r"a\textbackslash{}b\{c\}\textasciicircum{}\textasciitilde{}" in latex([found])


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_shows_every_row_whole(section: Section, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(rich_table(section))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for word in ("25.550 ± 0.071", "2 of 3", "12,345", "[+0.300,", "(#2)", "plugins_only", "bank_v2"):
        assert word in text
    assert "…" not in text


def test_notes_say_which_row_is_best_and_how_sure(section: Section) -> None:
    first, verdict, *_ = notes(section)
    assert "95 % interval" in first
    assert verdict == "edvr: #3 is best; of the others #2 comes closest, +0.300 [+0.300, +0.300] dB behind it."


def test_notes_say_why_no_row_is_best(leave: Leave, tmp_path: Path) -> None:
    leave({"a": 20.0, "b": 30.0})
    leave({"a": 20.4, "b": 29.8}, plugins="seem", config={"trainer": {"max_steps": 5}})
    leave({"a": 20.0}, backbone="one", name="x")
    leave({"a": 21.0}, backbone="one", plugins="seem", name="y")
    (found,), _ = sections(read_jobs(tmp_path), Resampling(resamples=500))
    lines = notes(found)
    assert lines[1] == (
        "edvr: no row is best. #2 is ahead of #1 by +0.100 [-0.200, +0.400] dB, but the interval has zero in it."
    )
    assert lines[2] == "one: no row is best. #4 is ahead of #3 by +1.000 dB, but there is no interval."
    assert lines[3] == "#2 has no control: the run without plug-ins differs in trainer.max_steps."


def test_counts(section: Section) -> None:
    jobs = [job for row in section.rows for job in row.jobs]
    assert counts(jobs) == "4 of 6 jobs are done, 1 failed, 1 not finished"
    assert counts(jobs[:2]) == "2 of 2 jobs are done"
