"""Plug-in files: a round trip into a new process, what is refused, and that a failure leaves everything as it was."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vsrplug.plugin_files
from vsrplug import Context, ForeignSite, PluggedModel, Plugin, attach, load_plugins, save_plugins
from vsrplug.backbones import BasicVSR, SPyNet
from vsrplug.lora import LoRA, lora_state
from vsrplug.plugged import fingerprint
from vsrplug.plugins import MemoryBankPlugin, SEEMPlugin

C, MASKS = 8, 3


def basicvsr(channels: int = C) -> BasicVSR:
    return BasicVSR(channels, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8).eval()


def awake(model: PluggedModel) -> PluggedModel:
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def both(network: nn.Module) -> PluggedModel:
    """Two kinds of plug-in; the names sort otherwise than they were attached."""
    bank = MemoryBankPlugin(C, sites=["fused", "forward_output"], groups=4, entries=6)
    return awake(attach(network, wide=SEEMPlugin(C, masks=MASKS, sites=("forward_output",)), bank=bank))


def banked(network: nn.Module, entries: int = 6) -> PluggedModel:
    return awake(attach(network, bank=MemoryBankPlugin(C, groups=4, entries=entries)))


def tuned(model: PluggedModel, lora: LoRA | None = None) -> PluggedModel:
    """With low-rank layers, other biases, and plug-ins that do something."""
    (lora or LoRA(rank=2, alpha=3.0, targets=("*_trunk.*", "conv_last"))).insert(model.backbone)
    with torch.no_grad():
        biases = [value for key, value in model.backbone.named_parameters() if key.endswith("bias")]
        for value in (*lora_state(model.backbone).values(), *biases):
            value.add_(0.1 * torch.randn_like(value))
    return awake(model)


def run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    frames = torch.rand(1, 3, 3, 8, 9, generator=generator)
    masks = (torch.rand(1, 3, MASKS, 8, 9, generator=generator) > 0.5).float()
    with torch.no_grad():
        return model(frames, Context(frames, masks=masks))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, *, drop: str = "", **changes: str) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != drop}  # noqa: SIM118 - not a mapping
        data = file.metadata() | changes
    save_file(tensors, path, data)


def same_state(module: nn.Module, before: dict[str, Tensor]) -> bool:
    state = module.state_dict()
    return state.keys() == before.keys() and all(torch.equal(value, before[key]) for key, value in state.items())


class Mine(MemoryBankPlugin):
    """A class that is not on the allow-list, with open keywords."""

    def __init__(self, channels: int, **keywords: Any) -> None:
        super().__init__(channels, **keywords)


def test_a_round_trip_into_a_new_process(tmp_path: Path) -> None:
    """Plug-ins, low-rank layers and biases in one file."""
    network = basicvsr()
    state = copy.deepcopy(network.state_dict())
    model = tuned(both(network))
    save_plugins(model, tmp_path / "two.safetensors")
    frames, masks = torch.rand(1, 3, 3, 8, 9), torch.rand(1, 3, MASKS, 8, 9) > 0.5
    expected = model(frames, Context(frames, masks=masks)).detach()
    torch.save((state, frames, masks, expected), tmp_path / "rest.pt")
    script = textwrap.dedent(
        f"""
        import torch
        from vsrplug import Context, load_plugins
        from vsrplug.backbones import BasicVSR, SPyNet
        from vsrplug.lora import LoRA
        torch.set_num_threads(1)
        state, frames, masks, expected = torch.load({str(tmp_path / "rest.pt")!r}, weights_only=True)
        network = BasicVSR({C}, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8).eval()
        network.load_state_dict(state)
        model = load_plugins(network, {str(tmp_path / "two.safetensors")!r}).eval()
        with torch.no_grad():
            assert torch.equal(model(frames, Context(frames, masks=masks)), expected)
        assert list(model.plugins) == ["wide", "bank"]
        assert model.plugins["bank"].sites == ("fused", "forward_output")
        assert len(LoRA.of(network).targets) == 7
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_order_of_attach_is_kept(tmp_path: Path) -> None:
    """At a site that two plug-ins share, another order is another function."""
    network = basicvsr()
    model = both(network)
    swapped = attach(network, bank=model.plugins["bank"], wide=model.plugins["wide"]).eval()
    assert not torch.equal(run(swapped), run(model))
    for each in (model, swapped):
        save_plugins(each, tmp_path / "it.safetensors")
        assert torch.equal(run(load_plugins(network, tmp_path / "it.safetensors").eval()), run(each))


