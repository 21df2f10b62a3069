"""`vsrplug merge`: one checkpoint that needs nothing beside it, in BasicSR's layout or ours."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vsrplug import PluggedModel, attach, load_official, load_plugins, save_plugins
from vsrplug.backbones import EDVR, BasicVSR, BasicVSRPlusPlus, IconVSR, basicvsr_tiny
from vsrplug.commands import merge
from vsrplug.lora import LoRA, lora_state
from vsrplug.merging import save_merged
from vsrplug.plugged import fingerprint
from vsrplug.plugins import MemoryBankPlugin

from .conftest import Job

SMALL = ["backbone=basicvsr", "backbone.channels=8", "backbone.blocks=1"]
GOLDEN = Path(__file__).parents[1] / "golden"


def small() -> BasicVSR:
    return BasicVSR(8, 1).eval()


def tuned(network: nn.Module, **plugins: Any) -> PluggedModel:
    """With low-rank layers, tuned biases and plug-ins that do something."""
    model = attach(network, **plugins).eval()
    LoRA(rank=2, targets=("*_trunk.*", "conv_last")).insert(network)
    with torch.no_grad():
        biases = [value for key, value in network.named_parameters() if key.endswith("bias")]
        for value in (*lora_state(network).values(), *biases, *model.plugins.parameters()):
            value.add_(0.1 * torch.randn_like(value))
    return model


def bank() -> MemoryBankPlugin:
    return MemoryBankPlugin(8, groups=4, entries=6)


def run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model(torch.rand(1, 3, 3, 8, 9, generator=generator))


def close(ours: Tensor, expected: Tensor) -> bool:
    return bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max())


def saved(folder: Path, **plugins: Any) -> tuple[PluggedModel, list[str]]:
    """A tuned model, its backbone's and its own file, and the overrides that name them."""
    network = small()
    torch.save(network.state_dict(), folder / "base.pth")
    model = tuned(network, **plugins)
    save_plugins(model, folder / "tuned.safetensors")
    return model, [*SMALL, f"backbone.path={folder}/base.pth", f"plugins_file={folder}/tuned.safetensors"]


def test_basicsr_reads_the_merged_checkpoint(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, given = saved(tmp_path)
    output = tmp_path / "out" / "merged.pth"
    merge.run(job("merge", tmp_path, *given, f"output={output}"))
    assert capsys.readouterr().out == f"{output}: {output.stat().st_size / 1e6:.2f} MB, layout basicsr\n"
    checkpoint = torch.load(output, weights_only=True)
    assert list(checkpoint) == ["params"]
    plain = small()
    assert set(checkpoint["params"]) == {*plain.state_dict(), "spynet.mean", "spynet.std"}
    assert all(value.is_contiguous() for value in checkpoint["params"].values())
    base = torch.load(tmp_path / "base.pth", weights_only=True)
    adapted = {f"{name}.weight" for name in LoRA.of(model.backbone).targets}  # type: ignore[union-attr]
    for key, value in base.items():
        assert torch.equal(checkpoint["params"][key], value) == (key not in adapted and not key.endswith("bias")), key
    assert load_official(plain, output).ignored == ["spynet.mean", "spynet.std"]
    assert close(run(plain), run(model))
    assert LoRA.of(model.backbone)  # the model itself is as it was


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("basicsr_basicvsr_30", BasicVSR),
        ("basicsr_edvr_m_official", EDVR),
        ("basicsr_edvr_m_wotsa", lambda: EDVR(tsa=False)),
        ("basicsr_iconvsr_30", IconVSR),
    ],
)
def test_keys_order_and_shapes_are_those_of_the_official_files(
    golden: ModuleType, tmp_path: Path, name: str, make: Callable[[], nn.Module]
) -> None:
    model = attach(make())
    LoRA(targets=("conv_last",)).insert(model.backbone)
    save_merged(model, tmp_path / "it.pth", "basicsr")
    state = torch.load(tmp_path / "it.pth", weights_only=True)["params"]
    official = golden.full_size(name)["state_dict"]
    assert [(key, list(value.shape), "float32") for key, value in state.items()] == [tuple(entry) for entry in official]


