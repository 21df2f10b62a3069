"""Frozen convolutions against PyTorch's own: the same numbers to the last bit, and what is kept for backward."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vsrplug import Context, PluggedModel, Plugin, attach
from vsrplug.backbones import EDVR, BasicVSR, SPyNet
from vsrplug.frozen import LeanConv2d, lean, relu_before
from vsrplug.plugins import MemoryBankPlugin, SEEMPlugin
from vsrplug.plugins._blocks import ResidualBlock

GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"padding": 1},
    "no bias": {"padding": 1, "bias": False},
    "1x1": {"kernel_size": 1},
    "strided, groups": {"stride": (2, 1), "padding": (0, 2), "groups": 2},
    "depthwise": {"padding": 1, "groups": 4},
    "dilated": {"padding": 2, "dilation": 2},
    "same": {"padding": "same", "dilation": 2},
    "same, even kernel": {"padding": "same", "kernel_size": (4, 3)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate, strided": {"padding": 2, "padding_mode": "replicate", "stride": 3},
    "circular, same": {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def pair(**geometry: Any) -> tuple[nn.Conv2d, nn.Conv2d]:
    """PyTorch's convolution, frozen, and the same one lean."""
    plain = nn.Conv2d(4, 8, geometry.pop("kernel_size", 3), **geometry).requires_grad_(False)
    ours = copy.deepcopy(plain)
    lean(ours)
    assert type(ours) is LeanConv2d
    return plain, ours


def passed(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input for one fixed gradient of the output."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = network(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), torch.autograd.grad(out, x, weights)[0]


def assert_same(plain: nn.Module, ours: nn.Module, x: Tensor) -> None:
    for expected, found in zip(passed(plain, x), passed(ours, x), strict=True):
        assert torch.equal(found, expected)
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())


@contextmanager
def kept(parameters: Any = ()) -> Iterator[dict[int, int]]:
    """Address -> bytes of every storage kept for the backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}
    alive = []  # so that no address is given to another tensor

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # the tensor itself would hold the node that holds it, for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that whatever is computed from memory never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("weights", LAYOUTS, ids=["weights as made", "weights channels-last"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["as made", "channels-last"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_equals_torch_to_the_last_bit(
    geometry: dict[str, Any], layout: torch.memory_format, weights: torch.memory_format
) -> None:
    plain, ours = (conv.to(memory_format=weights) for conv in pair(**geometry))
    assert_same(plain, ours, torch.randn(2, 4, 9, 11).contiguous(memory_format=layout))


@pytest.mark.usefixtures("nan_in_fresh_memory")
def test_any_view_is_an_input() -> None:
    plain, ours = pair(padding=1)
    x = torch.randn(3, 2, 6, 9, 11)
    for view in (lambda x: x[:, 1, :4], lambda x: x[:, 0, ::2].expand(3, 3, 9, 11).repeat(1, 2, 1, 1)[:, :4]):
        assert_same(nn.Sequential(_Call(view), plain), nn.Sequential(_Call(view), ours), x)
    expanded = _Call(lambda x: x[:1, :1].expand(3, 4, 9, 11))
    assert_same(nn.Sequential(expanded, plain), nn.Sequential(expanded, ours), x[:, 0])
    assert_same(plain, ours, x[0, 0, :4])  # without a batch


class _Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(dtype: torch.dtype) -> None:
    plain, ours = pair(padding=1)
    x = torch.randn(2, 4, 9, 11)
    with torch.autocast("cpu", dtype):
        assert passed(ours, x)[0].dtype == dtype
        assert_same(plain, ours, x)
        with kept(ours.parameters()) as storages:
            ours(x.requires_grad_())
        assert not storages  # PyTorch's keeps copies of input and weight in half precision
    assert_same(plain.to(dtype), ours.to(dtype), x.to(dtype))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_first_and_second_derivatives_against_finite_differences(geometry: dict[str, Any]) -> None:
    ours = pair(**geometry)[1].double()
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x,))
    assert torch.autograd.gradgradcheck(ours, (x,))


def test_keeps_its_weight_and_nothing_else() -> None:
    plain, ours = pair(padding=1)
    x = torch.randn(2, 4, 9, 11, requires_grad=True)
    with kept(plain.parameters()) as storages:
        plain(x)
    assert list(storages.values()) == [x.nbytes]  # the day PyTorch does so itself, this file can go
    with kept(ours.parameters()) as storages:
        ours(x)
    assert not storages


def test_a_weight_changed_before_backward_is_an_error_not_a_wrong_gradient() -> None:
    ours = pair()[1]
    out = ours(torch.randn(2, 4, 9, 11, requires_grad=True))
    with torch.no_grad():
        ours.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Own(nn.Conv2d):
    """Somebody's subclass, which may compute anything."""


