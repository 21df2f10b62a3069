"""Networks from a low-resolution clip to a super-resolved one, each with named sites for plug-ins."""

from __future__ import annotations

if __name__ != "vsrplug.backbones":  # else every class would exist twice, and isinstance would fail between the two
    raise ImportError(
        f"this folder is the package vsrplug.backbones, but it was imported as {__name__!r}; "
        "write `from vsrplug.backbones import ...`"
    )

from collections.abc import Callable

from torch import nn

from .basicvsr import BasicVSR, basicvsr_tiny
from .basicvsr_pp import BasicVSRPlusPlus
from .bicubic import Bicubic
from .edvr import EDVR
from .iconvsr import IconVSR
from .latent_vsr import LatentVSR
from .lucas_kanade import LucasKanade
from .mana import MANA
from .pwcnet import PWCNet
from .real_basicvsr import RealBasicVSR
from .sliding_window import SlidingWindow
from .spynet import SPyNet
from .stvun import STVUN

__all__ = [
    "EDVR",
    "MANA",
    "NETWORKS",
    "STVUN",
    "BasicVSR",
    "BasicVSRPlusPlus",
    "Bicubic",
    "IconVSR",
    "LatentVSR",
    "LucasKanade",
    "PWCNet",
    "RealBasicVSR",
    "SPyNet",
    "SlidingWindow",
    "basicvsr_tiny",
]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "basicvsr": BasicVSR,
    "basicvsr_pp": BasicVSRPlusPlus,
    "basicvsr_tiny": basicvsr_tiny,
    "bicubic": Bicubic,
    "edvr": EDVR,
    "iconvsr": IconVSR,
    "latent_vsr": LatentVSR,
    "mana": MANA,
    "pwcnet": PWCNet,
    "real_basicvsr": RealBasicVSR,
    "spynet": SPyNet,
    "stvun": STVUN,
}
