"""LatentVSR against the paper's equations as plain loops in float64, and its sites as layers with attention between."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vsrplug import Context, Plugin, attach, load_official
from vsrplug.backbones import LatentVSR
from vsrplug.plugins import LatentAttentionPlugin

Layer = Callable[[Tensor], Tensor]


def tiny(**arguments: Any) -> LatentVSR:
    """A small network whose features stay near one, layer after layer."""
    network = LatentVSR(**({"channels": 4, "layers": 3, "length": 3} | arguments))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (c, sizes), weight (o, c, 3, ...) -> (o, sizes): zero border, one shifted product for each kernel place."""
    sizes = x.shape[1:]
    padded = x.new_zeros(len(x), *(size + 2 for size in sizes))
    padded[(slice(None), *(slice(1, -1) for _ in sizes))] = x
    out = x.new_zeros(len(weight), *sizes) + bias.view(-1, *(1 for _ in sizes))
    for at in itertools.product(range(3), repeat=len(sizes)):
        shifted = padded[(slice(None), *(slice(i, i + size) for i, size in zip(at, sizes, strict=True)))]
        out += torch.einsum("oc,c...->o...", weight[(slice(None), slice(None), *at)], shifted)
    return out


def by_equations(network: LatentVSR, frames: Tensor, attention: dict[int, Layer] | None = None) -> Tensor:
    """Eq. 15 and 17 to 21, sequence after sequence (6.2); `attention`: layer -> A_l, (1, t, c, h, w) to the same."""
    state = {name: value.double() for name, value in network.state_dict().items()}
    s, length = network.scale, network.length
    clips = []
    for clip in frames.double():
        restored = []
        for start in range(0, len(clip), length):
            sequence = clip.new_zeros(length, *clip.shape[1:])
            piece = clip[start : start + length]
            sequence[: len(piece)] = piece
            x = sequence.transpose(0, 1)
            for i in range(len(network.extractor)):
                found = convolved(x, state[f"extractor.{i}.weight"], state[f"extractor.{i}.bias"])
                found = torch.where(found > 0, found, 0.2 * found)
                x = found if i == 0 else x + found
                if attention and i + 1 in attention:
                    own = x[:, : len(piece)].transpose(0, 1)[None]  # what fills the sequence is no frame of the clip
                    x[:, : len(piece)] += attention[i + 1](own)[0].transpose(0, 1)
            for t in range(len(piece)):
                pixels = convolved(x[:, t], state["upscale.weight"], state["upscale.bias"])
                frame = x.new_zeros(3, s * clip.shape[2], s * clip.shape[3])
                for colour, row, column in itertools.product(range(3), range(s), range(s)):
                    frame[colour, row::s, column::s] = pixels[colour * s * s + row * s + column]
                restored.append(frame)
        clips.append(torch.stack(restored))
    return torch.stack(clips)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize(("t", "h", "w"), [(3, 6, 5), (1, 1, 1), (2, 3, 8), (7, 1, 4)])
@torch.no_grad()
def test_equals_the_equations(scale: int, t: int, h: int, w: int) -> None:
    network, frames = tiny(scale=scale), torch.rand(2, t, 3, h, w)
    kept, out = frames.clone(), network(frames)
    expected = by_equations(network, frames)
    assert out.shape == (2, t, 3, scale * h, scale * w)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (network.double()(frames.double()) - expected).abs().max() < 1e-12
    assert torch.equal(frames, kept)


@pytest.mark.parametrize(("layers", "length"), [(1, 2), (4, 5)])
@torch.no_grad()
def test_any_depth_and_length(layers: int, length: int) -> None:
    network, frames = tiny(layers=layers, length=length).double(), torch.rand(1, 4, 3, 3, 4).double()
    assert (network(frames) - by_equations(network, frames)).abs().max() < 1e-12


@torch.no_grad()
def test_sequences_know_nothing_of_each_other_and_the_last_is_filled_with_black() -> None:
    network, frames = tiny(), torch.rand(2, 8, 3, 5, 6)
    pieces = [network(piece) for piece in frames.split(3, 1)]
    torch.testing.assert_close(network(frames), torch.cat(pieces, 1), rtol=0, atol=1e-6)
    black = torch.zeros(2, 1, 3, 5, 6)
    filled = network(torch.cat((frames[:, 6:], black), 1))
    torch.testing.assert_close(pieces[-1], filled[:, :2], rtol=0, atol=1e-6)
    shorter = tiny(length=2)
    shorter.load_state_dict(network.state_dict())
    assert (shorter(frames[:, 6:]) - pieces[-1]).abs().max() > 1e-4  # black frames are not no frames


