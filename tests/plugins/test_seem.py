"""`SEEM` and its representation against the equations of paper 003, written with other operations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vsrplug import Context, attach
from vsrplug.backbones import EDVR, BasicVSR, SPyNet
from vsrplug.maps import recorded
from vsrplug.masks import Superpixels
from vsrplug.plugins import SEEM, SEEMPlugin, SemanticRepresentation


def noisy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def convolved(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """A 3x3 convolution with zero border as nine shifted products."""
    weight, bias = state[f"{name}.weight"].double(), state[f"{name}.bias"].double()
    h, w = x.shape[-2:]
    padded = x.new_zeros(*x.shape[:2], h + 2, w + 2)
    padded[..., 1:-1, 1:-1] = x
    out = bias.view(1, -1, 1, 1).expand(len(x), -1, h, w).clone()
    for dy in range(3):
        for dx in range(3):
            out += torch.einsum("oi,bihw->bohw", weight[:, :, dy, dx], padded[..., dy : dy + h, dx : dx + w])
    return out


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def dense(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].double().flatten(1).T + state[f"{name}.bias"].double()


def seem_by_equations(module: SEEM, feature: Tensor, representation: Tensor) -> Tensor:
    state = module.state_dict()
    together = torch.cat([feature, representation], 1).double()
    mapped = convolved(leaky(convolved(together, state, "mapping.0")), state, "mapping.2")  # F_m
    pooled = mapped.sum((2, 3)) / mapped[0, 0].numel()  # eq. 2, with two dense layers
    attention = 1 / (1 + torch.exp(-dense(leaky(dense(pooled, state, "attention.1")), state, "attention.3")))
    return feature.double() + mapped + attention[:, :, None, None] * mapped  # F + F_m + eq. 3


def representation_by_equation(module: SemanticRepresentation, frame: Tensor, masks: Tensor) -> Tensor:
    state = module.state_dict()
    seen = torch.cat([frame.double(), masks.double()], 1)
    embedded = leaky(convolved(leaky(convolved(seen, state, "embedding.0")), state, "embedding.2"))
    return embedded + convolved(leaky(convolved(embedded, state, "block.0")), state, "block.2")


def test_equations_2_and_3() -> None:
    module = noisy(SEEM(6, representation=4, reduction=1))
    feature, representation = torch.randn(2, 6, 5, 4), torch.randn(2, 4, 5, 4)
    expected = seem_by_equations(module, feature, representation)
    assert (module(feature, representation) - expected).abs().max() < 1e-5
    assert (expected - feature).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_equation_1(dtype: torch.dtype) -> None:
    module = noisy(SemanticRepresentation(masks=3, channels=5))
    frames, masks = torch.rand(2, 4, 3, 5, 6), (torch.rand(2, 4, 3, 5, 6) > 0.5).to(dtype)
    found = module(frames, masks)
    for t in range(4):
        expected = representation_by_equation(module, frames[:, t], masks[:, t])
        assert (found[:, t] - expected).abs().max() < 1e-5


def test_gradients() -> None:
    module, maker = noisy(SEEM(3, representation=2)).double(), noisy(SemanticRepresentation(1, 2)).double()
    feature = torch.randn(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    frames = torch.rand(1, 1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    masks = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).view(1, 1, 1, 3, 2)
    both = nn.ModuleDict({"seem": module, "maker": maker})
    names = [name for name, _ in both.named_parameters()]

    def refined(feature: Tensor, frames: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        pick = lambda start: {n.removeprefix(start): p for n, p in given.items() if n.startswith(start)}  # noqa: E731
        made = torch.func.functional_call(maker, pick("maker."), (frames, masks))
        return torch.func.functional_call(module, pick("seem."), (feature, made[:, 0]))

    assert torch.autograd.gradcheck(refined, (feature, frames, *both.parameters()))


def test_starts_as_the_identity_or_not() -> None:
    feature, representation = torch.randn(1, 8, 5, 6), torch.randn(1, 8, 5, 6)
    assert torch.equal(SEEM(8)(feature, representation), feature)
    assert not torch.equal(SEEM(8, zero_init=False)(feature, representation), feature)


@pytest.mark.parametrize(("channels", "squeezed"), [(8, 4), (32, 4), (64, 4), (128, 8), (256, 16)])
def test_the_squeeze_never_has_fewer_than_four_units(channels: int, squeezed: int) -> None:
    assert SEEM(channels, representation=1).attention[1].out_channels == squeezed


def test_the_representation_is_made_once_a_pass_and_each_frame_gets_its_own() -> None:
    plugin = noisy(SEEMPlugin(8, masks=2, representation=3))
    network = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)
    model = attach(network, seem=plugin)
    assert plugin.sites == ("backward_input", "forward_input", "backward_output", "forward_output")
    made: list[Tensor] = []
    used: list[Tensor] = []
    plugin.representation.register_forward_hook(lambda module, given, out: made.append(out))
    for site in plugin.sites:
        plugin.at[site].register_forward_hook(lambda module, given, out: used.append(given[1]))
    frames, masks = torch.rand(2, 3, 3, 6, 7), torch.rand(2, 3, 2, 6, 7) > 0.5
    model(frames, Context(frames, masks=masks))
    assert len(made) == 1
    # input and output of each step, backwards, then forwards
    assert len(used) == 12
    for given, t in zip(used, [2, 2, 1, 1, 0, 0, 0, 0, 1, 1, 2, 2], strict=True):
        assert torch.equal(given, made[0][:, t])


def test_a_clip_is_its_frames() -> None:
    plugin = noisy(SEEMPlugin(8, masks=2, sites=("fused",)))
    network = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)
    seen: list[tuple[Tensor, Tensor]] = []
    plugin.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    frames, masks = torch.rand(2, 3, 3, 6, 7), torch.rand(2, 3, 2, 6, 7) > 0.5
    attach(network, seem=plugin)(frames, Context(frames, masks=masks))
    ((clip, refined),) = seen
    representation = plugin.representation(frames, masks)
    for t in range(3):
        torch.testing.assert_close(refined[:, t], plugin.at["fused"](clip[:, t], representation[:, t]))


def test_sites_with_a_stride() -> None:
    """The representation is averaged over the LR pixels of each feature pixel."""
    network = EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=4, predeblur=True, hr_input=True)
    plugin = SEEMPlugin(8, masks=2, sites=("features", "fused"))
    model = attach(network.eval(), seem=plugin)
    frames, masks = torch.rand(1, 3, 3, 13, 18), torch.rand(1, 3, 2, 13, 18) > 0.5
    context = Context(frames, masks=masks)
    assert torch.equal(model(frames, context), network(frames))
    used: list[Tensor] = []
    for site in plugin.sites:
        plugin.at[site].register_forward_hook(lambda module, given, out: used.append(given[1]))
    context = Context(frames, masks=masks)
    model(frames, context)
    assert context.masks is not None
    assert context.masks.shape[-2:] == (16, 32)
    whole = plugin.representation(context.frames, context.masks)[0]
    blocks = whole.unflatten(3, (8, 4)).unflatten(2, (4, 4)).mean((3, 5))
    torch.testing.assert_close(used[0], blocks)
    torch.testing.assert_close(used[1], blocks[1:2])


def test_maps_are_the_masks_that_were_read_once() -> None:
    source = Superpixels(count=5)
    frames = torch.rand(1, 4, 3, 12, 10)
    model = attach(
        BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8), it=SEEMPlugin(8, masks=5)
    )
    with torch.no_grad(), recorded(model, 2, (0, 0)) as maps:
        model(frames, Context(frames, masks=source(frames[0])[None]))
    ((picture, planes),) = maps.items()  # of four sites
    assert picture == "it, masks"
    ((title, plane),) = planes.items()
    assert title == "the frame's masks"
    assert plane.dtype == torch.bool
    assert torch.equal(plane.float(), source(frames[0, 2:3])[0])
