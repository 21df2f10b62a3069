"""Reading official weights: every layout gives the same network, every misfit is an error that changes nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vsrplug import attach, load_backbone, load_official
from vsrplug.backbones import (
    EDVR,
    MANA,
    NETWORKS,
    STVUN,
    BasicVSR,
    BasicVSRPlusPlus,
    IconVSR,
    LatentVSR,
    RealBasicVSR,
    SPyNet,
)
from vsrplug.backbones.spynet import IMAGENET_MEAN, IMAGENET_STD

GOLDEN = Path(__file__).parent / "golden"
MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


def small(**options: Any) -> BasicVSR:
    return BasicVSR(**{"channels": 8, "blocks": 2, "flow": SPyNet(2, (4, 4, 4, 4))} | options)


def in_mmagic_words(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BasicSR's names to mmagic's, by the table that was checked with the official classes."""
    rules = json.loads((GOLDEN / "basicsr_to_mmagic_rename.json").read_text())["rules"]
    renamed = {}
    for key, value in state.items():
        for pattern, theirs in rules:
            found = re.search(pattern, key)
            if found and "<" in theirs:
                theirs = theirs.replace(r"<\3 // 2>", str(int(found[3]) // 2))
            key = re.sub(pattern, theirs, key)
        renamed[key] = value
    return renamed


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items())


def test_mmagic_names_give_the_same_output_bit_for_bit(golden: ModuleType) -> None:
    case = golden.load("basicsr_basicvsr")
    state = case.state_dict()
    renamed = in_mmagic_words(state)
    official = golden.load("mmagic_basicvsr")
    assert list(renamed) == [key for key, _, _ in official.spec["state_dict"] if key not in official.kept]
    one, other = BasicVSR(16, 2), BasicVSR(16, 2)
    load_official(one, state)
    report = load_official(other, renamed | {"spynet.mean": MEAN, "spynet.std": STD})
    assert report.ignored == ["spynet.mean", "spynet.std"]
    with torch.no_grad():
        assert torch.equal(one(case.input()), other(case.input()))


@pytest.mark.parametrize("name", ["basicsr_basicvsr_30", "mmagic_basicvsr_30"])
def test_full_size_files_are_accounted_for(golden: ModuleType, name: str) -> None:
    official = golden.full_size(name)
    state = {key: torch.rand(shape) for key, shape, _ in official["state_dict"]} | {
        "spynet.mean": MEAN,
        "spynet.std": STD,
    }
    net = BasicVSR()
    report = load_official(net, state)
    assert sorted(report.loaded) == sorted(net.state_dict())
    assert (report.missing, report.unexpected, report.ignored) == ([], [], ["spynet.mean", "spynet.std"])
    assert sum(value.numel() for value in net.state_dict().values()) == official["params"]
    assert str(report) == f"{len(state) - 2} loaded; 2 ignored: spynet.mean, spynet.std"


@pytest.mark.parametrize("prefix", ["module.", "generator.", "generator_ema.", "model.", "net.", "_orig_mod."])
def test_prefixes(prefix: str) -> None:
    source, net = small(), small()
    load_official(net, prefixed(prefix, source.state_dict()))
    assert same(net, source)


@pytest.mark.parametrize("wrapper", ["params_ema", "params", "state_dict"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
def test_wrappers(tmp_path: Path, wrapper: str, suffix: str) -> None:
    source, net = small(), small()
    path = tmp_path / f"weights{suffix}"
    torch.save({wrapper: source.state_dict(), "meta": {"epoch": 3}, "iter": 5}, path)
    load_official(net, str(path))
    assert same(net, source)


def test_the_average_is_preferred(tmp_path: Path) -> None:
    source, other, net = small(), small(), small()
    report = load_official(net, {"params": other.state_dict(), "params_ema": source.state_dict()})
    assert same(net, source)
    assert "params.fusion.weight" in report.ignored


def test_a_gan_checkpoint_of_mmagic() -> None:
    source, other, net = small(), small(), small()
    state = {
        "step_counter": torch.zeros(1),
        **prefixed("generator.", in_mmagic_words(other.state_dict())),
        **prefixed("generator_ema.", in_mmagic_words(source.state_dict())),
        "discriminator.conv.weight": torch.rand(1),
        "perceptual_loss.vgg.weight": torch.rand(1),
    }
    report = load_official(net, {"meta": {}, "state_dict": state})
    assert same(net, source)
    assert {"step_counter", "discriminator.conv.weight", "generator.fusion.weight"} <= set(report.ignored)
    assert not [key for key in report.ignored if key.startswith("generator_ema.")]


def test_checkpoints_of_a_plugged_model() -> None:
    source, net = small(), small()
    plain, lightning = attach(source).state_dict(), prefixed("model.", attach(source).state_dict())
    for state in (plain, lightning, plain | {"plugins.seem.weight": torch.rand(1)}):
        report = load_official(net, {"state_dict": state})
        assert same(net, source)
    assert report.ignored == ["plugins.seem.weight"]


def test_safetensors_and_half_precision(tmp_path: Path) -> None:
    source, net = small(), small()
    half = {key: value.half() for key, value in source.state_dict().items()}
    save_file(half | {"spynet.mean": MEAN.half(), "spynet.std": STD.half()}, tmp_path / "weights.safetensors")
    load_official(net, tmp_path / "weights.safetensors")
    assert all(value.dtype == torch.float32 for value in net.state_dict().values())
    assert same(net, small_from(half))


def small_from(state: dict[str, Tensor]) -> BasicVSR:
    net = small()
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("words", [dict, in_mmagic_words])
def test_a_file_of_spynet_alone(words: Any) -> None:
    source, net = SPyNet(3, (4, 4, 4, 4)), SPyNet(3, (4, 4, 4, 4))
    report = load_official(net, {"params": words(source.state_dict()) | {"mean": MEAN}})
    assert same(net, source)
    assert report.ignored == ["mean"]


def test_other_constants_are_an_error() -> None:
    net = small()
    with pytest.raises(ValueError, match=r"differ in the constant spynet.mean: \[0.48.*there|there.*0.5"):
        load_official(net, net.state_dict() | {"spynet.mean": torch.full((1, 3, 1, 1), 0.5)})


MISFITS = {
    "another depth": (
        lambda: small(blocks=14),
        "file's number of blocks",
        "96 unexpected in the file: backward_trunk.main",
    ),
    "another width": (
        lambda: small(channels=6),
        "but not their sizes: make the network with the file's arguments, of channels, blocks, scale, ",
        r"weight \(8, 11, 3, 3\) here, \(6, 9, 3, 3\) there",
    ),
    "another scale": (
        lambda: small(scale=2),
        "another variant or scale",
        "2 missing in the file: upconv2.weight, upconv2.bias",
    ),
    "another network": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3)),
        "weights of another network",
        "2 unexpected in the file: 0.weight",
    ),
}