@torch.no_grad()
def test_clips_of_a_batch_do_not_meet() -> None:
    network, frames = tiny(), torch.rand(2, 4, 3, 6, 5)
    torch.testing.assert_close(network(frames)[1:], network(frames[1:]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [7, 5])
@torch.no_grad()
def test_plugins_at_the_sites_are_blocks_between_the_layers(t: int) -> None:
    """Eq. 17, O_l = A_l + F_l, whole sequences and a shorter one: the paper's LSatn."""
    network, frames = tiny(layers=4, length=3).double(), torch.rand(2, t, 3, 6, 5).double()
    short = LatentAttentionPlugin(4, sites=("layer1", "layer4"), order=("short",), length=3, zero_init=False)
    long = LatentAttentionPlugin(4, sites=("layer3",), order=("long",), length=3, zero_init=False)
    model = attach(network, short=short, long=long).eval()
    blocks = {1: short.at["layer1"], 3: long.at["layer3"], 4: short.at["layer4"]}
    attention = {layer: lambda x, block=block: block.double()(x) - x for layer, block in blocks.items()}
    out, expected = model.double()(frames), by_equations(network, frames, attention)
    assert (out - expected).abs().max() < 1e-12
    assert (expected - by_equations(network, frames)).abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_external_key_frames(training: bool) -> None:
    """Section 6.2: frames from elsewhere in the video, of any number and size, for the long-range blocks."""
    network, frames = tiny(), torch.rand(2, 4, 3, 8, 6)
    long = LatentAttentionPlugin(4, sites=("layer1", "layer3"), order=("long",), length=3, external_keys=True)
    model = attach(network, long=long).train(training)
    keys = torch.rand(2, 5, 3, 12, 10)
    assert torch.equal(model(frames, Context(frames, keys=keys)), network(frames))
    with torch.no_grad():
        for parameter in long.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))

    def run(keys: Tensor) -> Tensor:
        torch.manual_seed(0)
        return model(frames, Context(frames, keys=keys))

    changed = (run(keys) - run(1 - keys)).abs().amax((2, 3, 4))
    assert (changed > 1e-5).all()  # in every frame of every sequence
    run(keys).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in long.keys.parameters())
    with pytest.raises(ValueError, match=r"needs key frames: Context\(frames, keys=\.\.\.\)"):
        model(frames)


class Shift(Plugin):
    """Adds a constant, and writes down what each site was given."""

    def __init__(self, channels: int, *, sites: tuple[str, ...], by: float = 0.0) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict({site: nn.Identity() for site in sites})
        self.by = by

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        context.memo[self, site, t] = (feature, given)
        return feature + self.by


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("t", [1, 3, 5, 6])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (5, 8)])
def test_every_site_is_met_with_the_clips_own_frames(training: bool, t: int, h: int, w: int) -> None:
    network, frames = tiny(length=3).train(training), torch.rand(2, t, 3, h, w)
    thin, wide = Shift(3, sites=("input",)), Shift(4, sites=("layer1", "layer2", "layer3"))
    context = Context(frames)
    assert torch.equal(attach(network, thin=thin, wide=wide)(frames, context), network(frames))
    met = {site: (at, *rest) for (_, site, at), rest in context.memo.items()}
    assert list(met) == list(network.sites) == ["input", "layer1", "layer2", "layer3"]
    for name, spec in network.sites.items():
        at, feature, given = met[name]
        assert (at, feature.shape, given) == (None, (2, t, spec.channels, h, w), {})
    assert torch.equal(met["input"][1], frames)


@pytest.mark.parametrize("site", ["input", "layer1", "layer2", "layer3"])
@pytest.mark.parametrize("t", [3, 4])
@torch.no_grad()
def test_every_site_reaches_the_result(site: str, t: int) -> None:
    network, frames = tiny(), torch.rand(1, t, 3, 8, 6)
    model = attach(network, shift=Shift(network.sites[site].channels, sites=(site,), by=0.1))
    changed = (model(frames) - network(frames)).abs().amax((0, 2, 3, 4))
    assert (changed > 1e-4).all()
    if site == "input":
        assert torch.equal(model(frames), network(frames + 0.1))


def test_sizes_of_the_paper() -> None:
    """6.1: 1.7 million, give or take 20,000, with and without attention."""
    with torch.device("meta"):
        networks = {layers: LatentVSR(layers=layers) for layers in (16, 10)}
    size = {layers: sum(p.numel() for p in network.parameters()) for layers, network in networks.items()}
    first, layer, head = 3 * 64 * 27 + 64, 64 * 64 * 27 + 64, 64 * 48 * 9 + 48
    assert size == {layers: first + (layers - 1) * layer + head for layers in (16, 10)}
    assert size[16] == 1_692_784
    assert abs(size[16] / 1.7e6 - 1) < 0.01
    assert list(networks[10].sites) == ["input", *(f"layer{i}" for i in range(1, 11))]
    assert list(networks[10].state_dict()) == [
        *(f"extractor.{i}.{end}" for i in range(10) for end in ("weight", "bias")),
        "upscale.weight",
        "upscale.bias",
    ]


@torch.no_grad()
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()  # the limit on recompilations counts over the whole process
    model = attach(tiny(), shift=Shift(4, sites=("layer2",), by=0.1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for t in (3, 5):
        frames = torch.rand(1, t, 3, 7, 6)
        torch.testing.assert_close(compiled(frames), model(frames), rtol=0, atol=1e-5)


def test_messages() -> None:
    for name in ("layers", "length"):
        with pytest.raises(ValueError, match=f"{name} is a count, 1 or more, got 0"):
            tiny(**{name: 0})
    with pytest.raises(ValueError, match="scale is 5; expected one of 1, 2, 3, 4"):
        tiny(scale=5)
    with pytest.raises(ValueError, match="channels and stride are counts, got channels=0"):
        tiny(channels=0)
    with pytest.raises(ValueError, match=r"there is no site 'layer4'; did you mean 'layer"):
        attach(tiny(), short=LatentAttentionPlugin(4, sites=("layer4",)))
    with pytest.raises(ValueError, match=r"default sites \(aligned, fused\) exists here; name some of input, layer1"):
        attach(tiny(), short=LatentAttentionPlugin)
    with pytest.raises(ValueError, match=r"4 missing in the file: extractor\.3\.weight"):
        load_official(tiny(layers=5), tiny().state_dict())
