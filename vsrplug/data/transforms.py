"""Crops, flips, quarter turns, time reversal and mirroring that move frames, masks and flows together.

A sample is a dict. `lr`, `hr`, `lr_between`, `hr_between` and `masks` are (t, c, h, w); `flow_backward` and
`flow_forward` are (t-1, 2, h, w), LR pixels, x then y; anything that is not a tensor (the name) is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Sample = dict[str, Any]


class Box(NamedTuple):
    """A rectangle of a frame, in LR pixels."""

    top: int
    left: int
    height: int
    width: int

    def grown(self, margin: int, height: int, width: int) -> Box:
        """The box with `margin` more on each side, as far as a frame of height x width allows."""
        top, left = max(self.top - margin, 0), max(self.left - margin, 0)
        bottom = min(self.top + self.height + margin, height)
        right = min(self.left + self.width + margin, width)
        return Box(top, left, bottom - top, right - left)

    def scaled(self, scale: int) -> Box:
        """The same rectangle in pixels `scale` times smaller."""
        return Box(*(scale * value for value in self))

    def cut(self, frames: Tensor) -> Tensor:
        """The rectangle of frames (..., h, w), as a view."""
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width]


def crop(sample: Sample, box: Box, scale: int) -> Sample:
    """The rectangle `box` (LR pixels) of every tensor; `hr` and `hr_between` at `scale` times the coordinates."""
    return {
        key: (box.scaled(scale) if key.startswith("hr") else box).cut(value) if isinstance(value, Tensor) else value
        for key, value in sample.items()
    }


def flip_horizontal(sample: Sample) -> Sample:
    """Left becomes right; the x of each flow vector changes its sign."""
    return _move(sample, lambda planes: planes.flip(-1), lambda flow: flow * flow.new_tensor([-1, 1]).view(2, 1, 1))


def flip_vertical(sample: Sample) -> Sample:
    """Top becomes bottom; the y of each flow vector changes its sign."""
    return _move(sample, lambda planes: planes.flip(-2), lambda flow: flow * flow.new_tensor([1, -1]).view(2, 1, 1))


def transpose(sample: Sample) -> Sample:
    """Rows become columns, and so do x and y of each flow vector. With a flip, this is a rotation by 90 degrees."""
    return _move(sample, lambda planes: planes.mT, lambda flow: flow.flip(-3))


def reverse_time(sample: Sample) -> Sample:
    """The last frame comes first. What pointed to the next frame now points to the one before, so flows swap roles."""
    reversed_ = {key: value.flip(0) if isinstance(value, Tensor) else value for key, value in sample.items()}
    if "flow_backward" in sample:
        backward, forward = reversed_["flow_backward"], reversed_["flow_forward"]
        reversed_ |= {"flow_backward": forward, "flow_forward": backward}
    return reversed_


def mirror_time(sample: Sample) -> Sample:
    """The clip followed by itself in reverse: t frames become 2 t, and between the two in the middle nothing moves."""
    back = reverse_time(sample)
    mirrored = dict(sample)
    for key, value in sample.items():
        if isinstance(value, Tensor):
            still = [value.new_zeros(1, *value.shape[1:])] if key.startswith("flow_") else []
            mirrored[key] = torch.cat([value, *still, back[key]])
    return mirrored


@dataclass(frozen=True)
class Pose:
    """One of the eight symmetries of the square, forwards or backwards in time."""

    horizontal: bool = False
    vertical: bool = False
    transposed: bool = False
    reversed: bool = False

    def move(self, sample: Sample) -> Sample:
        """The sample in this pose."""
        sample = flip_horizontal(sample) if self.horizontal else sample
        sample = flip_vertical(sample) if self.vertical else sample
        sample = transpose(sample) if self.transposed else sample
        return reverse_time(sample) if self.reversed else sample

    def move_box(self, box: Box, height: int, width: int) -> Box:
        """Where `box` of a frame of height x width lies once the frame is in this pose."""
        top = height - box.top - box.height if self.vertical else box.top
        left = width - box.left - box.width if self.horizontal else box.left
        if self.transposed:
            return Box(left, top, box.width, box.height)
        return Box(top, left, box.height, box.width)


def _move(sample: Sample, place: Callable[[Tensor], Tensor], turn: Callable[[Tensor], Tensor]) -> Sample:
    """`place` moves the pixels of every tensor; `turn` turns the vectors of flows besides."""
    moved = {}
    for key, value in sample.items():
        if isinstance(value, Tensor):
            value = place(value)
            value = turn(value) if key.startswith("flow_") else value
        moved[key] = value
    return moved
