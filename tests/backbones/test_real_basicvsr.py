"""RealBasicVSR against the official output, and against cleaning and BasicVSR done one after the other."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug import Context, Plugin, attach, load_official
from vsrplug.backbones import BasicVSR, RealBasicVSR, SPyNet
from vsrplug.backbones.spynet import IMAGENET_MEAN, IMAGENET_STD
from vsrplug.plugins import ImageCleaningPlugin

CONSTANTS = {
    f"basicvsr.spynet.{name}": torch.tensor(values).view(1, 3, 1, 1)
    for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
}


def small(**options: Any) -> RealBasicVSR:
    defaults = {"channels": 8, "propagation_blocks": 1, "cleaning_blocks": 1, "reconstruction_channels": 4}
    return RealBasicVSR(**{**defaults, "flow": SPyNet(2, (4, 4, 4, 4)), **options}).eval()


def official(constructor: dict[str, Any]) -> RealBasicVSR:
    """The network that the official constructor's arguments make."""
    return RealBasicVSR(
        channels=constructor["mid_channels"],
        propagation_blocks=constructor["num_propagation_blocks"],
        cleaning_blocks=constructor["num_cleaning_blocks"],
        refine_threshold=constructor["dynamic_refine_thres"],
    ).eval()


def cleaned_frame_by_frame(network: RealBasicVSR, clip: Tensor, passes: int) -> Tensor:
    """x + C(x), so many times over, for every frame (1, 3, h, w) by itself."""
    clean, frames = network.image_cleaning, list(clip.flatten(0, 1).split(1))
    for _ in range(passes):
        frames = [x + clean.last(clean.blocks(F.leaky_relu(clean.first(x), 0.1))) for x in frames]
    return torch.cat(frames).view_as(clip)


def counted(network: RealBasicVSR) -> list[int]:
    """A list that grows by one entry with every pass of the cleaning."""
    passes: list[int] = []
    network.image_cleaning.last.register_forward_hook(lambda *_: passes.append(1))
    return passes


class Spy(Plugin):
    """Notes what each site was given; multiplies the feature."""

    def __init__(self, channels: int, *, sites: tuple[str, ...], factor: float = 1.0) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict({site: nn.Identity() for site in sites})
        self.factor = factor
        self.seen: dict[tuple[str, int | None], Tensor] = {}

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        self.seen[site, t] = feature
        return feature * self.factor


@torch.no_grad()
def test_official_output(golden: ModuleType) -> None:
    case = golden.load("mmagic_realbasicvsr")
    network, frames = official(case.constructor), case.input()
    report = load_official(network, case.state_dict() | CONSTANTS)
    assert sorted(report.loaded) == sorted(network.state_dict())
    assert report.ignored == sorted(CONSTANTS)
    kept = frames.clone()
    assert case.check({"out": network(frames)}) <= 1e-5
    assert torch.equal(frames, kept)


@pytest.mark.parametrize(("name", "passes"), [("refine", 3), ("stop2", 2)])
@torch.no_grad()
def test_official_cases_of_dynamic_refinement(golden: ModuleType, name: str, passes: int) -> None:
    case = golden.load(f"mmagic_realbasicvsr_{name}")
    network, frames = official(case.constructor), case.input()
    load_official(network, case.state_dict())
    made = counted(network)
    out = network(frames)
    assert len(made) == passes
    cleaned = cleaned_frame_by_frame(network, frames, passes)
    torch.testing.assert_close(out, network.basicvsr(cleaned), rtol=0, atol=1e-5)


@torch.no_grad()
def test_training_never_refines() -> None:
    network, frames = small(refine_threshold=0.0), torch.rand(1, 2, 3, 8, 7)
    for training, passes in ((False, 3), (True, 1)):
        made = counted(network.train(training))
        expected = network.basicvsr(cleaned_frame_by_frame(network, frames, passes))
        made.clear()
        torch.testing.assert_close(network(frames), expected, rtol=0, atol=1e-6)
        assert len(made) == passes


def test_published_size_has_every_key_in_order(golden: ModuleType) -> None:
    spec = golden.full_size("mmagic_realbasicvsr_64_20_20")
    entries = [(key, shape) for key, shape, _ in spec["state_dict"] if key not in CONSTANTS]
    network = RealBasicVSR()
    report = load_official(network, {key: torch.zeros(shape) for key, shape in entries} | CONSTANTS)
    assert report.loaded == list(network.state_dict())
    assert [list(value.shape) for value in network.state_dict().values()] == [shape for _, shape in entries]
    assert sum(parameter.numel() for parameter in network.parameters()) == spec["params"] == 6_294_834


