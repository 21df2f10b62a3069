"""Charts as SVG: PSNR against trainable parameters, and bars of every clip. Colours are classes of the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree import ElementTree

from .rows import Row, Section

Element = ElementTree.Element
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 40, 32, 48
COLOURS = 8  # classes c0 ... c7 of the style
SHAPES = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M-5,-5h10v10h-10z",
    "M0,-6.5l6,11h-12z",
    "M0,-7l6,7l-6,7l-6,-7z",
    "M-6.5,-2h4.5v-4.5h4v4.5h4.5v4h-4.5v4.5h-4v-4.5h-4.5z",
    "M0,6.5l6,-11h-12z",
)
LABELS = ((9, 4), (-9, 4), (0, -11), (0, 19), (9, -8), (9, 16), (-9, -8), (-9, 16))  # where a number may stand
BAR, GAP, NAME, VALUE = 14, 4, 34, 60  # of the bars, in pixels
SHOWN = 24  # clips with bars of their own


def scatter(section: Section) -> str:
    """PSNR against trainable parameters on a logarithmic axis; a frozen backbone is a line. Empty without a point.

    Colours are backbones, shapes are tunings, numbers those of the table, whiskers the standard deviation over seeds.
    """
    rows = [(row, row.psnr) for row in section.rows if row.psnr is not None and math.isfinite(row.psnr)]
    frozen = [(row, psnr) for row, psnr in rows if not row.trained]
    points = [
        (row, row.figures[0].trainable, psnr, (row.deviations or (0.0, 0.0))[0]) for row, psnr in rows if row.trained
    ]
    if not points:
        return ""
    sizes = [size for _, size, _, _ in points]
    first = math.floor(math.log10(min(sizes)))
    last = max(math.ceil(math.log10(max(sizes))), first + 1)
    extent = [psnr + d for _, _, psnr, deviation in points for d in (-deviation, deviation)] + [p for _, p in frozen]
    ticks = _ticks(min(extent), max(extent))

    def x(size: float) -> float:
        return LEFT + (math.log10(size) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(psnr: float) -> float:
        return HEIGHT - BOTTOM - (psnr - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - TOP - BOTTOM)

    svg = _svg(WIDTH, HEIGHT, f"PSNR against trainable parameters, protocol {section.title}")
    for tick in ticks:
        _add(svg, "line", "grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick))
        _text(svg, LEFT - 8, y(tick) + 4, f"{tick:.{_digits(ticks)}f}", "end")
    for power in range(first, last + 1):
        _add(svg, "line", "grid", x1=x(10**power), x2=x(10**power), y1=TOP, y2=HEIGHT - BOTTOM)
        _text(svg, x(10**power), HEIGHT - BOTTOM + 18, f"{10**power:,}", "middle")
    _text(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "trainable parameters", "middle")
    _text(svg, 8, 12, "PSNR dB", "start")
    backbones, tunings = _order(section, "backbone"), _order(section, "tuning")
    for row, psnr in frozen:
        style = f"frozen {_colour(row, backbones)}"
        line = _add(svg, "line", style, x1=LEFT, x2=WIDTH - RIGHT, y1=y(psnr), y2=y(psnr))
        _title(line, f"#{row.number} {row.title}: {psnr:.3f} dB, nothing trained")
        _text(svg, LEFT + 6, y(psnr) - 5, f"#{row.number}", "start")
    taken = [(x(size), y(psnr)) for _, size, psnr, _ in points]
    for row, size, psnr, deviation in points:
        group = _add(svg, "g", _colour(row, backbones))
        _title(group, f"#{row.number} {row.title}: {psnr:.3f} dB, {size:,} parameters")
        if deviation:
            _add(group, "line", "whisker", x1=x(size), x2=x(size), y1=y(psnr - deviation), y2=y(psnr + deviation))
        shape = SHAPES[tunings.index(row.job.tuning) % len(SHAPES)]
        _add(group, "path", "mark", d=shape, transform=f"translate({x(size):.1f} {y(psnr):.1f})")
        taken.append(_number(svg, x(size), y(psnr), str(row.number), taken))
    return _written(svg)


def legend(section: Section) -> list[tuple[str, str, str]]:
    """What colours and shapes mean: (name, class of the colour, path of the shape)."""
    backbones, tunings = _order(section, "backbone"), _order(section, "tuning")
    colours = [(name, f"c{i % COLOURS}", SHAPES[0]) for i, name in enumerate(backbones)]
    return colours + [(name, "plain", SHAPES[i % len(SHAPES)]) for i, name in enumerate(tunings)]


def bars(section: Section) -> list[tuple[str, str]]:
    """Clip -> bars of every row: PSNR over the frozen backbone, dB. Empty where no row has it by clip.

    Of many clips those with the smallest and the largest mean gain are shown.
    """
    rows = [(row, row.over_backbone.clips) for row in section.rows if row.over_backbone and row.over_backbone.clips]
    if not rows:
        return []
    clips = list(dict.fromkeys(clip for _, gains in rows for clip in gains))
    if len(clips) > SHOWN:
        means = {clip: [gains[clip] for _, gains in rows if clip in gains] for clip in clips}
        ranked = sorted(clips, key=lambda clip: sum(means[clip]) / len(means[clip]))
        clips = ranked[: SHOWN // 2] + ranked[-SHOWN // 2 :]
    values = [gains[clip] for _, gains in rows for clip in clips if clip in gains]
    low, high = min(0.0, *values), max(0.0, *values)
    backbones = _order(section, "backbone")
    width, height = 340, len(rows) * (BAR + GAP) + GAP
    left, right = NAME + (VALUE if low < 0 else 0), width - VALUE

    def x(value: float) -> float:
        return left + (value - low) / ((high - low) or 1) * (right - left)

    charts = []
    for clip in clips:
        svg = _svg(width, height, f"Clip {clip}: PSNR over the frozen backbone, dB")
        _add(svg, "line", "axis", x1=x(0), x2=x(0), y1=0, y2=height)
        for i, (row, gains) in enumerate((row, gains) for row, gains in rows if clip in gains):
            top, gain = GAP + i * (BAR + GAP), gains[clip]
            left_end, length = min(x(0), x(gain)), abs(x(gain) - x(0))
            bar = _add(svg, "rect", f"bar {_colour(row, backbones)}", x=left_end, y=top, width=length, height=BAR)
            _title(bar, f"#{row.number} {row.title}: {gain:+.3f} dB")
            _text(svg, 2, top + BAR - 3, f"#{row.number}", "start")
            beyond, anchor = (5, "start") if gain >= 0 else (-5, "end")
            _text(svg, x(gain) + beyond, top + BAR - 3, f"{gain:+.3f}", anchor)
        charts.append((clip, _written(svg)))
    return charts


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around a range, four to nine of them."""
    spread = max(high - low, 0.01)
    raw = spread / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.floor((low - 0.1 * spread) / step)
    return [i * step for i in range(first, math.ceil((high + 0.1 * spread) / step) + 1)]


