"""The pictures of comparisons and of maps: the crops they choose, and every pixel where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vsrplug.masks import pack
from vsrplug.masks.preview import overlay
from vsrplug.pictures import (
    CAPTION,
    CELL,
    DARK_TO_LIGHT,
    MARGIN,
    RED,
    comparison,
    largest_differences,
    map_picture,
    save_picture,
)


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


@pytest.mark.parametrize("size", [1, 7, 30, 96])
def test_the_first_crop_is_the_largest_of_all_squares(size: int) -> None:
    first, second = frame(), frame()
    difference = (first - second).abs().mean(0).double()
    sums = {
        (top, left): difference[top : top + size, left : left + size].sum().item()
        for top in range(96 - size + 1)
        for left in range(128 - size + 1)
    }
    ((top, left),) = largest_differences(first, second, size, count=1)
    assert sums[top, left] == pytest.approx(max(sums.values()))


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


BOX, PIXEL = (6, 8, 20, 20), (16, 18)


def tiles(picture: Image.Image, count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """The frame and the planes, as they stand side by side."""
    width, height = size
    lefts = [MARGIN + i * (width + MARGIN) for i in range(count)]
    return [np.asarray(picture)[MARGIN : MARGIN + height, left : left + width] for left in lefts]


def test_planes_of_values_share_one_scale() -> None:
    """Enlarged by a whole factor; the anchors of the colours lie at the quarters of the range."""
    low = frame(24, 40)
    first, second = torch.zeros(24, 40), torch.full((24, 40), 2.0)
    second[4:8, 4:8] = torch.tensor([0.0, 1.0, 2.0, 4.0])  # columns
    picture = map_picture(low, {"one": first, "two": second}, BOX, PIXEL)
    shown, one, two = tiles(picture, 3, (240, 144))  # 6 times as large: three tiles of at most 256 pixels
    dark, quarter, half, _, light = (np.array(colour) for colour in DARK_TO_LIGHT)
    assert (one == dark).all()
    for column, colour in enumerate((dark, quarter, half, light)):
        assert (two[24:48, 6 * (4 + column) : 6 * (5 + column)] == colour).all()
    expected = (low * 255).round().byte().permute(1, 2, 0).numpy().repeat(6, 0).repeat(6, 1)
    marks = (shown != expected).any(2)
    assert {tuple(colour) for colour in shown[marks].tolist()} == {RED, (255, 255, 255)}
    assert marks[36:156, 48:168].sum() == marks.sum() > 400  # the rectangle and, in its middle, the cross
    assert not marks[16 * 6 : 17 * 6, 18 * 6 : 19 * 6].any()  # which leaves its pixel out
    assert picture.width == 3 * 248 + MARGIN


def test_values_below_zero_widen_the_scale() -> None:
    plane = torch.zeros(24, 40)
    plane[0, 0], plane[0, 1] = -1, 1
    _, shown = tiles(map_picture(frame(24, 40), {"it": plane}, BOX, PIXEL), 2, (240, 144))
    assert tuple(shown[0, 0]) == DARK_TO_LIGHT[0]
    assert tuple(shown[0, 6]) == DARK_TO_LIGHT[-1]
    assert tuple(shown[9, 9]) == DARK_TO_LIGHT[2]


def test_planes_that_are_coarser_or_finer_cover_the_same_place() -> None:
    coarse, fine = torch.zeros(6, 10), torch.zeros(192, 320)
    coarse[1, 2] = fine[32:64, 64:96] = 1
    _, one, two = tiles(map_picture(frame(24, 40), {"coarse": coarse, "fine": fine}, BOX, PIXEL), 3, (240, 144))
    assert (one[24:48, 48:72] == DARK_TO_LIGHT[-1]).all()
    assert (one == DARK_TO_LIGHT[-1]).all(2).sum() == 24 * 24
    assert np.array_equal(one, two)


def test_masks_tint_the_frame_and_numbers_have_colours_of_their_own() -> None:
    low, masks = frame(24, 64), torch.rand(3, 24, 64) > 0.5
    numbers = torch.arange(24 * 64).view(24, 64) % 12
    _, tinted, coloured = tiles(map_picture(low, {"masks": masks, "entry": numbers}, BOX, PIXEL), 3, (256, 96))
    assert np.array_equal(tinted, np.asarray(overlay(low, pack(masks[None])[0])))
    colours = {tuple(coloured[4 * y, 4 * x]): int(numbers[y, x]) for y in range(24) for x in range(64)}
    assert sorted(colours.values()) == [*range(12)]
    for y, x in ((0, 0), (13, 30), (23, 63)):
        assert colours[tuple(coloured[4 * y + 3, 4 * x + 3])] == numbers[y, x]


def test_many_planes_and_large_frames_fit_a_page() -> None:
    planes = {f"frame {t:+d}": torch.rand(90, 160) for t in range(-4, 4)}
    assert map_picture(frame(90, 160), planes, BOX, PIXEL).width <= 1200
    large = map_picture(frame(270, 480), {"it": torch.rand(270, 480)}, BOX, PIXEL)
    assert large.width == 2 * (256 + MARGIN) + MARGIN
