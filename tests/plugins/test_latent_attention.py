"""`LatentAttention` against eq. 9 to 17 written with other operations in float64, all scores materialised."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from vsrplug import Context, attach, conf
from vsrplug.backbones import EDVR, BasicVSR, SPyNet
from vsrplug.maps import recorded
from vsrplug.plugins import LatentAttention, LatentAttentionPlugin, LongRangeAttention, ShortRangeAttention

State = dict[str, Tensor]
BLOCKS = [LongRangeAttention, ShortRangeAttention]


def noisy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def network(channels: int = 8) -> nn.Module:
    return BasicVSR(channels, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)


# The paper's operations, on b c t h w.


def linear(x: Tensor, state: State, name: str) -> Tensor:
    out = torch.einsum("oi,bithw->bothw", state[f"{name}.weight"], x)
    return out + state[f"{name}.bias"].view(1, -1, 1, 1, 1) if f"{name}.bias" in state else out


def convolved(x: Tensor, state: State, name: str) -> Tensor:
    """3x3x3 with zero border, as 27 shifted products."""
    weight, (b, _, t, h, w) = state[f"{name}.weight"], x.shape
    padded = x.new_zeros(b, x.shape[1], t + 2, h + 2, w + 2)
    padded[:, :, 1:-1, 1:-1, 1:-1] = x
    out = state[f"{name}.bias"].view(1, -1, 1, 1, 1).expand(b, -1, t, h, w).clone()
    for i, j, k in itertools.product(range(3), repeat=3):
        shifted = padded[:, :, i : i + t, j : j + h, k : k + w]
        out += torch.einsum("oi,bithw->bothw", weight[:, :, i, j, k], shifted)
    return out


def pooled(x: Tensor) -> Tensor:
    h, w = (-(-size // 2) for size in x.shape[-2:])
    out = x.new_empty(*x.shape[:3], h, w)
    for i, j in itertools.product(range(h), range(w)):
        out[..., i, j] = x[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].amax((3, 4))
    return out


def doubled(x: Tensor, state: State, name: str, like: Tensor) -> Tensor:
    """Each pixel adds a 4x4 patch, two pixels from its neighbour's; the outer pixel all round is dropped."""
    weight, (b, _, t, h, w) = state[f"{name}.weight"], x.shape
    out = x.new_zeros(b, weight.shape[1], t, 2 * h + 2, 2 * w + 2)
    for i, j in itertools.product(range(h), range(w)):
        patch = torch.einsum("iokl,bit->botkl", weight, x[..., i, j])
        out[..., 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += patch
    out = out[..., 1:-1, 1:-1] + state[f"{name}.bias"].view(1, -1, 1, 1, 1)
    return out[..., : like.shape[-2], : like.shape[-1]]


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def long_range(state: State, query: Tensor, keys: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The attended feature, and all weights: b, t, h, w of the query, n, h, w of the key, for each key clip."""
    reduced, others = ([pooled(leaky(convolved(clip, state, "reduce"))) for clip in clips] for clips in ([query], keys))
    theta = linear(reduced[0], state, "theta")
    phi, g = ([pooled(linear(other, state, name)) for other in others] for name in ("phi", "g"))
    exponents = [torch.einsum("bdthw,bdnyx->bthwnyx", theta, key).exp() for key in phi]
    total = sum(exponent.sum((4, 5, 6), keepdim=True) for exponent in exponents)
    weights = [exponent / total for exponent in exponents]
    read = sum(torch.einsum("bthwnyx,bdnyx->bdthw", a, value) for a, value in zip(weights, g, strict=True))
    return leaky(doubled(read, state, "enlarge", query)), weights


def short_range(state: State, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The attended feature, and the mask."""
    value = linear(key, state, "key")
    together = torch.cat([value, linear(query, state, "query")], 1)
    first = pooled(leaky(convolved(together, state, "reduce.0")))
    second = pooled(leaky(convolved(first, state, "reduce.1")))
    third = leaky(doubled(second, state, "enlarge.0", first))
    mask = 1 / (1 + torch.exp(-doubled(third, state, "enlarge.1", query)))
    return mask * value, mask


def by_equations(module: nn.Module, query: Tensor, *keys: Tensor) -> tuple[Tensor, Normal, Any]:
    """The refined clip at test, the posterior of z, and the attention, in float64 from a state of any precision."""
    state = {name: value.double() for name, value in module.state_dict().items()}
    query, *others = (clip.double().transpose(1, 2) for clip in (query, *keys))
    if isinstance(module, LongRangeAttention):
        attended, attention = long_range(state, query, others or [query])
    else:
        attended, attention = short_range(state, query, others[0] if others else query)
    mean = linear(attended, state, "mean")
    deviation = (linear(attended, state, "log_variance") / 2).exp()
    refined = query + linear(mean, state, "output")
    return refined.transpose(1, 2), Normal(mean.transpose(1, 2), deviation.transpose(1, 2)), attention


SIZES = [tuple(random.Random(i).choices(range(1, 10), k=2)) for i in range(14)] + [(1, 1), (9, 8)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equations_9_to_17(block: type[nn.Module], size: tuple[int, int]) -> None:
    module = noisy(block(4, embedding=3)).eval()
    query = torch.randn(2, random.Random(sum(size)).choice((1, 2, 3)), 4, *size)
    other = torch.randn(2, 2, 4, size[1], size[0] + 1) if block is LongRangeAttention else torch.randn_like(query)
    for keys in ((), (other,), (query, other)[: 2 if block is LongRangeAttention else 1]):
        expected, posterior, _ = by_equations(module, query, *keys)
        refined, divergence = module.refine(query, *keys)
        assert (refined - expected).abs().max() < 2e-5 * expected.abs().max()
        torch.testing.assert_close(module(query, *keys), refined, rtol=0, atol=0)
        kl = kl_divergence(posterior, Normal(torch.zeros_like(posterior.mean), 1.0)).mean()
        torch.testing.assert_close(divergence.double(), kl, rtol=1e-4, atol=1e-5)
        found = module.distribution(query, *keys)
        torch.testing.assert_close(found.mean.double(), posterior.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.stddev.double(), posterior.stddev, rtol=1e-4, atol=1e-6)
    assert (expected - query).abs().max() > 0.01


@pytest.mark.parametrize("block", BLOCKS)
def test_exact_in_float64(block: type[nn.Module]) -> None:
    module = noisy(block(4, embedding=3)).double().eval()
    query = torch.randn(2, 3, 4, 7, 6, dtype=torch.float64)
    assert (module(query) - by_equations(module, query)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_through_the_samples(block: type[nn.Module]) -> None:
    module = noisy(block(2, embedding=1)).double().train()
    query = torch.randn(1, 2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    class Refine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = module

        def forward(self, query: Tensor, key: Tensor) -> Any:
            torch.manual_seed(4)  # the same noise at every evaluation
            return self.block.refine(query, key)

    def refined(query: Tensor, key: Tensor, *parameters: Tensor) -> Any:
        given = {f"block.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Refine(), given, (query, key))

    assert torch.autograd.gradcheck(refined, (query, key, *module.parameters()))


@pytest.mark.parametrize("block", BLOCKS)
def test_samples_while_training_and_the_mean_at_test(block: type[nn.Module]) -> None:
    module = noisy(block(4, embedding=3))
    query = torch.randn(2, 3, 4, 5, 6)
    posterior = module.distribution(query)
    torch.manual_seed(7)
    epsilon = torch.randn(2, 3, 5, 6, 3)
    torch.manual_seed(7)
    sampled = module.train()(query)
    z = posterior.mean.permute(0, 1, 3, 4, 2) + epsilon * posterior.stddev.permute(0, 1, 3, 4, 2)
    brought = z @ module.output.weight.T + module.output.bias
    torch.testing.assert_close(sampled, query + brought.permute(0, 1, 4, 2, 3))
    assert not torch.equal(module(query), sampled)
    assert torch.equal(module.eval()(query), module(query))


def test_the_variance_starts_next_to_none() -> None:
    deviation = LongRangeAttention(64).distribution(torch.rand(1, 2, 64, 8, 8)).stddev
    assert deviation.min() > 0.02
    assert deviation.max() < 0.12


def test_without_a_variance_nothing_is_sampled() -> None:
    module = noisy(LatentAttention(8, variational=False)).train()
    query = torch.randn(1, 2, 8, 5, 6)
    refined, divergence = module.refine(query)
    assert divergence is None
    assert torch.equal(module(query), refined)
    assert not [name for name, _ in module.named_parameters() if "variance" in name]
    with pytest.raises(ValueError, match="variational=False has no distribution"):
        module.blocks[0].distribution(query)
    variational = LatentAttention(8)  # stage two of algorithm 1 goes on from stage one
    assert set(variational.load_state_dict(module.state_dict(), strict=False).missing_keys) == {
        f"blocks.{i}.log_variance.{end}" for i in range(4) for end in ("weight", "bias")
    }
    torch.testing.assert_close(variational.eval()(query), refined)


@pytest.mark.parametrize("training", [False, True])
def test_starts_as_the_identity_or_not(training: bool) -> None:
    query = torch.randn(1, 2, 8, 5, 6)
    assert torch.equal(LatentAttention(8).train(training)(query), query)
    assert not torch.equal(LatentAttention(8, zero_init=False).train(training)(query), query)


def test_the_restoration_alone_moves_every_parameter() -> None:
    module, query = LatentAttention(8).train(), torch.randn(2, 3, 8, 9, 10)
    started = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (module(query) - 1).square().mean().backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
    assert not [name for name, p in module.named_parameters() if torch.equal(p, started[name])]


def test_attention_of_chosen_positions_for_pictures() -> None:
    module = noisy(LongRangeAttention(4, embedding=3)).double()
    query, other = torch.randn(2, 3, 4, 7, 6).double(), torch.randn(2, 2, 4, 9, 5).double()
    at = [(0, 0, 0), (2, 6, 5), (1, 3, 2)]
    maps = module.attend(query, query, other, at=at)
    assert [found.shape for found in maps] == [(2, 3, 3, 2, 2), (2, 3, 2, 3, 2)]
    for found, weights in zip(maps, by_equations(module, query, query, other)[2], strict=True):
        for i, (frame, y, x) in enumerate(at):
            torch.testing.assert_close(found[:, i], weights[:, frame, y // 2, x // 2])
    total = sum(found.sum((2, 3, 4)) for found in maps)
    torch.testing.assert_close(total, torch.ones_like(total))
    (alone,) = module.attend(query, at=at[:1])
    torch.testing.assert_close(alone[:, 0], by_equations(module, query)[2][0][:, 0, 0, 0])


def test_mask_for_pictures() -> None:
    module = noisy(ShortRangeAttention(4, embedding=3)).double()
    query, key = torch.randn(2, 3, 4, 7, 6).double(), torch.randn(2, 3, 4, 7, 6).double()
    torch.testing.assert_close(module.attend(query, key), by_equations(module, query, key)[2].transpose(1, 2))


def test_short_range_sees_five_frames() -> None:
    module = noisy(ShortRangeAttention(4)).eval()
    clip = torch.randn(1, 9, 4, 8, 8)
    moved = clip.clone()
    moved[:, 4] += 1
    seen = (module(moved) - module(clip)).abs().amax((0, 2, 3, 4)) > 0
    assert seen.tolist() == [False, False, True, True, True, True, True, False, False]


def test_another_number_of_stacks() -> None:
    module = noisy(ShortRangeAttention(4, stacks=3)).eval()
    assert len(module.reduce) == len(module.enlarge) == 3
    assert module(torch.rand(1, 2, 4, 5, 3)).shape == (1, 2, 4, 5, 3)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(value, Tensor):
                self.found = max(self.found, value.numel() * value.element_size())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 5])
def test_memory_is_linear_in_t_h_w(width: int, dtype: torch.dtype) -> None:
    module = noisy(LongRangeAttention(8, embedding=width)).to(dtype).train()
    largest = []
    for t, h, w in ((7, 32, 32), (7, 64, 64)):
        query = torch.rand(1, t, 8, h, w, dtype=dtype).requires_grad_()
        with Largest() as seen:
            module(query).float().sum().backward()
        largest.append(seen.found)
        scores = t * (h // 2) * (w // 2) * t * (h // 4) * (w // 4) * query.element_size()
        assert seen.found < scores / 4
    assert largest[1] == 4 * largest[0]


def test_blocks_run_in_order_and_external_clips_reach_the_long_range_only() -> None:
    module = noisy(LatentAttention(4, ("short", "long", "short"))).eval()
    clip, external = torch.randn(2, 3, 4, 6, 7), torch.randn(2, 2, 4, 5, 9)
    short, long, last = module.blocks
    assert [type(block) for block in (short, long, last)] == [
        ShortRangeAttention,
        LongRangeAttention,
        ShortRangeAttention,
    ]
    between = short(clip)
    torch.testing.assert_close(module(clip), last(long(between)))
    torch.testing.assert_close(module(clip, external), last(long(between, between, external)))
    assert not torch.allclose(module(clip, external), module(clip))
    divergences = [short.refine(clip)[1], long.refine(between)[1], last.refine(long(between))[1]]
    torch.testing.assert_close(module.refine(clip)[1], torch.stack(divergences).mean())


def test_a_long_clip_is_refined_in_sequences() -> None:
    plugin = noisy(LatentAttentionPlugin(8, length=3, order=("long", "short"))).eval()
    model = attach(network().eval(), it=plugin)
    seen: list[tuple[Tensor, Tensor]] = []
    plugin.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    context = Context(torch.rand(2, 5, 3, 6, 7))
    model(context.frames, context)
    ((clip, refined),) = seen
    (first, early), (second, late) = (plugin.at["fused"].refine(piece) for piece in (clip[:, :3], clip[:, 3:]))
    torch.testing.assert_close(refined, torch.cat([first, second], 1))
    torch.testing.assert_close(context.losses, {"it/kl": (3 * early + 2 * late) / 5})


def test_key_frames_are_embedded_once_and_attended_to() -> None:
    plugin = noisy(LatentAttentionPlugin(8, order=("long",), external_keys=True)).eval()
    model = attach(network().eval(), it=plugin)
    seen: list[tuple[Tensor, Tensor]] = []
    plugin.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    frames, keys = torch.rand(2, 3, 3, 6, 7), torch.rand(2, 4, 3, 9, 5)
    model(frames, Context(frames, keys=keys))
    ((clip, refined),) = seen
    state = {name: value.double() for name, value in plugin.state_dict().items()}
    embedded = leaky(convolved(keys.double().transpose(1, 2), state, "keys")).transpose(1, 2)
    expected = by_equations(plugin.at["fused"].blocks[0], clip, clip, embedded)[0]
    assert (refined - expected).abs().max() < 1e-5
    model(frames, Context(frames, keys=keys.flip(1)))
    assert not torch.allclose(seen[1][1], refined)


def test_with_key_frames_too_every_parameter_learns() -> None:
    plugin = LatentAttentionPlugin(8, order=("short", "long"), external_keys=True)
    model = attach(network(), it=plugin).train()
    frames, keys = torch.rand(2, 3, 3, 6, 7), torch.rand(2, 2, 3, 6, 7)
    assert torch.equal(model(frames, Context(frames, keys=keys)), model.backbone(frames))
    started = {name: p.detach().clone() for name, p in plugin.named_parameters()}
    optimizer = torch.optim.Adam(plugin.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(frames, Context(frames, keys=keys)).square().mean().backward()
        optimizer.step()
    assert not [name for name, p in plugin.named_parameters() if torch.equal(p, started[name])]


def test_key_features_are_as_coarse_as_the_site() -> None:
    edvr = EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=4, predeblur=True, hr_input=True)
    plugin = LatentAttentionPlugin(8, sites=("features", "aligned"), order=("long",), external_keys=True)
    model = attach(edvr.eval(), it=plugin)
    given: list[tuple[Tensor, ...]] = []
    for site in plugin.sites:
        block = plugin.at[site].blocks[0]
        block.refine = lambda *clips, refine=block.refine: given.append(clips) or refine(*clips)
    frames, keys = torch.rand(1, 3, 3, 13, 18), torch.rand(1, 2, 3, 13, 18)
    assert torch.equal(model(frames, Context(frames, keys=keys)), edvr(frames))
    assert [clips[2].shape for clips in given] == [(1, 2, 8, 4, 5)] * 2
    embedded = leaky(plugin.keys(keys.transpose(1, 2))).transpose(1, 2)
    torch.testing.assert_close(given[0][2][..., 1, 1], embedded[..., 4:8, 4:8].mean((3, 4)))


def test_default_sites_hold_clips() -> None:
    assert attach(EDVR(8, frames=3, deform_groups=4), it=LatentAttentionPlugin).plugins["it"].sites == ("aligned",)
    assert attach(network(), it=LatentAttentionPlugin).plugins["it"].sites == ("fused",)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("x", "short long short long"),
        ("s", "short short long long"),
        ("l", "long long short short"),
        ("sl", "long short short long"),
        ("ls", "short long long short"),
    ],
)
def test_the_orders_of_table_2(name: str, order: str) -> None:
    given = OmegaConf.load(Path(conf.__file__).parent / "plugins" / f"latent_attention_{name}.yaml")
    call = given[f"latent_attention_{name}"]
    assert list(call.order) == order.split()
    default = OmegaConf.load(Path(conf.__file__).parent / "plugins" / "latent_attention.yaml").latent_attention
    assert {**call, "order": None} == {**default, "order": None}
    assert list(default.order) == ["short", "long", "long", "short"]  # the constructor's


def test_clips_that_do_not_fit() -> None:
    long, short, clip = LongRangeAttention(4), ShortRangeAttention(4), torch.rand(2, 3, 4, 6, 5)
    for block in (long, short):
        with pytest.raises(ValueError, match=r"query must be a clip \(b, t, 4, h, w\), got \(2, 3, 5, 6, 5\)"):
            block(torch.rand(2, 3, 5, 6, 5))
        with pytest.raises(ValueError, match=r"query must be a clip .*, got \(2, 4, 6, 5\)"):
            block(clip[:, 0])
        for shape in ((1, 3, 4, 6, 5), (2, 3, 3, 6, 5), (2, 4, 6, 5)):
            expected = rf"batch and channels of the query, \(2, n, 4, h, w\), got \({', '.join(map(str, shape))}\)"
            with pytest.raises(ValueError, match=expected):
                block(clip, torch.rand(shape))
    with pytest.raises(ValueError, match=r"key frames have to be embedded first"):
        long.attend(clip, torch.rand(2, 3, 3, 6, 5), at=[(0, 0, 0)])
    with pytest.raises(ValueError, match=r"query's shape \(2, 3, 4, 6, 5\), got \(2, 2, 4, 6, 5\); long-range"):
        short(clip, clip[:, :2])
    with pytest.raises(ValueError, match=r"one key clip .* got \(2, 3, 4, 6, 5\) and \(2, 3, 4, 6, 5\)"):
        short(clip, clip, clip)
    for position in ((3, 0, 0), (0, -1, 0), (0, 0, 5)):
        with pytest.raises(IndexError, match=r"no frame, row, column .* in a clip of 3 x 6 x 5"):
            long.attend(clip, at=[position])


def test_arguments_that_do_not_fit() -> None:
    for order in ("short", (), ("long", "middle")):
        with pytest.raises(ValueError, match="order is a sequence of 'long' and 'short', one for each block, got"):
            LatentAttention(8, order)
    with pytest.raises(ValueError, match="length is the number of frames refined together, 1 or more, got 0"):
        LatentAttentionPlugin(8, length=0)
    with pytest.raises(ValueError, match="external_keys=True needs a long-range block"):
        LatentAttentionPlugin(8, order=("short",), external_keys=True)
    with pytest.raises(ValueError, match=r"serves clip sites, but 'forward_output' is a frame site.*input, fused"):
        attach(network(), it=LatentAttentionPlugin(8, sites=("forward_output",)))


def test_key_frames_that_do_not_fit() -> None:
    frames = torch.rand(2, 3, 3, 6, 7)
    without = attach(network(), it=LatentAttentionPlugin(8))
    with pytest.raises(ValueError, match="the pass has key frames, but this latent attention was made without"):
        without(frames, Context(frames, keys=frames))
    model = attach(network(), it=LatentAttentionPlugin(8, external_keys=True))
    with pytest.raises(ValueError, match=r"needs key frames: Context\(frames, keys=...\), \(b, n, 3, h, w\)"):
        model(frames)
    for shape in ((1, 3, 3, 6, 7), (2, 3, 4, 6, 7), (2, 3, 6, 7)):
        given = ", ".join(map(str, shape))
        with pytest.raises(ValueError, match=rf"key frames must be \(2, n, 3, h, w\), got \({given}"):
            model(frames, Context(frames, keys=torch.rand(shape)))


def test_maps_are_the_weights_of_a_pixel_and_the_mask() -> None:
    """Of the first block of each kind, with the clip that reaches it; by the equations in float64."""
    module = noisy(LatentAttention(4, embedding=3)).eval()
    clip, key, at = torch.randn(2, 3, 4, 7, 6), torch.randn(2, 2, 4, 9, 5), (2, 6, 5)
    with torch.no_grad():
        maps = module.maps(clip, key, at=at)
        reached = module.blocks[0](clip)
    assert list(maps) == ["short-range mask", "long-range attention"]
    mask = by_equations(module.blocks[0], clip)[2].transpose(1, 2)
    planes = maps["short-range mask"]
    assert list(planes) == ["frame -2", "frame -1", "this frame"]
    torch.testing.assert_close(torch.stack([*planes.values()]).double(), mask[0].mean(1), atol=1e-6, rtol=0)
    planes = maps["long-range attention"]
    assert list(planes) == ["frame -2", "frame -1", "this frame", "key 0", "key 1"]
    own, other = (weights[0, 2, 3, 2] for weights in by_equations(module.blocks[1], reached, reached, key)[2])
    for found, expected in zip(planes.values(), [*own, *other], strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert sum(plane.sum().item() for plane in planes.values()) == pytest.approx(1)


def test_maps_of_a_plugin_are_of_the_sequence_that_the_frame_is_in() -> None:
    plugin = noisy(LatentAttentionPlugin(8, order=("long",), length=3, external_keys=True))
    seen: list[Tensor] = []
    plugin.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    model = attach(network(), it=plugin).eval()
    frames, keys = torch.rand(1, 5, 3, 8, 12), torch.rand(1, 2, 3, 9, 10)
    context = Context(frames, keys=keys)
    with torch.no_grad(), recorded(model, 4, (7, 3)) as maps:
        model(frames, context)
    ((picture, planes),) = maps.items()
    assert picture == "it, long-range attention at fused"
    assert list(planes) == ["frame -1", "this frame", "key 0", "key 1"]
    with torch.no_grad():
        sequence = seen[0][:, 3:]
        expected = plugin.at["fused"].blocks[0].attend(sequence, sequence, context.memo[plugin], at=[(1, 7, 3)])
    for found, wanted in zip(planes.values(), [*expected[0][0, 0], *expected[1][0, 0]], strict=True):
        torch.testing.assert_close(found, wanted)
