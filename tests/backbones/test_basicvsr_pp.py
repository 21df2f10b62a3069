"""BasicVSR++ against the official output, and in every form against the recurrence with torchvision's convolution."""

from __future__ import annotations

import copy
import re
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from vsrplug import Context, Plugin, attach, load_official
from vsrplug.backbones import BasicVSRPlusPlus, SPyNet, _blocks
from vsrplug.plugins import MemoryBankPlugin, SEEMPlugin
from vsrplug.plugins._blocks import warp

ONE_ROUND = ("backward", "forward")
FORMS: list[dict[str, Any]] = [
    {},
    {"propagation": ONE_ROUND},
    {"propagation": ONE_ROUND, "alignment": "first_order"},
    {"propagation": ONE_ROUND, "alignment": "flow"},
    {"propagation": ("forward", "forward", "backward"), "scale": 3},
    {"restoration": True},
    {"restoration": True, "scale": 2},
    {"restoration": True, "alignment": "flow", "propagation": ("forward",)},
]


def small(**options: Any) -> BasicVSRPlusPlus:
    """A small BasicVSR++ whose weights have noise, since fresh offsets are those of the flow."""
    defaults = {
        "channels": 8,
        "blocks": 1,
        "deform_groups": 4,
        "flow": SPyNet(2, (4, 4, 4, 4)),
        "reconstruction_channels": 4,
    }
    net = BasicVSRPlusPlus(**(defaults | options))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def aligned(layer: Any, features: list[Tensor], flows: list[Tensor], reference: Tensor) -> Tensor:
    """Flow-guided deformable alignment of one feature or two, the equations of the paper in their order."""
    warped = [warp(feature, flow) for feature, flow in zip(features, flows, strict=True)]
    out = layer.conv_offset(torch.cat((warped[0], reference, *warped[1:], *flows), 1))
    rows, columns, mask = out.chunk(3, 1)
    residues = layer.max_residual * torch.tanh(torch.cat((rows, columns), 1))
    offsets = [
        residue + flow.flip(1).repeat(1, residue.shape[1] // 2, 1, 1)
        for residue, flow in zip(residues.chunk(len(features), 1), flows, strict=True)
    ]
    return deform_conv2d(
        torch.cat(features, 1), torch.cat(offsets, 1), layer.weight, layer.bias, padding=1, mask=mask.sigmoid()
    )


def plainly(net: BasicVSRPlusPlus, frames: Tensor) -> Tensor:
    """The network, one frame and one pair at a time."""
    t = frames.shape[1]
    size = [side * net.scale for side in frames.shape[-2:]]
    bottom, right = (-side % net.stride for side in frames.shape[-2:])
    frames = F.pad(frames.flatten(0, 1), (0, right, 0, bottom), mode="replicate").unflatten(0, frames.shape[:2])
    single = [net.feat_extract(frames[:, i]) for i in range(t)]
    seen = [frames[:, i] for i in range(t)]
    if net.stride > 1:
        seen = [F.interpolate(frame, scale_factor=1 / net.stride, mode="bicubic") for frame in seen]
    made: dict[str, dict[int, Tensor]] = {}
    for branch, trunk in net.backbone.items():
        step = -1 if branch.startswith("backward") else 1
        features: dict[int, Tensor] = {}
        for i in list(range(t))[::step]:
            feature = torch.zeros_like(single[i])
            if i - step in features:
                previous, flow = features[i - step], net.spynet(seen[i], seen[i - step])
                earlier, far = torch.zeros_like(previous), torch.zeros_like(flow)
                if i - 2 * step in features:
                    earlier = features[i - 2 * step]
                    far = flow + warp(net.spynet(seen[i - step], seen[i - 2 * step]), flow)
                if net.alignment == "flow":
                    feature = warp(previous, flow)
                elif net.alignment == "first_order":
                    feature = aligned(net.deform_align[branch], [previous], [flow], single[i])
                else:
                    feature = aligned(net.deform_align[branch], [previous, earlier], [flow, far], single[i])
            others = [of[i] for of in made.values()]
            features[i] = feature + trunk.main(torch.cat([single[i], *others, feature], 1))
        made[branch] = features
    outputs = []
    for i in range(t):
        fused = net.reconstruction.main(torch.cat([single[i], *(of[i] for of in made.values())], 1))
        base = frames[:, i]
        if net.scale > 1:
            base = F.interpolate(base, scale_factor=net.scale, mode="bilinear", align_corners=False)
        outputs.append(net.head(fused) + base)
    return torch.stack(outputs, 1)[..., : size[0], : size[1]]


class Spy(Plugin):
    """Notes every call and feature; multiplies the feature by a factor."""

    def __init__(self, channels: int, *, sites: Any = None, factor: float = 1.0) -> None:
        super().__init__(channels, sites=sites)
        self.factor = factor
        self.features: dict[tuple[str, int | None], Tensor] = {}

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        self.features[site, t] = feature
        return feature if self.factor == 1 else feature * self.factor


@torch.no_grad()
def test_official_output(golden: ModuleType) -> None:
    case = golden.load("mmagic_basicvsrpp")
    net = BasicVSRPlusPlus(channels=16, blocks=2)
    report = load_official(net, case.state_dict())
    assert (report.missing, report.unexpected) == ([], [])
    assert case.check({"out": net(case.input())}) <= 1e-5


@pytest.mark.parametrize("name", ["basicsr_basicvsrpp", "mmagic_basicvsrpp_restoration"])
def test_other_layouts_load(golden: ModuleType, name: str) -> None:
    case = golden.load(name)
    net = BasicVSRPlusPlus(channels=16, blocks=2, restoration=not case.constructor["is_low_res_input"])
    report = load_official(net, case.state_dict())
    assert (report.missing, report.unexpected) == ([], [])
    values = list(case.state_dict().values())
    assert all(torch.equal(own, value) for own, value in zip(net.state_dict().values(), values, strict=True))


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [("mmagic_basicvsrpp_64_7", (), 7_322_927), ("mmagic_basicvsrpp_128_25", (128, 25), 43_780_463)],
)
def test_official_keys_in_order(golden: ModuleType, name: str, arguments: tuple[int, ...], parameters: int) -> None:
    official = golden.full_size(name)
    with torch.device("meta"):
        net = BasicVSRPlusPlus(*arguments)
    keys = {}
    for key, shape, _ in official["state_dict"]:
        for pattern, ours in BasicVSRPlusPlus.official_names:
            key = re.sub(pattern, ours, key)
        keys[key] = shape
    del keys["spynet.mean"], keys["spynet.std"]
    assert [(key, list(value.shape)) for key, value in net.state_dict().items()] == list(keys.items())
    assert sum(p.numel() for p in net.parameters()) == parameters == official["params"]


