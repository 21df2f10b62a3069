"""Every network, small: what the tests that walk all of them make. A new network is one row."""

from __future__ import annotations

from collections.abc import Callable

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
    SlidingWindow,
    SPyNet,
)

WINDOW = 3


def flow() -> SPyNet:
    return SPyNet(2, (4, 4, 4, 4))


# Each is made with a width and a scale.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "edvr": lambda width, scale: EDVR(width, WINDOW, 1, 2, deform_groups=2, scale=scale),
    "edvr_predeblur": lambda width, scale: EDVR(width, WINDOW, 1, 2, deform_groups=2, predeblur=True, scale=scale),
    "basicvsr": lambda width, scale: BasicVSR(width, 2, scale, flow(), width),
    "iconvsr": lambda width, scale: IconVSR(
        width, 2, temporal_padding=1, scale=scale, flow=flow(), reconstruction_channels=width
    ),
    "basicvsr_pp": lambda width, scale: BasicVSRPlusPlus(
        width, 1, deform_groups=4, scale=scale, flow=flow(), reconstruction_channels=width
    ),
    "real_basicvsr": lambda width, scale: RealBasicVSR(
        width, 2, 1, scale=scale, flow=flow(), reconstruction_channels=width
    ),
    "mana": lambda width, scale: MANA(width, WINDOW, 1, 2, memory_size=16, scale=scale, groups=4),
    "stvun": lambda width, scale: STVUN(width, WINDOW, scale, flow=flow()),
    "latent_vsr": lambda width, scale: LatentVSR(width, 4, length=3, scale=scale),
}


def on_clips(network: nn.Module) -> nn.Module:
    """The network, sliding over a clip if it takes windows."""
    return SlidingWindow(network, "replicate") if network.window else network
