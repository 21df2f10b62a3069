"""Fixtures every test may use: the official outputs, and the folder of real clips where there is one."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # the suite runs in two processes on two cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning leaves the port of several processes behind, which the next ones would take instead of a free one."""
    monkeypatch.delenv("MASTER_PORT", raising=False)


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """The module that rebuilds what official implementations computed."""
    spec = importlib.util.spec_from_file_location("golden", HERE / "golden" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real clips that VSRPLUG_DATA names."""
    folder = os.environ.get("VSRPLUG_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("VSRPLUG_DATA names no folder with real clips")
    return Path(folder)
