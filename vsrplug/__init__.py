"""vsrplug: plug-in modules for video super-resolution.

Attach a module to any VSR network without editing it, know that nothing changed, train only what was attached.
Importing this package loads torch and einops only; what needs Lightning is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vsrplug.context import Context
from vsrplug.foreign import ForeignSite
from vsrplug.official import load_backbone, load_official
from vsrplug.plugged import PluggedModel, attach
from vsrplug.plugin import Plugin
from vsrplug.plugin_files import load_plugins, save_plugins
from vsrplug.site import SiteSpec

if TYPE_CHECKING:
    from vsrplug.data import VSRDataModule
    from vsrplug.module import VSRModule

__all__ = [
    "Context",
    "ForeignSite",
    "PluggedModel",
    "Plugin",
    "SiteSpec",
    "VSRDataModule",
    "VSRModule",
    "attach",
    "load_backbone",
    "load_official",
    "load_plugins",
    "save_plugins",
]
__version__ = "0.1.0"

_HEAVY = {"VSRModule": "vsrplug.module", "VSRDataModule": "vsrplug.data"}


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        return getattr(import_module(_HEAVY[name]), name)
    raise AttributeError(f"module 'vsrplug' has no attribute {name!r}")
