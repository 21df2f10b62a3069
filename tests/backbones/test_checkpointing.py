"""Gradient checkpointing of BasicVSR: the gradients, losses and draws of the plain pass, with less kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vsrplug import Context, ForeignSite, PluggedModel, Plugin, attach
from vsrplug.backbones import BasicVSR, SPyNet
from vsrplug.backbones._blocks import ResidualTrunk
from vsrplug.frozen import lean
from vsrplug.plugins import LatentAttentionPlugin, MemoryBankPlugin, SEEMPlugin

FRAMES, MASKS = 4, 2


class Noise(Plugin):
    """Adds noise of a learned size while training, and counts its calls."""

    def __init__(self, channels: int, *, sites: Any) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict()
        self.size = nn.Parameter(torch.tensor(0.1))
        self.calls = 0

    def forward(self, feature: Tensor, context: Context, **given: Any) -> Tensor:
        self.calls += 1
        return feature + self.size * torch.randn_like(feature)


INPUTS = ("backward_input", "forward_input")
PLUGINS: dict[str, Callable[[], Plugin]] = {
    "seem": lambda: SEEMPlugin(8, masks=MASKS),  # before and after the residual blocks
    "memory_bank": lambda: MemoryBankPlugin(8, sites=(*INPUTS, "fused"), groups=4, entries=4),  # reports losses
    "latent_attention": lambda: LatentAttentionPlugin(8, order=("short", "long")),  # draws noise, reports losses
    "noise": lambda: Noise(8, sites=INPUTS),
}


def pair(plugin: str, train: tuple[str, ...] = ("backbone", "plugins")) -> tuple[PluggedModel, PluggedModel]:
    """A model that keeps everything, and the same one checkpointing."""
    backbone = BasicVSR(8, 4, flow=SPyNet(2, (4, 4, 4, 4)), reconstruction_channels=4)
    plain = attach(backbone, it=PLUGINS[plugin]())
    for parameter in plain.plugins.parameters():
        nn.init.normal_(parameter, std=0.2)
    for part in ("backbone", "plugins"):
        plain.get_submodule(part).requires_grad_(part in train)
    saving = copy.deepcopy(plain)
    for module in saving.modules():
        if isinstance(module, ResidualTrunk):
            module.checkpointing = True
    lean(plain)
    lean(saving)
    return plain, saving


def forward(model: nn.Module) -> tuple[Tensor, Context]:
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(1, FRAMES, 3, 12, 16, generator=generator)
    masks = torch.rand(1, FRAMES, MASKS, 12, 16, generator=generator).round()
    torch.manual_seed(2)  # what plug-ins draw
    context = Context(frames, masks=masks)
    return model(frames, context), context


def gradients(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Name -> gradient of every parameter that learns after one step."""
    step(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def everything(model: nn.Module) -> Tensor:
    out, context = forward(model)
    return out.square().mean() + sum(context.losses.values(), torch.zeros(()))


def assert_equal_gradients(plain: nn.Module, saving: nn.Module, step: Callable[[nn.Module], Tensor]) -> None:
    expected, found = gradients(plain, step), gradients(saving, step)
    assert expected.keys() == found.keys() == {name for name, p in plain.named_parameters() if p.requires_grad}
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("train", [("backbone", "plugins"), ("plugins",), ("backbone",)], ids="+".join)
@pytest.mark.parametrize("plugin", PLUGINS)
def test_gradients_are_those_of_the_plain_pass(plugin: str, train: tuple[str, ...]) -> None:
    plain, saving = pair(plugin, train)
    assert torch.equal(forward(saving)[0], forward(plain)[0])
    assert_equal_gradients(plain, saving, everything)


def test_gradients_under_autocast() -> None:
    def step(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return everything(model)

    assert_equal_gradients(*pair("seem"), step)


def test_plugins_are_called_and_losses_reported_once() -> None:
    saving = pair("noise")[1]
    forward(saving)[0].sum().backward()
    assert saving.plugins["it"].calls == 2 * FRAMES
    plain, saving = pair("memory_bank")
    expected = forward(plain)[1].losses["it/quantisation"]
    out, context = forward(saving)
    before = context.losses["it/quantisation"]
    out.square().mean().backward()
    assert torch.equal(before, expected)
    assert torch.equal(context.losses["it/quantisation"], expected)


def test_a_loss_that_is_differentiated_on_its_own_afterwards() -> None:
    """Had the residual blocks' plug-ins run again, the loss would be that of a graph without what came before."""

    def step(model: nn.Module) -> Tensor:
        out, context = forward(model)
        out.square().mean().backward(retain_graph=True)
        return context.losses["it/quantisation"]

    assert_equal_gradients(*pair("memory_bank"), step)


def test_residual_blocks_keep_what_enters_them() -> None:
    def kept(model: nn.Module) -> int:
        own = {parameter.data_ptr() for parameter in model.parameters()}
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                storages[tensor.untyped_storage().data_ptr()] = tensor.detach()
            return tensor.detach()  # the tensor itself would hold the node that holds it, for good

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            everything(model)
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    plain, saving = pair("noise")
    activations = 4 * 8 * 12 * 16 * 2 * FRAMES  # bytes of one layer, in all frames of both directions
    # A block keeps two activations, what enters it and the ReLU's; what enters the first is kept either way.
    assert kept(plain) - kept(saving) == (2 * 4 - 1) * activations


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_trunk_alone(blocks: int) -> None:
    plain = ResidualTrunk(5, 8, blocks)
    saving = ResidualTrunk(5, 8, blocks, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 6, 7)
    with torch.no_grad():
        assert torch.equal(saving(x), plain(x))
    assert_equal_gradients(plain, saving, lambda trunk: trunk(x, torch.sin).square().mean())


def test_the_argument_reaches_both_trunks() -> None:
    assert not BasicVSR(8, 1).backward_trunk.checkpointing
    network = BasicVSR(8, 1, checkpointing=True)
    assert network.backward_trunk.checkpointing
    assert network.forward_trunk.checkpointing
    assert network.state_dict().keys() == BasicVSR(8, 1).state_dict().keys()


def test_a_foreign_site_among_the_blocks_is_refused() -> None:
    network = BasicVSR(8, 1, flow=SPyNet(2, (4, 4, 4, 4)), checkpointing=True)
    site = ForeignSite("backward_trunk.main.2.0", channels=8, kind="frame", order="backward")
    model = attach(network, sites={"block": site}, it=Noise(8, sites=("block",)))
    with pytest.raises(RuntimeError, match="runs under gradient checkpointing"):
        forward(model)
    with torch.no_grad():  # nothing is checkpointed then
        assert forward(model)[0].isfinite().all()


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    trunk = ResidualTrunk(5, 8, 2, checkpointing=True)
    compiled = torch.compile(copy.deepcopy(trunk), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 6, 7)
    expected = gradients(trunk, lambda trunk: trunk(x).square().mean())
    found = gradients(compiled, lambda trunk: trunk(x).square().mean())
    for name, gradient in expected.items():
        assert (found[f"_orig_mod.{name}"] - gradient).norm() <= 1e-5 * gradient.norm(), name