def test_keys_of_basicvsr_pp_are_mmagics_by_the_checked_table(golden: ModuleType, tmp_path: Path) -> None:
    save_merged(attach(BasicVSRPlusPlus()), tmp_path / "it.pth", "basicsr")
    state = torch.load(tmp_path / "it.pth", weights_only=True)["params"]
    rules = json.loads((GOLDEN / "basicsr_to_mmagic_rename.json").read_text())["rules"]
    renamed = set()
    for key in state:
        for pattern, theirs in rules:
            found = re.search(pattern, key)
            if found and "<" in theirs:
                theirs = theirs.replace(r"<\3 // 2>", str(int(found[3]) // 2))
            key = re.sub(pattern, theirs, key)
        renamed.add(key)
    assert renamed == {key for key, _, _ in golden.full_size("mmagic_basicvsrpp_64_7")["state_dict"]}


@pytest.mark.parametrize("plugins", [{}, {"bank": bank}], ids=["without", "with"])
def test_our_layout_is_the_whole_network(job: Job, tmp_path: Path, plugins: dict[str, Callable[[], Any]]) -> None:
    model, given = saved(tmp_path, **{name: make() for name, make in plugins.items()})
    output = tmp_path / "merged.safetensors"
    merge.run(job("merge", tmp_path, *given, "layout=vsrplug", f"output={output}"))
    untrained = small()
    restored = load_plugins(untrained, output).eval()
    assert list(restored.plugins) == list(plugins)
    assert close(run(restored), run(model))
    assert LoRA.of(restored.backbone) is None
    assert len({key for key in load_file(output) if key.startswith("backbone.")}) == len(untrained.state_dict())

    save_plugins(restored, tmp_path / "again.safetensors")  # stays whole
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(output).keys()
    again = load_plugins(small(), tmp_path / "again.safetensors").eval()
    assert torch.equal(run(again), run(restored))

    network = small()
    report = load_official(network, output)
    assert (report.missing, report.unexpected) == ([], [])
    assert all(key.startswith("plugins.") for key in report.ignored)
    assert bool(report.ignored) == bool(plugins)
    assert fingerprint(network) == fingerprint(restored.backbone)
    with pytest.raises(ValueError, match=r"\d+ entries do not fit this model|other weights"):
        load_plugins(BasicVSR(8, 2), output)


def test_basicsr_has_no_place_for_everything(job: Job, tmp_path: Path) -> None:
    _, given = saved(tmp_path, bank=bank(), other=bank())
    cfg = job("merge", tmp_path, *given, f"output={tmp_path}/merged.pth")
    with pytest.raises(
        ValueError, match="no place for plug-ins, and this model has bank, other; layout=vsrplug holds it"
    ):
        merge.run(cfg)
    for network, message in (
        (
            nn.Sequential(basicvsr_tiny()),
            "BasicSR has no Sequential of these keys, but EDVR, BasicVSR, IconVSR, BasicVS",
        ),
        (
            basicvsr_tiny(),
            "BasicSR's BasicVSR finds flow with a SPyNet, this one with LucasKanade; layout=vsrplug hold",
        ),
    ):
        model = attach(basicvsr_tiny())
        model.backbone = network
        with pytest.raises(ValueError, match=message):
            save_merged(model, tmp_path / "merged.pth")
    assert not (tmp_path / "merged.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=a.pth"], "plugins_file=... is missing: what save_plugins wrote"),
        (["plugins_file=a.safetensors"], "output=... is missing: the checkpoint to write"),
        (
            ["plugins_file=a", "output=a.pth", "layout=mmagic"],
            "there is no layout 'mmagic'; did you mean 'basicsr'? Known: basicsr, vsrplug.",
        ),
        (
            ["plugins_file=a", "output=a.safetensors"],
            "layout=basicsr is a .pth file, got a.safetensors; rename it, or layout=vsrplug for .safetensors",
        ),
        (
            ["plugins_file=a", "output=a.pth", "layout=vsrplug"],
            "layout=vsrplug is a .safetensors file, got a.pth; rename it, or layout=basicsr for .pth",
        ),
        (["plugins_file=no.safetensors", "output=a.pth"], "there is no plug-in file no.safetensors"),
        (
            ["plugins_file=a", "output={path}/there.pth"],
            "output {path}/there.pth exists; name another, or add overwrite",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    vsrplug: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pth").write_bytes(b"old")
    with pytest.raises(SystemExit) as caught:
        vsrplug("merge", *(argument.format(path=tmp_path) for argument in arguments))
    text = str(caught.value)
    assert text.startswith("vsrplug merge: " + message.format(path=tmp_path))
    assert "\n" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["there.pth"]
    assert (tmp_path / "there.pth").read_bytes() == b"old"


def test_an_existing_output_is_replaced_on_demand_and_only_as_a_whole(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, given = saved(tmp_path)
    output = tmp_path / "out" / "merged.pth"
    output.parent.mkdir()
    output.write_bytes(b"old")
    cfg = job("merge", tmp_path, *given, f"output={output}", "overwrite=true")
    whole = torch.save

    def full(value: Any, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"merged\.pth could not be written \(PytorchStreamWriter .*\); a file that was th"
    ):
        merge.run(cfg)
    assert output.read_bytes() == b"old"
    assert list(output.parent.iterdir()) == [output]
    monkeypatch.setattr(torch, "save", whole)
    merge.run(cfg)
    load_official(small(), output)
    assert list(output.parent.iterdir()) == [output]


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = tuned(small(), bank=bank())
    before, prints = copy.deepcopy(model.state_dict()), model.fingerprint
    save_merged(model, tmp_path / "it.safetensors", "vsrplug")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.fingerprint is prints
