"""Scenes of moving layers, and their rendering into frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vsrplug.data import _canvas
from vsrplug.data._motion import Path, random_path


class Layer(NamedTuple):
    """One plane of a scene. `canvas` is (4, h, w) float32, RGB times opacity, then opacity."""

    canvas: Tensor
    path: Path


def random_scene(
    rng: np.random.Generator, shown: Sequence[_canvas.Picture], frames: int, size: tuple[int, int]
) -> list[Layer]:
    """A background and up to three occluders, farthest first."""
    height, width = size
    camera_speed = 0.0 if rng.random() < 0.06 else _log_uniform(rng, 0.15, 10)
    camera = random_path(rng, frames, camera_speed, lively=float(camera_speed > 0))
    margin = min(64, 8 + int(camera_speed * frames / 2))
    sides = [_canvas.DENSITY * (side + 2 * margin) + 1 for side in size]
    ground = _canvas.paint(rng, shown, sides[0], sides[1], shares=(0.5, 0.33, 0.17))
    layers = [Layer(_planes(ground, np.ones_like(ground[..., :1])), camera)]
    for _ in range(rng.choice(4, p=[0.2, 0.35, 0.25, 0.2])):
        sides = [int(_canvas.DENSITY * side * _log_uniform(rng, 0.15, 0.8)) for side in size]
        colour = _canvas.paint(rng, shown, sides[0], sides[1], shares=(0.75, 0.1, 0.15))
        own = random_path(rng, frames, 0.0 if rng.random() < 0.1 else _log_uniform(rng, 0.1, 10), lively=0.7)
        centre = rng.uniform(-0.4, 0.4, 2) * (width, height)
        parallax = rng.uniform(0.9, 1.6)  # what is nearer moves more
        path = Path(own.shift + parallax * camera.shift + centre, own.angle + camera.angle, own.zoom, own.tilt)
        layers.append(Layer(_planes(colour, _canvas.outline(rng, sides[0], sides[1])), path))
    return layers


def render(layers: Sequence[Layer], frames: int, size: tuple[int, int], shutter: float = 0.0) -> tuple[Tensor, Tensor]:
    """The frames of a scene.

    Args:
        layers: farthest first; the first is mirrored without end, the others end at their canvas.
        frames: length t.
        size: (H, W).
        shutter: share of the time between two frames for which the shutter is open; above 0, motion blurs.

    Returns:
        (t, 3, H, W) float32, not clamped, and the index of the layer seen, (t, H, W) uint8.
    """
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    place = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # (3, H W)
    steps = [np.linalg.norm(np.diff(layer.path.shift, axis=0), axis=1).max() for layer in layers]
    exposures = int(np.clip(np.ceil(max(steps) * shutter) + 1, 1, 6)) if shutter else 1
    opening = (np.arange(exposures) + 0.5) / exposures - 0.5 if exposures > 1 else np.zeros(1)
    pixels = torch.empty(frames, 3, height, width)
    owner = torch.zeros(frames, height, width, dtype=torch.uint8)
    for t in range(frames):
        times = t + shutter * opening
        scene = torch.zeros(exposures, 3, height, width)
        for number, layer in enumerate(layers):
            view = torch.from_numpy(np.linalg.inv(layer.path.matrices(times))).float() @ place
            seen = _look(layer.canvas, view[:, :2] / view[:, 2:], "reflection" if number == 0 else "zeros")
            seen = seen.view(4, exposures, height, width).transpose(0, 1)
            opacity = seen[:, 3:].clamp(0, 1)
            scene = scene * (1 - opacity) + seen[:, :3]
            owner[t][opacity.mean(dim=(0, 1)) > 0.5] = number
        pixels[t] = scene.mean(dim=0)
    return pixels, owner


def _planes(colour: _canvas.Canvas, opacity: _canvas.Canvas) -> Tensor:
    """(4, h, w): premultiplied, so that what lies outside the outline cannot bleed in."""
    planes = _canvas.integrate(np.concatenate([colour * opacity, opacity], axis=2))
    return torch.from_numpy(planes).permute(2, 0, 1).contiguous()


def _look(canvas: Tensor, at: Tensor, beyond: str) -> Tensor:
    """Bicubic values of `canvas` (4, h, w) at layer coordinates (n, 2, places): (4, n * places)."""
    size = torch.tensor(canvas.shape[:0:-1])
    grid = at.transpose(1, 2) * (2 * _canvas.DENSITY / size)
    values = F.grid_sample(canvas[None], grid.reshape(1, 1, -1, 2), "bicubic", beyond, align_corners=False)
    return values[0, :, 0]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
