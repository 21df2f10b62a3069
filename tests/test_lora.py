"""LoRA: the identity at the start, the equation, merging and taking off, and what else is done with such networks."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vsrplug import attach
from vsrplug.backbones import EDVR, MANA, STVUN, BasicVSR, BasicVSRPlusPlus, Bicubic, IconVSR, RealBasicVSR, SPyNet
from vsrplug.lora import LoRA, base_state, lora_state
from vsrplug.plugged import fingerprint
from vsrplug.plugins import MemoryBankPlugin

C = 16


def flow() -> SPyNet:
    return SPyNet(levels=2, widths=(4, 4))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basicvsr": lambda: BasicVSR(C, 1, flow=flow(), reconstruction_channels=8),
    "basicvsr_pp": lambda: BasicVSRPlusPlus(C, 1, deform_groups=4, flow=flow()),
    "edvr": lambda: EDVR(C, frames=5, extract_blocks=1, reconstruct_blocks=1, deform_groups=4),
    "iconvsr": lambda: IconVSR(C, 1, flow=flow()),
    "mana": lambda: MANA(C, frames=5, encoder_blocks=1, decoder_blocks=1, memory_size=8, groups=4),
    "real_basicvsr": lambda: RealBasicVSR(C, 1, 1, flow=flow(), reconstruction_channels=8),
    "stvun": lambda: STVUN(C, frames=5, times=(0.5,), flow=flow()),
}


def noisy(name: str = "basicvsr") -> nn.Module:
    network = NETWORKS[name]()
    with torch.no_grad():  # a fresh EDVR has zero offsets
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def tuned(network: nn.Module, lora: LoRA | None = None) -> nn.Module:
    """With low-rank layers that do something."""
    (lora or LoRA(rank=3, alpha=2.0)).insert(network)
    with torch.no_grad():
        for value in lora_state(network).values():
            value.normal_(std=0.05)
    return network


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[key]) for key, value in one.items())


def layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("name", NETWORKS)
def test_identity_then_every_layer_learns(name: str) -> None:
    """A module that read a convolution's weight would pass its layer by: every one of them has to be reached."""
    network, frames = noisy(name), torch.rand(1, 5, 3, 12, 16)
    before = copy.deepcopy(network.state_dict())
    expected = {training: network.train(training)(frames) for training in (False, True)}
    names = LoRA(rank=2).insert(network)
    convolutions = [n for n, module in NETWORKS[name]().named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(names) == sorted(convolutions)
    for training, plain in expected.items():
        assert torch.equal(network.train(training)(frames), plain)
    assert same(base_state(network), before)

    low_rank = {key: p for key, p in network.named_parameters() if "lora_" in key}
    assert low_rank.keys() == lora_state(network).keys()
    start = {key: p.detach().clone() for key, p in low_rank.items()}
    optimizer = torch.optim.Adam(low_rank.values(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        network(frames).square().mean().backward()
        optimizer.step()
    assert [key for key, p in low_rank.items() if torch.equal(p, start[key])] == []
    assert same(base_state(network), before)
    LoRA.remove(network)
    assert torch.equal(network(frames), expected[True])


def test_identity_at_odd_sizes_layouts_and_precisions() -> None:
    """Where a dimension is 1 two layouts look the same, and torch's choice among them selects the next kernel."""
    for widths in ((3, 16, 1, 16), (19, 1, 16, 1), (16, 1, 3, 3)):
        for kernel in (1, 3):
            for size in ((1, 7), (1, 1), (12, 16)):
                for bfloat16 in (False, True):
                    for layout in (torch.contiguous_format, torch.channels_last):
                        pairs = pairwise(widths)
                        plain = nn.Sequential(*(nn.Conv2d(i, o, kernel, padding=kernel // 2) for i, o in pairs))
                        plain = plain.to(memory_format=layout)
                        adapted = copy.deepcopy(plain)
                        LoRA().insert(adapted)
                        x = torch.rand(2, widths[0], *size).contiguous(memory_format=layout)
                        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                            ours, expected = adapted(x), plain(x)
                        assert torch.equal(ours, expected)
                        assert (ours.stride(), ours.dtype) == (expected.stride(), expected.dtype)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), (7, 2)])
def test_the_equation(kernel: int, stride: int) -> None:
    """W x + alpha / rank * B A x, in float64, with B A written out as one kernel."""
    network = tuned(nn.Sequential(nn.Conv2d(5, 6, kernel, stride, kernel // 2)).double(), LoRA(rank=3, alpha=2.0))
    layer, x = network[0], torch.rand(2, 5, 9, 8, dtype=torch.float64)
    down, up = (lora_state(network)[f"0.lora_{side}.default.weight"] for side in "AB")
    assert down.dtype == torch.float64
    update = torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
    expected = F.conv2d(x, layer.base_layer.weight + 2 / 3 * update, layer.base_layer.bias, stride, kernel // 2)
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)
    assert (network(x) - layer.base_layer(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_it_is_the_plain_network(name: str) -> None:
    network, frames = noisy(name).eval(), torch.rand(1, 5, 3, 12, 16)
    before, modules = copy.deepcopy(network), dict(network.named_modules())
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        plain = network(frames)
        expected = tuned(network)(frames)
        names = LoRA.merge(network)
        ours = network(frames)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()
    assert str(network) == str(before)
    assert list(network.state_dict()) == list(before.state_dict())
    assert dict(network.named_modules()) == modules  # the very same objects
    assert all(p is parameters[key] for key, p in network.named_parameters())
    changed = [k for k, v in network.state_dict().items() if not torch.equal(v, before.state_dict()[k])]
    assert changed == [f"{n}.weight" for n in names]
    assert LoRA.of(network) is None
    assert LoRA.merge(network) == LoRA.remove(network) == []


def test_taken_off_the_base_is_back_to_the_last_bit() -> None:
    network = noisy()
    before, modules = copy.deepcopy(network.state_dict()), dict(network.named_modules())
    tuned(network)
    names = LoRA.remove(network)
    assert same(network.state_dict(), before)
    assert dict(network.named_modules()) == modules
    assert names == [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]


def test_merging_and_unmerging_by_peft_keeps_the_base() -> None:
    """peft subtracts what it added, which rounds; here the base comes back, and counts as the base all along."""
    network, frames = noisy().eval(), torch.rand(1, 2, 3, 8, 8)
    before = copy.deepcopy(network.state_dict())
    expected = tuned(network)(frames)
    rounded = []
    for layer in layers(network):
        update = layer.get_delta_weight("default")
        rounded.append(not torch.equal(layer.base_layer.weight + update - update, layer.base_layer.weight))
        layer.merge()
    assert any(rounded)  # or this test could not fail
    assert (network(frames) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert same(base_state(network), before)
    with pytest.raises(ValueError, match=r"the layer of '[\w.]+' is merged; call its unmerge\(\) first"):
        LoRA(rank=3, alpha=2.0).insert(network)
    again = copy.deepcopy(network)
    for layer in layers(network):
        layer.unmerge()
    assert torch.equal(network(frames), expected)
    assert same(base_state(network), before)
    for fold in (LoRA.remove, LoRA.merge):  # from the merged state
        other = copy.deepcopy(again)
        fold(other)
        if fold is LoRA.remove:
            assert same(other.state_dict(), before)
        else:
            assert (other(frames) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_weights_that_are_not_finite_are_not_merged() -> None:
    network = tuned(noisy())
    with torch.no_grad():
        lora_state(network)["fusion.lora_B.default.weight"][0] = float("nan")
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=r"the weight of 'fusion' would have NaN or infinite entries; nothing was me"):
        LoRA.merge(network)
    assert all(torch.equal(v, before[k]) or k.startswith("fusion.lora_B") for k, v in network.state_dict().items())
    assert list(network.state_dict()) == list(before)


def test_twice_is_once_and_other_settings_are_an_error() -> None:
    network, lora = noisy(), LoRA(rank=3, alpha=2.0, targets=("*_trunk.*", "fusion"))
    names = lora.insert(network)
    assert "fusion" in names
    assert all(n == "fusion" or n.startswith(("backward_trunk", "forward_trunk")) for n in names)
    assert LoRA.of(network) == LoRA(3, 2.0, tuple(names))
    before = copy.deepcopy(network.state_dict())
    assert lora.insert(network) == []
    assert LoRA.of(network).insert(network) == []  # type: ignore[union-attr]
    others = (LoRA(4, 2.0, lora.targets), LoRA(3, 1.0, lora.targets), LoRA(3, 2.0))
    for other in others:
        with pytest.raises(
            ValueError, match=rf"asked for, but this backbone has rank=3, alpha=2 on {len(names)} already; call LoRA.me"
        ):
            other.insert(network)
    assert same(network.state_dict(), before)


def test_only_the_new_layers_learn_anew() -> None:
    network = noisy()
    network.requires_grad_(False)
    network.fusion.requires_grad_(True)
    LoRA(targets=("fusion", "conv_last")).insert(network)
    assert [key for key, p in network.named_parameters() if p.requires_grad] == [
        *("fusion.base_layer.weight", "fusion.base_layer.bias"),
        *("fusion.lora_A.default.weight", "fusion.lora_B.default.weight"),
        *("conv_last.lora_A.default.weight", "conv_last.lora_B.default.weight"),
    ]


class Odd(nn.Module):
    """Convolutions that peft would adapt to something else."""

    def __init__(self) -> None:
        super().__init__()

        class Standardised(nn.Conv2d):
            pass

        self.plain = nn.Conv2d(4, 4, 3, padding="same")
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.standardised = Standardised(4, 4, 3, padding=1)
        self.transposed = nn.ConvTranspose2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def test_convolutions_that_cannot_be_adapted() -> None:
    network, x = Odd(), torch.rand(1, 4, 6, 7)
    expected = network(x)
    assert LoRA().insert(network) == ["plain"]  # a pattern leaves them out
    assert torch.equal(network(x), expected)
    LoRA.remove(network)
    before = dict(network.named_modules())
    for name, reason in {
        "grouped": "it has groups=2, which cannot be merged",
        "dilated": r"it has dilation=\(2, 2\), which peft's layer has not",
        "mirrored": "it pads with 'reflect', peft's layer with zeros",
        "standardised": "it is a Standardised, which may not convolve as nn.Conv2d does",
    }.items():
        for target in (name, name[:-2] + "*"):
            with pytest.raises(ValueError, match=f"LoRA: '{name}' cannot be adapted: {reason}; leave it out of targ"):
                LoRA(targets=("plain", target)).insert(network)
    with pytest.raises(ValueError, match=r"there is no convolution that matches 'transposed'.* Known: plain, grouped"):
        LoRA(targets=("transposed",)).insert(network)
    assert dict(network.named_modules()) == before


def test_targets_that_match_nothing() -> None:
    network = noisy()
    with pytest.raises(
        ValueError,
        match=r"LoRA: there is no convolution that matches 'fussion'; did you mean 'fusion'.* Known: "
        r"spynet\.basic_module\.\*\.basic_module\.\*, backward_trunk\.main\.\*, backward_trunk\.main\.\*\.\*\.conv1, ",
    ):
        LoRA(targets=("fusion", "fussion")).insert(network)
    assert LoRA.of(network) is None
    assert LoRA(targets=("backward_trunk.main.*.*.conv1",)).insert(network)  # as the message would have it
    with pytest.raises(ValueError, match=r"no convolution that matches '\*'. Known: none"):
        LoRA().insert(Bicubic())


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(TypeError, match=r"got the string 'fusion'; write targets=\('fusion',\)"):
        LoRA(targets="fusion")
    for wrong in ({"rank": 0}, {"rank": 2.5}, {"alpha": 0.0}, {"alpha": float("nan")}, {"targets": ()}):
        with pytest.raises(ValueError, match="a whole rank of 1 or more, a positive alpha and one target or more, got"):
            LoRA(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"goes on a backbone, not on the model with its plug-ins; give it model\.back"):
        LoRA().insert(attach(noisy()))
    assert LoRA(targets=["a"]) == LoRA(targets=("a",))  # as a yaml gives it


def test_a_layer_has_the_shape_of_its_convolution() -> None:
    plain = nn.Conv2d(4, 5, 3, 2, 1)
    network = nn.Sequential(plain)
    LoRA().insert(network)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"):
        assert getattr(network[0], name) is getattr(plain, name)
    with pytest.raises(AttributeError, match="'LowRankConv2d' object has no attribute 'inchannels'"):
        network[0].inchannels  # noqa: B018


def test_a_module_that_reads_the_weight_does_not_pass_by_silently() -> None:
    class Sampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.inner.weight, self.inner.bias)

    network = nn.Sequential(nn.Conv2d(4, 4, 3), Sampled())
    LoRA().insert(network)
    with pytest.raises(
        RuntimeError, match=r"weight of '1.inner' was read from outside, past its LoRA layers.* leave t"
    ):
        network(torch.rand(1, 4, 9, 9))


def test_a_convolution_of_two_names_stays_one() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    network.append(network[0])
    x = torch.rand(1, 4, 6, 6)
    before, plain = copy.deepcopy(network.state_dict()), network(x)
    assert LoRA(targets=("2",)).insert(network) == ["0", "2"]
    assert network[0] is network[2]
    assert torch.equal(network(x), plain)
    assert same(base_state(network), before)
    assert LoRA(targets=("0",)).insert(network) == []
    expected = tuned(network, LoRA())(x)
    LoRA.merge(network)
    assert network[0] is network[2]
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)


def test_copies_and_averages() -> None:
    network, frames = tuned(noisy()).eval(), torch.rand(1, 2, 3, 8, 8)
    expected = network(frames)
    twin = copy.deepcopy(network)
    assert torch.equal(twin(frames), expected)
    with torch.no_grad():
        for value in lora_state(twin).values():
            value.zero_()
    assert torch.equal(network(frames), expected)
    averaged = AveragedModel(network, avg_fn=lambda mean, value, _: 0.5 * mean + 0.5 * value)
    for one in (network, twin):
        averaged.update_parameters(one)
    for key, value in lora_state(averaged.module).items():
        torch.testing.assert_close(value, 0.5 * lora_state(network)[key])
    assert torch.equal(pickle.loads(pickle.dumps(network))(frames), expected)
    fresh = NETWORKS["basicvsr"]().eval()
    LoRA(rank=3, alpha=2.0).insert(fresh)
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(frames), expected)


def test_half_precision_and_channels_last_networks() -> None:
    for change in ({"dtype": torch.bfloat16}, {"memory_format": torch.channels_last}):
        network, frames = noisy().eval().to(**change), torch.rand(1, 2, 3, 8, 8)  # type: ignore[call-overload]
        frames = frames.to(change.get("dtype", torch.float32))  # type: ignore[call-overload]
        before, plain = copy.deepcopy(network.state_dict()), network(frames)
        LoRA().insert(network)
        assert torch.equal(network(frames), plain)
        assert {value.dtype for value in network.state_dict().values()} == {frames.dtype}
        expected = tuned(network, LoRA())(frames).float()
        merged = copy.deepcopy(network)
        LoRA.merge(merged)
        tolerance = 3e-2 if frames.dtype == torch.bfloat16 else 1e-5
        assert (merged(frames).float() - expected).abs().max() <= tolerance * expected.abs().max()
        LoRA.remove(network)
        assert same(network.state_dict(), before)
        assert all(v.stride() == before[k].stride() for k, v in network.state_dict().items())


def test_the_layers_are_where_their_convolution_is() -> None:
    network = noisy().to("meta")
    LoRA().insert(network)
    assert {value.device.type for value in lora_state(network).values()} == {"meta"}


def test_compiled_into_one_graph() -> None:
    network, x = tuned(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), torch.rand(1, 3, 9, 8)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), network(x))


def test_two_models_share_what_their_backbone_has() -> None:
    """Low-rank layers are part of the backbone; plug-ins are not."""
    network, frames = noisy().eval(), torch.rand(1, 2, 3, 8, 8)
    one = attach(network, bank=MemoryBankPlugin(C, groups=4, entries=6))
    other = attach(network)
    plain = other(frames)
    known = fingerprint(network)
    tuned(one.backbone)
    assert not torch.equal(other(frames), plain)
    assert torch.equal(one(frames), other(frames))  # the bank is untrained
    assert fingerprint(network) == known == attach(network).fingerprint
    LoRA.remove(other.backbone)
    assert torch.equal(one(frames), plain)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    network = noisy()
    monkeypatch.delitem(sys.modules, "vsrplug._lora_layer", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"low-rank layers come from peft \(.*\); install it: pip install 'vsrplug\["):
        LoRA().insert(network)
    assert LoRA.of(network) is None
    assert LoRA.merge(network) == []
    assert same(base_state(network), network.state_dict())