def test_metadata_is_data(tmp_path: Path) -> None:
    model = both(basicvsr())
    path = tmp_path / "two.safetensors"
    save_plugins(model, path)
    data = metadata(path)
    assert data["format"] == "vsrplug-plugins-1"
    assert json.loads(data["plugins"]) == {
        "wide": {"class": "SEEMPlugin", "arguments": {"channels": C, "masks": MASKS}, "sites": ["forward_output"]},
        "bank": {
            "class": "MemoryBankPlugin",
            "arguments": {"channels": C, "groups": 4, "entries": 6},
            "sites": ["fused", "forward_output"],
        },
    }
    assert "vsrplug.plugins" not in str(data)
    assert data["lora"] == "null"
    assert json.loads(data["fingerprint"]).keys() == model.backbone.state_dict().keys()
    assert path.stat().st_mode & 0o777 == 0o644
    with safe_open(path, framework="pt") as file:
        assert all(key.startswith("plugins.") for key in file.keys())  # noqa: SIM118


def test_foreign_sites_are_rebuilt(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Flatten(0, 1), nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 3, 1), nn.Unflatten(0, (1, 3))
    )
    sites = {"here": ForeignSite("1", C, "clip", stride=1)}
    model = awake(attach(network, sites=sites, bank=MemoryBankPlugin(C, sites=("here",), groups=4)))
    save_plugins(model, tmp_path / "it.safetensors")
    again = load_plugins(copy.deepcopy(network), tmp_path / "it.safetensors").eval()
    assert again.foreign == sites
    frames = torch.rand(1, 3, 3, 8, 9)
    assert torch.equal(again(frames), model(frames))


def test_weights_into_a_model_that_has_the_plugins(tmp_path: Path) -> None:
    network = basicvsr()
    model = both(network)
    save_plugins(model, tmp_path / "it.safetensors")
    expected = run(model)
    awake(model)
    assert not torch.equal(run(model), expected)
    assert load_plugins(model, tmp_path / "it.safetensors") is model
    assert torch.equal(run(model), expected)


def test_another_backbone_is_refused_unless_forced(tmp_path: Path) -> None:
    model = both(basicvsr())
    save_plugins(model, tmp_path / "it.safetensors")
    other = basicvsr()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"trained on a backbone with other weights: \d+ of \d+ entries differ \(backw.*, "
    ):
        load_plugins(other, tmp_path / "it.safetensors")
    forced = load_plugins(other, tmp_path / "it.safetensors", force=True).eval()
    assert same_state(other, before)
    assert torch.equal(run(forced), run(attach(other, **model.plugins).eval()))
    one_off = copy.deepcopy(model.backbone)
    with torch.no_grad():
        one_off.fusion.bias[0].add_(1e-3)
    total = len(before)
    with pytest.raises(ValueError, match=rf"1 of {total} entries differ \(fusion.bias\)\. Load the same .* force=True"):
        load_plugins(one_off, tmp_path / "it.safetensors")


