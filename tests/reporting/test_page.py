"""The page: charts against the figures, and the whole in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from vsrplug.reporting import Resampling, Section, page, read_jobs, sections
from vsrplug.reporting.charts import SHOWN, bars, scatter
from vsrplug.reporting.pictures import clip_pictures

from .conftest import Leave, draw

BASE = {"a": 20.0, "b": 30.0, "c": 25.0}
HOW = Resampling(resamples=200)
RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)


def better(by: float) -> dict[str, float]:
    return {"a": 20.0 + by, "b": 30.0 + 2 * by, "c": 25.0 + 3 * by}


@pytest.fixture
def folder(leave: Leave, tmp_path: Path) -> Path:
    """Two networks with crops and a map, a frozen one, and a job whose error would be markup."""
    leave(BASE, tuning="plugins_only", trainable=0)
    for plugins, by, trainable, colour in (("none", 0.1, 100_000, RED), ("seem", 0.2, 1_000, GREEN)):
        job = leave(better(by), plugins=plugins, before=BASE, trainable=trainable)
        for clip in ("a", "deep/b"):
            draw(job / "pictures" / clip, "result", colour)
            draw(job / "pictures" / clip, "backbone", BLUE)
            draw(job / "pictures" / clip, "ground truth", GREY)
    draw(job / "pictures" / "a" / "maps", "attention of frame 3", BLUE)
    draw(leave(better(0.3), plugins="bank", before=BASE, trainable=10_000), "comparison", BLUE)
    failed = leave(None, plugins="efst")
    error = {"error": "<script>alert(1)</script> & more", "traceback": "File <stdin>", "choices": {}}
    (failed / "failed.json").write_text(json.dumps(error))
    return tmp_path


def found(folder: Path) -> Section:
    (section,), _ = sections(read_jobs(folder), HOW)
    return section


def written(folder: Path) -> str:
    jobs = read_jobs(folder)
    all_sections, left = sections(jobs, HOW)
    return page("my <sweep>", all_sections, left, [job for job in jobs if job.figures is None])


class Attributes(HTMLParser):
    """Every (tag, attribute, value), and the text outside style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data


def test_the_page_has_everything_inside(folder: Path) -> None:
    text = written(folder)
    parsed = Attributes(text)
    assert parsed.open == []
    addresses = [value for _, name, value in parsed.found if name in ("src", "href", "srcset", "action", "data")]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org)", text)
    (policy,) = [value for tag, name, value in parsed.found if tag == "meta" and name == "content" and "src" in value]
    assert policy.startswith("default-src 'none';")


def test_what_a_job_left_is_text_and_no_markup(folder: Path) -> None:
    text = written(folder)
    assert "<script>alert" not in text
    parsed = Attributes(text)
    for words in ("<script>alert(1)</script> & more", "File <stdin>", "my <sweep>", "4 of 5 jobs are done, 1 failed"):
        assert words in parsed.text


def test_every_control_and_picture_has_a_name(folder: Path) -> None:
    text = written(folder)
    for tag in re.findall(r"<svg[^>]*>", text):
        assert "aria-label=" in tag or "aria-hidden=" in tag
    assert all(' alt="' in tag for tag in re.findall(r"<img[^>]*>", text))
    assert all("aria-label=" in tag for tag in re.findall(r"<input[^>]*>", text))
    assert len(re.findall(r"<label>[^<]*<select", text)) == text.count("<select") == 3


def test_points_stand_where_the_figures_are(folder: Path) -> None:
    section = found(folder)
    svg = ElementTree.fromstring(scatter(section))
    marks = [g.find("path") for g in svg.iter("g")]
    places = [tuple(map(float, re.findall(r"[\d.]+", m.get("transform") or ""))) for m in marks if m is not None]
    rows = [row for row in section.rows if row.trained]
    assert len(places) == len(rows) == 3
    sizes = [math.log10(row.figures[0].trainable) for row in rows]
    for values, axis, sign in ((sizes, 0, 1), ([row.psnr or 0 for row in rows], 1, -1)):
        slopes = {
            round((places[i][axis] - places[0][axis]) / (values[i] - values[0])) for i in (1, 2)
        }  # pixels a unit are the same everywhere
        assert len(slopes) == 1
        assert slopes.pop() * sign > 0
    (line,) = [line for line in svg.iter("line") if "frozen" in (line.get("class") or "")]
    assert float(line.get("y1") or 0) > max(place[1] for place in places)  # below them: it is worse