def _digits(ticks: Sequence[float]) -> int:
    return max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))


def _number(svg: Element, x: float, y: float, number: str, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Write a point's number beside it, where there is most room; returns about where."""

    def room(offset: tuple[int, int]) -> float:
        at = x + 2 * offset[0], y + offset[1] - 4
        inside = LEFT < at[0] < WIDTH - RIGHT and TOP < at[1] < HEIGHT - BOTTOM
        return min(math.dist(at, other) for other in taken) - (0 if inside else WIDTH)

    right, down = max(LABELS, key=room)
    _text(svg, x + right, y + down, number, "start" if right > 0 else "end" if right < 0 else "middle")
    return x + 2 * right, y + down - 4


def _order(section: Section, what: str) -> list[str]:
    return list(dict.fromkeys(getattr(row.job, what) for row in section.rows))


def _colour(row: Row, backbones: Sequence[str]) -> str:
    return f"c{backbones.index(row.job.backbone) % COLOURS}"


def _svg(width: int, height: int, title: str) -> Element:
    return ElementTree.Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": title})


def _add(parent: Element, tag: str, style: str, **attributes: float | str) -> Element:
    values = {key: value if isinstance(value, str) else f"{value:.1f}" for key, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, {"class": style, **values})


def _text(parent: Element, x: float, y: float, text: str, anchor: str) -> None:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ElementTree.SubElement(parent, "text", attributes).text = text


def _title(parent: Element, text: str) -> None:
    ElementTree.SubElement(parent, "title").text = text


def _written(svg: Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")
