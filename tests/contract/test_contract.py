"""Every plug-in at every site it serves, on every backbone. A new plug-in is one row of PLUGINS."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vsrplug import Context, PluggedModel, Plugin, attach, load_plugins, save_plugins
from vsrplug.backbones import EDVR, MANA, STVUN, BasicVSR, BasicVSRPlusPlus, IconVSR, LatentVSR, RealBasicVSR, SPyNet
from vsrplug.plugins import (
    EFSTPlugin,
    FlowGuidedDeformableAlignmentPlugin,
    GaussianCrossFrameAttentionPlugin,
    ImageCleaningPlugin,
    LatentAttentionPlugin,
    MemoryBankPlugin,
    ResidualConvolutionsPlugin,
    SecondOrderPropagationPlugin,
    SEEMPlugin,
)

C, MASKS = 16, 5

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "edvr": lambda: EDVR(C, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=4),
    "edvr_without_tsa": lambda: EDVR(C, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=4, tsa=False),
    "basicvsr": lambda: BasicVSR(C, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8),
    "iconvsr": lambda: IconVSR(
        C, 1, temporal_padding=0, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8
    ),
    "basicvsr_pp": lambda: BasicVSRPlusPlus(
        C, 1, propagation=("backward", "forward"), flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8
    ),
    "real_basicvsr": lambda: RealBasicVSR(C, 1, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8),
    "latent_vsr": lambda: LatentVSR(C, layers=2, length=2),
    "mana": lambda: MANA(C, frames=3, encoder_blocks=1, decoder_blocks=1, memory_size=8, groups=4),
    "stvun": lambda: STVUN(C, frames=3, times=(0.5,), flow=SPyNet(levels=2, widths=(4, 4))),
}


class Row(NamedTuple):
    """A plug-in, the constructor arguments that suit narrow features, where it serves, and what its pass needs.

    `where` is a pattern of the names of sites, of `kinds` and of the width `channels`; `target` is the enlarged truth,
    which some plug-ins learn from.
    """

    make: type[Plugin]
    arguments: dict[str, Any]
    where: str = ""
    channels: int = C
    masks: bool = False
    target: bool = False


PLUGINS = {
    "efst": Row(EFSTPlugin, {"frames": 3}, where="^(features|aligned|attended|fused)$"),
    "flow_guided_deformable_alignment": Row(FlowGuidedDeformableAlignmentPlugin, {}, where="_warped$"),
    "gaussian_cross_frame_attention": Row(GaussianCrossFrameAttentionPlugin, {"frames": 3, "groups": 4}),
    "image_cleaning": Row(ImageCleaningPlugin, {"width": 8, "blocks": 1}, where="^input$", channels=3, target=True),
    "latent_attention": Row(LatentAttentionPlugin, {"order": ("short", "long")}),
    "memory_bank": Row(MemoryBankPlugin, {"groups": 4, "entries": 8}),
    "residual_convolutions": Row(ResidualConvolutionsPlugin, {"width": 8}),
    "second_order_propagation": Row(SecondOrderPropagationPlugin, {}, where="_(warped|output)$"),
    "seem": Row(SEEMPlugin, {"masks": MASKS}, masks=True),
}


def served(row: Row, backbone: nn.Module) -> list[str]:
    return [
        site
        for site, spec in backbone.sites.items()
        if spec.kind in row.make.kinds and spec.channels == row.channels and re.search(row.where, site)
    ]


CELLS = [
    pytest.param(plugin, backbone, site, id=f"{plugin}-{backbone}-{site}")
    for plugin, row in PLUGINS.items()
    for backbone, make in BACKBONES.items()
    for site in served(row, make())
]
# Where a plug-in's default sites put it on a backbone that has some of them.
PAIRS = [
    pytest.param(plugin, backbone, id=f"{plugin}-{backbone}")
    for plugin, row in PLUGINS.items()
    for backbone, make in BACKBONES.items()
    if set(served(row, make())) & set(row.make.default_sites)
]

# Their code at the sites is another's: compiling takes seconds.
LIKE_ANOTHER = {"edvr_without_tsa", "iconvsr", "basicvsr_pp", "real_basicvsr"}


def noisy(name: str) -> nn.Module:
    """A backbone with a little noise on its weights: a fresh EDVR has zero offsets and is blind at some sites."""
    backbone = BACKBONES[name]()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return backbone


def build(plugin: str, backbone: nn.Module, sites: tuple[str, ...] | None = None, **changes: Any) -> PluggedModel:
    row = PLUGINS[plugin]
    return attach(backbone, it=row.make(row.channels, sites=sites, **{**row.arguments, **changes}))


def clip(t: int = 3, h: int = 12, w: int = 16) -> Tensor:
    return torch.rand(2, t, 3, h, w)


def run(model: nn.Module, frames: Tensor, plugin: str) -> tuple[Tensor, Context]:
    b, t, _, h, w = frames.shape
    row = PLUGINS[plugin]
    generator = torch.Generator().manual_seed(1)
    masks = (torch.rand(b, t, MASKS, h, w, generator=generator) > 0.5).to(frames) if row.masks else None
    target = torch.rand(b, t, 3, 4 * h, 4 * w, generator=generator).to(frames) if row.target else None
    context = Context(frames, masks=masks, target=target)
    return model(frames, context), context


def loss_of(out: Tensor, context: Context) -> Tensor:
    return out.square().mean() + sum(context.losses.values(), torch.zeros(()))


def awake(model: PluggedModel) -> PluggedModel:
    """The plug-ins with noise on every parameter: no longer the identity."""
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("plugin", "backbone", "site"), CELLS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_identity_then_every_parameter_learns(plugin: str, backbone: str, site: str, training: bool) -> None:
    network = noisy(backbone)
    frames = clip()
    plain = network.train(training)(frames)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    model = build(plugin, network, (site,)).train(training)
    assert torch.equal(run(model, frames, plugin)[0], plain)
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "plugins"}

    network.requires_grad_(False)
    started = {name: p.detach().clone() for name, p in model.plugins.named_parameters()}
    optimizer = torch.optim.Adam(model.plugins.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(*run(model, frames, plugin)).backward()
        optimizer.step()
    still = [name for name, p in model.plugins.named_parameters() if torch.equal(p, started[name])]
    assert not still, f"dead after two steps: {still}"
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not torch.equal(run(model, frames, plugin)[0], plain)
    model.detach("it")
    assert torch.equal(model(frames), plain)
    assert torch.equal(network(frames), plain)


@pytest.mark.parametrize(("plugin", "backbone"), PAIRS)
def test_odd_sizes_and_single_frames(plugin: str, backbone: str) -> None:
    network = noisy(backbone).eval()
    t = network.window or 1
    for h, w in ((13, 10), (5, 7)):
        frames = clip(t, h, w)
        model = build(plugin, network)
        out = run(model, frames, plugin)[0]
        assert (len(out), *out.shape[2:]) == (2, 3, 4 * h, 4 * w)
        assert torch.equal(out, network(frames))


@pytest.mark.parametrize(("plugin", "backbone"), PAIRS)
def test_nothing_of_a_call_stays_behind(plugin: str, backbone: str) -> None:
    model = awake(build(plugin, noisy(backbone))).eval()
    frames, others = clip(), clip(h=8, w=8)
    first = run(model, frames, plugin)[0]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    run(model, others, plugin)
    assert torch.equal(run(model, frames, plugin)[0], first)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, frames, plugin)[0], first)
    tensors = [
        (name, key)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    assert not tensors, f"tensors kept outside parameters and buffers: {tensors}"


@pytest.mark.parametrize(("plugin", "backbone"), PAIRS)
def test_saved_and_loaded(plugin: str, backbone: str, tmp_path: Any) -> None:
    network = noisy(backbone).eval()
    model = awake(build(plugin, network)).eval()
    frames = clip()
    expected = run(model, frames, plugin)[0]
    save_plugins(model, tmp_path / "it.safetensors")
    again = load_plugins(copy.deepcopy(network), tmp_path / "it.safetensors").eval()
    assert torch.equal(run(again, frames, plugin)[0], expected)
    assert again.plugins["it"].sites == model.plugins["it"].sites


@pytest.mark.parametrize(("plugin", "backbone"), PAIRS)
def test_bfloat16_and_autocast(plugin: str, backbone: str) -> None:
    model = awake(build(plugin, noisy(backbone))).eval()
    frames = clip()
    exact = run(model, frames, plugin)[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(model, frames, plugin)[0]
    half = run(model.to(torch.bfloat16), frames.bfloat16(), plugin)[0]
    scale = exact.abs().max()
    assert (cast.float() - exact).abs().mean() < 0.02 * scale
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.05 * scale


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_several_plugins_on_one_site_run_in_order(backbone: str) -> None:
    network = noisy(backbone).eval()
    frames = clip()
    bank = PLUGINS["memory_bank"]
    site = next(site for site in ("fused", "attended", "layer1") if site in network.sites)
    one = bank.make(C, sites=(site,), **bank.arguments)
    two = bank.make(C, sites=(site,), **bank.arguments)
    model = awake(attach(network, one=one, two=two)).eval()
    reverse = attach(network, two=two, one=one).eval()
    context = Context(frames)
    out = model(frames, context)
    assert context.losses.keys() - {"backbone/quantisation"} == {"one/quantisation", "two/quantisation"}
    assert not torch.equal(out, reverse(frames))


@pytest.mark.slow
@pytest.mark.parametrize(("plugin", "backbone"), [pair for pair in PAIRS if not set(pair.values) & LIKE_ANOTHER])
def test_compiles_without_a_graph_break(plugin: str, backbone: str) -> None:
    torch._dynamo.reset()  # the limit on recompilations counts over the whole process
    model = awake(build(plugin, noisy(backbone))).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for frames in (clip(), clip(h=8, w=20)):  # the second size compiles with sizes that are symbols
            out = run(compiled, frames, plugin)[0]
            torch.testing.assert_close(out, run(model, frames, plugin)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("plugin", "backbone"), PAIRS)
def test_the_same_again_is_the_same_to_the_last_bit(plugin: str, backbone: str) -> None:
    model = awake(build(plugin, noisy(backbone)))
    frames = clip()
    for training in (False, True):
        model.train(training)
        torch.manual_seed(3)
        first = run(model, frames, plugin)[0]
        torch.manual_seed(3)
        assert torch.equal(run(model, frames, plugin)[0], first)


@pytest.mark.parametrize(("plugin", "backbone"), PAIRS)
def test_float16_agrees_with_float32(plugin: str, backbone: str) -> None:
    model = awake(build(plugin, noisy(backbone))).eval()
    frames = clip()
    exact = run(model, frames, plugin)[0]
    half = run(model.to(torch.float16), frames.half(), plugin)[0]
    assert half.dtype == torch.float16
    assert (half.float() - exact).abs().mean() < 0.01 * exact.abs().max()


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize(("plugin", "backbone"), PAIRS)
def test_memory_grows_with_the_pixels_not_with_their_square(plugin: str, backbone: str) -> None:
    model = awake(build(plugin, noisy(backbone)))

    def largest(h: int, w: int) -> int:
        with Largest() as seen:
            loss_of(*run(model, clip(h=h, w=w), plugin)).backward()
        return seen.elements

    assert largest(48, 64) < 5 * largest(24, 32)  # four times the pixels; their square would be sixteen
