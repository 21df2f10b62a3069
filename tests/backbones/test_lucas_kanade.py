"""`LucasKanade` against motion that is known, and against scikit-image's iterative Lucas-Kanade."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.registration import optical_flow_ilk

from vsrplug.backbones import LucasKanade
from vsrplug.data import DemoClips
from vsrplug.degradations import BI


def waves(shift_x: float, shift_y: float) -> torch.Tensor:
    """A smooth pattern sampled where it was moved to: no interpolation is involved."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    x, y = x - shift_x, y - shift_y
    grey = 0.5 + 0.15 * (x / 3).sin() * (y / 4).cos() + 0.15 * (x / 5 + y / 7).sin() + 0.1 * (y / 2.5 - x / 9).cos()
    return grey.expand(1, 3, -1, -1)


@pytest.mark.parametrize("shift", [(0.3, -0.2), (1.7, 0.6), (-3.2, 2.4)])
def test_known_translation(shift: tuple[float, float]) -> None:
    # Damping holds the default, which is made for noisy frames, back by some hundredths of a pixel.
    flow = LucasKanade(iterations=10, damping=1e-5)(waves(0, 0), waves(*shift))[
        0, :, 16:-16, 16:-16
    ]  # what leaves the frame spoils the windows at its border
    error = (flow - torch.tensor(shift).view(2, 1, 1)).square().sum(0).sqrt()
    assert error.mean() < 0.08
    assert LucasKanade()(waves(0, 0), waves(0, 0)).abs().max() < 1e-5  # a warp by nothing rounds


def test_photographs_in_motion() -> None:
    """End-point error against the true flow: far below that of no motion, and no worse than scikit-image's."""
    still = ours = theirs = 0.0
    for clip in DemoClips("train", clips=4, frames=2, size=(128, 160)):
        lr = BI(4)(torch.stack(list(clip.frames())))
        true = clip.flows(4).backward[0].float()
        still += true.square().sum(0).sqrt().mean().item()
        ours += (LucasKanade()(lr[:1], lr[1:])[0] - true).square().sum(0).sqrt().mean().item()
        y, x = optical_flow_ilk(*(frame.mean(0).numpy() for frame in lr), radius=4)
        theirs += (torch.from_numpy(np.stack([x, y])) - true).square().sum(0).sqrt().mean().item()
    assert ours < 0.6 * still
    assert ours < 1.1 * theirs


def test_any_size_and_dtype() -> None:
    for h, w in ((1, 1), (5, 3), (17, 30)):
        assert LucasKanade()(torch.rand(2, 3, h, w), torch.rand(2, 3, h, w)).isfinite().all()
    flow = LucasKanade()(waves(0, 0).bfloat16(), waves(0.5, 0).bfloat16())
    assert flow.dtype == torch.float32
    assert not LucasKanade().state_dict()
