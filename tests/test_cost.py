"""Operations counted without computing, against formulas and real passes; optimizer state against real steps."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from vsrplug import Context, ForeignSite, PluggedModel, Plugin, attach
from vsrplug._flop_formulas import register_formulas
from vsrplug.backbones import EDVR, BasicVSR, Bicubic, SlidingWindow, SPyNet
from vsrplug.cost import Flops, count_flops, dry_step, example, state_bytes
from vsrplug.plugins import (
    EFSTPlugin,
    FlowGuidedDeformableAlignmentPlugin,
    GaussianCrossFrameAttention,
    GaussianCrossFrameAttentionPlugin,
    ImageCleaningPlugin,
    LatentAttentionPlugin,
    LongRangeAttention,
    MemoryBankPlugin,
    SecondOrderPropagationPlugin,
    SEEMPlugin,
    _deformable,
    _gaussian_blocks,
)

C, T, SIZE = 16, 3, (12, 16)


class OnFrames(nn.Module):
    """Any function or module of a clip, as a network that declares nothing."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, frames: Tensor) -> Any:
        return self.function(frames)


def flops(model: Callable[..., Any], t: int = T, size: tuple[int, int] = SIZE) -> Flops:
    network = model if isinstance(model, nn.Module) else OnFrames(model)
    return count_flops(network, partial(example, network, t, size))


def total(model: Callable[..., Any], t: int = T, size: tuple[int, int] = SIZE) -> int:
    counted = flops(model, t, size)
    assert not counted.uncounted
    assert counted.total is not None
    return counted.total


def in_earnest(run: Callable[[], Any]) -> int:
    """What torch counts while it computes."""
    register_formulas()
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def basicvsr() -> BasicVSR:
    return BasicVSR(C, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)


def edvr() -> EDVR:
    return EDVR(C, frames=T, extract_blocks=1, reconstruct_blocks=1, deform_groups=4)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        # outputs x multiplications for each x 2
        (nn.Conv2d(3, 5, 3, padding=1), T * 5 * 12 * 16 * 27 * 2),
        (nn.Conv2d(3, 5, (1, 3), stride=2), T * 5 * 6 * 7 * 9 * 2),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), T * 6 * 12 * 16 * 9 * 2),
        # a transposed convolution gives every input to 16 places of every output channel
        (nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1), T * 3 * 12 * 16 * 5 * 16 * 2),
        (nn.Linear(16, 7), T * 3 * 12 * 7 * 16 * 2),
        (nn.Sequential(nn.LeakyReLU(), nn.GroupNorm(1, 3), nn.Upsample(scale_factor=2)), 0),
    ],
)
def test_layers_counted_by_hand(layer: nn.Module, expected: int) -> None:
    assert total(OnFrames(lambda frames: layer(frames.flatten(0, 1)))) == expected


def spynet_flops(h: int, w: int, widths: tuple[int, ...], levels: int) -> int:
    layers = list(zip((8, *widths), (*widths, 2), strict=True))
    return sum(2 * 49 * i * o * (h >> level) * (w >> level) for level in range(levels) for i, o in layers)


def test_basicvsr_is_counted_as_its_formula_says() -> None:
    channels, blocks, wide, (h, w) = 8, 3, 4, (16, 24)

    def conv(inputs: int, outputs: int, enlarged: int = 1) -> int:
        return 2 * 9 * inputs * outputs * h * w * enlarged**2

    trunk = conv(channels + 3, channels) + blocks * 2 * conv(channels, channels)
    fusion = 2 * (2 * channels) * channels * h * w
    head = conv(channels, 4 * channels) + conv(channels, 4 * wide, 2) + conv(wide, wide, 4) + conv(wide, 3, 4)
    flow = 2 * (T - 1) * spynet_flops(h, w, (4, 6), 3)
    network = BasicVSR(channels, blocks, flow=SPyNet(levels=3, widths=(4, 6)), reconstruction_channels=wide)
    assert total(network, size=(h, w)) == T * (2 * trunk + fusion + head) + flow