def test_bars_are_as_long_as_the_gains(folder: Path) -> None:
    charts = dict(bars(found(folder)))
    assert list(charts) == ["a", "b", "c"]
    widths = {
        clip: [float(r.get("width") or 0) for r in ElementTree.fromstring(svg).iter("rect")]
        for clip, svg in charts.items()
    }
    scale = max(widths["c"]) / 0.9
    for clip, factor in (("a", 1), ("b", 2), ("c", 3)):
        gains = sorted(factor * by for by in (0.1, 0.2, 0.3))
        assert sorted(widths[clip]) == pytest.approx([gain * scale for gain in gains], abs=0.2)


def test_of_many_clips_the_extremes_have_bars(leave: Leave, tmp_path: Path) -> None:
    before = {f"{i:03d}": 20.0 for i in range(100)}
    leave({clip: psnr + int(clip) / 100 for clip, psnr in before.items()}, plugins="seem", before=before)
    shown = [clip for clip, _ in bars(found(tmp_path))]
    assert shown == [f"{i:03d}" for i in (*range(SHOWN // 2), *range(100 - SHOWN // 2, 100))]
    assert "Of 100 clips, the 24 with the smallest" in written(tmp_path)


def test_without_a_reference_there_are_no_bars_and_without_training_no_chart(leave: Leave, tmp_path: Path) -> None:
    leave(BASE, trainable=0)
    section = found(tmp_path)
    assert bars(section) == []
    assert scatter(section) == ""
    assert "<figure" not in written(tmp_path)


def test_crops_are_put_together_by_clip(folder: Path) -> None:
    clips = clip_pictures(found(folder))
    names = ["backbone", "#2 edvr, none, full", "#5 edvr, seem, full", "ground truth"]
    assert {clip: list(one.crops) for clip, one in clips.items()} == {"a": names, "deep/b": names}
    assert len(set(clips["a"].crops.values())) == 4
    assert [name for name, _ in clips["a"].maps] == ["#5 edvr, seem, full: attention of frame 3"]
    draw(next(folder.glob("*seem*")) / "pictures" / "a", "ground truth", RED)
    assert "ground truth (#5)" in clip_pictures(found(folder))["a"].crops


def test_versions_that_differ_are_shown(leave: Leave, tmp_path: Path) -> None:
    leave(BASE, seed=0, more={"versions": {"torch": "2.7.0", "python": "3.11"}})
    leave(BASE, seed=1, more={"versions": {"torch": "2.9.1", "python": "3.11"}})
    text = Attributes(written(tmp_path)).text
    assert "torch 2.7.0 and 2.9.1 (the jobs differ)" in text
    assert "python 3.11\n" in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    installed = next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium here (playwright install chromium): {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_the_slider_works_and_nothing_is_fetched(browser: Any, folder: Path, scheme: str) -> None:
    (folder / "report.html").write_text(written(folder))
    tab = browser.new_page(viewport={"width": 1000, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    address = (folder / "report.html").as_uri()
    tab.goto(address)
    picture = tab.locator(".compare")
    picture.scroll_into_view_if_needed()

    def colours() -> list[tuple[int, ...]]:
        """A quarter and three quarters from the left, as the screen shows them."""
        shot = Image.open(BytesIO(picture.screenshot())).convert("RGB")
        return [shot.getpixel((shot.width * part // 8, shot.height // 2)) for part in (2, 6)]  # type: ignore[misc]

    assert colours() == [BLUE, GREEN]  # the backbone | the last result
    divider = tab.get_by_role("slider")
    divider.focus()
    for _ in range(40):
        tab.keyboard.press("ArrowLeft")
    assert divider.input_value() == "10"
    assert divider.get_attribute("aria-valuetext") == "10 percent backbone, the rest #5 edvr, seem, full"
    assert colours() == [GREEN, GREEN]
    box = divider.bounding_box()
    tab.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
    assert colours() == [BLUE, BLUE]
    tab.keyboard.press("Home")
    tab.get_by_role("combobox", name="Right").select_option("#2 edvr, none, full")
    assert colours() == [RED, RED]
    tab.get_by_role("combobox", name="Left").select_option("ground truth")
    tab.get_by_role("combobox", name="Clip").select_option("deep/b")
    divider.fill("100")
    assert colours() == [GREY, GREY]
    assert tab.locator(".says").inner_text() == "Left of the divider: ground truth. Right: #2 edvr, none, full."
    for shown in tab.locator(".strip img:visible, .compare img").all():
        assert shown.evaluate("image => image.naturalWidth") == 64
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # wide tables scroll on their own
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    tab.close()
