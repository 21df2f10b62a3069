from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.backbones.edvr import EDVR
from vsrplug.context import Context
from vsrplug.official import load_official
from vsrplug.plugged import attach
from vsrplug.plugin import Plugin

OURS = {  # official constructors' arguments -> ours
    "num_feat": "channels",
    "mid_channels": "channels",
    "num_frame": "frames",
    "num_frames": "frames",
    "num_extract_block": "extract_blocks",
    "num_blocks_extraction": "extract_blocks",
    "num_reconstruct_block": "reconstruct_blocks",
    "num_blocks_reconstruction": "reconstruct_blocks",
    "deformable_groups": "deform_groups",
    "deform_groups": "deform_groups",
    "with_tsa": "tsa",
    "with_predeblur": "predeblur",
    "hr_in": "hr_input",
}
FULL_SIZE = {
    "basicsr_edvr_m_official": 3_300_131,
    "basicsr_edvr_m_wotsa": 2_996_259,
    "basicsr_edvr_l_official": 20_633_827,
    "basicsr_edvr_l_7frames": 20_699_363,
    "basicsr_edvr_l_predeblur_hrin": 23_602_019,
    "mmagic_edvr_m": 3_300_131,
}


def _ours(constructor: dict[str, Any]) -> EDVR:
    return EDVR(**{OURS[name]: value for name, value in constructor.items() if name in OURS})


def tiny(**arguments: Any) -> EDVR:
    """A small EDVR whose weights have noise, since fresh offsets are zero."""
    defaults = {"channels": 8, "frames": 3, "extract_blocks": 1, "reconstruct_blocks": 1, "deform_groups": 4}
    network = EDVR(**(defaults | arguments))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("name", ["basicsr_edvr_m_tsa", "basicsr_edvr_predeblur_lrin"])
def test_outputs_are_the_official_ones(golden: ModuleType, name: str) -> None:
    case = golden.load(name)
    network = _ours(case.constructor)
    report = load_official(network, case.state_dict())
    assert (report.missing, report.unexpected) == ([], [])
    captured: dict[str, Tensor] = {}

    def keep(what: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            captured.setdefault(what, output)  # of several calls, the first

        return hook

    network.pcd_align.register_forward_hook(keep("cap_pcd_align_nbr0"))
    network.fusion.register_forward_hook(keep("cap_fusion"))
    with torch.no_grad():
        out = network(case.input())
    assert case.check({"out": out[:, 0], **captured}) <= 1e-5


@pytest.mark.parametrize("name", ["basicsr_edvr_wo_tsa", "basicsr_edvr_predeblur_hrin", "mmagic_edvr"])
def test_other_variants_load_and_run(golden: ModuleType, name: str) -> None:
    case = golden.load(name)
    network = _ours(case.constructor)
    load_official(network, case.state_dict())
    with torch.no_grad():
        out = network(case.input())
    assert list(out[:, 0].shape) == case.spec["outputs"][0]["shape"]
    assert out.isfinite().all()


def test_mmagic_names_give_the_network_of_basicsr(golden: ModuleType) -> None:
    case = golden.load("basicsr_edvr_m_tsa")
    rules = json.loads((Path(golden.__file__).parent / "basicsr_to_mmagic_rename.json").read_text())["rules"]
    renamed = {}
    for key, value in case.state_dict().items():
        for pattern, theirs in rules:
            key = re.sub(pattern, theirs, key)
        renamed[key] = value
    assert list(renamed) == [key for key, *_ in golden.load("mmagic_edvr").spec["state_dict"]]
    network = _ours(case.constructor)
    load_official(network, renamed)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in case.state_dict().items())


@pytest.mark.parametrize(("name", "parameters"), FULL_SIZE.items())
def test_published_sizes_have_every_key_in_order(golden: ModuleType, name: str, parameters: int) -> None:
    spec = golden.full_size(name)
    with torch.device("meta"):
        network = _ours(spec["constructor"])
    keys = {}
    for key, shape, *_ in spec["state_dict"]:
        for pattern, ours in EDVR.official_names:
            key = re.sub(pattern, ours, key)
        keys[key] = list(shape)
    assert [(key, list(value.shape)) for key, value in network.state_dict().items()] == list(keys.items())
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters == spec["params"]


@pytest.mark.parametrize("arguments", [{}, {"predeblur": True}, {"predeblur": True, "hr_input": True}], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (18, 21)], ids=str)
def test_any_size_is_padded_by_repetition_and_cropped(arguments: dict[str, bool], size: tuple[int, int]) -> None:
    network, frames = tiny(**arguments), torch.rand(2, 3, 3, *size)
    bottom, right = -size[0] % network.multiple, -size[1] % network.multiple
    padded = F.pad(frames.flatten(0, 1), (0, right, 0, bottom), mode="replicate").unflatten(0, (2, 3))
    with torch.no_grad():
        out, whole = network(frames), network(padded)
    s = network.scale
    assert out.shape == (2, 1, 3, s * size[0], s * size[1])
    assert torch.equal(out, whole[..., : s * size[0], : s * size[1]])


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_silent_head_leaves_the_bilinear_centre(scale: int) -> None:
    network, frames = tiny(scale=scale), torch.rand(1, 3, 3, 8, 12)
    nn.init.zeros_(network.conv_last.weight)
    nn.init.zeros_(network.conv_last.bias)  # type: ignore[arg-type]
    out = network(frames)[:, 0]
    torch.testing.assert_close(out, F.interpolate(frames[:, 1], size=(8 * scale, 12 * scale), mode="bilinear"))


