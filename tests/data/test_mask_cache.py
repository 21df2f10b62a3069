"""Masks of whole clips come back from their bits as they were, made once, within a budget."""

from __future__ import annotations

import pytest
import torch

from vsrplug.data.mask_cache import MaskCache
from vsrplug.data.transforms import Box

from .test_training import MemoryClip, clip


def random_masks(m: int, shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.rand(shape[0], m, *shape[2:], generator=torch.Generator().manual_seed(m)) > 0.5).float()


@pytest.mark.parametrize("m", [1, 7, 8, 9, 16, 20])
def test_windows_equal_those_of_the_masks_themselves(m: int) -> None:
    cache = MaskCache([clip()], lambda lr: random_masks(m, lr.shape), lambda c: torch.zeros(len(c), 3, 12, 17))
    expected = random_masks(m, (6, 3, 12, 17))
    found = cache.window(0, 2, 5, Box(3, 4, 5, 6))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected[2:5, :, 3:8, 4:10])  # masks overlap: a label map could not hold them


def test_no_masks_at_all() -> None:
    cache = MaskCache([clip()], lambda lr: random_masks(1, lr.shape)[:, :0], lambda c: torch.zeros(len(c), 3, 12, 17))
    assert cache.window(0, 0, 2, Box(0, 0, 4, 4)).shape == (2, 0, 4, 4)


def test_the_clips_not_used_for_longest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def low_resolution(c: MemoryClip) -> torch.Tensor:
        made.append(c.name)
        return torch.zeros(2, 3, 10, 10)

    monkeypatch.setattr("vsrplug.data.mask_cache._BUDGET", 2 * 2 * 10 * 10)  # two clips of eight masks
    cache = MaskCache([clip(name) for name in "abc"], lambda lr: random_masks(8, lr.shape), low_resolution)
    for name in "abacab":
        cache.window("abc".index(name), 0, 1, Box(0, 0, 4, 4))
    assert made == ["a", "b", "c", "b"]
