"""EFST against the official module's outputs, and against eq. 1-3 written out in float64 pixel by pixel."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vsrplug import Context, ForeignSite, PluggedModel, attach, load_plugins, save_plugins
from vsrplug.backbones import EDVR, BasicVSR, SlidingWindow, SPyNet
from vsrplug.maps import recorded
from vsrplug.official import load_official
from vsrplug.plugins import EFST, EFSTPlugin, SpatioTemporalFusion

Array = NDArray[np.float64]


def noisy(module: nn.Module, amount: float = 0.2) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return module


def edvr(frames: int = 3) -> EDVR:
    return noisy(EDVR(8, frames=frames, extract_blocks=1, reconstruct_blocks=1, deform_groups=4), 0.02).eval()


def basicvsr() -> BasicVSR:
    network = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)
    return noisy(network, 0.02).eval()


def awake(model: PluggedModel) -> PluggedModel:
    noisy(model.plugins)
    return model.eval()


# -- the official outputs


def worst(golden: ModuleType, name: str, outputs: dict[str, Tensor]) -> float:
    """The largest difference from the official outputs, each relative to its largest value."""
    case = golden.load(name)
    sizes = {output["name"]: output["absmax"] for output in case.spec["outputs"]}
    assert sizes.keys() == outputs.keys()
    return max(case.check({key: value}) / sizes[key] for key, value in outputs.items())


def test_the_official_feature_fusion(golden: ModuleType) -> None:
    case = golden.load("stvun_feature_fusion")
    module = SpatioTemporalFusion(case.constructor["nif"], case.constructor["fn"])
    assert len(load_official(module, case.state_dict()).loaded) == len(case.state_dict())
    clip = case.input()
    with torch.no_grad():
        assert worst(golden, case.name, {"out": module(clip[:, 7], clip[:, :7])}) < 1e-5


def test_the_official_module_at_its_four_levels(golden: ModuleType) -> None:
    case = golden.load("stvun_efst")
    module = EFST(case.constructor["nif"])
    assert len(load_official(module, case.state_dict()).loaded) == len(case.state_dict())
    levels = case.input().permute(1, 2, 0, 3, 4, 5)  # t l b c h w -> l b t c h w
    with torch.no_grad():
        assert worst(golden, case.name, {f"level{i}": module(level) for i, level in enumerate(levels)}) < 1e-5


# -- eq. 1-3 by loops


def convolve(layer: nn.Conv2d, x: Array) -> Array:
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    size, (_, h, w) = weight.shape[-1], x.shape
    padded = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2)))
    out = np.empty((len(weight), h, w))
    for y in range(h):
        for i in range(w):
            patch = padded[:, y : y + size, i : i + size]
            out[:, y, i] = [(kernel * patch).sum() + shift for kernel, shift in zip(weight, bias, strict=True)]
    return out


def leaky(x: Array) -> Array:
    return np.where(x > 0, x, 0.1 * x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def pooled(x: Array) -> Array:
    c, h, w = x.shape
    largest, mean = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf), np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.empty((2 * c, (h + 1) // 2, (w + 1) // 2))
    for y in range(0, h, 2):
        for i in range(0, w, 2):
            out[:c, y // 2, i // 2] = largest[:, y : y + 3, i : i + 3].max((1, 2))
            out[c:, y // 2, i // 2] = mean[:, y : y + 3, i : i + 3].sum((1, 2)) / 9
    return out


def enlarged(x: Array, h: int, w: int) -> Array:
    out = np.empty((len(x), h, w))
    for y in range(h):
        for i in range(w):
            at = [max((p + 0.5) / 2 - 0.5, 0) for p in (y, i)]
            (y0, x0), (fy, fx) = (int(p) for p in at), (p % 1 for p in at)
            y1, x1 = min(y0 + 1, x.shape[1] - 1), min(x0 + 1, x.shape[2] - 1)
            above = (1 - fx) * x[:, y0, x0] + fx * x[:, y0, x1]
            below = (1 - fx) * x[:, y1, x0] + fx * x[:, y1, x1]
            out[:, y, i] = (1 - fy) * above + fy * below
    return out


def by_loops(module: SpatioTemporalFusion, fused: Array, neighbours: Array) -> tuple[Array, Array]:
    """The equations for one sample: fused c h w, neighbours n c h w -> refined c h w, confidence n h w."""
    _, h, w = fused.shape
    reference = convolve(module.delta, fused)
    confidence = np.empty((len(neighbours), h, w))
    weighted = []
    for n, frame in enumerate(neighbours):
        embedded = convolve(module.theta, frame)
        for y in range(h):
            for i in range(w):
                confidence[n, y, i] = sigmoid(np.dot(embedded[:, y, i], reference[:, y, i]))
        weighted.append(frame * confidence[n])
    one = leaky(convolve(module.level1, np.concatenate(weighted)))
    two = leaky(convolve(module.level2, pooled(one)))
    three = leaky(convolve(module.level3, pooled(leaky(convolve(module.embed2, two)))))
    three = leaky(convolve(module.smooth3, three))
    two = leaky(convolve(module.smooth2, two)) + enlarged(three, *two.shape[1:])
    one = one + enlarged(leaky(convolve(module.merge2, two)), h, w)
    logit = convolve(module.alpha, one)
    beta = convolve(module.beta, leaky(convolve(module.beta_hidden, logit)))
    return 2 * sigmoid(logit) * fused + beta, confidence


@pytest.mark.parametrize("seed", range(16))
def test_the_equations_at_random_sizes(seed: int) -> None:
    random = np.random.RandomState(seed)
    h, w, n = (int(random.randint(1, top)) for top in (10, 14, 6))
    module = noisy(SpatioTemporalFusion(4, n))
    fused, neighbours = torch.randn(2, 4, h, w), torch.randn(2, n, 4, h, w)
    oracle = [by_loops(module, f.double().numpy(), k.double().numpy()) for f, k in zip(fused, neighbours, strict=True)]
    refined, confidence = (torch.from_numpy(np.stack(part)) for part in zip(*oracle, strict=True))
    with torch.no_grad():
        found, maps = module.refine(fused, neighbours)
        assert (found - refined).abs().max() < 1e-5 * refined.abs().max()
        assert (maps - confidence).abs().max() < 1e-5
        assert torch.equal(module(fused, neighbours), found)
        exact, maps = module.double().refine(fused.double(), neighbours.double())
    assert (exact - refined).abs().max() < 1e-12
    assert (maps - confidence).abs().max() < 1e-12
    assert (refined - fused).abs().max() > 0.1


def test_efst_is_the_fusion_of_its_early_fusion() -> None:
    module = noisy(EFST(4, frames=3))
    features = torch.randn(2, 3, 4, 5, 7)
    early = module.early_fusion(features.flatten(1, 2))
    refined, confidence = module.refine(features)
    expected, maps = module.fusion.refine(early, features)
    assert torch.equal(refined, expected)
    assert torch.equal(module(features), expected)
    assert torch.equal(confidence, maps)
    untrained = EFST(4, frames=3)
    assert torch.equal(untrained(features), untrained.early_fusion(features.flatten(1, 2)))


def test_gradients() -> None:
    module = noisy(SpatioTemporalFusion(2, 2)).double()
    fused = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    neighbours = torch.randn(1, 2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def refined(fused: Tensor, neighbours: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, parameters, strict=True))
        called = torch.func.functional_call(module, given, (fused, neighbours))
        return called, module.refine(fused, neighbours)[1]

    assert torch.autograd.gradcheck(refined, (fused, neighbours, *module.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    module = noisy(SpatioTemporalFusion(8, 3), 0.1)
    fused, neighbours = torch.randn(1, 8, 7, 9), torch.randn(1, 3, 8, 7, 9)
    with torch.no_grad():
        exact, maps = module.refine(fused, neighbours)
        half, half_maps = module.to(dtype).refine(fused.to(dtype), neighbours.to(dtype))
    assert half.dtype == dtype
    assert half_maps.dtype == torch.float32
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert (half_maps - maps).abs().max() < 0.05
    scaled = 300 * neighbours.to(dtype)  # scores beyond what float16 holds: still a number in [0, 1]
    assert module.refine(300 * fused.to(dtype), scaled)[1].isfinite().all()


def test_starts_as_the_identity_or_not() -> None:
    fused, neighbours = torch.randn(2, 8, 7, 5), torch.randn(2, 3, 8, 7, 5)
    assert torch.equal(SpatioTemporalFusion(8, 3)(fused, neighbours), fused)
    assert not torch.equal(SpatioTemporalFusion(8, 3, zero_init=False)(fused, neighbours), fused)


# -- the plug-in


def passed(model: nn.Module, frames: Tensor) -> tuple[Tensor, Context]:
    context = Context(frames)
    with torch.no_grad():
        return model(frames, context), context


def test_neighbours_are_the_aligned_features() -> None:
    """What EDVR's `fused` gives is what its `aligned` holds, so both ways of asking agree; `features` are others."""
    network, frames = edvr(), torch.rand(1, 3, 3, 9, 14)
    model = awake(attach(network, it=EFSTPlugin(8, frames=3)))
    out, context = passed(model, frames)
    assert not torch.equal(out, network(frames))
    maps = context.memo[model.plugins["it"], "fused", 1]
    assert maps.shape == (1, 3, 12, 16)  # the padded size
    assert not maps.requires_grad
    assert ((maps > 0) & (maps < 1)).all()
    for name, same in (("aligned", True), ("features", False)):
        plugin = EFSTPlugin(8, frames=3, neighbours=name)
        plugin.load_state_dict(model.plugins["it"].state_dict())
        observing = attach(network, it=plugin).eval()
        assert plugin.sites == ("fused", name)
        assert torch.equal(passed(observing, frames)[0], out) is same


