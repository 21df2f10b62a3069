"""The file of a clip: any window equals that of the words written; a byte that changed is an error with its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vsrplug.masks import DamagedMasksError
from vsrplug.masks.cache_file import TILE, CacheFile, check_whole, decode_tile, encode_frame
from vsrplug.masks.words import Words

from .making import write_words

RNG = np.random.default_rng(0)
WHOLE = np.iinfo(np.uint64).max


def patches(t: int, h: int, w: int, step: int = 9) -> Words:
    """Few different words, in squares, as masks have."""
    small = RNG.integers(0, WHOLE, (t, -(-h // step), -(-w // step)), np.uint64, endpoint=True)
    return small.repeat(step, 1).repeat(step, 2)[:, :h, :w]


@pytest.mark.parametrize("size", [(1, 1), (63, 65), (64, 64), (64, 112), (70, 200), (130, 129)])
def test_every_window_equals_that_of_the_words(tmp_path: Path, size: tuple[int, int]) -> None:
    words = patches(4, *size)
    file = CacheFile(write_words(tmp_path / "a.masks", words))
    assert (file.header.size, len(file.header.hashes)) == (size, 4)
    assert np.array_equal(file.read(range(4), 0, 0, *size), words)
    for _ in range(30):
        start, stop = sorted(RNG.integers(0, 5, 2))
        top, left = (RNG.integers(side) for side in size)
        height, width = (RNG.integers(1, side - first + 1) for side, first in zip(size, (top, left), strict=True))
        found = file.read(range(start, stop), top, left, height, width)
        assert np.array_equal(found, words[start:stop, top : top + height, left : left + width])
    assert np.array_equal(file.read([3, 0], 0, 0, 1, 1), words[[3, 0], :1, :1])


@pytest.mark.parametrize("different", [1, 256, 257, TILE * TILE])
def test_a_tile_with_so_many_different_words(different: int) -> None:
    table = RNG.choice(2**62, different, replace=False).astype(np.uint64)
    table[0] = WHOLE
    words = np.resize(table, (TILE, TILE))
    (tile,) = encode_frame(words)
    assert np.array_equal(decode_tile(tile, words.shape), words)


def test_frames_without_masks_take_next_to_nothing(tmp_path: Path) -> None:
    words = np.zeros((5, 180, 320), np.uint64)
    path = write_words(tmp_path / "a.masks", words)
    assert not CacheFile(path).read(range(5), 3, 5, 64, 64).any()
    assert path.stat().st_size < words.nbytes / 500


def test_the_same_words_are_the_same_bytes(tmp_path: Path) -> None:
    words = patches(2, 40, 50)
    one, two = (write_words(tmp_path / name, words).read_bytes() for name in ("a.masks", "b.masks"))
    assert one == two


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    words = patches(2, 70, 80)
    path = write_words(tmp_path / "a.masks", words)
    whole = path.read_bytes()
    check_whole(path)
    for at in [*range(40), *RNG.integers(40, len(whole), 60), len(whole) - 1]:
        changed = bytearray(whole)
        changed[at] ^= 1 << RNG.integers(8)
        path.write_bytes(changed)
        with pytest.raises(DamagedMasksError, match=r"a\.masks is damaged, .*; `vsrplug masks` makes it anew"):
            check_whole(path)
        try:  # a window reads only what it needs; what it gives is right, or an error
            assert np.array_equal(CacheFile(path).read(range(2), 0, 0, 70, 80), words)
        except DamagedMasksError as error:
            assert str(path) in str(error)  # noqa: PT017 - either is right
    assert at == len(whole) - 1


@pytest.mark.parametrize("kept", [0, 7, 16, 60, 300, -5, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_words(tmp_path / "a.masks", patches(2, 70, 80))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedMasksError, match=r"a\.masks is damaged, or is no file of masks"):
        CacheFile(path)
    with pytest.raises(DamagedMasksError, match=r"a\.masks is damaged"):
        check_whole(path)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CacheFile(tmp_path / "a.masks")
