from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vsrplug.backbones.edvr import EDVR
from vsrplug.backbones.sliding_window import SlidingWindow, window_indices
from vsrplug.context import Context
from vsrplug.foreign import ForeignSite
from vsrplug.plugged import attach
from vsrplug.plugin import Plugin


def network(**arguments: Any) -> EDVR:
    """A small EDVR whose weights have noise, since fresh offsets are zero."""
    defaults = {"channels": 8, "frames": 5, "extract_blocks": 1, "reconstruct_blocks": 1, "deform_groups": 4}
    made = EDVR(**(defaults | arguments))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.eval()


class MaskedGain(Plugin):
    """Multiplies by what a convolution makes of the masks of the frame at hand; reports their mean as a loss."""

    def __init__(self, channels: int, *, sites: tuple[str, ...], offset: int = 0) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict({site: nn.Conv2d(2, channels, 3, padding=1) for site in sites})

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        assert context.masks is not None
        masks = context.masks if t is None else context.masks[:, t]
        flat = masks.flatten(0, -4)
        gain = self.at[site](flat).view_as(feature)
        context.add_loss(self, "mean", masks.mean(), site=site, t=t)
        return feature * (1 + gain)


def window_by_window(model: nn.Module, frames: Tensor, masks: Tensor | None = None) -> Tensor:
    """The straightforward way, with the indices of "replicate" written out anew."""
    t = frames.shape[1]
    results = []
    for centre in range(t):
        index = (torch.arange(5) + centre - 2).clamp(0, t - 1)
        window = frames[:, index]
        results.append(model(window, Context(window, None if masks is None else masks[:, index])))
    return torch.cat(results, dim=1)


@pytest.mark.parametrize("arguments", [{}, {"predeblur": True, "hr_input": True}, {"tsa": False}], ids=str)
def test_clip_equals_window_by_window(arguments: dict[str, bool]) -> None:
    made, frames = network(**arguments), torch.rand(2, 7, 3, 17, 10)
    with torch.no_grad():
        expected = window_by_window(made, frames)
        result = SlidingWindow(made, padding="replicate")(frames)
    assert result.shape == (2, 7, 3, made.scale * 17, made.scale * 10)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("site", ["features", "reference", "aligned", "fused", "reconstructed"])
def test_plugged_clip_equals_window_by_window(site: str) -> None:
    frames, masks = torch.rand(2, 6, 3, 9, 10), (torch.rand(2, 6, 2, 9, 10) > 0.5).float()
    model = attach(network(), gain=MaskedGain(8, sites=(site,)))
    with torch.no_grad():
        expected = window_by_window(model, frames, masks)
        result = SlidingWindow(model, padding="replicate")(frames, Context(frames, masks))
        plain = SlidingWindow(model.backbone, padding="replicate")(frames)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert (result - plain).abs().max() > 1e-5


