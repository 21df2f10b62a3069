"""Words hold exactly the masks they were packed from; a hash is that of what a frame shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vsrplug.masks import pack, unpack
from vsrplug.masks.words import as_tensor, frame_hash


def random_masks(t: int, m: int, h: int, w: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(t, m, h, w, generator=torch.Generator().manual_seed(seed)) > 0.5).float()


@pytest.mark.parametrize("m", [0, 1, 7, 8, 9, 33, 63, 64])
def test_masks_come_back(m: int) -> None:
    masks = random_masks(2, m, 5, 7)
    words = as_tensor(pack(masks))
    assert words.shape == (2, 5, 7)
    assert torch.equal(unpack(words, m).float(), masks)
    assert not unpack(words, 64)[:, m:].any()


def test_mask_k_is_bit_k() -> None:
    masks = torch.zeros(1, 64, 1, 64)
    masks[0, range(64), 0, range(64)] = 1
    assert pack(masks)[0, 0].tolist() == [2**k for k in range(64)]


def test_words_move_as_the_masks_do() -> None:
    masks = random_masks(3, 64, 6, 9)
    words = as_tensor(pack(masks))
    moves = (
        lambda planes: planes.flip(-1),
        lambda planes: planes.flip(-2),
        lambda planes: planes.mT,
        lambda planes: planes.flip(0),
        lambda planes: planes[..., 1:4, 2:9],
        lambda planes: planes.rot90(1, (-2, -1)),
    )
    for move in moves:
        assert torch.equal(unpack(move(words), 64).float(), move(masks))


def test_batches_are_unpacked_where_they_lie() -> None:
    masks = random_masks(6, 10, 4, 5)
    words = as_tensor(pack(masks)).view(2, 3, 4, 5)
    assert torch.equal(unpack(words, 10).float(), masks.view(2, 3, 10, 4, 5))
    assert unpack(words.to("meta"), 10).shape == (2, 3, 10, 4, 5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"holds up to 64 masks \(t, m, h, w\), got \(1, 65, 2, 2\); keep the largest"):
        pack(torch.zeros(1, 65, 2, 2))
    with pytest.raises(TypeError, match=r"words of masks are int64, got torch\.int32"):
        unpack(torch.zeros(2, 2, dtype=torch.int32), 1)


def test_a_hash_is_of_size_and_8_bit_levels() -> None:
    levels = torch.randint(256, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    frame = levels / 255
    assert frame_hash(frame) == frame_hash(frame.double()) == frame_hash((frame * 65535).round() / 65535)
    assert frame_hash(frame) != frame_hash(frame.view(3, 6, 4))
    changed = frame.clone()
    changed[1, 2, 3] += 1 / 255 if levels[1, 2, 3] < 255 else -1 / 255
    assert frame_hash(changed) != frame_hash(frame)
    assert len(frame_hash(frame)) == 32
    assert np.unique([frame_hash(torch.full((3, 2, 2), k / 255)) for k in range(256)]).size == 256
