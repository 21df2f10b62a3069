"""The picture of a comparison: whole frame, and the crops where the results differ most."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 8
TEXT = 16  # font size, in pixels
CAPTION = 2 * TEXT + 3 * MARGIN  # height of the two lines over the columns
CELL = 192  # least side of an enlarged crop: the captions of a column have to fit
RED = (230, 40, 40)


def largest_differences(first: Tensor, second: Tensor, size: int, count: int = 3) -> list[tuple[int, int]]:
    """Corners (top, left) of the `count` squares, apart from each other, where two frames (3, h, w) differ most."""
    difference = (first - second).abs().mean(0)[None, None]
    size = min(size, *difference.shape[-2:])
    energy = F.avg_pool2d(difference, size, stride=1)[0, 0].clone()
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


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)


def _image(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
