"""`GaussianCrossFrameAttention` against the official block, and against every pair of pixels written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vsrplug import Context, attach, load_official
from vsrplug.backbones import EDVR, BasicVSR, SPyNet
from vsrplug.maps import recorded
from vsrplug.plugins import (
    GaussianCrossFrameAttention,
    GaussianCrossFrameAttentionPlugin,
    MemoryBank,
    _gaussian_attention,
    _gaussian_blocks,
)

WEIGHTINGS = ("gaussian_of_softmax", "product", "softmax_of_gaussian")


def noisy(module: nn.Module, size: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("sigma"):
                parameter.add_(size * torch.randn_like(parameter))
    return module


def squared_distances(h: int, w: int) -> Tensor:
    y, x = (axis.flatten().double() for axis in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    return (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2


def materialised(query: Tensor, key: Tensor, value: Tensor, sigma: Tensor, weighting: str) -> Tensor:
    """(b, c, h, w), (b, t, c, h, w) twice -> (b, t, c, h, w), frame by frame, with all matrices."""
    h, w = query.shape[-2:]
    log = -squared_distances(h, w).to(query.dtype) / (2 * sigma**2)
    q, frames = query.flatten(2).mT, []
    for t in range(key.shape[1]):
        scores = q @ key[:, t].flatten(2)
        if weighting == "gaussian_of_softmax":
            weights = scores.softmax(-1) * log.exp()
        elif weighting == "product":
            weights = scores * log.exp()
        else:
            weights = (scores + log).softmax(-1)
        frames.append((weights @ value[:, t].flatten(2).mT).mT.unflatten(2, (h, w)))
    return torch.stack(frames, 1)


def expected(module: GaussianCrossFrameAttention, query: Tensor, clip: Tensor) -> Tensor:
    """The whole module in float64, a convolution of one pixel as a matrix product."""

    def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
        return torch.einsum("oi,bihw->bohw", layer.weight[..., 0, 0].double(), x) + layer.bias.double()[:, None, None]

    def norm(x: Tensor) -> Tensor:
        split = x.double().unflatten(1, (module.norm.num_groups, -1))
        mean = split.mean((2, 3, 4), keepdim=True)
        variance = ((split - mean) ** 2).mean((2, 3, 4), keepdim=True)
        normed = ((split - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
        return normed * module.norm.weight.double()[:, None, None] + module.norm.bias.double()[:, None, None]

    frames = [norm(frame) for frame in clip.unbind(1)]
    key, value = (torch.stack([conv(layer, f) for f in frames], 1) for layer in (module.key, module.value))
    sigma = module.sigma.double()
    attended = materialised(conv(module.query, norm(query)), key, value, sigma, module.weighting)
    return query.double() + conv(module.output, attended.flatten(1, 2))


def worst(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the size of what is wanted."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def test_the_official_block_is_the_sum_of_two_residuals(golden: ModuleType) -> None:
    case = golden.load("mana_attention")
    clip = case.input()
    feature = clip[:, 3]
    attention, bank = GaussianCrossFrameAttention(64), MemoryBank(64, entries=256)
    block = case.state_dict() | {"D": torch.zeros(256, 256)}
    report = load_official(attention, block)
    assert report.ignored == ["D", "W_z1.bias", "W_z1.weight", "mb"]
    assert len(report.loaded) == 11
    load_official(bank, block)
    with torch.no_grad():
        z = attention(feature, clip) + bank(feature) - feature
    assert case.check({"z": z}) / case.expected["z"].abs().max() < 1e-5
    assert attention.sigma.item() == 4


def test_official_weights_on_an_oblong_frame(golden: ModuleType) -> None:
    case = golden.load("mana_attention_rect")
    clip = case.input()
    module = GaussianCrossFrameAttention(64)
    load_official(module, case.state_dict())
    with torch.no_grad():
        assert worst(module(clip[:, 3], clip), expected(module, clip[:, 3], clip)) < 1e-5


@pytest.mark.parametrize("number", range(16))
def test_any_size_against_all_pairs_of_pixels(number: int) -> None:
    random = torch.Generator().manual_seed(number)
    h, w, t = (int(torch.randint(low, high, (), generator=random)) for low, high in ((1, 48), (1, 48), (1, 5)))
    clip = torch.randn(1, t, 16, h, w, generator=random)
    sigma = 0.5 + 5 * torch.rand((), generator=random).item()
    for weighting in WEIGHTINGS:
        eps = 0.0 if weighting == "softmax_of_gaussian" else None
        module = GaussianCrossFrameAttention(16, t, groups=4, sigma=sigma, weighting=weighting, eps=eps)
        noisy(module)
        with torch.no_grad():
            found = module(clip[:, t // 2], clip)
            assert worst(found, expected(module, clip[:, t // 2], clip)) < 1e-5, (h, w, t, weighting)
        assert worst(found, clip[:, t // 2]) > 1e-3


@pytest.fixture(params=[None, (2, 21)], ids=["one tile", "many tiles"])
def tiled(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(_gaussian_blocks, "sizes", lambda device, weighting: request.param)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("h", "w", "sigma", "size"), [(9, 14, 1.5, 1), (5, 12, -0.6, 3), (8, 7, 0.7, 40)])
def test_gradients_against_all_pairs_of_pixels(weighting: Any, h: int, w: int, sigma: float, size: float) -> None:
    """Scores of several hundred, too, whose softmax overflows at the first try."""
    query, key, value = size * torch.randn(2, 5, h, w), torch.randn(2, 3, 5, h, w), torch.randn(2, 3, 4, h, w)
    given = [x.double().requires_grad_() for x in (query, key, value, torch.tensor([sigma]))]
    found = _gaussian_attention.gaussian_attention(*given, weighting, 2.0**-60)
    wanted = materialised(*given, weighting)
    assert worst(found, wanted) < 1e-11
    grad = torch.randn_like(wanted)
    for ours, theirs in zip(*(torch.autograd.grad(x, given, grad) for x in (found, wanted)), strict=True):
        assert worst(ours, theirs) < 1e-10


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradcheck(weighting: Any) -> None:
    module = noisy(GaussianCrossFrameAttention(4, 2, groups=2, sigma=1.3, weighting=weighting)).double()
    query, clip = torch.randn(1, 4, 3, 4).double(), torch.randn(1, 2, 4, 3, 4).double()
    names = [name for name, _ in module.named_parameters()]

    def refined(query: Tensor, clip: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (query, clip))

    given = (query.requires_grad_(), clip.requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(refined, given)


def test_what_is_skipped() -> None:
    """Beyond the reach of eps a value counts for nothing; its key counts in the softmax over everything alone."""
    query, key, value = torch.randn(1, 4, 6, 90), torch.randn(1, 1, 4, 6, 90), torch.randn(1, 1, 4, 6, 90)
    sigma = torch.tensor(4.0)
    results = {}
    for weighting, eps in (("gaussian_of_softmax", 2.0**-24), ("softmax_of_gaussian", 1e-4)):
        for what in ("before", "key", "value"):
            k, v = key.clone(), value.clone()
            if what != "before":
                (k if what == "key" else v)[..., 80:] += 1
            results[weighting, what] = _gaussian_attention.gaussian_attention(query, k, v, sigma, weighting, eps)
    near = (..., slice(0, 16))
    for weighting in ("gaussian_of_softmax", "softmax_of_gaussian"):
        assert torch.equal(results[weighting, "value"][near], results[weighting, "before"][near])
        same = torch.equal(results[weighting, "key"][near], results[weighting, "before"][near])
        assert same == (weighting == "softmax_of_gaussian")


def test_the_local_form_is_close_to_the_whole() -> None:
    module = GaussianCrossFrameAttention(32, 3, weighting="softmax_of_gaussian", zero_init=False)
    clip = torch.randn(1, 3, 32, 48, 70)
    with torch.no_grad():
        local = module(clip[:, 1], clip) - clip[:, 1]
        module.eps = 0.0
        whole = module(clip[:, 1], clip) - clip[:, 1]
    assert 0 < worst(local, whole) < 1e-3


def test_sigmas_at_the_edge() -> None:
    query, key, value = torch.randn(1, 4, 5, 6), torch.randn(1, 2, 4, 5, 6), torch.randn(1, 2, 4, 5, 6)
    for weighting in WEIGHTINGS:
        none, nan, wide = (
            _gaussian_attention.gaussian_attention(query, key, value, torch.tensor([sigma]), weighting, 1e-4)
            for sigma in (0.0, float("nan"), 1e4)
        )
        assert none.isfinite().all()
        assert nan.isnan().all()  # and no error: the trainer stops with the sample's name
        assert worst(wide, materialised(query, key, value, torch.tensor(1e4), weighting)) < 1e-5


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            self.elements = max(self.elements, value.numel() if isinstance(value, Tensor) else 0)
        return out


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_matrix_of_all_pairs(weighting: str) -> None:
    """The functions that the operators run: a dispatch mode does not look into an operator."""
    h, w = 96, 80
    sigma, eps = torch.tensor([2.0]), 2.0**-24
    query, (key, value) = torch.randn(1, h, w, 8), torch.randn(2, 1, 2, h, w, 8)
    with Largest() as seen:
        out, lse = _gaussian_blocks.forward(query, key, value, sigma, weighting, eps)
        _gaussian_blocks.backward(out, query, key, value, sigma, out, lse, weighting, eps)
    side, block = _gaussian_blocks.sizes(out.device, weighting)
    assert side**2 * 500 < seen.elements <= block < (h * w) ** 2 / 100


def dense(q: Tensor, k: Tensor, v: Tensor, score_mod: Any = None, block_mask: Any = None, scale: float = 1) -> Any:
    """What FlexAttention computes, in plain operations, differentiable on a CPU."""
    scores = scale * q @ k.mT
    if score_mod is not None:
        axes = (torch.arange(n).view([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate(scores.shape))
        scores = score_mod(scores, *axes)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("weighting", ["gaussian_of_softmax", "softmax_of_gaussian"])
def test_the_way_of_the_gpu(weighting: Any) -> None:
    """Its formula and gradients; then FlexAttention's own evaluation of it, which on a CPU has no gradient."""
    from torch.nn.attention import flex_attention as flex

    h, w, sigma = 9, 20, torch.tensor([2.0])
    query, key, value = torch.randn(2, h, w, 16), torch.randn(2, 3, h, w, 16), torch.randn(2, 3, h, w, 16)
    given = [0.6 * x.requires_grad_() for x in (query, key, value)]
    found = _gaussian_attention.flexible(*given, sigma, weighting, 0.0, dense)
    wanted, _ = _gaussian_blocks.blocked(*given, sigma, weighting, 0.0)
    assert worst(found, wanted) < 1e-5
    grad = torch.randn_like(wanted)
    for ours, theirs in zip(*(torch.autograd.grad(x, given, grad) for x in (found, wanted)), strict=True):
        assert worst(ours, theirs) < 1e-4

    def attend(*args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        if not hasattr(flex, "AuxRequest"):
            return flex.flex_attention(*args, **keywords, return_lse=True)
        out, more = flex.flex_attention(*args, **keywords, return_aux=flex.AuxRequest(lse=True))
        return out, more.lse

    with torch.no_grad():
        found = _gaussian_attention.flexible(*(x.detach() for x in given), sigma, weighting, 2.0**-24, attend)
    assert worst(found, wanted) < 1e-5


@pytest.mark.parametrize(("h", "w", "sigma"), [(30, 40, 1.0), (50, 9, 3.0), (3, 300, 2.0)])
def test_blocks_for_the_gpu_hold_every_near_pair(h: int, w: int, sigma: float) -> None:
    mask = _gaussian_attention._near_blocks(h, w, torch.tensor([sigma]), 1e-3, size=32)
    near = squared_distances(h, w) <= sigma**2 * 2 * torch.tensor(1e3).log()
    chosen = torch.zeros(near.shape, dtype=torch.bool)
    for i, count in enumerate(mask.kv_num_blocks[0, 0].tolist()):
        for j in mask.kv_indices[0, 0, i, :count].tolist():
            chosen[32 * i : 32 * i + 32, 32 * j : 32 * j + 32] = True
    assert (chosen | ~near).all()
    assert not chosen.all()


def test_starts_as_the_identity_or_not() -> None:
    clip = torch.randn(1, 3, 32, 5, 6)
    assert torch.equal(GaussianCrossFrameAttention(32, 3)(clip[:, 1], clip), clip[:, 1])
    assert not torch.equal(GaussianCrossFrameAttention(32, 3, zero_init=False)(clip[:, 1], clip), clip[:, 1])
    module = GaussianCrossFrameAttention(128)
    assert module.query.weight.shape == (64, 128, 1, 1)
    assert module.output.weight.shape == (128, 7 * 64, 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_half_precision(dtype: torch.dtype, weighting: Any) -> None:
    given = [0.5 * torch.randn(1, 8, 9, 11), *torch.randn(2, 1, 2, 8, 9, 11), torch.tensor([3.0])]
    half = [x.to(dtype).requires_grad_() for x in given]
    exact = [x.detach().double().requires_grad_() for x in half]
    found = _gaussian_attention.gaussian_attention(*half, weighting, 2.0**-24)
    wanted = materialised(*exact, weighting)
    assert found.dtype == dtype
    assert worst(found, wanted) < torch.finfo(dtype).eps
    grads = [torch.autograd.grad(out.double().sum(), x) for out, x in ((found, half), (wanted, exact))]
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max() < 2 * torch.finfo(dtype).eps * max(theirs.abs().max(), 1)
    with torch.autocast("cpu", torch.bfloat16):  # inside everything is float32
        assert torch.equal(_gaussian_attention.gaussian_attention(*half, weighting, 2.0**-24), found)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_compiles_with_its_gradient(weighting: Any) -> None:
    torch._dynamo.reset()
    module = noisy(GaussianCrossFrameAttention(8, 2, groups=2, weighting=weighting))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    clip = torch.randn(1, 2, 8, 7, 9)
    wanted = torch.autograd.grad(module(clip[:, 0], clip).square().sum(), module.parameters())
    found = torch.autograd.grad(compiled(clip[:, 0], clip).square().sum(), module.parameters())
    torch.testing.assert_close(found, wanted)


def plugged(backbone: nn.Module, **arguments: Any) -> tuple[nn.Module, GaussianCrossFrameAttention, list]:
    """A model with the plug-in, its plain module, and what will go in and out at its site."""
    plugin = GaussianCrossFrameAttentionPlugin(8, **{"frames": 3, "groups": 4, "sigma": 2.0} | arguments)
    model = attach(backbone, attention=plugin).eval()
    (site,) = plugin.sites
    seen: list[tuple[Tensor, Tensor]] = []
    plugin.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    return model, noisy(plugin.at[site]), seen


def test_a_window_network_has_its_centre_refined() -> None:
    backbone = EDVR(8, frames=5, extract_blocks=1, reconstruct_blocks=1, deform_groups=2)
    model, module, seen = plugged(backbone)
    assert model.plugins["attention"].sites == ("features",)
    with torch.no_grad():
        model(torch.rand(2, 5, 3, 8, 12))
        ((clip, refined),) = seen
        torch.testing.assert_close(refined[:, 2], module(clip[:, 2], clip[:, 1:4]))
    others = [0, 1, 3, 4]
    assert torch.equal(refined[:, others], clip[:, others])
    assert not torch.equal(refined[:, 2], clip[:, 2])


@pytest.mark.parametrize("t", [1, 2, 4])
def test_a_recurrent_network_has_every_frame_refined(t: int) -> None:
    model, module, seen = plugged(
        BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8), frames=5
    )
    assert model.plugins["attention"].sites == ("fused",)
    calls: list[Callable] = []
    module.key.register_forward_hook(lambda *_: calls.append(module.key))
    with torch.no_grad():
        model(torch.rand(1, t, 3, 6, 7))
        ((clip, refined),) = seen
        assert len(calls) == 1  # keys and values are shared
        for centre in range(t):
            window = [min(max(frame, 0), t - 1) for frame in range(centre - 2, centre + 3)]
            torch.testing.assert_close(refined[:, centre], module(clip[:, centre], clip[:, window]))


def test_errors() -> None:
    with pytest.raises(ValueError, match="channels=48 cannot be normalised in groups=32; give groups that divide it"):
        GaussianCrossFrameAttention(48)
    with pytest.raises(ValueError, match="weighting is 'gauss'; expected one of 'gaussian_of_softmax', 'product', 'so"):
        GaussianCrossFrameAttention(32, weighting="gauss")
    with pytest.raises(ValueError, match="frames is one at least and sigma above zero, got frames=0, sigma=4"):
        GaussianCrossFrameAttention(32, 0)
    with pytest.raises(ValueError, match=r"eps is the least Gaussian weight that counts, from 0 .*, got 1"):
        GaussianCrossFrameAttention(32, eps=1)
    with pytest.raises(ValueError, match="frames must be odd, a centre and as many on either side, got 4"):
        GaussianCrossFrameAttentionPlugin(32, frames=4)
    module, clip = GaussianCrossFrameAttention(32, 4), torch.randn(1, 4, 32, 5, 6)
    assert torch.equal(module(clip[:, 1], clip), clip[:, 1])  # which needs no centre
    with pytest.raises(ValueError, match="frames must be odd, a centre and as many on either side, got 4"):
        module.refine_clip(clip, [1])
    with pytest.raises(ValueError, match=r"expected a query \(b, c, h, w\) and a clip \(b, 4, c, h, w\) .* \(1, 3, 32"):
        module(clip[:, 1], clip[:, :3])
    with pytest.raises(ValueError, match=r"of the same b, c, h and w, got \(1, 32, 5, 5\) and \(1, 4, 32, 5, 6\)"):
        module(clip[:, 1, ..., :5], clip)
    backbone = BasicVSR(16, 1, flow=SPyNet(levels=2, widths=(4, 4)))
    with pytest.raises(ValueError, match=r"serves clip sites, but 'forward_output' is a frame .* fit: input, fused"):
        attach(backbone, it=GaussianCrossFrameAttentionPlugin(16, sites=("forward_output",), groups=4))


def test_the_context_is_left_alone() -> None:
    model, _, _ = plugged(BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8))
    context = Context(torch.rand(1, 2, 3, 6, 7))
    model(context.frames, context)
    assert not context.losses
    assert not context.memo


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_maps_are_the_weights_of_a_pixel(weighting: str) -> None:
    """Summed with the values they give what the module adds there, and each is the weight of eq. 1 in float64."""
    module = noisy(GaussianCrossFrameAttention(8, 3, groups=4, sigma=1.5, weighting=weighting, eps=0.0)).double()
    clip, (row, column) = torch.randn(2, 3, 8, 5, 6).double(), (3, 1)
    with torch.no_grad():
        planes = module.maps(clip[:, 1], clip, at=(1, row, column))["attention"]
        assert list(planes) == ["frame -1", "this frame", "frame +1"]
        weights = torch.stack([*planes.values()])
        keys, values = module._embed(module._normalise(clip))
        attended = torch.einsum("thw,tchw->tc", weights, values[0]).flatten()
        added = module.output(attended[None, :, None, None])[0, :, 0, 0]
        torch.testing.assert_close(added, (module(clip[:, 1], clip) - clip[:, 1])[0, :, row, column])
        query = module.query(module.norm(clip[:1, 1]))[0, :, row, column]
    for t in range(3):
        scores = [[(query @ keys[0, t, :, y, x]).item() for x in range(6)] for y in range(5)]
        gaussian = [[math.exp(-((y - row) ** 2 + (x - column) ** 2) / 4.5) for x in range(6)] for y in range(5)]
        s, g = torch.tensor(scores).double(), torch.tensor(gaussian).double()
        expected = s * g if weighting == "product" else s.exp() * g
        total = {"product": 1.0, "gaussian_of_softmax": s.exp().sum(), "softmax_of_gaussian": expected.sum()}[weighting]
        torch.testing.assert_close(weights[t], expected / total)
        if weighting == "softmax_of_gaussian":
            assert weights[t].sum().item() == pytest.approx(1)


def test_maps_of_a_clip_are_those_of_the_frames_around_the_frame() -> None:
    network = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)
    plugin = noisy(GaussianCrossFrameAttentionPlugin(8, groups=4, frames=3))
    seen: list[Tensor] = []
    plugin.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    model = attach(network, it=plugin)
    with torch.no_grad(), recorded(model, 3, (2, 5)) as maps:
        model(torch.rand(1, 4, 3, 6, 7))
        clip = seen[0]
        expected = plugin.at["fused"].maps(clip[:, 3], clip[:, [2, 3, 3]], at=(0, 2, 5))["attention"]
    assert maps.keys() == {"it, attention at fused"}
    torch.testing.assert_close(maps["it, attention at fused"], expected)
