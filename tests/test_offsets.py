"""Alignment layers of any network: found, measured and limited against the arithmetic done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

from vsrplug.backbones import EDVR
from vsrplug.offsets import alignment_layers
from vsrplug.plugins import FlowGuidedDeformableAlignment
from vsrplug.plugins._deformable import DeformablePack


class Pack(nn.Module):
    """torchvision's layer, and a convolution that makes its offsets."""

    def __init__(self, keyword: bool = False) -> None:
        super().__init__()
        self.offset_conv = nn.Conv2d(4, 18, 3, padding=1)
        self.mask = nn.Conv2d(4, 9, 3, padding=1)
        self.deform = DeformConv2d(4, 4, 3, padding=1)
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.offset_conv(x), self.mask(x).sigmoid()
        return self.deform(x, offset=offset, mask=mask) if self.keyword else self.deform(x, offset, mask)


class Official(nn.Module):
    """As BasicSR and mmagic write it: conv_offset beside a weight, thirds of its output being y, x and the mask."""

    def __init__(self, wide: int = 27) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.conv_offset = nn.Conv2d(4, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = self.conv_offset(x).chunk(3, dim=1)
        return deform_conv2d(x, torch.cat((first, second), 1), self.weight, None, padding=1, mask=mask.sigmoid())


def test_the_layers_of_edvr_are_found_by_name_with_the_parameters_of_their_offsets() -> None:
    network = EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=2)
    packs = ["dcn_pack.l3", "dcn_pack.l2", "dcn_pack.l1", "cas_dcnpack"]
    layers = {layer.name: layer for layer in alignment_layers(network)}
    assert set(layers) == {f"pcd_align.{pack}" for pack in packs}
    for name, layer in layers.items():
        own = network.get_submodule(f"{name}.conv_offset")
        assert [id(p) for p in layer.parameters] == [id(p) for p in own.parameters()]


def test_what_only_looks_like_a_pack_is_left_alone() -> None:
    other = nn.Module()
    other.conv_offset = nn.Conv2d(4, 27, 3)  # no kernel beside it
    nothing = Official()
    nothing.conv_offset = nn.Identity()  # type: ignore[assignment]
    assert alignment_layers(nn.ModuleList([other, nothing, Official(wide=28), nn.Conv2d(3, 3, 3)])) == []


@pytest.mark.parametrize(
    ("network", "predictor"),
    [(Pack(), "offset_conv"), (Pack(keyword=True), "offset_conv"), (Official(), "conv_offset")],
    ids=["torchvision", "torchvision, by keyword", "official"],
)
def test_the_mean_and_the_limit_of_foreign_layers(network: Any, predictor: str) -> None:
    x = torch.randn(2, 4, 6, 8)
    seen: list[Tensor] = []
    (layer,) = alignment_layers(network)
    assert {id(p) for p in layer.parameters} == {id(p) for p in getattr(network, predictor).parameters()}
    with torch.no_grad():
        plain, raw = network(x), getattr(network, predictor)(x)
        handle = layer.watch(seen.append)
        assert torch.equal(network(x), plain)
        handle.remove()
        assert seen.pop().item() == pytest.approx(raw[:, :18].double().abs().mean().item(), rel=1e-6)
        limit = raw[:, :18].abs().median().item()
        handle = layer.watch(None, limit)
        limited = network(x)
        handle.remove()
        offset = raw[:, :18].clamp(-limit, limit)
        inner = network.deform if isinstance(network, Pack) else network
        mask = network.mask(x) if isinstance(network, Pack) else raw[:, 18:]
        bias = getattr(inner, "bias", None)
        by_hand = deform_conv2d(x, offset, inner.weight, bias, padding=1, mask=mask.sigmoid())
        assert torch.allclose(limited, by_hand, atol=1e-5)
        assert not torch.allclose(limited, plain, atol=1e-2)
        assert torch.equal(network(x), plain)  # nothing is left


def test_bounded_offsets_are_measured_without_the_flow_and_limited_to_nine_tenths_of_the_bound() -> None:
    module = FlowGuidedDeformableAlignment(8, 1, groups=2)
    with torch.no_grad():
        module.get_parameter("conv_offset.6.bias").normal_(std=3.0)
    (layer,) = alignment_layers(module)
    sources, flows, reference = torch.randn(1, 1, 8, 6, 6), 40 * torch.rand(1, 1, 2, 6, 6), torch.randn(1, 8, 6, 6)
    raw: list[Tensor] = []
    seen: list[Tensor] = []
    spy = module.conv_offset.register_forward_hook(lambda module, args, output: raw.append(output.detach().clone()))
    handle = layer.watch(seen.append)
    module(sources, flows, reference)
    residual = (10 * raw[0][:, :36].double().tanh()).abs()
    assert seen[0].item() == pytest.approx(residual.mean().item(), rel=1e-5)
    assert residual.max() > 9.5
    handle.remove()
    spy.remove()
    handle = layer.watch(seen.append, 50.0)
    module.conv_offset.register_forward_hook(lambda module, args, output: raw.append(output.detach().clone()))
    module(sources, flows, reference)
    after = (10 * raw[1][:, :36].double().tanh()).abs()
    assert after.max() == pytest.approx(9.0, abs=1e-5)
    inside = residual < 9
    assert torch.equal(raw[1][:, :36][inside], raw[0][:, :36][inside])
    assert torch.equal(raw[1][:, 36:], raw[0][:, 36:])  # the masks
    assert seen[1] == seen[0]  # as they were before


def test_the_limit_is_the_threshold_or_what_the_bound_leaves_of_it() -> None:
    (free,) = alignment_layers(DeformablePack(8, 8, groups=2))
    (bounded,) = alignment_layers(FlowGuidedDeformableAlignment(8, 1, groups=2, max_residual=20.0))
    assert [free.limit(50.0), bounded.limit(50.0), bounded.limit(4.0)] == [50.0, 18.0, 4.0]


def test_beyond_the_limit_only_the_way_back_has_a_gradient() -> None:
    """Against each offset on its own: 1 goes down, then up, by a gradient step, from -8, -2, 2 and 8; limit 5."""
    pack = DeformablePack(4, 4, groups=1)
    bias = pack.get_parameter("conv_offset.bias")
    with torch.no_grad():
        bias[:4] = torch.tensor([-8.0, -2.0, 2.0, 8.0])
    (layer,) = alignment_layers(pack)
    layer.watch(None, 5.0)
    x = torch.zeros(1, 4, 1, 1)
    gradients = []
    for sign in (1, -1):
        out = pack.conv_offset(x)[0, :4, 0, 0]
        assert out.tolist() == [-5.0, -2.0, 2.0, 5.0]
        (gradient,) = torch.autograd.grad((sign * out).sum(), bias)
        gradients.append(gradient[:4].tolist())
    assert gradients == [[0.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, 0.0]]
