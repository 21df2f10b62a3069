"""How the layers of a demo clip move: smooth random paths of homographies, and the flow that they imply.

A layer's plane has coordinates u in HR pixels around its centre, a frame has coordinates p in HR pixels around its own
centre. At time t the layer is seen through the homography p = M_t u. All of it is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vsrplug.context import Flows

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Path:
    """Where a layer is at each time: rows for the times -1, 0, ..., t, so that a shutter may open around every frame.

    Attributes:
        shift: (t + 2, 2), where the layer's centre is seen, in HR pixels from the frame's centre, x then y.
        angle: (t + 2,), radians.
        zoom: (t + 2,), natural logarithm of the magnification.
        tilt: (t + 2, 2), the perspective row of the homography, per HR pixel.
    """

    shift: Array
    angle: Array
    zoom: Array
    tilt: Array

    def matrices(self, times: Array) -> Array:
        """M_t at any times of [-1, t]: (n, 3, 3), from layer to frame coordinates, linear between the rows."""
        rows = np.column_stack([self.shift, self.angle, self.zoom, self.tilt])
        known = np.arange(-1, len(rows) - 1)
        x, y, angle, zoom, tilt_x, tilt_y = (np.interp(times, known, row) for row in rows.T)
        cosine, sine = np.exp(zoom) * np.cos(angle), np.exp(zoom) * np.sin(angle)
        flat = np.stack([cosine, -sine, x, sine, cosine, y, tilt_x, tilt_y, np.ones_like(x)], axis=1)
        return flat.reshape(-1, 3, 3)


def random_path(rng: np.random.Generator, frames: int, speed: float, lively: float = 1.0) -> Path:
    """A smooth path through (0, 0) at mid-clip.

    Args:
        rng: its randomness.
        frames: length t of the clip.
        speed: typical HR pixels a frame; 0 stands still.
        lively: how much the layer turns, zooms, tilts and shakes besides (0 not at all, 1 as a held camera does).
    """
    steps = frames + 2
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, rng.choice([0.02, 0.15, 0.4]), steps))
    pace = speed * np.exp(_smooth(rng, steps) * 0.3)
    velocity = np.column_stack([np.cos(heading), np.sin(heading)]) * pace[:, None]
    if rng.random() < 0.2:  # a swing: there and back
        velocity *= np.cos(np.arange(steps) * rng.uniform(0.3, 1.2) + rng.uniform(0, 6))[:, None] * 1.4
    shift = np.cumsum(velocity, axis=0)
    if lively and rng.random() < 0.4:  # the tremor of a hand, below a pixel to a few
        shift += rng.normal(0, lively * np.exp(rng.uniform(np.log(0.1), np.log(1.5))), (steps, 2))
    shift -= shift[steps // 2]
    angle = rng.normal(0, 0.12) + lively * _drift(rng, steps, 0.004)
    zoom = lively * _drift(rng, steps, 0.005)
    tilt = rng.normal(0, 3e-4, 2) + lively * np.column_stack([_drift(rng, steps, 1e-5), _drift(rng, steps, 1e-5)])
    return Path(shift, angle, zoom.clip(-0.25, 0.35), tilt.clip(-1.2e-3, 1.2e-3))


def true_flows(matrices: Array, owner: Tensor, scale: int) -> Flows:
    """The flow between consecutive frames at LR resolution, from the layers' homographies.

    Args:
        matrices: (t, layers, 3, 3), from layer to frame coordinates in HR pixels.
        owner: (t, H, W), which layer is seen at each HR pixel.
        scale: HR pixels a LR pixel; divides H and W.

    Returns:
        backward and forward, each (t-1, 2, H / scale, W / scale) float32 in LR pixels, x then y.
    """
    height, width = owner.shape[-2:]
    seen = owner[:, scale // 2 :: scale, scale // 2 :: scale].long()
    # The centre of LR pixel k lies at HR coordinate s (k + 1/2) - 1/2.
    y, x = torch.meshgrid(
        (torch.arange(height // scale, dtype=torch.float64) + 0.5) * scale - height / 2,
        (torch.arange(width // scale, dtype=torch.float64) + 0.5) * scale - width / 2,
        indexing="ij",
    )
    place = torch.stack([x, y, torch.ones_like(x)]).flatten(1)

    def flow(source: Array, target: Array, seen: Tensor) -> Tensor:
        step = torch.from_numpy(target @ np.linalg.inv(source))  # (t-1, layers, 3, 3), frame to frame
        moved = step @ place
        moved = moved[:, :, :2] / moved[:, :, 2:] - place[:2]
        index = seen.flatten(1)[:, None, None].expand(-1, 1, 2, -1)
        return (moved.gather(1, index)[:, 0] / scale).unflatten(-1, x.shape).float()

    return Flows(
        backward=flow(matrices[:-1], matrices[1:], seen[:-1]), forward=flow(matrices[1:], matrices[:-1], seen[1:])
    )


def _smooth(rng: np.random.Generator, steps: int) -> Array:
    """A slow curve of unit size around zero."""
    phase, rate = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.05, 0.6, 3)
    return np.asarray(np.sin(np.arange(steps)[:, None] * rate + phase).mean(axis=1) * 1.5)


def _drift(rng: np.random.Generator, steps: int, size: float) -> Array:
    """A sum of small steps that starts anywhere and is zero at mid-clip; `size` is one step's deviation."""
    strength = size * rng.choice([0.0, 1.0, 3.0], p=[0.3, 0.5, 0.2])
    path = np.cumsum(strength * (rng.normal() + 0.5 * _smooth(rng, steps)))
    return np.asarray(path - path[steps // 2])
