"""The chunked result is that of the whole clip, memory is bounded, and a cut starts afresh."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vsrplug import attach
from vsrplug.backbones import EDVR, STVUN, BasicVSR, Bicubic, LucasKanade, SlidingWindow, SPyNet
from vsrplug.context import Context
from vsrplug.data import DemoClips, FrameFolder
from vsrplug.plugins import SEEMPlugin
from vsrplug.scene_cuts import CUT, distance, look, numbered_scenes
from vsrplug.upscaling import Upscaler, join, tile_starts


class Frames:
    """A clip in memory."""

    name = "frames"

    def __init__(self, frames: Tensor) -> None:
        self.all = frames

    def __len__(self) -> int:
        return len(self.all)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        yield from self.all[start:stop]


class Mean(nn.Module):
    """Recurrent in the extreme: each frame plus the mean of all it sees, x2; what borders do to it is known."""

    window = None
    multiple = 1
    channels = 3
    scale = 2

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, frames: Tensor, context: Context | None = None) -> Tensor:
        self.seen.append(frames.shape[1])
        mixed = (frames + frames.mean(1, keepdim=True)) / 2
        return mixed.repeat_interleave(2, -1).repeat_interleave(2, -2)


def moving(t: int, h: int = 12, w: int = 16) -> Frames:
    generator = torch.Generator().manual_seed(1)
    base = torch.rand(3, h, w, generator=generator)
    return Frames(torch.stack([base * (0.9 + 0.1 * torch.sin(torch.tensor(i / 5))) for i in range(t)]))


def restored(upscaler: Upscaler, clip: Frames | FrameFolder) -> Tensor:
    numbers, frames = zip(*upscaler.frames(clip), strict=True)
    assert numbers == tuple(range(len(clip)))
    return torch.stack(frames)


@pytest.mark.parametrize("t", [1, 2, 9, 10, 11, 12, 21, 22, 23, 40])
def test_frame_by_frame_networks_give_the_whole_clips_result(t: int) -> None:
    clip = moving(t)
    expected = Bicubic(4)(clip.all[None])[0].clamp(0, 1)
    for chunk, overlap in ((8, 2), (3, 2), (8, 0), (1, 0)):
        result = restored(Upscaler(Bicubic(4), chunk=chunk, overlap=overlap), clip)
        assert torch.equal(result, expected), (chunk, overlap)


@pytest.mark.parametrize(("chunk", "overlap"), [(8, 2), (3, 2), (7, 4)])
def test_window_networks_give_the_whole_clips_result(chunk: int, overlap: int) -> None:
    clip = moving(23, 16, 16)
    network = EDVR(channels=8, extract_blocks=1, reconstruct_blocks=1, deform_groups=2).eval()
    with torch.no_grad():
        expected = SlidingWindow(network)(clip.all[None])[0].clamp(0, 1)
    torch.testing.assert_close(restored(Upscaler(network, chunk=chunk, overlap=overlap), clip), expected)


def test_a_scene_shorter_than_the_window_is_restored() -> None:
    clip = moving(3, 16, 16)
    network = EDVR(channels=8, extract_blocks=1, reconstruct_blocks=1, deform_groups=2).eval()
    with torch.no_grad():
        expected = SlidingWindow(network, padding="replicate")(clip.all[None])[0].clamp(0, 1)
    torch.testing.assert_close(restored(Upscaler(network), clip), expected)


def test_seams_are_blended_linearly() -> None:
    """A loop in float64 over chunks and weights is the oracle."""
    t, chunk, overlap = 21, 8, 3
    clip = moving(t)
    chunks = {0: (0, 11), 8: (5, 19), 16: (13, 21)}
    expected = torch.zeros(t, 3, 24, 32, dtype=torch.float64)
    for start, (low, high) in chunks.items():
        out = Mean()(clip.all[None, low:high].double())[0]
        for i in range(low, high):
            weight = 1.0
            if start > 0 and i < start + overlap:
                weight = (i - (start - overlap) + 0.5) / (2 * overlap)
            if start < 16 and i >= start + chunk - overlap:
                weight = 1 - (i - (start + chunk - overlap) + 0.5) / (2 * overlap)
            expected[i] += weight * out[i - low]
    result = restored(Upscaler(Mean(), chunk=chunk, overlap=overlap), clip)
    torch.testing.assert_close(result, expected.float(), atol=1e-6, rtol=0)


def test_seams_of_a_recurrent_network_are_no_jumps() -> None:
    """Where chunks meet, the result leaves that of the whole clip no faster than elsewhere."""
    clip = moving(30, 16, 16)
    network = BasicVSR(channels=8, blocks=1, flow=SPyNet()).eval()
    with torch.no_grad():
        whole = network(clip.all[None])[0].clamp(0, 1)
    error = restored(Upscaler(network, chunk=8, overlap=4), clip) - whole
    hard = restored(Upscaler(network, chunk=8, overlap=0), clip) - whole
    jump = (error[1:] - error[:-1]).abs().mean((1, 2, 3)).max()
    assert error.abs().max() < hard.abs().max()
    assert jump < (hard[1:] - hard[:-1]).abs().mean((1, 2, 3)).max() / 3


def test_a_short_last_chunk_sees_as_many_frames_as_others() -> None:
    for t, seen in ((24, [24]), (28, [28]), (29, [28, 9]), (100, [28, 32, 32, 32])):
        network = Mean()
        restored(Upscaler(network), moving(t))
        assert network.seen == seen


def test_memory_is_bounded_and_reading_lazy() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    class Counting(Frames):
        def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
            nonlocal most
            for i in range(len(self.all)):
                frame = self.all[i].clone()
                alive.add(frame)
                most = max(most, len(alive))
                yield frame

    clip = Counting(torch.cat([moving(50).all, 1 - moving(40).all]))
    gc.disable()  # nothing may wait for the collector
    try:
        given = []
        for number, _ in Upscaler(Bicubic(2), chunk=8, overlap=3).frames(clip):
            given.append(number)
            most = max(most, len(alive))
    finally:
        gc.enable()
    assert given == list(range(90))
    assert most <= 8 + 2 * 3 + 1  # one more: the first frame of the next scene, found while the last one ends


def test_a_cut_starts_afresh() -> None:
    """Two clips joined are restored as each alone."""
    a, b = (Frames(torch.stack(list(DemoClips("test", clips=2, frames=11, size=(48, 64))[i].frames()))) for i in (0, 1))
    joined = Frames(torch.cat([a.all, b.all]))
    upscaler = Upscaler(Mean(), chunk=6, overlap=2)
    assert torch.equal(restored(upscaler, joined), torch.cat([restored(upscaler, a), restored(upscaler, b)]))
    without = restored(Upscaler(Mean(), chunk=6, overlap=2, cut=None), joined)
    assert not torch.equal(without[9:13], restored(upscaler, joined)[9:13])


def test_cuts_are_told_from_motion() -> None:
    clips = DemoClips("train", clips=12, frames=6, size=(48, 64))
    frames = [list(clip.frames()) for clip in clips]
    inside = [distance(look(a), look(b)) for clip in frames for a, b in pairwise(clip)]
    between = [distance(look(a[-1]), look(b[0])) for a in frames for b in frames if a is not b]
    assert max(inside) < CUT < min(between)
    scenes = [scene for scene, _ in numbered_scenes([f for clip in frames[:3] for f in clip])]
    assert scenes == [0] * 6 + [1] * 6 + [2] * 6


def test_brightness_and_fast_motion_are_no_cuts() -> None:
    frame = next(DemoClips("test", clips=1, frames=1, size=(48, 64))[0].frames())
    assert distance(look(frame), look(frame * 0.8)) < CUT
    assert distance(look(frame), look(frame.roll(16, -1))) < CUT
    assert distance(look(frame), look(frame)) == 0


@pytest.mark.realdata
def test_real_footage_has_no_cuts_inside_and_cuts_between(real_data: Path) -> None:
    folders = sorted(path for path in (real_data / "clips").iterdir() if path.is_dir())
    clips = [list(FrameFolder(folder).frames(0, 22)) for folder in folders]
    assert len(clips) > 5
    inside = [distance(look(a), look(b)) for clip in clips for a, b in pairwise(clip)]
    between = [distance(look(a[-1]), look(b[0])) for a in clips for b in clips if a is not b]
    assert max(inside) < CUT < min(between)


def test_tiles_give_the_whole_frames_result() -> None:
    clip = moving(3, 50, 70)
    expected = Bicubic(4)(clip.all[None])[0].clamp(0, 1)
    result = restored(Upscaler(Bicubic(4), tile=32, tile_overlap=12), clip)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
    large = restored(Upscaler(Bicubic(4), tile=64, tile_overlap=12), clip)  # larger than one side only
    torch.testing.assert_close(large, expected, atol=1e-6, rtol=0)


def test_tiles_cover_and_overlap() -> None:
    for size in range(20, 90):
        starts = tile_starts(size, 20, 7)
        assert (starts[0], starts[-1]) == (0, size - 20)
        assert all(0 < b - a <= 13 for a, b in pairwise(starts))
    assert tile_starts(64, None, 8) == [0]


def test_joining_is_linear_in_the_middle_half() -> None:
    joined = join([torch.zeros(1, 2, 16), torch.ones(1, 2, 16)], [0, 8], dim=-1)
    expected = [0] * 10 + [0.125, 0.375, 0.625, 0.875] + [1] * 10
    torch.testing.assert_close(joined[0, 1], torch.tensor(expected))
    assert torch.equal(joined, join([torch.zeros(1, 16, 2), torch.ones(1, 16, 2)], [0, 8], dim=-2).mT)


def test_masks_are_those_of_the_whole_frame() -> None:
    """Tiles see their part of the masks that the whole frames have."""
    given: list[Tensor] = []
    shapes: list[tuple[int, ...]] = []

    def source(frames: Tensor) -> Tensor:
        given.append(frames)
        return (frames[:, :2] > 0.5).float()

    class Masked(nn.Module):
        def forward(self, frames: Tensor, context: Context) -> Tensor:
            assert context.masks is not None
            shapes.append(tuple(context.masks.shape))
            assert torch.equal(context.masks, (frames[:, :, :2] > 0.5).float())
            return frames

    clip = moving(12, 20, 30)
    result = restored(Upscaler(Masked(), chunk=8, overlap=2, tile=16, tile_overlap=4, masks=source), clip)
    torch.testing.assert_close(result, clip.all)
    assert [len(frames) for frames in given] == [10, 6]
    assert given[0].shape[-2:] == (20, 30)
    assert set(shapes) == {(1, 10, 2, 16, 16), (1, 6, 2, 16, 16)}


def test_plugins_that_need_masks_get_them() -> None:
    network = BasicVSR(channels=8, blocks=1, flow=SPyNet())
    model = attach(network, seem=SEEMPlugin(8, masks=2))
    clip = moving(5)
    masks = lambda frames: (frames[:, :2] > 0.5).float()  # noqa: E731
    with torch.no_grad():
        expected = network.eval()(clip.all[None])[0].clamp(0, 1)
    torch.testing.assert_close(restored(Upscaler(model, masks=masks), clip), expected)
    with pytest.raises(ValueError, match="masks"):
        restored(Upscaler(model), clip)


def test_chunks_without_missing_frames_are_passed_over() -> None:
    network, clip = Mean(), moving(40)
    upscaler = Upscaler(network, chunk=8, overlap=2)
    whole = restored(upscaler, clip)
    network.seen.clear()
    some = dict(upscaler.frames(clip, missing=lambda number: number in (21, 39)))
    assert sorted(some) == [21, 39]
    assert all(torch.equal(frame, whole[number]) for number, frame in some.items())
    assert len(network.seen) == 2  # frame 21 lies in one chunk alone, 39 in the last
    network.seen.clear()
    blended = dict(upscaler.frames(clip, missing=lambda number: number == 15))
    assert torch.equal(blended[15], whole[15])
    assert len(network.seen) == 2  # 15 is blended of two


def test_results_are_ordinary_tensors_and_stay_in_range() -> None:
    class Bright(nn.Module):
        def forward(self, frames: Tensor, context: Context) -> Tensor:
            return frames * 3 - 1

    ((_, frame),) = Upscaler(Bright()).frames(moving(1))
    assert not frame.is_inference()
    assert not frame.requires_grad
    assert (frame.min(), frame.max()) == (0, 1)


def whole(network: nn.Module, clip: Tensor, times: tuple[float, ...]) -> Tensor:
    """The whole clip in one pass; after its last frame, that frame again."""
    with torch.no_grad():
        expected = network(clip[None], times=times)[0].clamp(0, 1)
    expected[-len(times) :] = expected[-len(times) - 1]
    return expected


@pytest.mark.parametrize("t", [1, 2, 10, 11, 23])
@pytest.mark.parametrize(("chunk", "overlap"), [(8, 2), (3, 1)])
def test_frames_in_between_are_those_of_the_whole_clip(t: int, chunk: int, overlap: int) -> None:
    clip = moving(t)
    for between, times in ((1, (0.5,)), (3, (0.25, 0.5, 0.75))):
        upscaler = Upscaler(Bicubic(2), chunk=chunk, overlap=overlap, between=between)
        numbers, frames = zip(*upscaler.frames(clip), strict=True)
        assert numbers == tuple(range((1 + between) * t))
        torch.testing.assert_close(torch.stack(frames), whole(Bicubic(2), clip.all, times), rtol=0, atol=1e-6)


def test_window_networks_make_frames_in_between() -> None:
    torch.manual_seed(0)
    clip, network = moving(13, 16, 16), STVUN(4, frames=3, scale=2, flow=LucasKanade(), times=(0.1, 0.2, 0.3)).eval()
    for between, times in ((0, ()), (2, (1 / 3, 2 / 3))):
        frames = [frame for _, frame in Upscaler(network, chunk=4, overlap=2, between=between).frames(clip)]
        with torch.no_grad():
            expected = SlidingWindow(network)(clip.all[None], times=times)[0].clamp(0, 1)
        assert len(frames) == len(expected) == 13 * (1 + between)
        kept = len(frames) - between
        torch.testing.assert_close(torch.stack(frames)[:kept], expected[:kept], rtol=0, atol=1e-5)
        assert all(torch.equal(frame, frames[kept - 1]) for frame in frames[kept:])


def test_nothing_is_interpolated_across_a_cut() -> None:
    a, b = (torch.stack(list(DemoClips("test", clips=2, frames=7, size=(48, 64))[i].frames())) for i in (0, 1))
    upscaler = Upscaler(Bicubic(2), chunk=4, overlap=1, between=1)
    frames = torch.stack([frame for _, frame in upscaler.frames(Frames(torch.cat([a, b])))])
    apart = torch.cat([whole(Bicubic(2), clip, (0.5,)) for clip in (a, b)])
    torch.testing.assert_close(frames, apart, rtol=0, atol=1e-6)
    across = whole(Bicubic(2), torch.cat([a, b]), (0.5,))
    assert (across[13] - frames[13]).abs().mean() > 0.02


def test_memory_is_bounded_with_frames_in_between() -> None:
    held = []

    class Watched(Upscaler):
        def _restore_onto(self, restored: dict[int, Tensor], given: list[Tensor], low: int, start: int) -> None:
            super()._restore_onto(restored, given, low, start)
            held.append((len(given), len(restored)))

    assert len(list(Watched(Bicubic(2), chunk=6, overlap=2, between=3).frames(moving(60)))) == 240
    assert max(held) <= (6 + 2 * 2, 4 * (6 + 2 * 2))


def test_frames_in_between_that_are_there_are_not_made_again() -> None:
    clip, expected = moving(40), whole(Bicubic(2), moving(40).all, (0.5,))
    upscaler = Upscaler(Bicubic(2), chunk=8, overlap=2, between=1)
    some = dict(upscaler.frames(clip, missing=lambda number: number in (43, 79)))
    assert sorted(some) == [43, 79]
    assert all(torch.allclose(frame, expected[number], atol=1e-6) for number, frame in some.items())


class Broken(nn.Module):
    def forward(self, frames: Tensor, context: Context) -> Tensor:
        out = frames.clone()
        out[:, 2, 0, 0, 0] = torch.nan
        return out


class Greedy(nn.Module):
    def forward(self, frames: Tensor, context: Context) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")


def test_errors_name_what_to_change() -> None:
    network = EDVR(channels=8, extract_blocks=1, reconstruct_blocks=1, deform_groups=2)
    for keywords, message in (
        ({"chunk": 4, "overlap": 4}, "overlap=4 must be smaller than chunk=4; try chunk=12"),
        ({"chunk": 0}, "chunk=0 must be a whole number, 1 or more"),
        ({"overlap": -1}, "overlap=-1 must be a whole number, 0 or more"),
        ({"chunk": "many"}, "chunk=many must be a whole number"),
        ({"tile": 0}, "tile=0 must be a whole number, 1 or more"),
        ({"tile": 32}, "tile_overlap=32 must be smaller than tile=32, which counts the overlap; try tile=128"),
        ({"between": -1}, "between=-1 must be a whole number, 0 or more"),
        (
            {"between": 1, "overlap": 0},
            "overlap=0 leaves a chunk's last frame without a next one; between=1 needs over",
        ),
        ({"cut": 2.0}, "cut=2.0 must lie between 0 and 1; try 0.18, or null"),
    ):
        with pytest.raises(ValueError, match=message):
            Upscaler(Bicubic(4), **keywords)
    with pytest.raises(ValueError, match="overlap=1 is too small for a network with a window of 5 frames; it needs ov"):
        Upscaler(network, overlap=1)
    with pytest.raises(
        ValueError, match=r"between=1 needs a network that makes frames in between, which EDVR does not; "
    ):
        Upscaler(network, between=1)
    with pytest.raises(ValueError, match="frame 2: the model's output has values that are NaN"):
        list(Upscaler(Broken()).frames(moving(5)))
    with pytest.raises(RuntimeError, match=r"out of memory with 12 frames of 200x400 at once; .*chunk=12.*tile=100"):
        list(Upscaler(Greedy()).frames(moving(12, 200, 400)))
