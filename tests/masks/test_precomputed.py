"""Label images and COCO run lengths become the masks they mean; what does not fit is refused with its file's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vsrplug.masks import Precomputed
from vsrplug.masks.precomputed import decode_rle

from ..data.test_training import MemoryClip

H, W = 40, 57
FRAMES = torch.zeros(1, 3, H, W)
Y, X = np.mgrid[:H, :W]
RING = ((Y - 18) ** 2 + (X - 30) ** 2 < 200) & ~((Y - 15) ** 2 + (X - 33) ** 2 < 20)
RING_TEXT = (
    "ad03Q18J4M2N2N2N2N2O0O2O00000O_OG68HL64JL65HM64JL64JL64KJ67II68LD6=92N2N2N2N3L6Hc>"  # by pycocotools 2.0.11
)
BOX_TEXT = "dea0f4f4" + "0" * 258 + "hle0"  # rows 100 to 249, columns 60 to 189 of 300 x 200, by the same


def clip(t: int = 1) -> MemoryClip:
    return MemoryClip("walk", torch.zeros(t, 3, H, W, dtype=torch.uint8))


def label_image(path: Path, labels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)
    return path


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of runs down the columns, the first of zeros, counted one pixel at a time."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("found", [0, 1, 64, 65])
def test_every_label_but_zero_is_a_mask_largest_first(tmp_path: Path, found: int, kind: type) -> None:
    labels = np.zeros((H, W), kind)
    areas = np.random.default_rng(found).permutation(found) // 2 + 3  # pairs of equal area
    at = 0
    for number, area in enumerate(areas):
        labels.ravel()[at : at + area] = 3 * number + 1
        at += area
    label_image(tmp_path / "walk" / "0.png", labels)
    (masks,) = Precomputed(tmp_path).of_clip(clip(), 0, FRAMES)
    assert masks.shape == (64, H, W)
    order = sorted(range(found), key=lambda number: -areas[number])[:64]  # sorted() keeps the order of equal ones
    for plane, number in zip(masks, order, strict=False):
        assert np.array_equal(plane.numpy(), labels == 3 * number + 1)
    assert not masks[len(order) :].any()
    assert (found == 65) == (int(masks.sum()) < (labels > 0).sum())  # only the smallest was dropped


def test_palette_images_are_labels(tmp_path: Path) -> None:
    image = Image.fromarray((RING * 2).astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 9, 9, 9, 200, 0, 0])
    (tmp_path / "walk").mkdir()
    image.save(tmp_path / "walk" / "0.png")
    assert np.array_equal(Precomputed(tmp_path, count=1).of_clip(clip(), 0, FRAMES)[0, 0].numpy(), RING)


def test_run_lengths_are_those_of_pycocotools() -> None:
    assert np.array_equal(decode_rle({"size": [H, W], "counts": RING_TEXT}), RING)
    assert np.array_equal(decode_rle({"size": [H, W], "counts": runs(RING)}), RING)
    full = np.ones((3, 2), bool)
    assert np.array_equal(decode_rle({"size": [3, 2], "counts": [0, 6]}), full)
    assert not decode_rle({"size": [3, 2], "counts": [6]}).any()


@pytest.mark.parametrize("around", ["list", "annotations"])
def test_json_of_segment_anything(tmp_path: Path, around: str) -> None:
    small = (Y > 35) & (X < 9)
    records: list[Any] = [
        {"segmentation": {"size": [H, W], "counts": runs(small)}, "area": 1},
        {"segmentation": {"size": [H, W], "counts": RING_TEXT}},
    ]
    (tmp_path / "walk").mkdir()
    content = records if around == "list" else {"image": {}, "annotations": records}
    (tmp_path / "walk" / "frame_9.json").write_text(json.dumps(content))
    label_image(tmp_path / "walk" / "frame_10.png", small.astype(np.uint8))
    first, second = Precomputed(tmp_path, count=3).of_clip(clip(2), 0, FRAMES.expand(2, -1, -1, -1)).numpy()
    assert np.array_equal(first, [RING, small, np.zeros_like(small)])
    assert np.array_equal(second[0], small)
    (again,) = Precomputed(tmp_path, count=3).of_clip(clip(2), 1, FRAMES).numpy()
    assert np.array_equal(again, second)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder of label images or run lengths .*nowhere"):
        Precomputed(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="1 to 64 masks, got count=65"):
        Precomputed(tmp_path, count=65)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*walk with the masks of that clip"):
        Precomputed(tmp_path).of_clip(clip(), 0, FRAMES)
    label_image(tmp_path / "walk" / "0.png", np.zeros((H, W), np.uint8))
    with pytest.raises(ValueError, match=r"walk has 1 files of masks, but clip 'walk' has 2 frames"):
        Precomputed(tmp_path).of_clip(clip(2), 0, FRAMES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((H * 4, W * 4), np.uint8), "has masks of 160x228, but the low-resolution frames are 40x57"),
        (np.zeros((H, W, 3), np.uint8), "cannot be read as masks: a label image has one whole number a pixel"),
        ([{"segmentation": {"size": [H, W], "counts": [H * W - 1]}}], "run lengths add up to 2279, not to 40x57"),
        ([{"segmentation": {"size": [H, W], "counts": [-1, H * W + 1]}}], "run lengths add up to 2280, not to 40x57"),
        ([], "it has no masks, so their size is unknown; use a label image of zeros"),
        ([{"bbox": [0, 0, 1, 1]}], "cannot be read as masks"),
        (None, "cannot be read as masks"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, content: Any, message: str) -> None:
    if isinstance(content, np.ndarray):
        file = label_image(tmp_path / "walk" / "0.png", content)
    else:
        file = tmp_path / "walk" / "0.json"
        file.parent.mkdir()
        file.write_text("{" if content is None else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        Precomputed(tmp_path).of_clip(clip(), 0, FRAMES)
    assert str(file) in str(caught.value)
