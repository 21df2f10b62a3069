"""The picture shows each pixel tinted by its smallest mask, and lines between masks."""

from __future__ import annotations

import numpy as np
import torch

from vsrplug.masks import pack
from vsrplug.masks.preview import overlay, preview


def test_pixels_are_tinted_by_their_smallest_mask() -> None:
    masks = torch.zeros(1, 64, 8, 16)
    masks[0, 0, :, 8:] = 1  # the right half
    masks[0, 1, 4:, 8:] = 1  # and its lower part again
    frame = torch.full((3, 8, 16), 0.4)
    image = np.asarray(overlay(frame, pack(masks)[0])).astype(int)
    assert image.shape == (128, 256, 3)
    assert (image[64, 64] == round(0.4 * 255)).all()  # in no mask: as it was
    upper, lower = image[32, 192], image[96, 192]
    assert not (upper == lower).all()
    assert (image[32, 128] == 255).all()  # a line where the mask begins
    assert (image[64, 192] == 255).all()
    assert (image[64, 60:120] == round(0.4 * 255)).all()


def test_one_row_a_clip() -> None:
    frames = [torch.rand(3, 10, 300)] * 2
    words = pack(torch.zeros(2, 64, 10, 300))
    sheet = preview([("one", frames, words), ("two", frames[:1], words[:1])])
    assert sheet.width == 4 * (300 + 8) + 8
    assert sheet.height == 2 * (10 + 16 + 3 * 8)