def test_what_a_seem_adds_is_its_formula() -> None:
    h, w = SIZE
    pixel = 2 * h * w
    representation = T * pixel * 9 * ((3 + 5) * C + 3 * C * C)
    seem = pixel * 9 * (2 * C * C + C * C) + 2 * 2 * C * 4
    counted = flops(attach(basicvsr(), seem=SEEMPlugin(C, masks=5)))
    assert counted.counted["plugins.seem"] == representation + 4 * T * seem  # 4 sites
    assert counted.total == total(basicvsr()) + counted.counted["plugins.seem"]


def test_an_attention_over_all_positions_is_its_formula() -> None:
    c, (h, w) = 8, (12, 16)
    module = LongRangeAttention(16, embedding=c, variational=False)
    queries, keys = T * (h // 2) * (w // 2), T * (h // 4) * (w // 4)
    attention = 2 * queries * keys * 2 * c
    reduce, enlarge = 2 * 27 * 16 * c * T * h * w, 2 * 16 * c * c * T * (h // 2) * (w // 2)
    linear = 2 * c * c * (3 * queries) + 2 * c * (c + 16) * T * h * w
    clip = nn.Conv2d(3, 16, 1)
    embed = 2 * 3 * 16 * T * h * w
    network = OnFrames(lambda frames: module(clip(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])))
    assert total(network) == attention + reduce + enlarge + linear + embed


@pytest.mark.parametrize("weighting", ["gaussian_of_softmax", "product", "softmax_of_gaussian"])
@pytest.mark.parametrize(("size", "sigma", "eps"), [((20, 37), 1.5, 1e-4), ((33, 18), 2.0, 0.0), ((5, 3), 4.0, 1e-4)])
def test_gaussian_attention_is_what_its_blocks_multiply(
    weighting: str, size: tuple[int, int], sigma: float, eps: float
) -> None:
    query, key, value = torch.randn(2, *size, 6), torch.randn(2, 3, *size, 6), torch.randn(2, 3, *size, 5)
    width = torch.tensor([sigma])
    done = in_earnest(lambda: _gaussian_blocks.forward(query, key, value, width, weighting, eps))
    assert _gaussian_blocks.operations(key, 5, width, weighting, eps) == done
    operator = torch.ops.vsrplug.gaussian_attention
    assert in_earnest(lambda: operator(query, key, value, width, weighting, eps)) == done


def test_gaussian_attention_that_skips_nothing_is_all_pairs() -> None:
    h, w = SIZE
    attention = GaussianCrossFrameAttention(16, frames=T, groups=4, weighting="product", eps=0.0)
    embed = nn.Conv2d(3, 16, 1)

    def run(frames: Tensor) -> Tensor:
        clip = embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return attention(clip[:, 1], clip)

    projections = h * w * (3 * 16 * T + 8 * 16 * (1 + 2 * T) + 8 * T * 16)
    assert total(run) == 2 * (projections + T * (h * w) ** 2 * (8 + 8))


def test_the_reach_of_gaussian_attention_follows_sigma_whatever_the_dtype() -> None:
    def model(sigma: float) -> PluggedModel:
        plugin = GaussianCrossFrameAttentionPlugin(C, frames=3, groups=4, sigma=sigma, weighting="softmax_of_gaussian")
        return attach(basicvsr(), attention=plugin)

    near, far = (flops(model(sigma), size=(48, 40)).counted["plugins.attention"] for sigma in (1.0, 4.0))
    assert near < far / 2
    assert flops(model(1.0).bfloat16(), size=(48, 40)).counted["plugins.attention"] == near


@pytest.mark.parametrize("samples", [2**22, 16 * 9 * 16 * 5])
def test_deformable_convolution_costs_the_same_whichever_way_it_is_made(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_deformable, "CPU_SAMPLES", samples)  # in bands, too
    weight = torch.randn(5, 16, 3, 3)
    offset, mask = nn.Conv2d(16, 72, 1), nn.Conv2d(16, 36, 1)
    embed = nn.Conv2d(3, 16, 1)

    def ours(x: Tensor) -> Tensor:
        return _deformable.deformable_convolution(x, offset(x), mask(x), weight)

    def torchvisions(x: Tensor) -> Tensor:
        return deform_conv2d(x, offset(x), weight, padding=1, mask=mask(x))

    def plain(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1) + offset(x).mean() + mask(x).mean()

    counts = {total(lambda frames, way=way: way(embed(frames[:, 0]))) for way in (ours, torchvisions, plain)}
    assert len(counts) == 1
    assert counts.pop() > 2 * 12 * 16 * 9 * 16 * 5


PLUGINS: dict[str, tuple[Callable[[], nn.Module], dict[str, Callable[[], Plugin]]]] = {
    "efst": (edvr, {"it": lambda: EFSTPlugin(C, frames=T)}),
    "efst_neighbours": (edvr, {"it": lambda: EFSTPlugin(C, frames=T, neighbours="aligned")}),
    "alignment": (basicvsr, {"it": lambda: FlowGuidedDeformableAlignmentPlugin(C)}),
    "gaussian": (edvr, {"it": lambda: GaussianCrossFrameAttentionPlugin(C, frames=T, groups=4)}),
    "cleaning": (basicvsr, {"it": lambda: ImageCleaningPlugin(3, width=8, blocks=1)}),
    "latent": (edvr, {"it": lambda: LatentAttentionPlugin(C, order=("short", "long"))}),
    "latent_keys": (basicvsr, {"it": lambda: LatentAttentionPlugin(C, external_keys=True)}),
    "second_order": (basicvsr, {"it": lambda: SecondOrderPropagationPlugin(C)}),
    "several": (
        basicvsr,
        {"seem": lambda: SEEMPlugin(C, masks=5), "bank": lambda: MemoryBankPlugin(C, groups=4, entries=8)},
    ),
    "several_on_edvr": (
        edvr,
        {"bank": lambda: MemoryBankPlugin(C, groups=4, entries=8), "seem": lambda: SEEMPlugin(C, masks=5)},
    ),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_as_many_as_a_real_training_pass(name: str) -> None:
    make, plugins = PLUGINS[name]
    network = make()
    expected, before = {}, 0
    attached: dict[str, Plugin] = {}
    for part, plugin in (("backbone", None), *plugins.items()):
        attached |= {part: plugin()} if plugin else {}
        model = attach(network, **attached).train()
        given = example(attach(network, **{key: make() for key, make in plugins.items() if key in attached}), T, SIZE)
        done = in_earnest(lambda model=model, given=given: model(given.frames, given))
        expected["backbone" if part == "backbone" else f"plugins.{part}"] = done - before
        before = done
    assert all(count > 0 for count in expected.values())
    assert flops(model.eval()) == Flops(expected, {}, restored=1 if make is edvr else T)


def test_a_sliding_window_and_a_foreign_network() -> None:
    slid = SlidingWindow(attach(edvr(), seem=SEEMPlugin(C, masks=2, sites=("fused",))), padding="replicate")
    given = example(slid, 4, SIZE)
    assert total(slid, 4) == in_earnest(lambda: slid(given.frames, given))

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3 + C, C, 3, padding=1)
            self.last = nn.Conv2d(C, 3, 3, padding=1)

        def forward(self, frames: Tensor) -> Tensor:
            state, out = torch.zeros(len(frames), C, *frames.shape[-2:]), []
            for frame in frames.unbind(1):
                state = self.body(torch.cat((frame, state), 1))
                out.append(self.last(state))
            return torch.stack(out, 1)

    site = ForeignSite("body", C, "frame", order="forward")
    counted = flops(attach(Foreign(), sites={"here": site}, seem=SEEMPlugin(C, masks=2, sites=("here",))))
    assert counted.counted["backbone"] == 2 * T * 12 * 16 * 9 * (19 * C + C * 3)
    assert counted.counted["plugins.seem"] == 2 * T * 12 * 16 * 9 * (5 * C + 6 * C * C) + T * 2 * 2 * C * 4
    assert counted.restored == T


def test_image_cleaning_is_counted_once() -> None:
    plugin = ImageCleaningPlugin(3, width=8, blocks=1, threshold=0.0)  # would make three passes in eval mode
    model = attach(basicvsr(), cleaning=plugin).eval()
    once = 2 * T * 12 * 16 * 9 * (2 * 3 * 8 + 2 * 8 * 8)
    assert flops(model).counted["plugins.cleaning"] == once


def test_nothing_takes_memory_and_nothing_changes() -> None:
    model = attach(basicvsr(), seem=SEEMPlugin(C, masks=64), bank=MemoryBankPlugin(C, groups=4)).eval()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    learn = [parameter.requires_grad for parameter in model.parameters()]
    size = (12 * 4096, 16 * 4096)  # 77 TB of frames and masks alone
    assert flops(model, size=size).counted["backbone"] == flops(model).counted["backbone"] * 4096**2
    assert list(model.plugins) == ["seem", "bank"]
    assert not any(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == learn
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {
        name: set(values) for name, values in attributes.items()
    }
    frames = torch.rand(1, T, 3, *SIZE)
    assert torch.equal(model(frames, Context(frames, masks=torch.rand(1, T, 64, *SIZE))), model.backbone(frames))


def test_running_statistics_stay() -> None:
    network = OnFrames(nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1)))
    before = copy.deepcopy(network.state_dict())
    assert total(network) == 2 * 3 * T * 12 * 16
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_network_without_operations() -> None:
    assert flops(Bicubic()) == Flops({"backbone": 0}, {}, restored=T)
    assert flops(attach(Bicubic())).total == 0