def test_hr_input_keeps_the_size_and_adds_to_the_centre() -> None:
    network, frames = tiny(predeblur=True, hr_input=True), torch.rand(1, 3, 3, 32, 16)
    assert (network.scale, network.multiple, network.sites["fused"].stride, network.sites["input"].stride) == (
        1,
        16,
        4,
        1,
    )
    nn.init.zeros_(network.conv_last.weight)
    nn.init.zeros_(network.conv_last.bias)  # type: ignore[arg-type]
    assert torch.equal(network(frames)[:, 0], frames[:, 1])


class Shift(Plugin):
    """Adds a constant, and writes down what each site was given."""

    def __init__(self, channels: int, *, sites: tuple[str, ...], by: float = 0.0) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict({site: nn.Identity() for site in sites})
        self.by = by

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        context.memo[self, site, t] = (feature, given)
        return feature + self.by


@pytest.mark.parametrize("arguments", [{}, {"tsa": False}, {"predeblur": True, "hr_input": True}], ids=str)
def test_every_site_is_met_with_its_declared_shape(arguments: dict[str, bool]) -> None:
    network, frames = tiny(**arguments), torch.rand(2, 3, 3, 32, 16)
    wide = Shift(8, sites=tuple(name for name in network.sites if name != "input"))
    thin = Shift(3, sites=("input",))
    context = Context(frames)
    model = attach(network, wide=wide, thin=thin)
    assert torch.equal(model(frames, context), network(frames))
    met = {site: (t, feature, given) for (_, site, t), (feature, given) in context.memo.items()}
    assert met.keys() == network.sites.keys()
    for name, spec in network.sites.items():
        t, feature, _ = met[name]
        time = (3,) if spec.kind == "clip" else ()
        assert feature.shape == (2, *time, spec.channels, 32 // spec.stride, 16 // spec.stride)
        assert t == (1 if spec.kind == "frame" else None)
    assert torch.equal(met["fused"][2]["neighbours"], met["aligned"][1])
    assert torch.equal(met["reference"][1], met["features"][1][:, 1])


@pytest.mark.parametrize("site", ["input", "features", "reference", "aligned", "fused", "reconstructed"])
def test_every_site_reaches_the_result(site: str) -> None:
    network, frames = tiny(), torch.rand(1, 3, 3, 8, 12)
    shift = Shift(network.sites[site].channels, sites=(site,), by=0.1)
    assert (attach(network, shift=shift)(frames) - network(frames)).abs().max() > 1e-4


def test_input_site_changes_what_everything_sees() -> None:
    network, frames = tiny(), torch.rand(1, 3, 3, 8, 12)
    model = attach(network, shift=Shift(3, sites=("input",), by=0.1))
    assert torch.equal(model(frames), network(frames + 0.1))


def test_extracted_features_stand_in_for_extraction() -> None:
    network, frames = tiny(), torch.rand(1, 3, 3, 8, 12)
    with torch.no_grad():
        pyramid = network.extract(frames)
        assert [tuple(level.shape[-2:]) for level in pyramid] == [(8, 12), (4, 6), (2, 3)]
        assert torch.equal(network(frames, extracted=pyramid), network(frames))


def test_windows_in_a_batch_do_not_meet() -> None:
    network, frames = tiny(), torch.rand(2, 3, 3, 8, 12)
    with torch.no_grad():
        both, second = network(frames), network(frames[1:])
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-6)


def test_messages() -> None:
    network = tiny()
    with pytest.raises(ValueError, match=r"takes windows of 3 frames, got 4; .* SlidingWindow\(model\)"):
        network(torch.rand(1, 4, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"multiples of 4, got 9 x 8; pad the clip first with Context\(frames\).pad\(4\)"
    ):
        network.extract(torch.rand(1, 3, 3, 9, 8))
    with pytest.raises(ValueError, match=r"frames must be odd, .* got 4"):
        EDVR(frames=4)
    with pytest.raises(ValueError, match="hr_input=True needs predeblur=True"):
        EDVR(hr_input=True)
    with pytest.raises(ValueError, match="leave scale at 4, got 2"):
        EDVR(predeblur=True, hr_input=True, scale=2)
    with pytest.raises(ValueError, match="8 deformable groups do not divide 12 channels"):
        EDVR(channels=12)
