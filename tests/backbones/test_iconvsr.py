"""IconVSR against the official output and against the plain recurrence, its keyframes' windows, and its sites."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug import Context, Plugin, attach, load_official
from vsrplug.backbones import IconVSR, SPyNet, _blocks
from vsrplug.backbones.iconvsr import keyframe_window
from vsrplug.plugins._blocks import warp


def small(**options: Any) -> IconVSR:
    """A small IconVSR whose weights have noise, since fresh offsets are zero."""
    defaults = {
        "channels": 8,
        "blocks": 1,
        "keyframe_stride": 3,
        "flow": SPyNet(2, (4, 4, 4, 4)),
        "reconstruction_channels": 4,
    }
    net = IconVSR(**(defaults | options))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def official_windows(frames: Tensor, stride: int, padding: int) -> dict[int, Tensor]:
    """Keyframe -> its window, as the official code writes it: the clip with frames put before and after it."""
    before, after = {2: ([4, 3], [-4, -5]), 3: ([6, 5, 4], [-5, -6, -7])}[padding]
    longer = torch.cat((frames[:, before], frames, frames[:, after]), 1)
    keyframes = list(range(0, frames.shape[1], stride))
    if keyframes[-1] != frames.shape[1] - 1:
        keyframes.append(frames.shape[1] - 1)
    return {i: longer[:, i : i + 2 * padding + 1] for i in keyframes}


def plainly(net: IconVSR, frames: Tensor, windows: dict[int, Tensor]) -> Tensor:
    """The recurrence of the paper, one window, one pair and one frame at a time; sizes are multiples of 4."""
    t = frames.shape[1]
    zero = frames.new_zeros(len(frames), net.channels, *frames.shape[-2:])
    refills = {i: net.edvr(window) for i, window in windows.items()}
    backward, feature = {}, zero
    for i in reversed(range(t)):
        if i < t - 1:
            feature = warp(feature, net.spynet(frames[:, i], frames[:, i + 1]))
        if i in refills:
            feature = net.backward_fusion(torch.cat((feature, refills[i]), 1))
        feature = backward[i] = net.backward_trunk.main(torch.cat((frames[:, i], feature), 1))
    outputs, feature = [], zero
    for i in range(t):
        if i > 0:
            feature = warp(feature, net.spynet(frames[:, i], frames[:, i - 1]))
        if i in refills:
            feature = net.forward_fusion(torch.cat((feature, refills[i]), 1))
        feature = net.forward_trunk.main(torch.cat((frames[:, i], backward[i], feature), 1))
        skip = F.interpolate(frames[:, i], scale_factor=net.scale, mode="bilinear", align_corners=False)
        outputs.append(net.head(feature) + skip)
    return torch.stack(outputs, 1)


class Spy(Plugin):
    """Notes every call and feature; multiplies the feature by a factor."""

    def __init__(self, channels: int, *, sites: Any = None, factor: float = 1.0) -> None:
        super().__init__(channels, sites=sites)
        self.factor = factor
        self.calls: list[tuple[str, int | None]] = []
        self.given: dict[tuple[str, int | None], dict[str, Tensor]] = {}
        self.features: dict[tuple[str, int | None], Tensor] = {}

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        self.calls.append((site, t))
        self.given[site, t], self.features[site, t] = given, feature
        return feature if self.factor == 1 else feature * self.factor


@torch.no_grad()
def test_official_output_of_a_width_that_is_mirrored(golden: ModuleType) -> None:
    case = golden.load("mmagic_iconvsr")
    assert case.spec["input_shape"][-1] % 4 == 2
    net = IconVSR(channels=64, blocks=1, keyframe_stride=3, temporal_padding=2)
    report = load_official(net, case.state_dict())
    assert (report.missing, report.unexpected) == ([], [])
    assert case.check({"out": net(case.input())}) <= 1e-5


def test_the_narrow_network_of_basicsr_loads(golden: ModuleType) -> None:
    case = golden.load("basicsr_iconvsr")
    net = IconVSR(channels=16, blocks=2, keyframe_stride=3)
    load_official(net, case.state_dict())
    assert all(torch.equal(net.state_dict()[key], value) for key, value in case.state_dict().items())


def test_official_keys_in_order(golden: ModuleType) -> None:
    official = golden.full_size("basicsr_iconvsr_30")
    with torch.device("meta"):
        net = IconVSR()
    own = [(key, list(value.shape)) for key, value in net.state_dict().items()]
    keys = [(key, shape) for key, shape, _ in official["state_dict"] if key not in ("spynet.mean", "spynet.std")]
    assert own == keys
    assert sum(p.numel() for p in net.parameters()) == official["params"] == 8_694_991


def test_every_name_of_mmagic_is_one_of_ours(golden: ModuleType) -> None:
    with torch.device("meta"):
        own = {key: list(value.shape) for key, value in IconVSR().state_dict().items()}
    renamed = {}
    for key, shape, _ in golden.full_size("mmagic_iconvsr_30")["state_dict"]:
        for pattern, ours in IconVSR.official_names:
            key = re.sub(pattern, ours, key)
        renamed[key] = shape
    assert {key: shape for key, shape in renamed.items() if key not in ("spynet.mean", "spynet.std")} == own


@pytest.mark.parametrize(("count", "padding"), [(5, 2), (7, 2), (12, 2), (7, 3), (8, 3), (12, 3)])
def test_windows_are_the_official_ones(count: int, padding: int) -> None:
    clip = torch.arange(count)[None]
    for stride in (1, 3, 5):
        for keyframe, window in official_windows(clip, stride, padding).items():
            assert keyframe_window(keyframe, count, padding) == window[0].tolist()


def test_windows_of_short_clips_are_mirrored_into_them() -> None:
    assert keyframe_window(0, 4, 2) == [2, 3, 0, 1, 2]  # 4 does not exist: counted back from 3
    assert keyframe_window(2, 3, 2) == [0, 1, 2, 1, 2]
    assert keyframe_window(0, 1, 3) == [0] * 7
    for count in range(1, 9):
        for keyframe in range(count):
            window = keyframe_window(keyframe, count, 3)
            inside = range(max(0, keyframe - 3), min(count, keyframe + 4))
            assert [frame for at, frame in enumerate(window, keyframe - 3) if at in inside] == list(inside)
            assert set(window) <= set(range(count))


@pytest.mark.parametrize(
    ("t", "stride", "padding", "scale"), [(7, 3, 3, 4), (5, 5, 2, 2), (6, 1, 2, 3), (5, 2, 2, 1), (6, 9, 2, 4)]
)
@torch.no_grad()
def test_equals_the_plain_recurrence(t: int, stride: int, padding: int, scale: int) -> None:
    net = small(keyframe_stride=stride, temporal_padding=padding, scale=scale)
    frames = torch.rand(2, t, 3, 8, 12)
    kept = frames.clone()
    expected = plainly(net, frames, official_windows(frames, stride, padding))
    torch.testing.assert_close(net(frames), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(frames, kept)


@pytest.mark.parametrize(("h", "w"), [(7, 10), (5, 4), (9, 5)])
@torch.no_grad()
def test_other_sizes_are_mirrored_and_cropped(h: int, w: int) -> None:
    net, frames = small(), torch.rand(2, 5, 3, h, w)
    mirrored = F.pad(frames.flatten(0, 1), (0, -w % 4, 0, -h % 4), mode="reflect").unflatten(0, (2, 5))
    out = net(frames)
    assert torch.equal(out, net(mirrored)[..., : 4 * h, : 4 * w])
    assert out.shape == (2, 5, 3, 4 * h, 4 * w)


@pytest.mark.parametrize("t", [1, 2, 4])
@torch.no_grad()
def test_short_clips_and_tiny_frames(t: int) -> None:
    net, frames = small(), torch.rand(1, t, 3, 8, 8)
    keyframes = [i for i in range(t) if i % 3 == 0 or i == t - 1]
    windows = {i: frames[:, keyframe_window(i, t, 2)] for i in keyframes}
    torch.testing.assert_close(net(frames), plainly(net, frames, windows), rtol=1e-5, atol=1e-5)
    pixel = frames[..., :1, :1]
    whole = pixel.expand(1, t, 3, 4, 4).contiguous()  # of one pixel there is nothing else to mirror
    assert torch.equal(net(pixel), net(whole)[..., :4, :4])


@torch.no_grad()
def test_bounded_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, frames = small(), torch.rand(2, 7, 3, 8, 8)
    whole = net(frames)
    monkeypatch.setattr(_blocks, "CHUNK_PIXELS", 3 * 32 * 32)
    torch.testing.assert_close(net(frames), whole, rtol=1e-5, atol=1e-6)


def test_sites_in_order_with_their_frames() -> None:
    net, frames = small(), torch.rand(1, 5, 3, 8, 8)
    spy = Spy(8, sites=tuple(name for name, spec in net.sites.items() if spec.channels == 8))
    frame_spy = Spy(3, sites=("input",))
    context = Context(frames)
    with torch.no_grad():
        assert torch.equal(attach(net, features=spy, frames=frame_spy)(frames, context), net(frames))
    assert frame_spy.calls == [("input", None)]
    expected: list[tuple[str, int | None]] = [("keyframe", 0), ("keyframe", 3), ("keyframe", 4)]
    for way, order in (("backward", [4, 3, 2, 1, 0]), ("forward", [0, 1, 2, 3, 4])):
        for t in order:
            places = ["input", "output"] if t == order[0] else ["warped", "input", "output"]
            expected += [(f"{way}_{place}", t) for place in places]
    assert spy.calls == [*expected, ("fused", None)]

    window = frames[:, keyframe_window(3, 5, 2)]
    torch.testing.assert_close(spy.features["keyframe", 3], net.edvr(window))
    assert context.flows is not None
    torch.testing.assert_close(context.flows.forward[:, 2], net.spynet(frames[:, 3], frames[:, 2]))
    given = spy.given["forward_warped", 3]
    assert torch.equal(given["source"], spy.features["forward_output", 2])
    assert torch.equal(warp(given["source"], given["flow"]), spy.features["forward_warped", 3])
    refilled = torch.cat((spy.features["forward_warped", 3], spy.features["keyframe", 3]), 1)
    entered = torch.cat((frames[:, 3], spy.features["backward_output", 3], net.forward_fusion(refilled)), 1)
    psi = F.leaky_relu(net.forward_trunk.main[0](entered), 0.1)
    torch.testing.assert_close(spy.features["forward_input", 3], psi)
    assert torch.equal(spy.features["fused", None][:, 3], spy.features["forward_output", 3])


@pytest.mark.parametrize("site", list(small().sites))
@torch.no_grad()
def test_every_site_reaches_the_result(site: str) -> None:
    net, frames = small(), torch.rand(1, 5, 3, 8, 8)
    halved = attach(net, spy=Spy(net.sites[site].channels, sites=(site,), factor=0.5))
    assert (halved(frames) - net(frames)).abs().max() > 1e-3
    if site == "input":
        torch.testing.assert_close(halved(frames), net(0.5 * frames))


class Still(nn.Module):
    def forward(self, reference: Tensor, supporting: Tensor) -> Tensor:
        return torch.zeros_like(reference[:, :2])


def test_checkpointing_changes_no_gradient() -> None:
    net, frames = small(), torch.rand(1, 3, 3, 8, 8)
    twin = small(checkpointing=True)
    twin.load_state_dict(net.state_dict())
    for model in (net, twin):
        model(frames).square().mean().backward()
    gradients = zip(net.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in gradients)
    assert {m.checkpointing for m in twin.modules() if isinstance(m, _blocks.ResidualTrunk)} == {True}


def test_any_flow_module_serves() -> None:
    net, frames = small(flow=Still()), torch.rand(1, 5, 3, 8, 8)
    assert not any(key.startswith("spynet") for key in net.state_dict())
    expected = plainly(net, frames, official_windows(frames, 3, 2))
    torch.testing.assert_close(net(frames), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keyframe_stride": 0}, r"keyframe_stride is 1 or more .* got keyframe_stride=0, temporal_padding=2"),
        ({"temporal_padding": -1}, r"temporal_padding 0 or more, got keyframe_stride=3, temporal_padding=-1"),
        ({"scale": 8}, "scale is 8; expected one of 1, 2, 3, 4"),
        ({"channels": 12}, "8 deformable groups do not divide 12 channels; try 4"),
    ],
)
def test_messages(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)