# The network asked for, weights of what, and what the error says; at the published sizes.
VARIANTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "BasicVSR into IconVSR": (
        IconVSR,
        BasicVSR,
        r"another variant .* 100 missing in the file: (edvr\.[\w.]+, ){9}edvr\.[\w.]+ and 90 more\. "
        r"2 unexpected in the file: fusion\.weight, fusion\.bias\. "
        r"1 of another shape: forward_trunk\.main\.0\.weight \(64, 131, 3, 3\) here, \(64, 67, 3, 3\) there$",
    ),
    "EDVR-L into EDVR-M": (
        EDVR,
        partial(EDVR, 128, reconstruct_blocks=40),
        r"file's number of blocks and sizes\).* 120 unexpected in the file: (reconstruction\.1[0-2]\.[\w.]+, ){9}"
        r"reconstruction\.12\.[\w.]+ and 110 more\. "
        r"135 of another shape: conv_first\.weight \(64, 3, 3, 3\) here, \(128, 3, 3, 3\) there, .* and 125 more$",
    ),
    "EDVR of 7 frames into 5": (
        EDVR,
        partial(EDVR, frames=7),
        r"file's arguments, of channels, frames, .* 2 of another shape: fusion\.feat_fusion\.weight "
        r"\(64, 320, 1, 1\) here, \(64, 448, 1, 1\) there, fusion\.spatial_attn1\.weight",
    ),
    "IconVSR of Vimeo-90K into REDS": (
        IconVSR,
        partial(IconVSR, temporal_padding=3),
        r"file's arguments, of .*temporal_padding.* 2 of another shape: edvr\.fusion\.feat_fusion\.weight",
    ),
    "MANA of 256 entries into 512": (
        MANA,
        partial(MANA, memory_size=256),
        r"file's arguments, of .*memory_size.* 1 of another shape: "
        r"memory_bank\.memory \(64, 512\) here, \(64, 256\) there$",
    ),
    "BasicVSR++ of first order into second": (
        BasicVSRPlusPlus,
        partial(BasicVSRPlusPlus, alignment="first_order"),
        r"file's arguments, of .*alignment.* 8 of another shape: "
        r"deform_align\.backward_1\.weight \(64, 128, 3, 3\) here, \(64, 64, 3, 3\) there",
    ),
    "BasicVSR into RealBasicVSR": (
        RealBasicVSR,
        BasicVSR,
        r"weights of another network\).* 318 missing in the file: "
        r"(image_cleaning\.[\w.]+, ){9}image_cleaning\.[\w.]+ and 308 more",
    ),
    "STVUN without EFST into STVUN": (
        STVUN,
        partial(STVUN, fusion="early"),
        r"another variant .* 24 missing in the file: (fusion\.fusion\.[\w.]+, ){9}fusion\.fusion\.[\w.]+ and 14 more$",
    ),
    "LatentVSR of 10 layers into 16": (
        LatentVSR,
        partial(LatentVSR, layers=10),
        r"file's number of blocks\).* 12 missing in the file: "
        r"extractor\.10\.weight, (.*, ){8}extractor\.14\.bias and 2 more$",
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_weights_of_another_variant_are_told_by_their_first_differences(case: str) -> None:
    asked, given, says = VARIANTS[case]
    with torch.device("meta"):
        network, weights = asked(), given().state_dict()
    with pytest.raises(ValueError, match=says):
        load_official(network, weights)


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_listed_and_nothing_changes(case: str) -> None:
    make, hint, listed = MISFITS[case]
    net = small()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=hint) as error:
        load_official(net, make().state_dict())
    assert re.search(listed, str(error.value))
    assert "nothing was loaded" in str(error.value)
    assert len(re.findall(r"\.(?:weight|bias)", str(error.value))) <= 30  # ten names of each group
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_long_lists_are_cut() -> None:
    with pytest.raises(ValueError, match=r"bias and 86 more$"):
        load_official(small(), small(blocks=14).state_dict())