def _count_extracted(made: EDVR, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    extracted: list[int] = []
    level1 = made._level1
    monkeypatch.setattr(made, "_level1", lambda frames: extracted.append(frames.shape[1]) or level1(frames))
    return extracted


@pytest.mark.parametrize("padding", ["replicate", "reflection", "reflection_circle", "circle"])
def test_each_frame_is_extracted_once(padding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    extracted = _count_extracted(made, monkeypatch)
    with torch.no_grad():
        SlidingWindow(made, padding=padding)(torch.rand(1, 9, 3, 8, 8))
        assert sum(extracted) == 9
        extracted.clear()
        SlidingWindow(attach(made, gain=MaskedGain(8, sites=("fused",))), padding=padding)(
            frames := torch.rand(1, 9, 3, 8, 8), Context(frames, torch.ones(1, 9, 2, 8, 8))
        )
        assert sum(extracted) == 9


def test_nothing_is_shared_while_a_plugin_sits_at_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    extracted = _count_extracted(made, monkeypatch)
    model = attach(made, gain=MaskedGain(8, sites=("features",)))
    frames = torch.rand(1, 6, 3, 8, 8)
    SlidingWindow(model)(frames, Context(frames, torch.ones(1, 6, 2, 8, 8)))
    assert extracted == [5] * 6
    extracted.clear()
    model.detach("gain")
    SlidingWindow(model)(frames)
    assert sum(extracted) == 6


def test_a_foreign_site_in_the_extraction_is_not_passed_over() -> None:
    class Half(Plugin):
        def __init__(self, channels: int, *, sites: tuple[str, ...]) -> None:
            super().__init__(channels, sites=sites)
            self.at = nn.ModuleDict({site: nn.Identity() for site in sites})

        def forward(self, feature: Tensor, context: Context, *, site: str, **given: Any) -> Tensor:
            return feature / 2

    first = ForeignSite("conv_first", channels=8, kind="clip")
    model = attach(network(), sites={"first": first}, halved=Half(8, sites=("first",)))
    frames = torch.rand(1, 5, 3, 8, 8)
    with torch.no_grad():
        result = SlidingWindow(model, padding="replicate")(frames)
        torch.testing.assert_close(result, window_by_window(model, frames), rtol=0, atol=1e-6)
        assert (result - SlidingWindow(model.backbone, padding="replicate")(frames)).abs().max() > 1e-3


def test_losses_of_the_windows_are_averaged_into_the_context() -> None:
    frames, masks = torch.rand(1, 6, 3, 8, 8), torch.rand(1, 6, 2, 8, 8)
    context = Context(frames, masks)
    SlidingWindow(attach(network(), gain=MaskedGain(8, sites=("fused", "reconstructed"))))(frames, context)
    assert context.losses.keys() == {"gain/mean"}
    torch.testing.assert_close(context.losses["gain/mean"], masks.mean())  # each frame is the centre of one window


def test_target_and_keys_reach_the_windows() -> None:
    seen: list[tuple[Tensor | None, Tensor | None]] = []

    class Look(MaskedGain):
        def prepare(self, context: Context) -> None:
            seen.append((context.target, context.keys))

    frames = torch.rand(1, 5, 3, 8, 8)
    target, keys = torch.rand(1, 5, 3, 32, 32), torch.rand(1, 2, 3, 8, 8)
    context = Context(frames, torch.ones(1, 5, 2, 8, 8), keys, target)
    SlidingWindow(attach(network(), look=Look(8, sites=("fused",))), padding="reflection")(frames, context)
    assert len(seen) == 5
    assert all(got_keys is keys for _, got_keys in seen)
    assert torch.equal(seen[0][0], target[:, [2, 1, 0, 1, 2]])  # type: ignore[arg-type]


def test_gradients_flow_as_window_by_window() -> None:
    made, frames = network(), torch.rand(1, 5, 3, 8, 8)
    parameters = list(made.parameters())
    gradients = [
        torch.autograd.grad(model(frames).square().mean(), parameters)
        for model in (SlidingWindow(made, padding="replicate"), lambda clip: window_by_window(made, clip))
    ]
    for shared, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("padding", "first", "second", "last"),
    [  # BasicSR's documentation of `generate_frame_indices` has the first column
        ("replicate", [0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [5, 6, 7, 7, 7]),
        ("reflection", [2, 1, 0, 1, 2], [1, 0, 1, 2, 3], [5, 6, 7, 6, 5]),
        ("reflection_circle", [4, 3, 0, 1, 2], [4, 0, 1, 2, 3], [5, 6, 7, 4, 3]),
        ("circle", [3, 4, 0, 1, 2], [4, 0, 1, 2, 3], [5, 6, 7, 3, 4]),
    ],
)
def test_indices_are_those_of_basicsr(padding: Any, first: list[int], second: list[int], last: list[int]) -> None:
    indices = window_indices(8, 5, padding)
    assert (indices[0], indices[1], indices[-1]) == (first, second, last)
    assert indices[2:6] == [[t - 2, t - 1, t, t + 1, t + 2] for t in range(2, 6)]


@pytest.mark.parametrize(("padding", "shortest"), [("replicate", 1), ("reflection", 4), ("circle", 7)])
def test_the_shortest_clip_of_each_padding(padding: Any, shortest: int) -> None:
    assert len(window_indices(shortest, 7, padding)) == shortest
    if shortest > 1:
        with pytest.raises(
            ValueError, match=f"the clip has {shortest - 1} frames and the window 7: padding='{padding}'"
        ):
            window_indices(shortest - 1, 7, padding)


def test_it_looks_like_its_network() -> None:
    made = network(scale=2)
    sliding = SlidingWindow(attach(made))
    assert (sliding.scale, sliding.channels, sliding.window, sliding.multiple) == (2, 8, None, 1)
    assert sliding.sites == made.sites


def test_messages() -> None:
    made, frames = network(), torch.rand(1, 5, 3, 8, 8)
    with pytest.raises(
        ValueError,
        match=r"clip has 3 frames and the window 5: .*'reflection_circle' needs 5 .* 'reflection' or 'replicate'",
    ):
        SlidingWindow(made)(frames[:, :3])
    with pytest.raises(ValueError, match="padding is 'mirror'; expected one of 'replicate', 'reflection'"):
        SlidingWindow(made, padding="mirror")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a network with a window, such as EDVR, got Conv2d"):
        SlidingWindow(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="made for other frames"):
        SlidingWindow(made)(frames, Context(frames.clone()))
    with pytest.raises(RuntimeError, match=r"SlidingWindow\(attach\(network, ...\)\)"):
        attach(SlidingWindow(made), gain=MaskedGain(8, sites=("fused",)))(frames)