def test_only_frozen_convolutions_of_the_exact_type_are_turned_and_turned_back() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), Own(4, 4, 3), nn.Conv3d(4, 4, 1), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    )
    keys, kinds = list(network.state_dict()), [type(module) for module in network]
    network.requires_grad_(False)
    network[4].bias.requires_grad_()
    lean(network)
    assert [type(module) for module in network] == [LeanConv2d, *kinds[1:]]
    assert list(network.state_dict()) == keys
    assert isinstance(network[0], nn.Conv2d)
    network.requires_grad_(True)
    lean(network)
    assert [type(module) for module in network] == kinds


@pytest.mark.parametrize("names", [("weight", "bias"), ("weight",), ("bias",)], ids="+".join)
def test_what_learns_again_learns_even_before_lean_is_called(names: tuple[str, ...]) -> None:
    plain, ours = pair(padding=1)
    x = torch.randn(2, 4, 9, 11, requires_grad=True)
    for conv in (plain, ours):
        for name in names:
            conv.get_parameter(name).requires_grad_()
        conv(x).square().mean().backward()
    for name in names:
        assert torch.equal(ours.get_parameter(name).grad, plain.get_parameter(name).grad)


def test_copied_and_pickled(tmp_path: Path) -> None:
    network = nn.Sequential(*pair(padding=1)[1:])
    x = torch.randn(1, 4, 6, 6)
    torch.save(network, tmp_path / "network.pt")
    saved = torch.load(tmp_path / "network.pt", weights_only=False)
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), saved):
        assert type(again[0]) is LeanConv2d
        assert_same(network, again, x)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_whole(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    network = nn.Sequential(ResidualBlock(4), nn.Conv2d(4, 4, 3, stride=2, padding=1)).requires_grad_(False)
    lean(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (9, 12):
        x = torch.randn(2, 4, size, size)
        for expected, found in zip(passed(network, x), passed(compiled, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_under_ddp(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3), *pair(padding=1)[1:], nn.Conv2d(8, 4, 3))
    plain = copy.deepcopy(network)
    plain[1].__class__ = nn.Conv2d
    x = torch.randn(2, 4, 9, 9)
    plain(x).square().mean().backward()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        DistributedDataParallel(network)(x).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    for expected, found in zip(plain.parameters(), network.parameters(), strict=True):
        assert (found.grad is None) is (expected.grad is None)
        assert found.grad is None or torch.equal(found.grad, expected.grad)


def test_inside_the_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    network = peft.inject_adapter_in_model(config, network)
    plain = copy.deepcopy(network)
    lean(network)
    assert [type(network[i].base_layer) for i in (0, 2)] == [LeanConv2d] * 2
    assert_same(plain, network, torch.randn(1, 4, 9, 9))
    for each in (plain, network):
        each(torch.ones(1, 4, 9, 9)).square().mean().backward()
    learned = [(p.grad, q.grad) for p, q in zip(plain.parameters(), network.parameters(), strict=True)]
    assert sum(expected is not None for expected, _ in learned) == 4
    assert all(torch.equal(found, expected) for expected, found in learned if expected is not None)


def test_a_frozen_residual_block_keeps_one_byte_an_element() -> None:
    plain = ResidualBlock(8).requires_grad_(False)
    ours = copy.deepcopy(plain)
    lean(ours)
    x = torch.randn(2, 8, 6, 7)
    assert_same(plain, ours, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(plain, ours, x)
    with kept(ours.parameters()) as storages:
        ours(x.requires_grad_())
    assert list(storages.values()) == [x.numel()]
    ours = ours.double()
    assert torch.autograd.gradcheck(ours, (x[:1, :, :3, :3].detach().double().requires_grad_(),))


def test_relu_treats_what_is_not_finite_as_torch_does() -> None:
    following, x = pair()[1], torch.tensor([float("nan"), float("inf"), -1.0, 0.0, 1e-45])
    gradients = []
    for relu in (lambda x: torch.relu_(x), lambda x: relu_before(following, x)):
        leaf = x.clone().requires_grad_()
        out = relu(leaf * 1)
        torch.testing.assert_close(out, torch.relu(x), rtol=0, atol=0, equal_nan=True)
        gradients.append(torch.autograd.grad(out, leaf, torch.full_like(x, float("inf")))[0])
    assert torch.equal(*gradients)


def test_relu_before_a_layer_that_learns_is_shared_with_it() -> None:
    block = ResidualBlock(8)
    block.conv1.requires_grad_(False)
    lean(block)
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    with kept(block.parameters()) as storages:
        block(x)
    assert list(storages.values()) == [x.nbytes]


def basicvsr(blocks: int = 1) -> BasicVSR:
    return BasicVSR(8, blocks, flow=SPyNet(2, (4, 4, 4, 4)), reconstruction_channels=4)


def edvr() -> EDVR:
    return EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=2, deform_groups=2)


def plugged(backbone: nn.Module, plugin: Plugin) -> PluggedModel:
    model = attach(backbone, it=plugin)
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.backbone.requires_grad_(False)
    return model


@pytest.mark.parametrize(("backbone", "most"), [(basicvsr(blocks=12), 0.6), (edvr(), 0.95)], ids=["basicvsr", "edvr"])
def test_plugins_learn_the_same_with_less_kept(backbone: nn.Module, most: float) -> None:
    plain = plugged(backbone, SEEMPlugin(8, masks=2))
    ours = copy.deepcopy(plain)
    lean(ours)
    frames, masks = torch.rand(1, 3, 3, 16, 16), torch.rand(1, 3, 2, 16, 16)
    found = []
    for model in (plain, ours):
        with kept(model.parameters()) as storages:
            loss = (model(frames, Context(frames, masks=masks)) - 0.5).square().mean()
        loss.backward()
        found.append((loss, [p.grad for p in model.plugins.parameters()], sum(storages.values())))
    (loss, gradients, plain_bytes), (our_loss, our_gradients, our_bytes) = found
    assert torch.equal(our_loss, loss)
    assert all(torch.equal(*gradient) for gradient in zip(our_gradients, gradients, strict=True))
    assert our_bytes < most * plain_bytes


class Spy(MemoryBankPlugin):
    """Notes what autograd had kept when the features arrived."""

    def __init__(self, storages: dict[int, int]) -> None:
        super().__init__(8, sites=("fused",), groups=4, entries=4)
        self.storages = storages
        self.seen: list[tuple[bool, int]] = []

    def forward(self, feature: Tensor, context: Context, **given: Any) -> Tensor:
        inputs = [feature, *(value for value in given.values() if isinstance(value, Tensor)), *(context.flows or ())]
        self.seen.append((any(value.requires_grad for value in inputs), len(self.storages)))
        return super().forward(feature, context, **given)


@pytest.mark.parametrize("backbone", [basicvsr(), edvr()], ids=["basicvsr", "edvr"])
def test_no_graph_before_the_first_site_that_learns(backbone: nn.Module) -> None:
    frames = torch.rand(1, 3, 3, 16, 16)
    with kept() as storages:
        spy = Spy(storages)
        model = plugged(backbone, spy)
        out = model(frames)
    assert spy.seen == [(False, 0)]
    assert out.requires_grad
    assert storages


def test_features_are_free_before_the_frames_are_enlarged() -> None:
    """Of a long clip they are many times what the head needs."""

    class Watch(MemoryBankPlugin):
        references: list[weakref.ref[Tensor]]

        def forward(self, feature: Tensor, context: Context, **given: Any) -> Tensor:
            self.references.append(weakref.ref(feature))
            return super().forward(feature, context, **given)

    network = basicvsr()
    watch = Watch(8, sites=("backward_output", "forward_output"), groups=4, entries=4)
    watch.references = []
    alive: list[int] = []
    network.upconv1.register_forward_pre_hook(
        lambda *_: alive.append(sum(reference() is not None for reference in watch.references))
    )
    with torch.no_grad():
        attach(network, watch=watch)(torch.rand(1, 3, 3, 8, 8))
    assert len(watch.references) == 6
    assert alive == [0]