@torch.no_grad()
def test_a_checkpoint_of_the_gan_gives_its_average(golden: ModuleType) -> None:
    case = golden.load("mmagic_realbasicvsr")
    state = case.state_dict() | CONSTANTS
    checkpoint = {
        "step_counter": torch.zeros(1),
        **{f"generator.{key}": torch.zeros_like(value) for key, value in state.items()},
        **{f"generator_ema.{key}": value for key, value in state.items()},
        "discriminator.conv_0.weight": torch.rand(1),
        "perceptual_loss.vgg.mean": torch.rand(1),
    }
    network = official(case.constructor)
    report = load_official(network, {"meta": {}, "state_dict": checkpoint})
    assert {"step_counter", "discriminator.conv_0.weight", "perceptual_loss.vgg.mean"} <= set(report.ignored)
    plain = official(case.constructor)
    load_official(plain, state)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize(("t", "h", "w"), [(3, 7, 10), (1, 6, 5), (2, 1, 1)])
@torch.no_grad()
def test_is_cleaning_then_basicvsr(scale: int, t: int, h: int, w: int) -> None:
    network, frames = small(scale=scale), torch.rand(2, t, 3, h, w)
    out = network(frames)
    assert out.shape == (2, t, 3, scale * h, scale * w)
    expected = network.basicvsr(cleaned_frame_by_frame(network, frames, 1))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert (out - network.basicvsr(frames)).abs().max() > 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_sites_are_those_of_basicvsr_and_the_cleaned_frames(training: bool) -> None:
    network, frames = small().train(training), torch.rand(1, 3, 3, 8, 7)
    assert network.sites == network.basicvsr.sites | {"cleaned": network.sites["input"]}
    wide = Spy(8, sites=tuple(name for name, spec in network.sites.items() if spec.channels == 8))
    thin = Spy(3, sites=("input", "cleaned"))
    context = Context(frames)
    model = attach(network, wide=wide, thin=thin)
    plain = Context(frames)
    assert torch.equal(model(frames, context), network(frames, plain))
    assert {site for site, _ in wide.seen} | {site for site, _ in thin.seen} == set(network.sites)
    assert torch.equal(thin.seen["input", None], frames)
    torch.testing.assert_close(thin.seen["cleaned", None], cleaned_frame_by_frame(network, frames, 1))
    assert context.flows is not None
    assert plain.flows is not None
    first, second = thin.seen["cleaned", None][:, :2].unbind(1)  # flow is estimated between cleaned frames
    torch.testing.assert_close(context.flows.backward[:, 0], network.basicvsr.spynet(first, second))
    assert torch.equal(context.flows.backward, plain.flows.backward)


@torch.no_grad()
def test_what_is_refined_before_and_after_the_cleaning_is_used_throughout() -> None:
    network, frames = small(), torch.rand(1, 3, 3, 8, 8)
    before = attach(network, spy=Spy(3, sites=("input",), factor=0.5))
    assert torch.equal(before(frames), network(0.5 * frames))
    after = attach(network, spy=Spy(3, sites=("cleaned",), factor=0.5))
    assert torch.equal(after(frames), network.basicvsr(0.5 * network.image_cleaning(frames)))


def test_the_cleaning_loss_is_that_against_the_averaged_truth() -> None:
    network, target = small().train(), torch.rand(2, 3, 3, 32, 28)
    frames = torch.rand(2, 3, 3, 8, 7)
    context = Context(frames, target=target)
    network(frames, context)
    truth = target.unflatten(4, (7, 4)).unflatten(3, (8, 4)).mean((4, 6))
    expected = (cleaned_frame_by_frame(network, frames, 1) - truth).abs().mean()
    torch.testing.assert_close(context.losses, {"backbone/cleaning": expected})
    context.losses["backbone/cleaning"].backward()
    reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert reached == {f"image_cleaning.{name}" for name, _ in network.image_cleaning.named_parameters()}
    context = Context(frames)
    network(frames, context)
    assert context.losses == {}


def test_a_plugin_at_the_cleaned_frames_has_the_networks_loss_too() -> None:
    network, frames = small().requires_grad_(False), torch.rand(1, 2, 3, 8, 7)
    plugin = ImageCleaningPlugin(3, sites=("cleaned",), width=4, blocks=1, zero_init=False)
    context = Context(frames, target=torch.rand(1, 2, 3, 32, 28))
    attach(network, again=plugin).train()(frames, context)
    assert torch.equal(context.losses["backbone/cleaning"], context.losses["again/cleaning"])
    context.losses["backbone/cleaning"].backward()
    assert [name for name, parameter in plugin.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()  # the limit on recompilations counts over the whole process
    network, frames = small(refine_threshold=1.0), torch.rand(1, 2, 3, 9, 8)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(frames), network(frames), rtol=0, atol=1e-5)


def test_messages() -> None:
    with pytest.raises(ValueError, match="scale is 5; expected one of 1, 2, 3, 4"):
        small(scale=5)
    basicvsr = BasicVSR(8, 1, flow=SPyNet(2, (4, 4, 4, 4)), reconstruction_channels=4)
    with pytest.raises(ValueError, match=r"weights of another network\); nothing was loaded.*: image_cleaning\.first"):
        load_official(small(), basicvsr.state_dict())
    with pytest.raises(ValueError, match=r"file's number of blocks.*missing in the file: basicvsr\.backward_trunk"):
        load_official(small(propagation_blocks=2), small().state_dict())
