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
from .bicubic import Bicubic
from .edvr import EDVR
from .lucas_kanade import LucasKanade
from .sliding_window import SlidingWindow
from .spynet import SPyNet

__all__ = ["EDVR", "NETWORKS", "BasicVSR", "Bicubic", "LucasKanade", "SPyNet", "SlidingWindow", "basicvsr_tiny"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "basicvsr": BasicVSR,
    "basicvsr_tiny": basicvsr_tiny,
    "bicubic": Bicubic,
    "edvr": EDVR,
    "spynet": SPyNet,
}
