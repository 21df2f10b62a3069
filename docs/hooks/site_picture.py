"""The picture of a plugged model: its backbone as a line of sites, drawn from `model.sites`, and who sits where.

`python docs/hooks/site_picture.py` writes the one of `docs/concepts.md` anew; `tests/test_docs.py` fails if it is old.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

from vsrplug import PluggedModel, SiteSpec, attach
from vsrplug.backbones import BasicVSR
from vsrplug.plugins import MemoryBankPlugin, SEEMPlugin

FILE = Path(__file__).resolve().parents[1] / "pictures" / "sites.svg"
COLOURS = ("#00695c", "#ad1457", "#4527a0", "#e65100")
STEP, LANE = 136, 150  # pixels between sites, and between lanes
TOP, BOTTOM, EDGE, PILL = 96, 62, 84, 21  # margins, and the height of a plug-in's name


def example() -> PluggedModel:
    """What the page shows: both plug-ins at their default sites."""
    return attach(BasicVSR(channels=64, blocks=1), seem=SEEMPlugin, bank=MemoryBankPlugin)


def lanes(sites: Iterable[str]) -> list[list[str]]:
    """The sites that no direction of a recurrent network owns, then those of each direction, in their order."""
    sites = list(sites)
    ways = [[site for site in sites if site.startswith(way)] for way in ("backward_", "forward_")]
    return [[site for site in sites if not any(site in way for way in ways)], *(way for way in ways if way)]


def picture(model: PluggedModel) -> str:
    """An SVG of the model: frames on the left, every site with kind and width, super-resolved frames on the right."""
    single, *directions = lanes(model.sites)
    first = next(iter(directions[0]), None) if directions else None
    order = list(model.sites)
    before = [site for site in single if first is None or order.index(site) < order.index(first)]
    after = [site for site in single if site not in before]
    longest = max((len(way) for way in directions), default=0)
    width = 2 * EDGE + STEP * (len(before) + longest + len(after))
    middle = TOP + LANE * max(len(directions) - 1, 0) / 2
    height = TOP + LANE * max(len(directions) - 1, 0) + BOTTOM

    def x(column: float) -> float:
        return EDGE + STEP * (column + 0.5)

    at = {site: (x(column), middle) for column, site in enumerate(before)}
    paths = []
    for row, way in enumerate(directions):
        y = TOP + LANE * row
        steps = [x(len(before) + column) for column in range(len(way))]
        at |= {site: (step, y) for site, step in zip(way, steps, strict=True)}
        fork, join = x(len(before) - 0.7), x(len(before) + longest - 0.3)  # beside the labels of the sites there
        paths.append([(fork, middle), (x(len(before) - 0.4), y), (x(len(before) + longest - 0.6), y), (join, middle)])
    at |= {site: (x(len(before) + longest + column), middle) for column, site in enumerate(after)}
    if directions:
        paths += [[(EDGE, middle), paths[0][0]], [paths[0][-1], (width - EDGE, middle)]]
    else:
        paths = [[(EDGE, middle), (width - EDGE, middle)]]

    names = list(model.plugins)
    title = f"{type(model.backbone).__name__} with its sites, and the plug-ins {' and '.join(names) or 'none'}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#ffffff"/>',
        f'<rect x="{EDGE - 8}" y="8" width="{width - 2 * EDGE + 16:g}" height="{height - 16}" rx="8" fill="#f4f6f8"/>',
        _text(width / 2, 26, f"backbone: {type(model.backbone).__name__}", size=13),
    ]
    for points in paths:
        line = " ".join(f"{a:g},{b:g}" for a, b in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="#90a4ae" stroke-width="2"/>')
    parts += [_text(EDGE / 2 - 4, middle + 4, "frames"), _text(width - EDGE / 2 + 4, middle + 4, "SR frames")]
    for site, spec in model.sites.items():
        parts += _site(site, spec, *at[site])
        serving = [name for name in names if site in model.plugins[name].sites]  # type: ignore[operator]
        for level, name in enumerate(serving):
            left, line = at[site]
            above = line - 22 - PILL * level - (8 if spec.kind == "clip" else 0)
            parts += _pill(name, COLOURS[names.index(name) % len(COLOURS)], left, above)
    return "\n".join([*parts, "</svg>", ""])


def _site(name: str, spec: SiteSpec, x: float, y: float) -> list[str]:
    """One disc for a frame, three behind each other for a clip; name, kind and width below."""
    shifts = (8, 4, 0) if spec.kind == "clip" else (0,)
    discs = [
        f'<circle cx="{x + d:g}" cy="{y - d:g}" r="8" fill="#ffffff" stroke="#37474f" stroke-width="2"/>'
        for d in shifts
    ]
    stride = f", stride {spec.stride}" if spec.stride != 1 else ""
    kind = f"{spec.kind}, {spec.channels} ch{stride}"
    return [*discs, _text(x, y + 25, name, size=13), _text(x, y + 41, kind, colour="#607d8b")]


def _pill(name: str, colour: str, x: float, y: float) -> list[str]:
    """The attach name of a plug-in, over the site it serves; the first to run is the lowest."""
    width = 14 + 7.5 * len(name)
    return [
        f'<rect x="{x - width / 2:g}" y="{y - 13:g}" width="{width:g}" height="18" rx="9" fill="{colour}"/>',
        _text(x, y, name, colour="#ffffff"),
    ]


def _text(x: float, y: float, text: str, *, size: int = 12, colour: str = "#263238") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" font-size="{size}" fill="{colour}">{escape(text)}</text>'


if __name__ == "__main__":
    FILE.write_text(picture(example()), encoding="utf-8")