class Failing(Plugin):
    """A plug-in that does `what` with its feature, at the fused clip."""

    default_sites = ("fused",)

    def __init__(self, channels: int, *, what: Callable[[Tensor], Any], sites: Any = None) -> None:
        super().__init__(channels, sites=sites)
        self.what = what

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        self.what(feature)
        return feature


def depends(feature: Tensor) -> None:
    if feature.mean() > 0:
        raise AssertionError


def complains(feature: Tensor) -> None:
    raise ValueError("a clip of 40 frames at least\nand more")


@torch.library.custom_op("vsrplug_test::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x @ x.mT


square.register_fake(lambda x: x.new_empty(*x.shape[:-1], x.shape[-2]))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (depends, r"it reads values back to decide what to do \(aten\.\S+\), and there are none yet"),
        (complains, "a clip of 40 frames at least"),
        (lambda feature: feature.numpy(), r"\w+Error: .+"),
        (
            lambda feature: square(feature),
            r"no formula for the operations of vsrplug_test\.square; give one with "
            r"torch\.utils\.flop_counter\.register_flop_formula",
        ),
        (
            lambda feature: torch._int_mm(feature[0, 0, 0].char().expand(32, -1, -1)[:, 0], torch.ones(16, 8).char()),
            r"no formula for the operations of aten\._int_mm; .*",
        ),
    ],
    ids=["depends", "complains", "numpy", "custom", "int_mm"],
)
def test_what_cannot_be_counted_says_why_and_the_rest_is_counted(what: Callable[[Tensor], Any], reason: str) -> None:
    bank = partial(MemoryBankPlugin, groups=4, entries=8)
    counted = flops(attach(basicvsr(), it=Failing(C, what=what), bank=bank))
    assert counted.counted == flops(attach(basicvsr(), bank=bank)).counted
    assert list(counted.uncounted) == ["plugins.it"]

    assert re.fullmatch(reason, counted.uncounted["plugins.it"])
    assert counted.total is None