@pytest.mark.parametrize("form", FORMS, ids=str)
@torch.no_grad()
def test_equals_the_plain_recurrence(form: dict[str, Any]) -> None:
    net = small(**form)
    for t, h, w in ((4, 9, 14), (2, 5, 6), (1, 7, 4)):
        frames = torch.rand(2, t, 3, h, w)
        kept = frames.clone()
        torch.testing.assert_close(net(frames), plainly(net, frames), rtol=1e-5, atol=1e-5)
        assert torch.equal(frames, kept)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 5)])
@torch.no_grad()
def test_other_scales_and_tiny_frames(scale: int, size: tuple[int, int]) -> None:
    net, frames = small(scale=scale), torch.rand(1, 3, 3, *size)
    torch.testing.assert_close(net(frames), plainly(net, frames), rtol=1e-5, atol=1e-5)
    if scale == 2:
        restoring = small(restoration=True)
        assert restoring(frames).shape == frames.shape


@torch.no_grad()
def test_bounded_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, frames = small(), torch.rand(2, 4, 3, 8, 8)
    whole = net(frames)
    monkeypatch.setattr(_blocks, "CHUNK_PIXELS", 3 * 32 * 32)
    torch.testing.assert_close(net(frames), whole, rtol=1e-5, atol=1e-6)


