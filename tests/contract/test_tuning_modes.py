"""Every way of tuning x every plug-in: exactly the names it stands for move, and a file gives the model back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from vsrplug import PluggedModel, conf, load_plugins, save_plugins
from vsrplug.tuning import Staged, Tuning

from .test_contract import BACKBONES, PLUGINS, awake, build, clip, loss_of, noisy, run, served

MODES = ("full", "plugins_only", "plugins_and_bias", "lora", "staged")
COMBINATIONS = [
    pytest.param(mode, plugin, backbone, id=f"{mode}-{plugin}-{backbone}")
    for mode in MODES
    for backbone in ("edvr", "basicvsr")
    for plugin, row in PLUGINS.items()
    if set(served(row, BACKBONES[backbone]())) & set(row.make.default_sites)
]


def tuning(mode: str) -> Tuning | Staged:
    return instantiate(OmegaConf.load(Path(conf.__file__).parent / "tuning" / f"{mode}.yaml"), _convert_="all")


def learns(name: str, mode: str) -> bool:
    """By hand, what the mode's name says."""
    if name.startswith("plugins.") or mode == "full":
        return True
    return {"plugins_and_bias": name.endswith(".bias"), "lora": ".lora_" in name}.get(mode, False)


def model_of(plugin: str, backbone: str) -> PluggedModel:
    torch.manual_seed(0)
    return awake(build(plugin, noisy(backbone)))  # awake: else a first step moves last layers only


def tuned(mode: str, plugin: str, backbone: str) -> tuple[PluggedModel, dict[str, torch.Tensor]]:
    """The model after two steps of the mode, and its parameters before them."""
    model = model_of(plugin, backbone).train()
    phase = next(iter(tuning(mode).phases.values()))  # of a staged one the first
    tuning(mode).apply(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(phase.groups(model, 1e-2))
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(*run(model, clip(), plugin)).backward()
        optimizer.step()
    return model, before


@pytest.mark.parametrize(("mode", "plugin", "backbone"), COMBINATIONS)
def test_exactly_the_expected_names_move(mode: str, plugin: str, backbone: str) -> None:
    model, before = tuned(mode, plugin, backbone)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if learns(name, mode)}


@pytest.mark.parametrize("backbone", ["edvr", "basicvsr"])
def test_normalisation_is_not_tuned_where_there_is_none(backbone: str) -> None:
    model = model_of("memory_bank", backbone)  # whose own normalisation is a plug-in's
    with pytest.raises(ValueError, match="'norm' matches nothing, the backbone has no normalisation layer"):
        tuning("plugins_and_norm").apply(model)


def test_files_of_every_mode_give_the_model_back_in_a_new_process(tmp_path: Path) -> None:
    frames = clip()
    for combination in COMBINATIONS:
        mode, plugin, backbone = combination.values
        model, _ = tuned(mode, plugin, backbone)
        name = f"{mode}-{plugin}-{backbone}"
        save_plugins(model, tmp_path / f"{name}.plugins")
        with torch.no_grad():
            save_file({"frames": frames, "out": run(model.eval(), frames, plugin)[0].contiguous()}, tmp_path / name)
    root = str(Path(__file__).parents[2])  # after vsrplug is imported: the folder of that name there is not the package
    code = f"import sys, vsrplug; sys.path.append({root!r}); import tests.contract.test_tuning_modes as modes; "
    code += f"modes.read_all(modes.Path({str(tmp_path)!r}))"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [combination.id for combination in COMBINATIONS]


def read_all(folder: Path) -> None:
    """What the new process does: plain backbones, the files, the same output to the last bit."""
    for combination in COMBINATIONS:
        mode, plugin, backbone = combination.values
        torch.manual_seed(0)
        model = load_plugins(noisy(backbone), folder / f"{mode}-{plugin}-{backbone}.plugins").eval()
        saved = load_file(folder / f"{mode}-{plugin}-{backbone}")
        with torch.no_grad():
            out = run(model, saved["frames"], plugin)[0]
        assert torch.equal(out, saved["out"]), combination.id
        print(combination.id)
