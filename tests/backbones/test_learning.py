"""Fresh networks learn: on one clip, each falls below the error of the frames enlarged bilinearly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vsrplug.backbones import (
    EDVR,
    MANA,
    STVUN,
    BasicVSR,
    BasicVSRPlusPlus,
    IconVSR,
    LatentVSR,
    RealBasicVSR,
    SPyNet,
)
from vsrplug.data import DemoClips
from vsrplug.degradations import BI


def flow() -> SPyNet:
    return SPyNet(2, (4, 4, 4, 4))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "edvr": lambda: EDVR(16, 3, 1, 2, deform_groups=2),
    "basicvsr": lambda: BasicVSR(16, 2, flow=flow(), reconstruction_channels=16),
    "iconvsr": lambda: IconVSR(16, 2, temporal_padding=1, flow=flow(), reconstruction_channels=16),
    "basicvsr_pp": lambda: BasicVSRPlusPlus(16, 1, deform_groups=4, flow=flow(), reconstruction_channels=16),
    "real_basicvsr": lambda: RealBasicVSR(16, 2, 1, flow=flow(), reconstruction_channels=16),
    "mana": lambda: MANA(16, 3, 1, 2, memory_size=16, groups=4),
    "stvun": lambda: STVUN(8, 3, flow=flow()),
    "latent_vsr": lambda: LatentVSR(16, 4, length=3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_beats_the_skip_on_a_clip(name: str) -> None:
    """Fresh layers add noise to the skip: twenty steps reach its error, and then the rest is gained."""
    clip = DemoClips(split="train", clips=1, frames=3, size=(32, 32))[0]
    hr = torch.stack(list(clip.frames()))[None]
    lr = BI(4)(hr[0])[None]
    network = NETWORKS[name]().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, betas=(0.9, 0.99))
    truth = hr[:, [1]] if network.window else hr
    frames = lr[:, [1]] if network.window else lr
    skip = F.interpolate(frames[0], scale_factor=4, mode="bilinear", align_corners=False)
    for _ in range(70):
        optimizer.zero_grad()
        loss = (network(lr) - truth).abs().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.95 * (skip - truth[0]).abs().mean()
