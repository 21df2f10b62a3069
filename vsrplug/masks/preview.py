"""`preview`: masks over the frames they were made of, to see what a cache holds."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vsrplug.masks.words import MOST, Words, as_tensor, unpack

_WIDTH = 256  # least width of a frame in the picture; small ones are enlarged by a whole factor
_MARGIN = 8
_TEXT = 16


def preview(rows: Sequence[tuple[str, Sequence[Tensor], Words]]) -> Image.Image:
    """One row a clip: its name, and every frame beside the same frame with its masks.

    Args:
        rows: name, frames (3, h, w) in [0, 1], their words (t, h, w).
    """
    pictures = [
        (
            name,
            [part for frame, word in zip(frames, words, strict=True) for part in (_image(frame), overlay(frame, word))],
        )
        for name, frames, words in rows
    ]
    width = max(sum(part.width + _MARGIN for part in parts) for _, parts in pictures) + _MARGIN
    height = sum(parts[0].height + _TEXT + 3 * _MARGIN for _, parts in pictures)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT), 0
    for name, parts in pictures:
        draw.text((_MARGIN, top + _MARGIN), name, fill="black", font=font)
        left, top = _MARGIN, top + _TEXT + 2 * _MARGIN
        for part in parts:
            sheet.paste(part, (left, top))
            left += part.width + _MARGIN
        top += parts[0].height + _MARGIN
    return sheet


def overlay(frame: Tensor, words: Words) -> Image.Image:
    """The frame with every pixel tinted by its smallest mask, and lines where masks begin and end."""
    planes = unpack(as_tensor(words), MOST)
    smallest = (planes * torch.arange(1, MOST + 1).view(-1, 1, 1)).amax(0).numpy()  # the largest mask is the first
    image = np.asarray(_image(frame), np.float32)
    factor = image.shape[0] // words.shape[0]
    smallest, words = (plane.repeat(factor, 0).repeat(factor, 1) for plane in (smallest, words))
    # Neighbours in the order of areas differ by the golden ratio of the colour circle.
    hues = [colorsys.hsv_to_rgb(0.618034 * number % 1, 0.85, 1.0) for number in range(MOST + 1)]
    tint = np.asarray(hues, np.float32)[smallest] * 255
    tinted = np.where(smallest[..., None] > 0, 0.5 * image + 0.5 * tint, image)
    edges = np.zeros(words.shape, bool)
    edges[1:] |= words[1:] != words[:-1]
    edges[:, 1:] |= words[:, 1:] != words[:, :-1]
    tinted[edges] = 255
    return Image.fromarray(tinted.round().astype(np.uint8))


def _image(frame: Tensor) -> Image.Image:
    factor = -(-_WIDTH // frame.shape[-1])
    levels = (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(levels.repeat(factor, 0).repeat(factor, 1))
