"""BasicVSR against the official output and against the plain recurrence, and its sites in the order they are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug import Context, Plugin, attach, load_official
from vsrplug.backbones import BasicVSR, SPyNet, _blocks, basicvsr_tiny
from vsrplug.plugins._blocks import warp


def small(**options: Any) -> BasicVSR:
    return BasicVSR(
        **{"channels": 8, "blocks": 1, "flow": SPyNet(2, (4, 4, 4, 4)), "reconstruction_channels": 4} | options
    )


def plainly(net: BasicVSR, frames: Tensor) -> Tensor:
    """The recurrence of the paper, one pair, one frame and one layer at a time."""
    t = frames.shape[1]
    zero = frames.new_zeros(len(frames), net.channels, *frames.shape[-2:])
    backward, feature = {}, zero
    for i in reversed(range(t)):
        if i < t - 1:
            feature = warp(feature, net.spynet(frames[:, i], frames[:, i + 1]))
        feature = backward[i] = net.backward_trunk.main(torch.cat((frames[:, i], feature), 1))
    outputs, feature = [], zero
    for i in range(t):
        if i > 0:
            feature = warp(feature, net.spynet(frames[:, i], frames[:, i - 1]))
        feature = net.forward_trunk.main(torch.cat((frames[:, i], feature), 1))
        fused = F.leaky_relu(net.fusion(torch.cat((backward[i], feature), 1)), 0.1)
        skip = F.interpolate(frames[:, i], scale_factor=net.scale, mode="bilinear", align_corners=False)
        outputs.append(net.head(fused) + skip)
    return torch.stack(outputs, 1)


class Spy(Plugin):
    """Notes every call; multiplies the feature at the sites of `factors`."""

    def __init__(self, channels: int, *, sites: Any = None, factors: dict[str, float] | None = None) -> None:
        super().__init__(channels, sites=sites)
        self.factors = factors or {}
        self.calls: list[tuple[str, int | None]] = []
        self.given: dict[tuple[str, int | None], dict[str, Tensor]] = {}
        self.features: dict[tuple[str, int | None], Tensor] = {}

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        self.calls.append((site, t))
        self.given[site, t] = given
        self.features[site, t] = feature
        return feature * self.factors[site] if site in self.factors else feature


@torch.no_grad()
def test_official_output(golden: ModuleType) -> None:
    case = golden.load("basicsr_basicvsr")
    net = BasicVSR(channels=16, blocks=2)
    load_official(net, case.state_dict())
    assert case.check({"out": net(case.input())}) <= 1e-5


def test_official_keys_in_order(golden: ModuleType) -> None:
    official = golden.full_size("basicsr_basicvsr_30")
    net = BasicVSR()
    keys = [(key, shape) for key, shape, _ in official["state_dict"] if key not in ("spynet.mean", "spynet.std")]
    assert [(key, list(value.shape)) for key, value in net.state_dict().items()] == keys
    assert sum(p.numel() for p in net.parameters()) == official["params"] == 6_291_311


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize(("t", "h", "w"), [(3, 7, 10), (1, 6, 5), (2, 1, 1)])
@torch.no_grad()
def test_equals_the_plain_recurrence(scale: int, t: int, h: int, w: int) -> None:
    net, frames = small(scale=scale), torch.rand(2, t, 3, h, w)
    kept = frames.clone()
    torch.testing.assert_close(net(frames), plainly(net, frames), rtol=0, atol=1e-6)
    assert torch.equal(frames, kept)


@torch.no_grad()
def test_bounded_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, frames = small(), torch.rand(2, 4, 3, 8, 8)
    whole = net(frames)
    monkeypatch.setattr(_blocks, "CHUNK_PIXELS", 3 * 32 * 32)
    torch.testing.assert_close(net(frames), whole, rtol=0, atol=1e-6)


def test_sites_in_order_with_their_frames() -> None:
    net, frames = small(), torch.rand(1, 3, 3, 8, 8)
    sites = tuple(name for name, spec in net.sites.items() if spec.channels == 8)
    spy, frame_spy = Spy(8, sites=sites), Spy(3, sites=("input",))
    model = attach(net, features=spy, frames=frame_spy)
    assert torch.equal(model(frames), net(frames))
    assert frame_spy.calls == [("input", None)]
    ways = [("backward", [2, 1, 0]), ("forward", [0, 1, 2])]
    expected: list[tuple[str, int | None]] = []
    for way, order in ways:
        for t in order:
            places = ["input", "output"] if t == order[0] else ["warped", "input", "output"]
            expected += [(f"{way}_{place}", t) for place in places]
    assert spy.calls == [*expected, ("fused", None)]
    for site, t in spy.calls:
        assert spy.features[site, t].ndim == (5 if net.sites[site].kind == "clip" else 4)


def test_sites_see_what_the_papers_name() -> None:
    net, frames = small(), torch.rand(1, 3, 3, 8, 8)
    spy = Spy(8, sites=tuple(name for name, spec in net.sites.items() if spec.channels == 8))
    context = Context(frames)
    attach(net, spy=spy)(frames, context)
    assert context.flows is not None
    for t in range(2):  # backward flows live on the earlier frame, forward flows on the later
        torch.testing.assert_close(context.flows.backward[:, t], net.spynet(frames[:, t], frames[:, t + 1]))
        torch.testing.assert_close(context.flows.forward[:, t], net.spynet(frames[:, t + 1], frames[:, t]))
        for site, at, previous in (("backward", t, t + 1), ("forward", t + 1, t)):
            given = spy.given[f"{site}_warped", at]
            assert torch.equal(given["source"], spy.features[f"{site}_output", previous])
            assert torch.equal(warp(given["source"], given["flow"]), spy.features[f"{site}_warped", at])
    entered = torch.cat((frames[:, 1], spy.features["forward_warped", 1]), 1)
    psi = F.leaky_relu(net.forward_trunk.main[0](entered), 0.1)
    torch.testing.assert_close(spy.features["forward_input", 1], psi)
    torch.testing.assert_close(spy.features["forward_output", 1], net.forward_trunk.main[2](psi))


def test_refined_features_are_propagated_fused_and_refined_frames_used_throughout() -> None:
    net, frames = small(), torch.rand(1, 3, 3, 8, 8)
    halved = attach(net, spy=Spy(3, sites=("input",), factors={"input": 0.5}))
    torch.testing.assert_close(halved(frames), net(0.5 * frames))
    nothing = attach(
        net,
        spy=Spy(
            8, sites=("backward_output", "forward_output"), factors={"backward_output": 0.0, "forward_output": 0.0}
        ),
    )
    fused = F.leaky_relu(net.fusion(torch.zeros(1, 16, 8, 8)), 0.1)
    skip = F.interpolate(frames[:, 1], scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(nothing(frames)[:, 1], net.head(fused) + skip)


def test_one_frame_has_no_flows() -> None:
    context = Context(torch.rand(2, 1, 3, 6, 7))
    small()(context.frames, context)
    assert context.flows is not None
    assert context.flows.backward.shape == context.flows.forward.shape == (2, 0, 2, 6, 7)


def test_any_flow_module_serves() -> None:
    class Still(nn.Module):
        def forward(self, reference: Tensor, supporting: Tensor) -> Tensor:
            return torch.zeros_like(reference[:, :2])

    net, frames = small(flow=Still()), torch.rand(1, 3, 3, 8, 8)
    assert not any(key.startswith("spynet") for key in net.state_dict())
    torch.testing.assert_close(net(frames), plainly(net, frames), rtol=0, atol=1e-6)


def test_tiny_is_tiny() -> None:
    assert sum(p.numel() for p in basicvsr_tiny().parameters()) < 600_000
    assert basicvsr_tiny().channels == 32


def test_the_folder_is_one_package_only() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", "import backbones"], cwd=root, capture_output=True, text=True)
    assert "imported as 'backbones'; write `from vsrplug.backbones import ...`" in done.stderr


def test_importing_the_backbones_loads_no_torchvision() -> None:
    code = "import sys, vsrplug.backbones; print([m for m in ('torchvision', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
