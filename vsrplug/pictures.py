"""The picture of a comparison: whole frame, and the crops where the results differ most; and that of maps."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vsrplug.masks.preview import overlay
from vsrplug.masks.words import MOST, pack

MARGIN = 8
TEXT = 16  # font size, in pixels
CAPTION = 2 * TEXT + 3 * MARGIN  # height of the two lines over the columns
CELL = 192  # least side of an enlarged crop: the captions of a column have to fit
RED = (230, 40, 40)
SMALL = 13  # font size under a map
SHEET, TILE = 1200, 256  # width of a picture of maps, which a page shows as it is, and of one of its tiles, at most
DARK_TO_LIGHT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # matplotlib's "inferno"


def largest_differences(first: Tensor, second: Tensor, size: int, count: int = 3) -> list[tuple[int, int]]:
    """Corners (top, left) of the `count` squares, apart from each other, where two frames (3, h, w) differ most."""
    difference = (first - second).abs().mean(0)
    size = min(size, *difference.shape)
    # Sums over squares as differences of sums from the corner: however large the squares, four reads for each.
    total = F.pad(difference.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    energy = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    energy = energy.clamp(min=0)
    corners = []
    for _ in range(count):
        best = int(energy.argmax())
        top, left = best // energy.shape[1], best % energy.shape[1]
        if energy[top, left] < 0:
            break
        corners.append((top, left))
        energy[max(0, top - size + 1) : top + size, max(0, left - size + 1) : left + size] = -1
    return corners


def comparison(frames: Mapping[str, Tensor], captions: Mapping[str, str], size: int = 64) -> Image.Image:
    """The whole frame on the left; on the right one column a result, and one row for each crop marked in the frame.

    Args:
        frames: name -> (3, h, w) in [0, 1], all of one size, in the order of the columns. The crops are those where the
            last two but the truth (the final entry) differ most.
        captions: name -> a short line under the name, such as a PSNR.
        size: side of a crop, in HR pixels; crops are enlarged by a whole factor, pixel by pixel.
    """
    *_, before, after, truth = frames.values()
    size = min(size, *truth.shape[-2:])
    corners = largest_differences(before, after, size)
    zoom = -(-CELL // size)
    step = size * zoom + MARGIN
    height = max(len(corners), 2) * step - MARGIN
    factor = height / truth.shape[-2]
    overview = _image(truth).resize((round(truth.shape[-1] * factor), height), Image.Resampling.LANCZOS)
    right = overview.width + 2 * MARGIN
    sheet = Image.new("RGB", (right + len(frames) * step, CAPTION + height + MARGIN), "white")
    sheet.paste(overview, (MARGIN, CAPTION))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT)
    for row, (y, x) in enumerate(corners):
        left, top, side = MARGIN + x * factor, CAPTION + y * factor, size * factor
        draw.rectangle([left, top, left + side - 1, top + side - 1], outline=RED, width=3)
        draw.text((left + 7, top + 4), str(row + 1), fill=RED, font=font, stroke_width=2, stroke_fill="white")
    for column, (name, frame) in enumerate(frames.items()):
        left = right + column * step
        draw.text((left, MARGIN), name, fill="black", font=font)
        draw.text((left, 2 * MARGIN + TEXT), captions.get(name, ""), fill=(90, 90, 90), font=font)
        for row, (y, x) in enumerate(corners):
            crop = _image(frame[:, y : y + size, x : x + size])
            crop = crop.resize((size * zoom, size * zoom), Image.Resampling.NEAREST)
            sheet.paste(crop, (left, CAPTION + row * step))
    for row in range(len(corners)):
        at = (right + 6, CAPTION + row * step + 4)
        draw.text(at, str(row + 1), fill=RED, font=font, stroke_width=2, stroke_fill="white")
    return sheet


def map_picture(
    frame: Tensor, planes: Mapping[str, Tensor], box: tuple[int, int, int, int], pixel: tuple[int, int]
) -> Image.Image:
    """A low-resolution frame with two marks, and beside it the planes of a map, of the same size, each over its title.

    Values of all planes share one scale, from zero, or the least where that is below it, to the largest; it stands
    under them. Numbers of things get colours of their own, and masks tint the frame.

    Args:
        frame: (3, h, w) in [0, 1].
        planes: title -> plane, as `Plugin.maps` has them.
        box: top, left, height and width of a rectangle to mark in the frame.
        pixel: row and column of a pixel to mark in the frame.
    """
    h, w = frame.shape[-2:]
    width = min(TILE, (SHEET - MARGIN) // (len(planes) + 1) - MARGIN)
    size = (width // w * w, width // w * h) if w <= width else (width, max(1, round(h * width / w)))
    values = [plane for plane in planes.values() if plane.is_floating_point()]
    low = min([0.0, *(plane.min().item() for plane in values)])
    high = max([0.0, *(plane.max().item() for plane in values)])
    tiles = {"the frame": _marked(_fitted(_image(frame), size), box, pixel, size[0] / w)}
    for title, plane in planes.items():
        tiles[title] = _fitted(_coloured(plane, frame, low, high), size)
    step, line = size[0] + MARGIN, SMALL + MARGIN
    sheet = Image.new("RGB", (len(tiles) * step + MARGIN, size[1] + 2 * MARGIN + line * (2 if values else 1)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(SMALL)
    for i, (title, tile) in enumerate(tiles.items()):
        sheet.paste(tile, (MARGIN + i * step, MARGIN))
        draw.text((MARGIN + i * step, 2 * MARGIN + size[1]), title, fill="black", font=font)
    if values:
        top = 2 * MARGIN + size[1] + line
        first, last = f"{low:.3g}", f"{high:.3g}"
        left = MARGIN + step  # under the first plane
        draw.text((left, top), first, fill="black", font=font)
        left += round(font.getlength(first)) + MARGIN
        scale = torch.linspace(0, 1, 96).expand(SMALL, -1)
        sheet.paste(_coloured(scale, frame, 0, 1), (left, top + 1))
        draw.text((left + 96 + MARGIN, top), last, fill="black", font=font)
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)


def _image(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarged pixel by pixel, or reduced by averaging."""
    larger = size[0] >= picture.width
    return picture.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.BOX)