def test_without_the_backbone_nothing_is_counted() -> None:
    network = edvr()
    network.fusion.register_forward_pre_hook(lambda module, args: depends(args[0]))
    counted = flops(attach(network, bank=partial(MemoryBankPlugin, groups=4)))
    assert not counted.counted
    assert counted.uncounted["backbone"].startswith("it reads values back")
    assert counted.uncounted["plugins.bank"] == "the backbone was not counted"


def test_a_network_that_cannot_be_copied() -> None:
    network = basicvsr()
    network.lock = threading.Lock()
    assert flops(network).uncounted["backbone"].startswith("the network cannot be copied: TypeError: cannot pickle")


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: x[0, 0, 0] @ x[0, 0, 0, 0], 12 * 16),
        (lambda x: torch.addmv(x[0, 0, 0, :, 0], x[0, 0, 0], x[0, 0, 0, 0]), 12 * 16),
        (lambda x: x.new_zeros(12).addmv_(x[0, 0, 0], x[0, 0, 0, 0]), 12 * 16),
        (lambda x: x[0, 0, 0, 0].dot(x[0, 0, 0, 1]), 16),
        (lambda x: torch.vdot(x[0, 0, 0, 0], x[0, 0, 0, 1]), 16),
        (lambda x: x.new_zeros(12, 12).addmm_(x[0, 0, 0], x[0, 0, 1].mT), 12 * 12 * 16),
        (lambda x: x.new_zeros(3, 12, 12).baddbmm_(x[0, 0], x[0, 1].mT), 3 * 12 * 12 * 16),
        (lambda x: F.scaled_dot_product_attention(x, x, x), 2 * 9 * 12 * 12 * 16),
    ],
)
def test_products_that_torchs_counter_may_not_know(run: Callable[[Tensor], Tensor], expected: int) -> None:
    assert total(run) == 2 * expected


