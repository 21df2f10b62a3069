"""Plug-ins of the papers: for each the plain module, tensors in and tensors out, and its wiring, `...Plugin`."""

from __future__ import annotations

if __name__ != "vsrplug.plugins":
    raise ImportError(
        f"this folder is the package vsrplug.plugins, but was imported as {__name__!r}: every class would exist twice. "
        "Write `from vsrplug.plugins import ...`."
    )

from .memory_bank import MemoryBank, MemoryBankPlugin
from .seem import SEEM, SEEMPlugin, SemanticRepresentation

__all__ = ["SEEM", "MemoryBank", "MemoryBankPlugin", "SEEMPlugin", "SemanticRepresentation"]