def test_branches_are_named_by_direction_and_count() -> None:
    net = small(propagation=("forward", "backward", "forward"))
    names = ["forward_1", "backward_1", "forward_2"]
    assert list(net.backbone) == list(net.deform_align) == names
    outputs = [f"{name}_output" for name in names]
    assert list(net.sites) == ["input", "features", *outputs, "fused"]
    assert not len(small(alignment="flow").deform_align)


def test_sites_in_order_with_their_frames() -> None:
    net, frames = small(), torch.rand(1, 3, 3, 8, 8)
    spy = Spy(8, sites=tuple(name for name, spec in net.sites.items() if spec.channels == 8))
    frame_spy = Spy(3, sites=("input",))
    with torch.no_grad():
        assert torch.equal(attach(net, features=spy, frames=frame_spy)(frames), net(frames))
    expected: list[tuple[str, int | None]] = [("features", None)]
    for branch in net.backbone:
        expected += [(f"{branch}_output", t) for t in ([2, 1, 0] if "backward" in branch else [0, 1, 2])]
    assert list(spy.features) == [*expected, ("fused", None)]
    seen = spy.features
    parts = [seen["features", None][:, 1], *(seen[f"{branch}_output", 1] for branch in net.backbone)]
    torch.testing.assert_close(seen["fused", None][:, 1], net.reconstruction.main(torch.cat(parts, 1)))
    first = [seen["features", None][:, 0], seen["backward_1_output", 0], torch.zeros(1, 8, 8, 8)]
    torch.testing.assert_close(seen["forward_1_output", 0], net.backbone["forward_1"].main(torch.cat(first, 1)))


@pytest.mark.parametrize("site", list(small().sites))
@torch.no_grad()
def test_every_site_reaches_the_result(site: str) -> None:
    net, frames = small(), torch.rand(1, 3, 3, 8, 8)
    halved = attach(net, spy=Spy(net.sites[site].channels, sites=(site,), factor=0.5))
    assert (halved(frames) - net(frames)).abs().max() > 1e-3
    if site == "input":
        torch.testing.assert_close(halved(frames), net(0.5 * frames))