def test_one_entry_under_two_names() -> None:
    state = small().state_dict()
    with pytest.raises(ValueError, match=r"two entries are both upconv1.weight for BasicVSR"):
        load_official(small(), state | {"upsample1.upsample_conv.weight": state["upconv1.weight"]})


class Harmful:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code(tmp_path: Path, protocol: int) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"params": Harmful(str(mark))}, protocol))
    with pytest.raises(ValueError, match=r"weights.pth .*(would run code|nothing of it was run)"):
        load_official(small(), path)
    torch.save({"params": Harmful(str(mark))}, path)
    with pytest.raises(ValueError, match=r"weights.pth was refused: it asks for the Python object posix.mkdir"):
        load_official(small(), path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("size", [0, 9, 5000])
def test_a_truncated_file(tmp_path: Path, name: str, size: int) -> None:
    path, state = tmp_path / name, small().state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{name} (is damaged|cannot be read: cut short).*download it again"):
        load_official(small(), path)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "page.pth"
    path.write_text("<!DOCTYPE html> quota exceeded " * 20)
    with pytest.raises(ValueError, match=r"page.pth cannot be read.*download it again"):
        load_official(small(), path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"page.pth holds no weights but list"):
        load_official(small(), path)
    torch.save({"epoch": 3, "loss": 0.1}, path)
    with pytest.raises(ValueError, match=r"page.pth is no state dict: epoch, loss are no tensors"):
        load_official(small(), path)
    with pytest.raises(FileNotFoundError, match=r"there is no weights file .*absent.pth"):
        load_official(small(), tmp_path / "absent.pth")


def test_load_backbone(tmp_path: Path) -> None:
    source = small()
    torch.save({"params": source.state_dict()}, tmp_path / "weights.pth")
    loaded = load_backbone("basicvsr", tmp_path / "weights.pth", channels=8, blocks=2, flow=SPyNet(2, (4, 4, 4, 4)))
    assert same(loaded, source)
    assert load_backbone("bicubic", scale=2).scale == 2
    with pytest.raises(ValueError, match=r"there is no backbone 'basicvrs'; did you mean 'basicvsr'.*Known: .*spynet"):
        load_backbone("basicvrs")


def test_the_packaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vsrplug.backbones

    monkeypatch.setattr(vsrplug.backbones, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"basicvsr_tiny.safetensors; install vsrplug again, or train it"):
        load_backbone("basicvsr_tiny")
    source = NETWORKS["basicvsr_tiny"]()
    half = {key: value.half() for key, value in source.state_dict().items()}
    save_file(half, tmp_path / "basicvsr_tiny.safetensors")
    source.load_state_dict(half)
    assert same(load_backbone("basicvsr_tiny"), source)


def test_what_fits_starts_another_scale_and_the_report_names_the_rest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    four, two = small(), small(scale=2)
    before = {key: value.clone() for key, value in two.state_dict().items()}
    report = load_official(two, four.state_dict(), strict=False)
    head = {"upconv1.weight", "upconv1.bias"}  # 8 channels to 4 x 8, or to 4 x 64 at once
    assert set(report.missing) == head
    assert set(report.unexpected) == head | {"upconv2.weight", "upconv2.bias"}
    for key, value in two.state_dict().items():
        assert torch.equal(value, before[key] if key in head else four.state_dict()[key]), key
    save_file(four.state_dict(), tmp_path / "x4.safetensors")
    with pytest.warns(UserWarning, match=r"x4\.safetensors was carried over in part: \d+ loaded; 2 missing: upconv1"):
        made = load_backbone(
            "basicvsr", tmp_path / "x4.safetensors", strict=False, channels=8, blocks=2, scale=2,
            flow=SPyNet(2, (4, 4, 4, 4)),
        )  # fmt: skip
    assert torch.equal(made.get_parameter("fusion.weight"), four.get_parameter("fusion.weight"))


def test_edvr_without_attention_starts_the_one_with_it() -> None:
    arguments = {"channels": 8, "frames": 3, "extract_blocks": 1, "reconstruct_blocks": 1, "deform_groups": 2}
    without, fused = (NETWORKS["edvr"](tsa=tsa, **arguments) for tsa in (False, True))
    report = load_official(fused, without.state_dict(), strict=False)
    assert report.unexpected == ["fusion.weight", "fusion.bias"]
    assert all(name.startswith("fusion.") for name in report.missing)
    assert len(report.loaded) + len(report.missing) == len(fused.state_dict())


def test_nothing_that_fits_is_an_error_even_then() -> None:
    with pytest.raises(ValueError, match="these are weights of another network"):
        load_official(small(), {"fc.weight": torch.rand(3, 3)}, strict=False)