@pytest.mark.parametrize("neighbours", [None, "aligned", "features"])
def test_a_file_gives_it_back(neighbours: str | None, tmp_path: object) -> None:
    network, frames = edvr(), torch.rand(1, 3, 3, 8, 8)
    model = awake(attach(network, it=EFSTPlugin(8, frames=3, neighbours=neighbours)))
    save_plugins(model, f"{tmp_path}/it.safetensors")
    again = load_plugins(network, f"{tmp_path}/it.safetensors").eval()
    assert again.plugins["it"].sites == model.plugins["it"].sites
    assert torch.equal(passed(again, frames)[0], passed(model, frames)[0])


@pytest.mark.parametrize("neighbours", ["aligned", "features"])
@pytest.mark.parametrize("training", [False, True])
def test_every_parameter_learns_from_observed_neighbours(neighbours: str, training: bool) -> None:
    network, frames = edvr().train(training).requires_grad_(False), torch.rand(1, 3, 3, 8, 12)
    plain = network(frames)
    model = attach(network, it=EFSTPlugin(8, frames=3, neighbours=neighbours))
    assert torch.equal(model(frames), plain)
    started = {name: p.detach().clone() for name, p in model.plugins.named_parameters()}
    optimizer = torch.optim.Adam(model.plugins.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(frames).square().mean().backward()
        optimizer.step()
    assert not [name for name, p in model.plugins.named_parameters() if torch.equal(p, started[name])]


def around(t: int, count: int, frames: int) -> list[int]:
    return [sorted((0, t - frames // 2 + i, count - 1))[1] for i in range(frames)]


@pytest.mark.parametrize(("steps", "frames"), [(1, 3), (4, 3), (3, 5), (5, 2)])
def test_a_clip_is_its_windows(steps: int, frames: int) -> None:
    plugin = EFSTPlugin(8, frames=frames)
    model = awake(attach(basicvsr(), it=plugin))
    seen: list[tuple[Tensor, Tensor]] = []
    plugin.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    _, context = passed(model, torch.rand(2, steps, 3, 6, 7))
    ((clip, refined),) = seen
    maps = context.memo[plugin, "fused", None]
    assert maps.shape == (2, steps, frames, 6, 7)
    for t in range(steps):
        with torch.no_grad():
            expected, confidence = plugin.at["fused"].refine(clip[:, t], clip[:, around(t, steps, frames)])
        torch.testing.assert_close(refined[:, t], expected)
        torch.testing.assert_close(maps[:, t], confidence)


class Recurrent(nn.Module):
    """A network of somebody else's: features of the whole clip at once, then one step a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.extract = nn.Conv2d(3, 8, 3, padding=1)
        self.step = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        features = self.extract(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return torch.stack([self.step(features[:, t]) for t in range(frames.shape[1])], dim=1)


FOREIGN = {
    "features": ForeignSite("extract", channels=8, kind="clip"),
    "step": ForeignSite("step", channels=8, kind="frame", order="forward"),
}


def test_a_frame_site_of_a_recurrent_network_takes_the_frames_around() -> None:
    network, frames = Recurrent(), torch.rand(2, 4, 3, 5, 6)
    plugin = EFSTPlugin(8, sites=("step",), frames=3, neighbours="features")
    model = attach(network, sites=FOREIGN, it=plugin)
    assert torch.equal(model(frames), network(frames))
    out, context = passed(awake(model), frames)
    with torch.no_grad():
        steps, features = network(frames), network.extract(frames.flatten(0, 1)).unflatten(0, (2, 4))
        for t in range(4):
            expected, maps = plugin.at["step"].refine(steps[:, t], features[:, around(t, 4, 3)])
            torch.testing.assert_close(out[:, t], expected)
            torch.testing.assert_close(context.memo[plugin, "step", t], maps)


@pytest.mark.parametrize("neighbours", [None, "features"])
def test_a_sliding_window(neighbours: str | None) -> None:
    """Each window is a pass: its own neighbours, none of the window before."""
    plugged = awake(attach(edvr(), it=EFSTPlugin(8, frames=3, neighbours=neighbours)))
    clip = torch.rand(1, 4, 3, 8, 8)
    out, _ = passed(SlidingWindow(plugged, "replicate"), clip)
    for t in range(4):
        torch.testing.assert_close(out[:, t : t + 1], passed(plugged, clip[:, around(t, 4, 3)])[0])


def test_errors_of_the_plain_modules() -> None:
    fused = torch.rand(1, 8, 6, 6)
    with pytest.raises(
        ValueError, match=r"frames=3: .* takes .* = \(1, 3, 8, 6, 6\), got \(1, 5, 8, 6, 6\); make it with the"
    ):
        SpatioTemporalFusion(8, 3)(fused, torch.rand(1, 5, 8, 6, 6))
    with pytest.raises(ValueError, match=r"take both from places of one size"):
        SpatioTemporalFusion(8, 3)(fused, torch.rand(1, 3, 8, 3, 3))
    with pytest.raises(ValueError, match=r"fused feature \(b, c, h, w\) = \(8, 6, 6\)"):
        SpatioTemporalFusion(8, 3)(fused[0], torch.rand(1, 3, 8, 6, 6))
    with pytest.raises(ValueError, match=r"as many frames of the same size: expected \(1, 4, 8, 6, 6\), got \(1, 3, 8"):
        SpatioTemporalFusion(8, 3).refine_clip(torch.rand(1, 4, 8, 6, 6), torch.rand(1, 3, 8, 6, 6))
    with pytest.raises(ValueError, match=r"made for frames=7, got 5 in \(1, 5, 8, 6, 6\); make it with the number"):
        EFST(8)(torch.rand(1, 5, 8, 6, 6))


def test_errors_before_anything_changes() -> None:
    with pytest.raises(ValueError, match=r"sites=\('aligned',\) is where neighbours='aligned' come from, .* 'fused'"):
        EFSTPlugin(8, sites=("aligned",), neighbours="aligned")
    for sites in (None, ("fused",)):
        with pytest.raises(ValueError, match="'it': there is no site 'aligned'"):
            attach(basicvsr(), it=EFSTPlugin(8, sites=sites, neighbours="aligned"))
    with pytest.raises(ValueError, match="channels=8, but site 'input' has 3"):
        attach(edvr(), it=EFSTPlugin(8, frames=3, neighbours="input"))
    with pytest.raises(ValueError, match="'it': there is no site 'fused'; did you mean 'step'"):
        attach(Recurrent(), sites=FOREIGN, it=EFSTPlugin(8, neighbours="features"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 5}, r"made for frames=5: .* takes .* = \(1, 5, 8, 8, 8\), got \(1, 3, 8, 8, 8\)"),
        ({"frames": 5, "neighbours": "aligned"}, r"made for frames=5: .*, got \(1, 3, 8, 8, 8\)"),
        ({"frames": 3, "sites": ("reference",)}, r"site 'reference' gives no neighbours; name the clip site they are"),
        ({"frames": 3, "neighbours": "reference"}, "neighbours='reference' is a frame site; name a clip site"),
        (
            {"frames": 3, "sites": ("reference",), "neighbours": "aligned"},
            "from site 'aligned', which the network reaches only after 'reference', if at all; name a clip site before",
        ),
    ],
)
def test_errors_of_a_pass(arguments: dict[str, object], message: str) -> None:
    model = attach(edvr(), it=EFSTPlugin(8, **arguments))
    with pytest.raises(ValueError, match=message):
        model(torch.rand(1, 3, 3, 8, 8))


def test_a_foreign_frame_site_gives_no_neighbours() -> None:
    model = attach(Recurrent(), sites=FOREIGN, it=EFSTPlugin(8, sites=("step",)))
    with pytest.raises(ValueError, match="site 'step' gives no neighbours"):
        model(torch.rand(1, 3, 3, 6, 6))


@pytest.mark.parametrize("neighbours", [None, "aligned"])
def test_maps_are_the_confidence_of_the_frame(neighbours: str | None) -> None:
    """Eq. 1 by loops, of what the pass gave to the module."""
    plugin = EFSTPlugin(8, frames=3, neighbours=neighbours)
    model = awake(attach(edvr(), it=plugin))
    given: list[tuple[Tensor, Tensor]] = []
    refine = plugin.at["fused"].refine
    plugin.at["fused"].refine = lambda fused, around: given.append((fused, around)) or refine(fused, around)
    whole = SlidingWindow(model, "replicate")
    with torch.no_grad(), recorded(whole, 2, (0, 0)) as maps:
        whole(torch.rand(1, 4, 3, 8, 12))
    ((picture, planes),) = maps.items()
    assert picture == "it, confidence at fused"
    assert list(planes) == ["frame -1", "this frame", "frame +1"]
    _, expected = by_loops(plugin.at["fused"], *(x[0].double().numpy() for x in given[2]))
    found = torch.stack([*planes.values()])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0 < found.min() < found.max() < 1


def test_maps_of_a_clip_are_those_of_the_window_around_the_frame() -> None:
    plugin = EFSTPlugin(8, frames=5)
    model = awake(attach(basicvsr(), it=plugin))
    frames = torch.rand(2, 4, 3, 6, 7)
    _, context = passed(model, frames)
    with torch.no_grad(), recorded(model, 3, (0, 0)) as maps:
        model(frames)
    planes = maps["it, confidence at fused"]
    assert list(planes) == ["frame -2", "frame -1", "this frame", "frame +1", "frame +2"]
    torch.testing.assert_close(torch.stack([*planes.values()]), context.memo[plugin, "fused", None][0, 3])
