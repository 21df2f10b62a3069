"""Superpixels: exactly m planes, of the regions one expects, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

import vsrplug.conf
from vsrplug.masks import Superpixels


def quarters() -> Tensor:
    """(1, 3, 24, 36): four flat regions of different colour and area."""
    frame = torch.zeros(1, 3, 24, 36)
    frame[..., :14, 20:] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    frame[..., 14:, :20] = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)
    frame[..., 14:, 20:] = torch.tensor([1.0, 1.0, 1.0]).view(3, 1, 1)
    return frame


def test_flat_regions_are_the_masks_largest_first() -> None:
    masks = Superpixels(count=4, compactness=1)(quarters())
    expected = torch.zeros(1, 4, 24, 36)
    expected[:, 0, :14, :20] = 1  # 280 pixels
    expected[:, 1, :14, 20:] = 1  # 224
    expected[:, 2, 14:, :20] = 1  # 200
    expected[:, 3, 14:, 20:] = 1  # 160
    assert torch.equal(masks, expected)


def test_missing_segments_are_empty_and_the_smallest_are_dropped() -> None:
    noise = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    found = [int(Superpixels(count)(noise).sum(dim=(-2, -1)).gt(0).sum(1).min()) for count in (4, 16, 50)]
    assert found[0] <= 4
    masks = Superpixels(50)(noise)
    areas = masks.sum(dim=(-2, -1))
    assert masks.shape == (2, 50, 40, 56)
    assert (areas.diff(dim=1) <= 0).all()  # largest first, so empty ones come last
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert masks.sum(1).max() == 1  # no pixel twice


def test_a_clip_is_its_frames_and_repeats() -> None:
    clip = torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    source = Superpixels(9)
    together = source(clip)
    assert torch.equal(together, torch.cat([source(frame[None]) for frame in clip]))
    assert torch.equal(together, Superpixels(9)(clip))
    assert together.dtype == torch.float32


def test_tiny_frames() -> None:
    assert Superpixels(16)(torch.rand(1, 3, 2, 3)).shape == (1, 16, 2, 3)
    assert Superpixels(16)(torch.rand(1, 3, 1, 1)).shape == (1, 16, 1, 1)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must be positive, got count=0, compactness=10"):
        Superpixels(0)
    with pytest.raises(ValueError, match=r"need frames \(t, 3, h, w\), got \(1, 2, 3, 8, 8\); give one clip a call"):
        Superpixels()(torch.rand(1, 2, 3, 8, 8))


def test_the_configurations() -> None:
    with initialize_config_dir(str(Path(vsrplug.conf.__file__).parent), version_base=None):
        assert instantiate(compose(overrides=["+masks=none"])).masks is None
        source = instantiate(compose(overrides=["+masks=superpixels"])).masks
    default = Superpixels()
    assert (source.count, source.compactness) == (default.count, default.compactness)