def test_formulas_are_registered_once() -> None:
    register_formulas()
    register_formulas()


def test_the_example_has_what_the_plugins_ask_for() -> None:
    plain = example(basicvsr(), 4, (8, 10))
    assert plain.frames.shape == (1, 4, 3, 8, 10)
    assert (plain.masks, plain.keys) == (None, None)
    assert plain.target is not None
    assert plain.target.shape == (1, 4, 3, 32, 40)
    latent = LatentAttentionPlugin(C, external_keys=True)
    given = example(attach(edvr(), few=SEEMPlugin(C, masks=2), many=SEEMPlugin(C, masks=7), latent=latent), 4, (8, 10))
    assert given.frames.shape == (1, T, 3, 8, 10)  # the window
    assert given.masks is not None
    assert given.masks.shape == (1, T, 7, 8, 10)
    assert given.keys is not None
    assert given.keys.shape == (1, 1, 3, 8, 10)
    assert example(OnFrames(nn.Identity())).target is None


@pytest.mark.parametrize(("frames", "size"), [(0, (8, 8)), (3, (8, 0)), (3, (8,))])
def test_an_example_of_nothing(frames: int, size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a clip has one frame or more and a size \[height, width\], got frames="):
        example(basicvsr(), frames, size)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": weights, "lr": 1e-3, "name": "weights"},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 1e-4, "weight_decay": 0.5, "name": "others"},
    ]


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Adam,
        torch.optim.SGD,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.AdamW, lr=0.1, amsgrad=True),
        torch.optim.Adafactor,  # looks at values, and keeps rows and columns alone
        torch.optim.NAdam,
        torch.optim.ASGD,
    ],
)
def test_optimizer_state_is_that_of_a_real_step(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = edvr()
    dry = dry_step(make, groups(model))
    assert all(p.grad is None for p in model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    real = make(groups(model))
    real.step()
    tensors = [x for state in real.state.values() for x in state.values() if isinstance(x, Tensor)]
    assert state_bytes(dry) == state_bytes(real) == sum(x.numel() * x.element_size() for x in tensors)
    settings = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in (dry, real)]
    assert settings[0] == settings[1]


def test_adam_keeps_two_moments_and_a_count() -> None:
    parameters = [nn.Parameter(torch.zeros(64, 3, 3, 3)), nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))]
    expected = 2 * (64 * 27 * 4 + 64 * 2) + 2 * 4
    assert state_bytes(dry_step(torch.optim.Adam, [{"params": parameters}])) == expected


def test_an_optimizer_that_cannot_is_heard() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'closure'"):
        dry_step(torch.optim.LBFGS, [{"params": [nn.Parameter(torch.zeros(2))]}])
