"""What the layers of a demo clip show: photographs, collages of them, and a minority of printed patterns.

A canvas is an RGB plane in [0, 1] with `DENSITY` texels an HR pixel. Each texel is already the mean over one HR pixel,
as on a camera's sensor: a frame is then one bicubic look-up a pixel, sharp at any sub-pixel position and alias-free
(this is supersampling by 2 with a box average, done once a layer instead of once a frame).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

DENSITY = 2

Picture = NDArray[np.uint8]  # (h, w, 3)
Canvas = NDArray[np.float32]  # (h, w, 3) in [0, 1]
Random = np.random.Generator


def integrate(canvas: Canvas) -> Canvas:
    """Mean over one HR pixel around each texel; one texel less each way."""
    half = np.float32(0.5)
    rows = half * (canvas[1:] + canvas[:-1])
    return half * (rows[:, 1:] + rows[:, :-1])


def paint(
    rng: Random, photographs: Sequence[Picture], height: int, width: int, shares: tuple[float, float, float]
) -> Canvas:
    """A `piece`, a `collage` or a `pattern`, by their shares: (height, width, 3) in texels."""
    kinds = (piece, collage, pattern)
    return kinds[rng.choice(3, p=shares)](rng, photographs, height, width)


def piece(rng: Random, photographs: Sequence[Picture], height: int, width: int) -> Canvas:
    """A random part of a random photograph, reduced, turned, mirrored and recoloured: (height, width, 3) in texels.

    Reduction by 0.3 to 1.0 (more for the large photographs) makes the frames sharp down to the pixel. Where the
    photograph is too small it goes on as its mirror image.
    """
    photograph = photographs[int(rng.integers(len(photographs)))]
    if rng.random() < 0.25:
        photograph = photograph.transpose(1, 0, 2)
    high, wide = photograph.shape[:2]
    ratio = DENSITY * np.exp(rng.uniform(np.log(0.3), 0.0)) * min(1.0, 700 / max(high, wide))
    box_h, box_w = min(high, height / ratio), min(wide, width / ratio)
    top, left = rng.uniform(0, high - box_h), rng.uniform(0, wide - box_w)
    shown = max(1, min(height, round(box_h * ratio))), max(1, min(width, round(box_w * ratio)))
    image = Image.fromarray(np.ascontiguousarray(photograph)).resize(
        (shown[1], shown[0]), Image.Resampling.BICUBIC, box=(left, top, left + box_w, top + box_h)
    )
    part: Canvas = np.asarray(image, dtype=np.float32) / np.float32(255)
    part = np.pad(part, ((0, height - shown[0]), (0, width - shown[1]), (0, 0)), mode="symmetric")
    if rng.random() < 0.5:
        part = part[:, ::-1]
    if rng.random() < 0.15:
        part = part[::-1]
    return _recolour(rng, part)


def collage(rng: Random, photographs: Sequence[Picture], height: int, width: int) -> Canvas:
    """Shapes of all sizes, cut from the photographs and laid over each other.

    Sizes follow the power law r^-3 of the dead-leaves model of natural images (Lee, Mumford and Huang, "Occlusion
    models for natural images", IJCV 2001), whose edges and T-junctions few photographs have enough of.
    """
    canvas = piece(rng, photographs, height, width)
    smallest, largest = DENSITY * rng.uniform(3, 8), DENSITY * 90
    uniform = rng.random(int(rng.integers(30, 160)))
    radii = (smallest**-2 - uniform * (smallest**-2 - largest**-2)) ** -0.5
    for radius in np.sort(radii)[::-1]:
        size = int(2 * radius) + 2
        top, left = int(rng.integers(-size // 2, height)), int(rng.integers(-size // 2, width))
        rows, columns = slice(max(top, 0), min(top + size, height)), slice(max(left, 0), min(left + size, width))
        inside = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
        alpha = outline(rng, size, size)[inside]
        fill = piece(rng, photographs, size, size)[inside]
        if rng.random() < 0.3:  # a plain surface with a little of the texture left
            fill = 0.15 * fill + 0.85 * _plain(rng)
        canvas[rows, columns] += alpha * (fill - canvas[rows, columns])
    return canvas


def pattern(rng: Random, photographs: Sequence[Picture], height: int, width: int) -> Canvas:
    """Printed matter or a building's front, drawn: text, a calendar's sheet, windows or stripes, on a textured ground.

    The photographs have little text and few fine regular lines; these are the layers that are not photographs.
    """
    ink, ground = (tuple(int(v) for v in rng.integers(low, low + 140, 3)) for low in rng.permutation([0, 115]))
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    [_write, _tabulate, _build, _rule][rng.choice(4, p=[0.25, 0.25, 0.3, 0.2])](rng, draw, height, width, ink)
    canvas = np.asarray(image, dtype=np.float32) / 255
    texture = piece(rng, photographs, height, width)
    strength = np.float32(rng.uniform(0.1, 0.6))
    return np.asarray(canvas * (1 - strength + strength * texture))


def outline(rng: Random, height: int, width: int) -> Canvas:
    """Opacity of a cut-out that keeps clear of the border: (height, width, 1), a blob, polygon, leaves or bars."""
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    kind = rng.choice(["blob", "polygon", "leaves", "bars"], p=[0.35, 0.3, 0.2, 0.15])
    half = min(height, width) / 2 - 2
    if kind in ("blob", "polygon"):
        corners = 64 if kind == "blob" else int(rng.integers(3, 9))
        around = np.linspace(0, 2 * np.pi, corners, endpoint=False) + rng.uniform(0, 6)
        waves = np.arange(1, 7)
        ripple = np.cos(np.outer(around, waves) + rng.uniform(0, 6, 6)) @ (rng.normal(0, 0.25, 6) / waves)
        radius = (1 + ripple) if kind == "blob" else rng.uniform(0.6, 1, corners)
        radius = radius / radius.max()
        points = np.column_stack([np.cos(around) * (width / 2 - 2), np.sin(around) * (height / 2 - 2)])
        points = points * radius[:, None] + (width / 2, height / 2)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    elif kind == "leaves":
        for _ in range(int(rng.integers(5, 60))):
            length = half * rng.uniform(0.08, 0.35)
            across, turn = length * rng.uniform(0.25, 0.8), rng.uniform(0, np.pi)
            centre = np.array([width, height]) / 2 + (np.array([width, height]) / 2 - 2 - length) * rng.uniform(
                -1, 1, 2
            )
            around = np.linspace(0, 2 * np.pi, 16, endpoint=False)
            leaf = np.column_stack([np.cos(around) * length, np.sin(around) * across])
            leaf = leaf @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + centre
            draw.polygon([(float(x), float(y)) for x, y in leaf], fill=255)
    else:
        for _ in range(int(rng.integers(1, 7))):
            ends = [(float(x), float(y)) for x, y in rng.uniform(2, [width - 2, height - 2], (2, 2))]
            draw.line(ends, fill=255, width=int(rng.integers(2, max(3, int(half / 6)) + 1)))
        draw.rectangle((0, 0, width - 1, height - 1), outline=0, width=2)
    if rng.random() < 0.25:  # out of focus a little
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.0)))
        ImageDraw.Draw(image).rectangle((0, 0, width - 1, height - 1), outline=0)
    return np.asarray(image, dtype=np.float32)[..., None] / np.float32(255)


def _recolour(rng: Random, part: Canvas) -> Canvas:
    """Contrast, brightness, gamma and colour balance; grey photographs stay grey or take a mild tint."""
    if rng.random() < 0.3:
        part = part[..., rng.permutation(3)]
    middle = part.mean()
    part = (part - middle) * np.float32(rng.uniform(0.8, 1.5)) + middle + np.float32(rng.uniform(-0.1, 0.1))
    gamma = np.exp(rng.normal(0, 0.15) + rng.normal(0, 0.1, 3) * (rng.random() < 0.7)).astype(np.float32)
    return np.asarray(part.clip(0, 1) ** gamma)


def _plain(rng: Random) -> NDArray[np.float32]:
    """A colour of any brightness, seldom a strong one."""
    return np.asarray(rng.random() + rng.normal(0, 0.12, 3), dtype=np.float32).clip(0, 1)


def _words(rng: Random, letters: int) -> str:
    alphabet = list("eeeeaaaiioonnrrttsslldcumphgbvfyqxjkwz      ETANOIRS0123456789.,-")
    return "".join(rng.choice(alphabet, letters))


def _font(rng: Random, smallest: float, largest: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=DENSITY * np.exp(rng.uniform(np.log(smallest), np.log(largest))))


def _write(rng: Random, draw: ImageDraw.ImageDraw, height: int, width: int, ink: tuple[int, ...]) -> None:
    y = 4
    while y < height:
        font = _font(rng, 7, 40)
        draw.text((int(rng.integers(-40, 40)), y), _words(rng, 120), fill=ink, font=font)
        y += int(draw.textbbox((0, 0), "Agy", font=font)[3] * rng.uniform(1.0, 1.4)) + 1


def _tabulate(rng: Random, draw: ImageDraw.ImageDraw, height: int, width: int, ink: tuple[int, ...]) -> None:
    row, column = DENSITY * rng.uniform(14, 50, 2)
    font = _font(rng, 7, 0.8 * row / DENSITY)
    for i, y in enumerate(np.arange(0, height, row)):
        draw.line((0, y, width, y), fill=ink, width=int(rng.integers(1, 4)))
        for j, x in enumerate(np.arange(0, width, column)):
            draw.text((x + 4, y + 2), str(i * 7 + j), fill=tuple(rng.permutation(ink).tolist()), font=font)
            draw.line((x, 0, x, height), fill=ink, width=2) if i == 0 else None


def _build(rng: Random, draw: ImageDraw.ImageDraw, height: int, width: int, ink: tuple[int, ...]) -> None:
    row, column = DENSITY * np.exp(rng.uniform(np.log(3.5), np.log(30), 2))
    share_y, share_x = rng.uniform(0.3, 0.8, 2)
    spread = rng.choice([0, 25, 60])
    for y in np.arange(0, height, row):
        for x in np.arange(0, width, column):
            shade = tuple(int(np.clip(v + rng.normal(0, spread), 0, 255)) for v in ink)
            draw.rectangle((x, y, x + share_x * column, y + share_y * row), fill=shade)


def _rule(rng: Random, draw: ImageDraw.ImageDraw, height: int, width: int, ink: tuple[int, ...]) -> None:
    for _ in range(int(rng.integers(1, 3))):
        gap = DENSITY * np.exp(rng.uniform(np.log(3.0), np.log(25)))
        slope = rng.choice([0.0, rng.normal(0, 0.4)])
        thick = max(1, round(gap * rng.uniform(0.15, 0.6)))
        upright = rng.random() < 0.5
        extent, along = (width, height) if upright else (height, width)
        for at in np.arange(-abs(slope) * along, extent + abs(slope) * along, gap):
            ends = [(at, 0), (at + slope * along, along)]
            draw.line([(x, y) if upright else (y, x) for x, y in ends], fill=ink, width=thick)