def _coloured(plane: Tensor, frame: Tensor, low: float, high: float) -> Image.Image:
    if plane.dtype == torch.bool:
        return overlay(frame.cpu(), pack(plane[None, :MOST])[0])
    if plane.is_floating_point():
        anchors = torch.tensor(DARK_TO_LIGHT, dtype=torch.float64)
        place = (plane.double() - low) / ((high - low) or 1) * (len(anchors) - 1)
        below = place.floor().clamp(0, len(anchors) - 2).long()
        colours = torch.lerp(anchors[below], anchors[below + 1], (place - below)[..., None])
    else:  # neighbours in number are far apart on the colour circle
        hues = [colorsys.hsv_to_rgb(0.618034 * i % 1, 0.85, 1 - 0.12 * (i % 4)) for i in range(int(plane.max()) + 1)]
        colours = torch.tensor(hues)[plane] * 255
    return Image.fromarray(colours.round().to(torch.uint8).numpy().astype(np.uint8))


def _marked(picture: Image.Image, box: tuple[int, int, int, int], pixel: tuple[int, int], zoom: float) -> Image.Image:
    """With a rectangle, and a cross of which the pixel itself is left out."""
    draw = ImageDraw.Draw(picture)
    top, left, height, width = (side * zoom for side in box)
    draw.rectangle([left, top, left + width - 1, top + height - 1], outline=RED, width=2)
    y, x = ((at + 0.5) * zoom for at in pixel)
    gap = zoom / 2 + 2
    for colour, line in (("white", 4), (RED, 2)):
        for start, end in ((-gap - 7, -gap), (gap, gap + 7)):
            draw.line([x + start, y, x + end, y], fill=colour, width=line)
            draw.line([x, y + start, x, y + end], fill=colour, width=line)
    return picture
