"""Frames, masks and flows stay together through every crop, flip, turn and time reversal."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vsrplug.data.transforms import (
    Box,
    Pose,
    Sample,
    crop,
    flip_horizontal,
    flip_vertical,
    mirror_time,
    reverse_time,
    transpose,
)

STEPS = (flip_horizontal, flip_vertical, transpose, reverse_time)
T, H, W, SCALE = 4, 7, 9, 2


def sample(seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    lr = torch.rand(T, 3, H, W, generator=generator, dtype=torch.float64)
    flow = 3 * torch.randn(2, T - 1, 2, H, W, generator=generator, dtype=torch.float64)
    return {
        "lr": lr,
        "hr": lr.repeat_interleave(SCALE, -1).repeat_interleave(SCALE, -2),
        "masks": (lr[:, :2] > 0.5).double(),
        "flow_backward": flow[0],
        "flow_forward": flow[1],
        "name": "a clip",
    }


def warp(frame: Tensor, flow: Tensor) -> Tensor:
    """out(y, x) = frame(y + v, x + u), bilinear, zero outside: plain loops, x then y as the house has it."""
    _, height, width = frame.shape
    out = torch.zeros_like(frame)
    for y, x in itertools.product(range(height), range(width)):
        at_x, at_y = x + float(flow[0, y, x]), y + float(flow[1, y, x])
        for yy, xx in itertools.product((int(at_y // 1), int(at_y // 1) + 1), (int(at_x // 1), int(at_x // 1) + 1)):
            if 0 <= yy < height and 0 <= xx < width:
                out[:, y, x] += frame[:, yy, xx] * (1 - abs(at_y - yy)) * (1 - abs(at_x - xx))
    return out


def warped(s: Sample) -> Sample:
    """What the flows say: frame i + 1 warped onto frame i, and frame i onto frame i + 1."""
    lr = s["lr"]
    onto_before = torch.stack([warp(lr[i + 1], s["flow_backward"][i]) for i in range(T - 1)])
    onto_after = torch.stack([warp(lr[i], s["flow_forward"][i]) for i in range(T - 1)])
    return {"before": onto_before, "after": onto_after}


@pytest.mark.parametrize("seed", range(6))
def test_warping_the_moved_frames_by_the_moved_flows_is_moving_the_warped_frames(seed: int) -> None:
    chain = [STEPS[i] for i in torch.randint(4, (5,), generator=torch.Generator().manual_seed(seed)).tolist()]
    moved, expected = sample(seed), warped(sample(seed))
    for step in chain:
        moved, expected = step(moved), step(expected)
    if chain.count(reverse_time) % 2:  # then the earlier frame of each pair is the later one
        expected = {"before": expected["after"], "after": expected["before"]}
    found = warped(moved)
    torch.testing.assert_close(found["before"], expected["before"], rtol=0, atol=1e-12)
    torch.testing.assert_close(found["after"], expected["after"], rtol=0, atol=1e-12)


def test_a_mirrored_clip_begins_with_the_clip_and_is_its_own_reversal() -> None:
    given, found = sample(), mirror_time(sample())
    back = reverse_time(found)
    assert found["name"] == "a clip"
    for key in given.keys() - {"name"}:
        flow = key.startswith("flow_")
        assert len(found[key]) == 2 * T - flow
        assert torch.equal(found[key][: T - flow], given[key])
        assert torch.equal(found[key], back[key])
        assert not flow or not found[key][T - 1].any()  # the last frame is followed by itself


@pytest.mark.parametrize("seed", range(6))
def test_masks_and_hr_follow_the_frames(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    moved = sample(seed)
    for i in torch.randint(5, (6,), generator=generator).tolist():
        if i < 4:
            moved = STEPS[i](moved)
        else:
            height, width = moved["lr"].shape[-2:]
            moved = crop(moved, Box(1, 0, height - 1, width - 1), SCALE)
    assert torch.equal(moved["masks"], (moved["lr"][:, :2] > 0.5).double())
    assert torch.equal(moved["hr"], moved["lr"].repeat_interleave(SCALE, -1).repeat_interleave(SCALE, -2))
    assert moved["flow_backward"].shape == (T - 1, 2, *moved["lr"].shape[-2:])
    assert moved["name"] == "a clip"


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=4)))
def test_a_pose_is_its_steps_and_moves_boxes_like_pixels(flags: tuple[bool, ...]) -> None:
    pose, expected = Pose(*flags), sample()
    for flag, step in zip(flags, STEPS, strict=True):
        expected = step(expected) if flag else expected
    moved = pose.move(sample())
    assert all(torch.equal(moved[key], expected[key]) for key in expected if key != "name")
    box = Box(1, 2, 3, 5)
    inside = pose.move(crop(sample(), box, SCALE))
    assert torch.equal(inside["lr"], pose.move_box(box, H, W).cut(moved["lr"]))


def test_a_quarter_turn_is_a_transpose_and_a_flip() -> None:
    turned = flip_horizontal(transpose(sample()))
    assert torch.equal(turned["lr"], torch.rot90(sample()["lr"], -1, (-2, -1)))


def test_each_step_undoes_itself() -> None:
    for step in STEPS:
        twice = step(step(sample()))
        assert all(torch.equal(twice[key], value) for key, value in sample().items() if key != "name")


def test_a_grown_box_ends_at_the_frame() -> None:
    assert Box(1, 5, 4, 4).grown(2, 20, 10) == Box(0, 3, 7, 7)
    assert Box(1, 5, 4, 4).scaled(2) == Box(2, 10, 8, 8)
