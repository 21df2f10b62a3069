"""What an import costs, and what it offers, in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import vsrplug
import vsrplug.backbones
import vsrplug.plugins

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "av", "huggingface_hub", "hydra", "kornia", "lightning", "matplotlib", "omegaconf", "peft", "pytorch_lightning",
    "rich", "scipy", "segment_anything", "skimage", "tensorboard", "torchmetrics", "torchvision",
}  # fmt: skip


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_torch_and_einops_only() -> None:
    # torch itself is not ours to silence, so it is imported first, without warnings as errors
    code = (
        "import sys, warnings\nwith warnings.catch_warnings():\n    warnings.simplefilter('ignore')\n    import torch\n"
        "import vsrplug, vsrplug.plugins, vsrplug.backbones\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = set(fresh(code).split())
    assert "vsrplug" in loaded
    assert not loaded & HEAVY


def test_lightning_parts_come_on_first_use() -> None:
    code = (
        "import vsrplug, sys\nassert 'lightning' not in sys.modules\nmodule = vsrplug.VSRModule\n"
        "assert 'lightning' in sys.modules\nprint(module.__module__, vsrplug.VSRDataModule.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == ["vsrplug.module", "VSRDataModule"], done.stderr


def test_public_names_of_the_package() -> None:
    """Taking a name away fails here until the list is edited too."""
    assert set(vsrplug.__all__) >= {
        "Context", "ForeignSite", "PluggedModel", "Plugin", "SiteSpec", "VSRDataModule", "VSRModule", "attach",
        "load_backbone", "load_official", "load_plugins", "save_plugins",
    }  # fmt: skip
    assert set(vsrplug.plugins.__all__) >= {
        "SEEM", "MemoryBank", "MemoryBankPlugin", "SEEMPlugin", "SemanticRepresentation",
    }  # fmt: skip
    assert set(vsrplug.backbones.__all__) >= {"EDVR", "NETWORKS", "BasicVSR", "Bicubic", "SPyNet", "SlidingWindow"}


@pytest.mark.parametrize("name", ["vsrplug", "vsrplug.plugins", "vsrplug.backbones"])
def test_every_public_name_resolves_once(name: str) -> None:
    module = import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'vsrplug' has no attribute 'SEEMPlugin'"):
        vsrplug.SEEMPlugin  # noqa: B018
    assert not hasattr(vsrplug, "nothing")


@pytest.mark.parametrize("folder", ["plugins", "backbones"])
def test_a_mapped_folder_is_refused_under_another_name(folder: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert f"is the package vsrplug.{folder}, but" in done.stderr
    assert f"`from vsrplug.{folder} import ...`" in done.stderr


def test_arrows_point_one_way() -> None:
    """The contract knows neither plug-ins nor backbones at import, and plug-ins know no backbone."""
    contract = [ROOT / "vsrplug" / f"{name}.py" for name in ("site", "context", "plugin", "plugged", "foreign")]
    for path, forbidden in [(file, ("vsrplug.plugins", "vsrplug.backbones")) for file in contract] + [
        (file, ("vsrplug.backbones", "backbones")) for file in (ROOT / "plugins").glob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [imported]
            assert not [name for name in names if name.startswith(forbidden)], path
