"""The comparison picture: the crops it chooses, and every pixel where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vsrplug.pictures import CAPTION, CELL, MARGIN, comparison, largest_differences, save_picture


def frame(height: int = 96, width: int = 128) -> Tensor:
    return torch.randint(0, 256, (3, height, width)) / 255


def test_crops_lie_where_the_frames_differ_most() -> None:
    first = frame()
    second = first.clone()
    second[:, 70:80, 10:20] += 0.5  # the largest in sum
    second[0, 5:9, 100:104] += 0.9
    (top, left), (other_top, other_left) = largest_differences(first, second, 20, count=2)
    assert top <= 70
    assert top + 20 >= 80
    assert left <= 10
    assert left + 20 >= 20
    assert other_top <= 5
    assert other_top + 20 >= 9
    assert other_left <= 100
    assert other_left + 20 >= 104


def test_crops_keep_apart_and_inside() -> None:
    corners = largest_differences(frame(), frame(), 30, count=3)
    assert len(corners) == 3
    taken = np.zeros((96, 128), int)
    for top, left in corners:
        assert taken[top : top + 30, left : left + 30].shape == (30, 30)
        taken[top : top + 30, left : left + 30] += 1
    assert taken.max() == 1


def test_a_frame_smaller_than_a_crop_is_one_crop() -> None:
    assert largest_differences(frame(40, 50), frame(40, 50), 64)[0][0] == 0
    assert len(largest_differences(frame(40, 40), frame(40, 40), 64)) == 1


@pytest.mark.parametrize(("height", "width", "size"), [(96, 128, 32), (40, 40, 64)])
def test_each_column_shows_its_result_pixel_by_pixel(height: int, width: int, size: int) -> None:
    frames = {name: frame(height, width) for name in ("low resolution", "bicubic", "with plug-ins", "ground truth")}
    sheet = np.asarray(comparison(frames, {"bicubic": "24.00 dB"}, size))
    size = min(size, height)
    corners = largest_differences(frames["bicubic"], frames["with plug-ins"], size)
    zoom = -(-CELL // size)
    right = sheet.shape[1] - 4 * (size * zoom + MARGIN)
    for column, result in enumerate(frames.values()):
        for row, (top, left) in enumerate(corners):
            y, x = CAPTION + row * (size * zoom + MARGIN), right + column * (size * zoom + MARGIN)
            cell = sheet[y : y + size * zoom, x : x + size * zoom]
            shown = cell[zoom // 2 :: zoom, zoom // 2 :: zoom]
            expected = (result[:, top : top + size, left : left + size] * 255).round().byte().permute(1, 2, 0).numpy()
            differing = (shown != expected).any(2)
            assert differing.mean() < (0.03 if column == 0 else 1e-9)  # the number of the crop stands in the first


def test_captions_fit_above_their_columns() -> None:
    frames = {name: torch.ones(3, 64, 64) for name in ("low resolution", "bicubic", "with plug-ins", "ground truth")}
    sheet = np.asarray(comparison(frames, dict.fromkeys(frames, "24.00 dB")))
    step = CELL + MARGIN
    right = sheet.shape[1] - 4 * step
    for column in range(4):
        inked = np.flatnonzero((sheet[:CAPTION, right + column * step :][:, :step] < 128).all(2).any(0))
        assert len(inked) > 20
        assert inked.max() < step - MARGIN  # not running into the next column


def test_frames_out_of_range_are_clamped() -> None:
    frames = {name: torch.full((3, 64, 64), value) for name, value in zip("abc", (-1.0, 2.0, 0.5), strict=True)}
    sheet = np.asarray(comparison(frames, {}))
    last = sheet[-MARGIN - 10, -MARGIN - 10 - CELL - MARGIN]
    assert (last == 255).all()
    assert (sheet[CAPTION + CELL // 2, sheet.shape[1] - 3 * (CELL + MARGIN) + CELL // 2] == 0).all()


def test_save_picture_makes_folders_and_replaces_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "comparison.png"
    for colour in ("red", "blue"):
        save_picture(Image.new("RGB", (8, 8), colour), path)
        assert Image.open(path).getpixel((0, 0)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    assert [file.name for file in path.parent.iterdir()] == ["comparison.png"]