def test_a_tuned_backbone_is_saved_too_or_refused(tmp_path: Path) -> None:
    network, path = basicvsr(), tmp_path / "it.safetensors"
    original = copy.deepcopy(network)
    model = both(network)
    with torch.no_grad():
        network.fusion.bias.add_(0.5)
    with pytest.raises(ValueError, match=r"1 backbone entries changed since attach \(fusion\.bias\); .* backbone=True"):
        save_plugins(model, path, backbone=False)
    assert not path.exists()
    save_plugins(model, path)
    with safe_open(path, framework="pt") as file:
        assert {key for key in file.keys() if key.startswith("backbone.")} == {"backbone.fusion.bias"}  # noqa: SIM118
    again = load_plugins(original, path).eval()
    assert torch.equal(run(again), run(model))
    save_plugins(again, tmp_path / "again.safetensors")  # and once more, from what was loaded
    assert metadata(tmp_path / "again.safetensors") == metadata(path)


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    network, path = basicvsr(), tmp_path / "mine.safetensors"
    model = awake(attach(network, it=Mine(C, groups=4, entries=6, sites=("fused",))))
    assert model.plugins["it"].arguments == {"channels": C, "groups": 4, "entries": 6, "sites": ("fused",)}
    save_plugins(model, path)
    with pytest.raises(ValueError, match=r"there is no plug-in class 'Mine'.* Known: .*SEEMPlugin.*classes=\[Mine\]"):
        load_plugins(network, path)
    assert torch.equal(run(load_plugins(network, path, classes=[Mine]).eval()), run(model))


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "Conv2d", "MemoryBank", "Plugin"])
def test_only_plugins_are_made_from_a_file(tmp_path: Path, name: str) -> None:
    network, path = basicvsr(), tmp_path / "evil.safetensors"
    save_plugins(banked(network), path)
    rewrite(
        path, plugins=json.dumps({"bank": {"class": name, "arguments": {"args": "touch /tmp/x"}, "sites": ["fused"]}})
    )
    with pytest.raises(ValueError, match=f"there is no plug-in class '{name}'"):
        load_plugins(network, path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def headless(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


def other_safetensors(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def pickled(path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {path}.ran",)

    path.write_bytes(pickle.dumps(Boom()))


def archive(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def missing_entry(path: Path) -> None:
    rewrite(path, drop="plugins.bank.at.fused.memory")


def unknown_argument(path: Path) -> None:
    described = json.loads(metadata(path)["plugins"])
    described["bank"]["arguments"]["entrys"] = 6
    rewrite(path, plugins=json.dumps(described))


def broken_metadata(path: Path) -> None:
    rewrite(path, plugins="{")


def broken_lora(path: Path) -> None:
    rewrite(path, lora='{"rank": -1}')


def other_site(path: Path) -> None:
    rewrite(path, plugins=metadata(path)["plugins"].replace("fused", "fuzed"))


UNUSABLE = [
    (truncated, "it.safetensors is not a safetensors file, or is cut short .*save it again"),
    (headless, "it.safetensors is not a safetensors file, or is cut short"),
    (pickled, "it.safetensors is not a safetensors file"),
    (archive, "it.safetensors is not a safetensors file"),
    (other_safetensors, "is a safetensors file, but no plug-in file: it lacks the format mark 'vsrplug-plugins-1'"),
    (missing_entry, r"1 entries do not fit this model: plugins\.bank\.at\.fused\.memory"),
    (broken_metadata, "it.safetensors: its description of the plug-ins cannot be read"),
    (broken_lora, "it.safetensors: its description of the plug-ins cannot be read .*a whole rank of 1 or more"),
]
REBUILT = [  # a model that has the plug-ins takes the weights only
    (unknown_argument, "it.safetensors: MemoryBankPlugin cannot be made .*'entrys'.* another version of that class"),
    (other_site, "there is no site 'fuzed'; did you mean 'fused'"),
]


@pytest.mark.parametrize(
    ("onto", "damage", "message"),
    [("backbone", *case) for case in UNUSABLE + REBUILT] + [("model", *case) for case in UNUSABLE],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, onto: str, damage: Callable[[Path], None], message: str) -> None:
    network, path = basicvsr(), tmp_path / "it.safetensors"
    model = banked(network)
    save_plugins(model, path)
    damage(path)
    target = network if onto == "backbone" else awake(model)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=message):
        load_plugins(target, path)
    assert same_state(target, before)
    assert not Path(f"{path}.ran").exists()


def test_files_that_do_not_fit_the_model(tmp_path: Path) -> None:
    network, path = basicvsr(), tmp_path / "it.safetensors"
    save_plugins(banked(network), path)
    with pytest.raises(FileNotFoundError, match=r"there is no plug-in file .*nothing\.safetensors"):
        load_plugins(network, tmp_path / "nothing.safetensors")
    with pytest.raises(
        ValueError, match=r"holds plug-ins \['bank'\], this model has \['bank', 'wide'\]; give the backb"
    ):
        load_plugins(both(network), path)
    wider = banked(network, entries=7)
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(
        ValueError, match=r"3 entries do not fit this model: plugins\.bank\.at\.backward_output\.memory, "
    ):
        load_plugins(wider, path)
    assert same_state(wider, before)
    with pytest.raises(ValueError, match="plug-in 'bank' was made with channels=8, but site 'backward_output' has 16"):
        load_plugins(basicvsr(16), path, force=True)


def test_a_file_holds_what_was_tuned_and_no_more(tmp_path: Path) -> None:
    """Each kind alone, and all together; the keys are those of the plain network, as its fingerprint's."""
    path = tmp_path / "it.safetensors"
    names = [name for name, module in basicvsr().named_modules() if isinstance(module, nn.Conv2d)]
    adapted = [name for name in names if "_trunk." in name or name == "conv_last"]
    low_rank = {f"backbone.{name}.lora_{side}.default.weight" for name in adapted for side in "AB"}
    biases = {f"backbone.{name}.bias" for name in names}
    for kinds in ("plugins", "bias", "lora", "plugins bias lora"):
        network = basicvsr()
        start = copy.deepcopy(network)
        model = banked(network) if "plugins" in kinds else attach(network).eval()
        if "lora" in kinds:
            tuned(model)
        with torch.no_grad():
            for name in names:
                bias = network.get_submodule(name).bias
                bias.copy_(start.get_submodule(name).bias + (0.1 if "bias" in kinds else 0))  # type: ignore[operator]
        save_plugins(model, path)
        with safe_open(path, framework="pt") as file:
            held = {key for key in file.keys() if not key.startswith("plugins.")}  # noqa: SIM118
        assert held == (low_rank if "lora" in kinds else set()) | (biases if "bias" in kinds else set())
        data = metadata(path)
        assert json.loads(data["fingerprint"]) == fingerprint(start)
        expected = {"rank": 2, "alpha": 3.0, "targets": adapted} if "lora" in kinds else None
        assert json.loads(data["lora"]) == expected
        again = load_plugins(start, path).eval()
        assert torch.equal(run(again), run(model))
        assert list(again.plugins) == list(model.plugins)
        save_plugins(again, tmp_path / "again.safetensors")  # and once more, from what was loaded
        assert metadata(tmp_path / "again.safetensors") == metadata(path)
        ours, theirs = load_file(tmp_path / "again.safetensors"), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_files_of_before_low_rank_layers(tmp_path: Path) -> None:
    network, path = basicvsr(), tmp_path / "it.safetensors"
    model = banked(network)
    save_plugins(model, path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        data = file.metadata()
    del data["lora"]
    assert set(data) == {"format", "plugins", "foreign", "fingerprint"}  # what version 0.1 wrote
    save_file(tensors, path, data)
    assert torch.equal(run(load_plugins(network, path).eval()), run(model))


def test_weights_into_a_model_that_has_the_low_rank_layers(tmp_path: Path) -> None:
    network, path = basicvsr(), tmp_path / "it.safetensors"
    plain = copy.deepcopy(network)
    model = tuned(banked(network))
    save_plugins(model, path)
    expected = run(model)
    assert not torch.equal(run(tuned(model)), expected)
    assert load_plugins(model, path) is model
    assert torch.equal(run(model), expected)
    untrained = banked(plain)
    assert load_plugins(untrained, path) is untrained  # which get theirs inserted
    assert torch.equal(run(untrained), expected)


def refused_without_a_trace(target: nn.Module, path: Path, message: str, kind: type[Exception] = ValueError) -> None:
    before, modules = copy.deepcopy(target.state_dict()), dict(target.named_modules())
    with pytest.raises(kind, match=message):
        load_plugins(target, path)
    assert same_state(target, before)
    assert dict(target.named_modules()) == modules


def test_low_rank_layers_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, path = basicvsr(), tmp_path / "it.safetensors"
    plain = copy.deepcopy(network)
    model = tuned(banked(network))
    save_plugins(model, path)
    refused_without_a_trace(basicvsr(), path, "trained on a backbone with other weights")

    others = tuned(banked(copy.deepcopy(plain)), LoRA(rank=3))
    refused_without_a_trace(
        others, path, r"it.safetensors: LoRA: rank=2, alpha=3 on 7 convolutions was asked .* rank=3"
    )
    layer = next(module for module in network.modules() if hasattr(module, "lora_A"))
    layer.merge()
    refused_without_a_trace(model, path, r"it.safetensors: LoRA: the layer of 'backward_trunk.main.0' is merged; call")
    layer.unmerge()

    rewrite(path, drop="backbone.conv_last.lora_A.default.weight")
    refused_without_a_trace(
        plain, path, r"1 entries do not fit this model: backbone\.conv_last\.lora_A\.default\.weigh"
    )
    save_plugins(model, path)
    rewrite(path, lora=metadata(path)["lora"].replace('"rank": 2', '"rank": 4'))
    refused_without_a_trace(plain, path, r"14 entries do not fit this model: backbone\.backward_trunk\.main\.0\.lora_A")
    rewrite(path, lora=metadata(path)["lora"].replace("conv_last", "conv_lost"))
    refused_without_a_trace(plain, path, r"it.safetensors: LoRA: there is no convolution that matches 'conv_lost'; did")
    rewrite(path, lora="null")
    refused_without_a_trace(plain, path, r"14 entries do not fit this model: backbone\.backward_trunk\.main\.0\.lora_A")

    save_plugins(banked(plain), path)
    with_layers = tuned(attach(copy.deepcopy(plain)), LoRA(targets=("fusion",))).backbone
    with torch.no_grad():
        for key, value in plain.state_dict().items():
            if key.endswith("bias"):
                with_layers.get_parameter(key.replace("fusion.", "fusion.base_layer.")).copy_(value)
    refused_without_a_trace(
        with_layers,
        path,
        r"has no LoRA layers, the backbone has them on 1 convolutions; take them off first: LoRA\.rem",
    )

    save_plugins(model, path)
    monkeypatch.delitem(sys.modules, "vsrplug._lora_layer")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused_without_a_trace(plain, path, "low-rank layers come from peft", ImportError)


def test_what_the_file_does_not_hold_must_be_as_it_was_saved(tmp_path: Path) -> None:
    """The result computes what the saved model did: entries that the file brings may be anything before, others not."""
    network, path = basicvsr(), tmp_path / "it.safetensors"
    start = copy.deepcopy(network)
    model = banked(network)
    with torch.no_grad():
        network.fusion.bias.add_(0.5)
    save_plugins(model, path)
    expected = run(model)
    with torch.no_grad():
        start.fusion.bias.add_(0.7)
    assert torch.equal(run(load_plugins(start, path).eval()), expected)
    with torch.no_grad():
        network.fusion.weight.add_(0.5)  # the model goes on learning, then is to become the saved one again
    refused_without_a_trace(model, path, r"with other weights: 1 of \d+ entries differ \(fusion\.weight\)")
    assert not torch.equal(run(load_plugins(model, path, force=True)), expected)


@pytest.mark.parametrize("kind", ["full", "partial", "killed"])
def test_a_failure_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model, path = banked(basicvsr()), tmp_path / "it.safetensors"
    save_plugins(model, path)
    old = path.read_bytes()

    def fail(tensors: dict[str, Tensor], to: str, data: dict[str, str]) -> None:
        assert Path(to) != path
        Path(to).write_bytes(old[: 0 if kind == "full" else 100])
        if kind == "killed":
            raise KeyboardInterrupt
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vsrplug.plugin_files, "save_file", fail)
    if kind == "killed":
        with pytest.raises(KeyboardInterrupt):
            save_plugins(awake(model), path)
    else:
        with pytest.raises(
            OSError, match=r"could not be written \(.*No space left.*\); a file that was there is as it w"
        ):
            save_plugins(awake(model), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    network, path = basicvsr(), tmp_path / "it.safetensors"
    with pytest.raises(
        ValueError, match="no plug-in is attached, and the backbone is as it was at attach: there is not"
    ):
        save_plugins(attach(network), path)

    class WithModule(Mine):
        def __init__(self, channels: int, inner: nn.Module, **keywords: Any) -> None:
            super().__init__(channels, **keywords)

    model = attach(network, it=WithModule(C, nn.Identity(), groups=4))
    with pytest.raises(ValueError, match=r"'it' was made with an argument that is not plain data \(.*Identity"):
        save_plugins(model, path)
    assert not list(tmp_path.iterdir())


class Shared(Plugin):
    """One module at all its sites."""

    def __init__(self, channels: int, *, sites: Any = ("forward_output", "fused")) -> None:
        super().__init__(channels, sites=sites)
        one = nn.Conv2d(channels, channels, 1)
        self.at = nn.ModuleDict(dict.fromkeys(self.sites, one))

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        return self.at[site](feature.view(-1, *feature.shape[-3:])).view_as(feature)


def test_parameters_that_sites_share_are_saved(tmp_path: Path) -> None:
    network, path = basicvsr(), tmp_path / "shared.safetensors"
    model = awake(attach(network, it=Shared(C)))
    save_plugins(model, path)
    assert torch.equal(run(load_plugins(network, path, classes=[Shared]).eval()), run(model))


class GatePlugin(Plugin):
    """Its constructor takes no `sites`, and calls itself what it likes; a site of the default ones does not exist."""

    default_sites = ("fused", "elsewhere")

    def __init__(this, channels: int, start: float = 0.0) -> None:  # noqa: N805
        super().__init__(channels)
        this.at = nn.ModuleDict({site: nn.PReLU(channels, start) for site in this.sites})

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        return feature + self.at[site](feature.flatten(0, 1)).unflatten(0, feature.shape[:2])


def test_a_plugin_without_a_choice_of_sites_is_rebuilt(tmp_path: Path) -> None:
    model, frames = awake(attach(basicvsr(), gate=GatePlugin(C, start=0.5))), torch.rand(1, 3, 3, 8, 8)
    assert model.plugins["gate"].arguments == {"channels": C, "start": 0.5}
    save_plugins(model, tmp_path / "gate.safetensors")
    network = basicvsr()
    network.load_state_dict(model.backbone.state_dict())
    again = load_plugins(network, tmp_path / "gate.safetensors", classes=[GatePlugin])
    assert again.plugins["gate"].sites == ("fused",)
    assert torch.equal(again(frames), model(frames))