@pytest.mark.parametrize(("factor", "h", "w"), [(4, 10, 13), (2, 9, 12)])
def test_restoration_works_on_reduced_features_and_gives_flows_in_pixels_of_the_frames(
    factor: int, h: int, w: int
) -> None:
    net, frames = small(restoration=True, scale=factor), torch.rand(2, 3, 3, h, w)
    assert (net.scale, net.multiple, net.sites["input"].stride, net.sites["fused"].stride) == (1, factor, 1, factor)
    spy = Spy(8, sites=tuple(name for name, spec in net.sites.items() if spec.channels == 8))
    context = Context(frames)
    with torch.no_grad():
        assert attach(net, spy=spy)(frames, context).shape == frames.shape
    reduced = (-(-h // factor), -(-w // factor))
    assert {tuple(feature.shape[-2:]) for feature in spy.features.values()} == {reduced}
    assert context.flows is not None
    small_frames = [F.interpolate(context.frames[:, i], scale_factor=1 / factor, mode="bicubic") for i in (1, 2)]
    flow = factor * F.interpolate(net.spynet(*small_frames), scale_factor=factor, mode="bilinear")
    torch.testing.assert_close(context.flows.backward[:, 1], flow)
    assert flow.shape[-2:] == context.frames.shape[-2:]


@pytest.mark.parametrize("training", [False, True])
def test_plugins_at_reduced_features_are_the_identity_and_learn(training: bool) -> None:
    net = small(restoration=True).train(training)
    frames, masks = torch.rand(1, 3, 3, 10, 13), torch.rand(1, 3, 4, 10, 13).round()
    model = attach(net, seem=SEEMPlugin(8, masks=4), bank=MemoryBankPlugin(8, entries=4, groups=4)).train(training)
    assert model.plugins["seem"].sites == tuple(f"{branch}_output" for branch in net.backbone)
    context = Context(frames, masks=masks)
    out = model(frames, context)
    assert torch.equal(out, net(frames))
    (out.square().mean() + sum(context.losses.values())).backward()
    last = [at.mapping[2].weight.grad for at in model.plugins["seem"].at.values()]
    assert all(gradient.any() for gradient in last)


@pytest.mark.parametrize("form", [{}, {"restoration": True}, {"alignment": "first_order"}], ids=str)
def test_every_parameter_learns(form: dict[str, Any]) -> None:
    net = small(**form)
    for name, bias in net.named_parameters():
        if name.startswith("flow.") and name.endswith("bias"):
            torch.nn.init.constant_(bias, 0.1)  # no unit of these few is dead by an unlucky draw
    net(torch.rand(1, 3, 3, 16, 16)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_fresh_alignment_follows_the_flow() -> None:
    net = BasicVSRPlusPlus(channels=8, blocks=1, deform_groups=4)
    for layer in net.deform_align.values():
        assert not layer.conv_offset[-1].weight.any()
        assert not layer.conv_offset[-1].bias.any()
        assert layer.max_residual == 10
    assert BasicVSRPlusPlus(8, 1, max_residue=3.0, deform_groups=4).deform_align["forward_2"].max_residual == 3


@torch.no_grad()
def test_compiles_whole() -> None:
    net, frames = small(restoration=True, propagation=ONE_ROUND), torch.rand(1, 3, 3, 9, 8)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(frames), net(frames), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("restoration", [False, True])
@torch.no_grad()
def test_half_precision(restoration: bool) -> None:
    net, frames = small(restoration=restoration), torch.rand(1, 3, 3, 8, 8)
    full = net(frames)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        with torch.autocast("cpu", dtype):
            assert (net(frames) - full).abs().max() < tolerance * full.abs().max()
        half = copy.deepcopy(net).to(dtype)(frames.to(dtype))
        assert half.dtype == dtype
        assert (half.float() - full).abs().max() < tolerance * full.abs().max()


def test_checkpointing_changes_no_gradient() -> None:
    net, frames = small(restoration=True), torch.rand(1, 3, 3, 8, 8)
    twin = small(restoration=True, checkpointing=True)
    twin.load_state_dict(net.state_dict())
    for model in (net, twin):
        model(frames).square().mean().backward()
    gradients = zip(net.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in gradients)
    assert {m.checkpointing for m in twin.modules() if isinstance(m, _blocks.ResidualTrunk)} == {True}


def test_any_flow_module_serves() -> None:
    class Still(nn.Module):
        def forward(self, reference: Tensor, supporting: Tensor) -> Tensor:
            return torch.zeros_like(reference[:, :2])

    net, frames = small(flow=Still()), torch.rand(1, 3, 3, 8, 8)
    assert not any(key.startswith("spynet") for key in net.state_dict())
    torch.testing.assert_close(net(frames), plainly(net, frames), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"restoration": True, "scale": 3},
            "restoration=True reduces the frames by scale, which is 2 or 4 then, got 3",
        ),
        ({"propagation": ()}, r"propagation is a sequence of directions, .* got \(\)"),
        ({"propagation": ("backward", "up")}, r"'backward' or 'forward' for each branch, got \('backward', 'up'\)"),
        ({"propagation": "forward"}, "'backward' or 'forward' for each branch, got 'forward'"),
        ({"alignment": "second"}, "alignment is 'second'; expected one of 'second_order', 'first_order', 'flow'"),
        ({"scale": 8}, "scale is 8; expected one of 1, 2, 3, 4"),
        ({"channels": 12, "deform_groups": 16}, "16 deformable groups cannot be shared out .*: try 8"),
    ],
)
def test_messages(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)
