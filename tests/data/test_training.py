"""Training samples: reproducible one by one, cut as if the whole frame had been degraded, refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vsrplug.context import Flows
from vsrplug.data import TrainingClips
from vsrplug.degradations import BD, BDDUF, BI, STVUN, crop_to_multiple


class MemoryClip:
    """Frames (t, 3, h, w) uint8, decoded from memory; `pixels` and `flows` are offered by the subclasses."""

    def __init__(self, name: str, frames: Tensor) -> None:
        self.name = name
        self.stored = frames
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(self.stored)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        for t in range(len(self))[start:stop]:
            self.decoded.append(t)
            yield self.stored[t].float() / 255


class PixelClip(MemoryClip):
    @property
    def pixels(self) -> Tensor:
        return self.stored


class FlowClip(PixelClip):
    """Its flows say where and when they were cut: values are row, column and time."""

    def flows(self, scale: int) -> Flows:
        t, _, height, width = self.stored.shape
        y, x = torch.meshgrid(torch.arange(height // scale), torch.arange(width // scale), indexing="ij")
        place = torch.stack([x, y]).half().expand(t - 1, -1, -1, -1)
        return Flows(backward=place, forward=-place)


def clip(name: str = "a", t: int = 6, size: tuple[int, int] = (50, 70), kind: type = MemoryClip) -> MemoryClip:
    generator = torch.Generator().manual_seed(len(name) + t)
    return kind(name, torch.randint(256, (t, 3, *size), generator=generator, dtype=torch.uint8))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], Tensor) else one[key] == other[key] for key in one
    )


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    clips = [clip("a"), clip("bb", 9, (60, 60))]
    samples = TrainingClips(clips, BI(), frames=3, patch=8, seed=5)
    first = [samples[k] for k in range(8)]
    again = TrainingClips(clips, BI(), frames=3, patch=8, seed=5)
    assert all(same(again[k], first[k]) for k in (7, 2, 5, 0))
    other = TrainingClips(clips, BI(), frames=3, patch=8, seed=6)
    assert not any(same(other[k], first[j]) for k in range(8) for j in range(8))


def test_bytes_in_memory_and_decoded_frames_give_the_same_samples() -> None:
    decoded = TrainingClips([clip()], BD(), frames=3, patch=8)
    bytes_ = TrainingClips([clip(kind=PixelClip)], BD(), frames=3, patch=8)
    assert all(same(decoded[k], bytes_[k]) for k in range(10))


def test_only_the_window_is_decoded() -> None:
    only = clip(t=30)
    samples = TrainingClips([only], BI(), frames=3, patch=8)
    only.decoded.clear()
    samples[0]
    assert len(only.decoded) == 3


def test_every_window_of_every_clip_is_equally_likely() -> None:
    samples = TrainingClips([clip("short", 4), clip("long", 12)], BI(), frames=4, patch=4, augment=False)
    names = [samples[k]["name"] for k in range(400)]
    assert 20 <= names.count("short") <= 62  # one window of ten: 40 expected, 6 standard deviation


@pytest.mark.parametrize(
    "degradation",
    [BI(4), BD(4), BDDUF(4), STVUN(4), BI(3), BDDUF(3), BI(2), BD(2), BDDUF(2), BI(1), BDDUF(1), STVUN(1), BI(8)],
    ids=str,
)
def test_a_crop_is_the_crop_of_the_degraded_frame_borders_too(degradation: BI) -> None:
    only = clip(t=2, size=(67, 93))
    samples = TrainingClips([only], degradation, frames=2, patch=5, augment=False)
    s = degradation.scale
    hr = crop_to_multiple(only.stored.float() / 255, s)
    lr = degradation(hr)
    places = set()
    for k in range(60 if s > 3 else 10):
        sample = samples[k]
        windows = hr.unfold(2, 5 * s, s).unfold(3, 5 * s, s)  # (t, 3, rows, columns, 5 s, 5 s)
        found = (windows == sample["hr"][:, :, None, None]).flatten(4).all(-1).all(1).all(0).nonzero()
        assert len(found) == 1  # at a whole LR pixel, once
        top, left = found[0].tolist()
        expected = lr[..., top : top + 5, left : left + 5]
        assert (sample["lr"] - expected).abs().max() < 1e-7  # not one grey level in any pixel
        places.add((top, left))
    rows, columns = lr.shape[-2] - 5, lr.shape[-1] - 5
    if rows < 16:  # small enough that the borders were met
        assert {top for top, _ in places} >= {0, rows}
        assert {left for _, left in places} >= {0} or columns > 16


@pytest.mark.parametrize("degradation", [BI(), BD(), BDDUF()], ids=str)
def test_an_augmented_pair_is_degraded_in_its_pose(degradation: BI) -> None:
    only = clip(t=3, size=(48, 48))
    samples = TrainingClips([only], degradation, frames=3, patch=12)  # the whole frame, so only the pose is random
    poses = set()
    for k in range(40):
        sample = samples[k]
        assert torch.equal(sample["lr"], degradation(sample["hr"]))
        poses.add(tuple(sample["hr"][0, 0, 0, :8].tolist()))
    assert len(poses) == 16  # 8 symmetries of the square, forwards and backwards


def test_flows_are_cut_where_the_frames_are() -> None:
    clip_ = clip(t=5, size=(64, 64), kind=FlowClip)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    clip_.stored = torch.stack([x // 4, y // 4, x * 0]).to(torch.uint8).expand(5, -1, -1, -1)
    samples = TrainingClips([clip_], BI(), frames=4, patch=6, augment=False)
    for k in range(5):
        sample = samples[k]
        place = sample["hr"][:, :2, ::4, ::4] * 255  # column and row of each LR pixel
        assert sample["flow_backward"].dtype == torch.float32
        torch.testing.assert_close(sample["flow_backward"], place[:3], rtol=0, atol=1e-3)
        torch.testing.assert_close(sample["flow_forward"], -place[1:], rtol=0, atol=1e-3)


def test_masks_are_those_of_the_whole_frame_and_made_once() -> None:
    calls = []

    def ranks(lr: Tensor) -> Tensor:
        """Is a pixel brighter than its whole frame is on average? No crop alone could tell."""
        calls.append(lr.shape)
        return (lr > lr.mean(dim=(-2, -1), keepdim=True)).float()

    only = clip(t=4, size=(66, 70))
    samples = TrainingClips([only], BI(), frames=3, patch=6, masks=ranks)
    lr = BI()(crop_to_multiple(only.stored.float() / 255, 4))
    level = lr.mean(dim=(-2, -1), keepdim=True)
    for k in range(10):
        sample = samples[k]
        assert sample["masks"].shape == (3, 3, 6, 6)
        hits = [
            torch.equal(sample["masks"], (sample["lr"] > level[order]).float())
            for order in ([0, 1, 2], [1, 2, 3], [2, 1, 0], [3, 2, 1])
        ]
        assert any(hits)
    assert calls == [(4, 3, 16, 17)]


def test_one_frame_is_a_window() -> None:
    samples = TrainingClips([clip(t=1, kind=FlowClip)], BI(), frames=1, patch=6)
    assert samples[0]["lr"].shape == (1, 3, 6, 6)
    assert samples[0]["flow_backward"].shape == (0, 2, 6, 6)


@pytest.mark.parametrize(("frames", "between"), [(3, 1), (5, 1), (3, 3)])
@pytest.mark.parametrize("kind", [MemoryClip, FlowClip])
def test_frames_in_between_are_those_of_the_unbroken_window(frames: int, between: int, kind: type) -> None:
    """A window of every frame of the stretch is the oracle, forwards and reversed."""
    step, stretch = between + 1, (frames - 1) * (between + 1) + 1
    middle = stretch // 2
    clips = [clip(t=10, kind=kind), clip("long", t=12, kind=kind)]
    masks = lambda lr: (lr > 0.5).float()  # noqa: E731
    apart = TrainingClips(clips, STVUN(), frames=frames, patch=6, between=between, masks=masks, seed=4)
    unbroken = TrainingClips(clips, STVUN(), frames=stretch, patch=6, masks=masks, seed=4)
    for k in range(12):
        sample, whole = apart[k], unbroken[k]
        assert sample.keys() == {"name", "lr", "hr", "masks", "lr_between", "hr_between"}
        assert sample["name"] == whole["name"]
        for key in ("lr", "hr", "masks"):
            assert torch.equal(sample[key], whole[key][::step]), key
        for key in ("lr", "hr"):
            assert torch.equal(sample[f"{key}_between"], whole[key][middle + 1 : middle + step]), key


def test_a_degradation_sees_the_frames_of_a_window_in_order() -> None:
    seen = []

    class Watching(STVUN):
        def __call__(self, hr: Tensor) -> Tensor:
            seen.append((hr[:, 0, 0, 0] * 255).round().int().tolist())
            return super().__call__(hr)

    only = clip(t=9, kind=PixelClip)
    only.stored = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 3, 48, 48)
    TrainingClips([only], Watching(), frames=3, patch=6, between=3, augment=False)[0]
    assert seen == [[0, 4, 5, 6, 7, 8]]


def test_refusals() -> None:
    for given in ({"frames": 4}, {"frames": 1}, {"frames": 3, "mirror": True}):
        with pytest.raises(
            ValueError, match=r"between=1 takes windows with a middle frame and one after it: frames=3, 5"
        ):
            TrainingClips([clip("long", 20)], BI(), patch=4, between=1, **given)
    with pytest.raises(ValueError, match="between=-1 takes windows"):
        TrainingClips([clip()], BI(), frames=3, patch=4, between=-1)
    with pytest.raises(ValueError, match=r"'a' has 6 frames, .* frames=3 with between=3, which takes 9; leave"):
        TrainingClips([clip()], BI(), frames=3, patch=4, between=3)
    with pytest.raises(ValueError, match="no clips to train on"):
        TrainingClips([], BI())
    with pytest.raises(ValueError, match=r"clip 'walk' has 6 frames, but training windows have frames=7; leave"):
        TrainingClips([clip("long", 9), clip("walk", 6)], BI(), patch=4)
    with pytest.raises(ValueError, match=r"clip 'a' has frames of 50x70, that is 12x17 .* at scale 4, but patch=13"):
        TrainingClips([clip()], BI(), frames=2, patch=13)
    with pytest.raises(ValueError, match="counts of at least 1, got frames=0, patch=8"):
        TrainingClips([clip()], BI(), frames=0, patch=8)
    with pytest.raises(ValueError, match=r"must return \(t, m, h, w\) .* clip 'a', it returned \(6, 12, 17\)"):
        TrainingClips([clip()], BI(), frames=2, patch=8, masks=lambda lr: lr[:, 0])[0]
