"""Controls: what they give is known exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vsrplug.masks import Grid, NoMasks, OtherFrame, Superpixels


def test_no_masks_are_zeros() -> None:
    frames = torch.rand(2, 3, 5, 7)
    assert torch.equal(NoMasks(6)(frames), torch.zeros(2, 6, 5, 7))


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (8, 2, 4), (12, 3, 4), (64, 8, 8), (65, 8, 8)])
def test_grid_cells_are_what_a_loop_over_pixels_finds(count: int, rows: int, columns: int) -> None:
    h, w = 11, 18
    masks = Grid(count)(torch.rand(2, 3, h, w))
    expected = torch.zeros(count, h, w)
    for y in range(h):
        for x in range(w):
            expected[y * rows // h * columns + x * columns // w, y, x] = 1
    assert torch.equal(masks[0], expected)
    assert torch.equal(masks[0], masks[1])
    assert masks[:, rows * columns :].sum() == 0


@pytest.mark.parametrize("t", [2, 5])
def test_other_frame_gives_each_frame_the_masks_of_one_half_a_clip_before(t: int) -> None:
    coarse = torch.rand(t, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    frames = F.interpolate(coarse, scale_factor=8, mode="nearest")
    source = Superpixels(6)
    own, other = source(frames), OtherFrame(source, 4)(frames)
    for frame in range(t):
        assert torch.equal(other[frame], own[(frame - t // 2) % t, :4])
        assert not torch.equal(other[frame], own[frame, :4])


def test_settings_tell_the_controls_apart() -> None:
    made = [NoMasks(6), Grid(6), OtherFrame(Superpixels(6), 6), Superpixels(6)]
    assert len({str(source.settings) for source in made}) == 4
    assert all(source.settings["count"] == 6 for source in made)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="count must be positive, got count=0"):
        Grid(0)
    with pytest.raises(ValueError, match=r"8x8 cells do not fit frames of 5x20"):
        Grid(64)(torch.rand(1, 3, 5, 20))
    with pytest.raises(ValueError, match=r"masks are of frames \(t, 3, h, w\), got \(3, 5, 7\)"):
        NoMasks(2)(torch.rand(3, 5, 7))
    with pytest.raises(ValueError, match="need a clip of two frames or more, got one"):
        OtherFrame(Superpixels(2), 2)(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="count=5 masks are asked for, the source makes 2"):
        OtherFrame(Superpixels(2), 5)(torch.rand(2, 3, 8, 8))
