"""MANA against the official outputs, and against its equations written out with every pair of pixels in float64."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug import Context, Plugin, attach, load_official
from vsrplug.backbones import MANA, SlidingWindow
from vsrplug.tuning import Tuning


def tiny(**arguments: Any) -> MANA:
    """A small MANA whose weights have noise, since fresh attentions give nothing."""
    defaults = {"channels": 8, "frames": 3, "encoder_blocks": 1, "decoder_blocks": 1, "memory_size": 5, "groups": 4}
    network = MANA(**(defaults | arguments))
    for name, parameter in network.named_parameters():
        if not name.endswith("sigma"):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim == 4 else 0.5)
    return network.eval()


def plainly(network: MANA, frames: Tensor) -> tuple[Tensor, Tensor]:
    """One frame, one matrix of all pairs of pixels at a time: the centre frame and the quantisation loss, float64."""
    network, frames = copy.deepcopy(network).double(), frames.double()
    attention, bank, centre = network.attention, network.memory_bank, frames.shape[1] // 2
    h, w = frames.shape[-2:]
    y, x = (axis.flatten().double() for axis in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    gaussian = torch.exp(-((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2) / (2 * attention.sigma**2))
    features = [network.encoder(F.leaky_relu(network.conv_first(frame), 0.1)) for frame in frames.unbind(1)]
    query = attention.query(attention.norm(features[centre])).flatten(2)  # b c' (h w)
    found = []
    for feature in features:
        key, value = (layer(attention.norm(feature)).flatten(2) for layer in (attention.key, attention.value))
        weights = (query.mT @ key).softmax(-1) * gaussian
        found.append((weights @ value.mT).mT.unflatten(2, (h, w)))
    attended, loss = features[centre] + attention.output(torch.cat(found, 1)), torch.zeros(())
    if bank is not None:
        read = bank.memory @ (bank.memory.T @ query / query.shape[1] ** 0.5).softmax(1)
        attended, loss = attended + bank.output(read.unflatten(2, (h, w))), (query - read).abs().mean()
    x = network.decoder(attended)
    for upconv, factor in zip(("upconv1", "upconv2"), network.shuffles, strict=False):
        x = F.leaky_relu(F.pixel_shuffle(network.get_submodule(upconv)(x), factor), 0.1)
    x = network.conv_last(F.leaky_relu(network.conv_hr(x), 0.1))
    size = (h * network.scale, w * network.scale)
    return x + F.interpolate(frames[:, centre], size=size, mode="bilinear", align_corners=False), loss


def test_outputs_are_the_official_ones(golden: ModuleType) -> None:
    case = golden.load("mana_network")
    config = case.constructor["config"]
    network = MANA(
        channels=config["in_channels"],
        encoder_blocks=config["encoder_nblocks"],
        decoder_blocks=config["decoder_nblocks"],
        memory_size=256,
    )
    state = case.state_dict()
    assert list(case.kept) == ["nonloc_spatial.D"]
    report = load_official(network, state | {"nonloc_spatial.D": torch.zeros(256, 256)})
    assert sorted(report.loaded) == sorted(network.state_dict())
    assert len(report.loaded) == len(state)
    assert str(report) == f"{len(state)} loaded; 1 ignored: nonloc_spatial.D"
    frames = case.input()
    context = Context(frames)
    with torch.no_grad():
        out = network(frames, context)
    assert case.check({"out": out[:, 0]}) <= 1e-5 * case.expected["out"].abs().max()
    assert case.check({"qloss": context.losses["backbone/quantisation"]}) <= 1e-5 * case.expected["qloss"]


def test_published_size_has_every_key(golden: ModuleType) -> None:
    spec = golden.full_size("mana_official_64")
    state = {key: torch.zeros(()).expand(shape) for key, shape, _ in spec["state_dict"]}
    network = MANA(memory_size=256)
    report = load_official(network, {"params": state})
    assert sorted(report.loaded) == sorted(network.state_dict())
    assert report.ignored == ["nonloc_spatial.D"]
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == spec["params_trainable"] == spec["params"] - state["nonloc_spatial.D"].numel() == 14_317_508


def test_the_papers_memory_is_twice_the_codes(golden: ModuleType) -> None:
    with torch.device("meta"):
        network = MANA()
    assert sum(parameter.numel() for parameter in network.parameters()) == 14_317_508 + 64 * 256
    state = {key: torch.zeros(shape) for key, shape, _ in golden.full_size("mana_official_64")["state_dict"]}
    with pytest.raises(ValueError, match=r"of another shape: memory_bank.memory \(64, 512\) here, \(64, 256\) there"):
        load_official(network, state)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize(("t", "h", "w"), [(3, 7, 10), (1, 5, 4), (5, 1, 1)])
@torch.no_grad()
def test_equals_the_equations(scale: int, t: int, h: int, w: int) -> None:
    network, frames = tiny(frames=t, scale=scale).double(), torch.rand(2, t, 3, h, w).double()
    kept, context = frames.clone(), Context(frames)
    out, (expected, loss) = network(frames, context), plainly(network, frames)
    torch.testing.assert_close(out[:, 0], expected, rtol=0, atol=1e-6)  # G below 2**-24 is left out
    torch.testing.assert_close(context.losses["backbone/quantisation"], loss, rtol=0, atol=1e-12)
    assert torch.equal(frames, kept)


@torch.no_grad()
def test_without_memory() -> None:
    network, frames = tiny(memory_size=0).double(), torch.rand(1, 3, 3, 6, 7).double()
    assert not [name for name in network.state_dict() if "memory" in name]
    context = Context(frames)
    torch.testing.assert_close(network(frames, context)[:, 0], plainly(network, frames)[0], rtol=0, atol=1e-6)
    assert context.losses == {}


@torch.no_grad()
def test_starts_as_a_network_of_single_frames() -> None:
    """Both output projections start at zero (3.4): neighbours and memory count for nothing yet."""
    network = MANA(32, frames=3, encoder_blocks=1, decoder_blocks=1, memory_size=4)
    frames = torch.rand(1, 3, 3, 6, 7)
    others = torch.cat((torch.rand(1, 1, 3, 6, 7), frames[:, 1:2], torch.rand(1, 1, 3, 6, 7)), 1)
    assert torch.equal(network(frames), network(others))


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
def test_every_site_is_met_with_what_it_declares(training: bool) -> None:
    network, frames = tiny().train(training), torch.rand(2, 3, 3, 7, 6)
    context = Context(frames)
    model = attach(network, spy=Shift(8, sites=tuple(network.sites)))
    assert torch.equal(model(frames, context), network(frames))
    met = {site: (t, *rest) for (_, site, t), rest in context.memo.items()}
    assert list(met) == list(network.sites) == ["features", "attended", "reconstructed"]
    assert {site: (t, feature.shape) for site, (t, feature, _) in met.items()} == {
        "features": (None, (2, 3, 8, 7, 6)),
        "attended": (1, (2, 8, 7, 6)),
        "reconstructed": (1, (2, 8, 7, 6)),
    }
    features, attended = met["features"][1], met["attended"][1]
    torch.testing.assert_close(features, network.extract(frames))
    assert torch.equal(met["attended"][2]["neighbours"], features)
    torch.testing.assert_close(met["reconstructed"][1], network.decoder(attended))
    residual, _ = network.memory_bank(network.attention.query(network.attention.norm(features[:, 1])))
    torch.testing.assert_close(attended, network.attention(features[:, 1], features) + residual)


@pytest.mark.parametrize("site", ["features", "attended", "reconstructed"])
@torch.no_grad()
def test_every_site_reaches_the_result(site: str) -> None:
    network, frames = tiny(), torch.rand(1, 3, 3, 8, 6)
    model = attach(network, shift=Shift(8, sites=(site,), by=0.1))
    assert (model(frames) - network(frames)).abs().max() > 1e-4


def test_every_parameter_learns() -> None:
    network, frames = tiny(), torch.rand(1, 3, 3, 8, 7)
    network(frames).square().mean().backward()
    size = {name: parameter.grad.abs().max().item() for name, parameter in network.named_parameters()}
    assert size.pop("attention.key.bias") < 1e-6  # it adds the same to all scores of a query: a softmax is blind to it
    assert [name for name, value in size.items() if value == 0] == []


def test_the_three_stages_reach_what_they_train() -> None:
    """3.4: first all but the memory, then the memory by its own loss, then everything."""
    model, frames = attach(tiny()), torch.rand(1, 3, 3, 8, 7)
    everything = {name for name, _ in model.named_parameters()}
    memory = {name for name in everything if "memory_bank" in name}
    assert memory == {f"backbone.memory_bank.{name}" for name in ("memory", "output.weight", "output.bias")}
    stages = [
        (Tuning(freeze=("*.memory_bank.*",)), "pixel", everything - memory),
        (Tuning(train=("*.memory_bank.*memory",)), "quantisation", {"backbone.memory_bank.memory"}),
        (Tuning(), "pixel", everything),
    ]
    for tuning, loss, learns in stages:
        tuning.apply(model)
        model.zero_grad()
        context = Context(frames)
        pixel = model(frames, context).square().mean()
        (pixel if loss == "pixel" else context.losses["backbone/quantisation"]).backward()
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == learns
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == learns


@torch.no_grad()
def test_a_clip_equals_window_by_window_and_extracts_each_frame_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, frames = tiny(), torch.rand(2, 5, 3, 6, 7)
    index = [[max(0, t - 1), t, min(4, t + 1)] for t in range(5)]
    passes = [(window, Context(window)) for window in (frames[:, at] for at in index)]
    expected = torch.cat([network(window, passed) for window, passed in passes], 1)
    losses = torch.stack([passed.losses["backbone/quantisation"] for _, passed in passes])
    extracted: list[int] = []
    extract = network.extract
    monkeypatch.setattr(network, "extract", lambda frames: extracted.append(frames.shape[1]) or extract(frames))
    context = Context(frames)
    torch.testing.assert_close(SlidingWindow(network, "replicate")(frames, context), expected, rtol=0, atol=1e-5)
    assert sum(extracted) == 5
    torch.testing.assert_close(context.losses, {"backbone/quantisation": losses.mean()})

    def clip_of(model: nn.Module) -> Tensor:
        extracted.clear()
        return SlidingWindow(model, "replicate")(frames)

    at_features = attach(network, shift=Shift(8, sites=("features",), by=0.1))
    assert (clip_of(at_features) - expected).abs().max() > 1e-4
    assert sum(extracted) == 15  # such a plug-in may look at the whole window
    behind = attach(network, shift=Shift(8, sites=("attended", "reconstructed")))
    torch.testing.assert_close(clip_of(behind), expected, rtol=0, atol=1e-5)
    assert sum(extracted) == 5


def test_extracted_features_stand_in_for_extraction() -> None:
    network, frames = tiny(), torch.rand(1, 3, 3, 8, 7)
    assert torch.equal(network(frames, extracted=network.extract(frames)), network(frames))


def test_the_quantisation_loss_stays_float32_in_half_precision() -> None:
    context = Context(torch.rand(1, 3, 3, 8, 7))
    with torch.autocast("cpu", torch.bfloat16):
        tiny()(context.frames, context)
    assert context.losses["backbone/quantisation"].dtype == torch.float32


def test_messages(golden: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"takes windows of 3 frames, got 4; .* SlidingWindow\(model\)"):
        tiny()(torch.rand(1, 4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"frames must be odd, .* got 6"):
        MANA(frames=6)
    with pytest.raises(ValueError, match="channels=48 cannot be normalised in groups=32; give groups that divide it"):
        MANA(channels=48)
    with pytest.raises(ValueError, match="memory_size is -1; expected the number of entries, or 0 for no memory"):
        tiny(memory_size=-1)
    with pytest.raises(ValueError, match="scale is 5; expected one of 1, 2, 3, 4"):
        tiny(scale=5)
    state = golden.load("mana_network").state_dict()
    with pytest.raises(ValueError, match=r"file's number of blocks.*4 missing in the file: decoder\.3\.conv1\.weight"):
        load_official(MANA(64, encoder_blocks=2, decoder_blocks=4, memory_size=256), state)
    with pytest.raises(ValueError, match=r"1 unexpected in the file: nonloc_spatial\.E"):
        load_official(
            MANA(64, encoder_blocks=2, decoder_blocks=3, memory_size=256),
            state | {"nonloc_spatial.E": torch.zeros(1)},
        )
