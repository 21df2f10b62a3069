"""STVUN against the official decoder and the paper's equations written out, and what holds for every backbone."""

from __future__ import annotations

import copy
import re
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.backbones import EDVR, STVUN, PWCNet, SlidingWindow, SPyNet
from vsrplug.backbones._stvun_blocks import AlignedFusion, Decoder
from vsrplug.backbones.stvun import EnlargedPWCNet, intermediate_flows
from vsrplug.context import Context
from vsrplug.official import load_official
from vsrplug.plugged import attach
from vsrplug.plugin import Plugin
from vsrplug.plugins import EFST
from vsrplug.plugins._blocks import warp

TIMES = (0.25, 0.5, 0.75)
VARIANTS: list[dict[str, Any]] = [{}, {"fusion": "early"}, {"fusion": "pcd_tsa"}, {"share_decoded": False}]


def tiny(**arguments: Any) -> STVUN:
    """A small STVUN for windows of three frames, whose flow is a small SPyNet."""
    defaults: dict[str, Any] = {"channels": 8, "frames": 3, "flow": SPyNet(2, (4, 4, 4, 4))}
    return STVUN(**defaults | arguments).eval()


class Constant(nn.Module):
    """A camera that moves by `motion` pixels a frame, x then y, and the whole picture with it."""

    def __init__(self, *motion: float) -> None:
        super().__init__()
        self.motion = motion

    def forward(self, reference: Tensor, supporting: Tensor) -> Tensor:
        there = reference.new_tensor(self.motion).view(1, 2, 1, 1).expand(len(reference) // 2, 2, *reference.shape[-2:])
        return torch.cat((there, -there))


def silent(network: STVUN) -> STVUN:
    """Without a residual."""
    nn.init.zeros_(network.decoder.last.weight)
    nn.init.zeros_(network.decoder.last.bias)  # type: ignore[arg-type]
    return network


def renamed(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    ours = {}
    for key, value in state.items():
        key = prefix + key
        for pattern, name in STVUN.official_names:
            key = re.sub(pattern, name, key)
        ours[key.removeprefix(prefix)] = value
    return ours


@torch.no_grad()
def test_official_decoder(golden: ModuleType) -> None:
    case = golden.load("stvun_decoder")
    decoder, x = Decoder(16, 4), case.input()
    decoder.load_state_dict(renamed(case.state_dict(), "decoder."))
    decoded = decoder(list(x[:4]), list(x[4:]))
    named = {f"sx{level}": feature for level, feature in enumerate(decoded)}
    residual = F.pixel_unshuffle(decoder.residual(decoded[-1]), 4)
    # The smallest of these outputs reaches 0.24, the largest 1.2.
    assert case.check(named) <= 5e-6
    assert case.check({"res": residual}) <= 2e-6


@pytest.fixture(scope="module")
def state(golden: ModuleType) -> dict[str, Tensor]:
    """The weights of the golden case, under official names."""
    return golden.load("stvun_network").state_dict()


@pytest.fixture(scope="module")
def official(state: dict[str, Tensor]) -> STVUN:
    """The network at its published size, with these weights."""
    network = STVUN().eval()
    load_official(network, state)
    return network


def test_every_official_entry_is_accounted_for(golden: ModuleType, state: dict[str, Tensor], official: STVUN) -> None:
    spec = golden.full_size("stvun_official")
    assert [(key, shape) for key, shape, *_ in spec["state_dict"]] == [(k, list(v.shape)) for k, v in state.items()]
    network = copy.deepcopy(official)
    report = load_official(network, {"state_dict": {f"module.{key}": value for key, value in state.items()}})
    assert (report.missing, report.unexpected) == ([], [])
    assert report.ignored == [f"pwcnet.estimators.4.enlarge_flow.{part}" for part in ("bias", "weight")]  # deconv2
    assert sorted(report.loaded) == sorted(network.state_dict())
    unused = sum(state[f"pwcnet.deconv2.{part}"].numel() for part in ("bias", "weight"))
    assert sum(p.numel() for p in network.parameters()) + unused == spec["params"] == 30_882_276
    assert load_official(network, official.state_dict()).ignored == []  # our own file


def by_the_paper(state: dict[str, Tensor], x: list[Tensor], times: tuple[float, ...], flow: PWCNet) -> Tensor:
    """The network as the paper has it, frame by frame, on official names and on values from -1 to 1."""

    def conv(name: str, *inputs: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(torch.cat(inputs, 1), weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def act(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.1 * x)

    def dense(name: str, x: Tensor) -> Tensor:
        return act(conv(f"{name}.conv1.0", act(conv(f"{name}.conv0.0", x)), x))

    def encode(frame: Tensor) -> list[Tensor]:
        levels = [act(conv("encoder.conv.0", frame))]
        for i in range(4):
            levels.append(dense(f"encoder.block{i}", levels[-1]))
        return levels[1:]

    def decode(own: list[Tensor], other: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        decoded: list[Tensor] = []
        for i in range(4):
            guide = conv(f"decoder.cconv{i}", decoded[-1], other[i]) if i else other[i]
            first = torch.cat((own[i], guide), 1)
            second = torch.cat((first, dense(f"decoder.block{i}_0", first)), 1)
            third = torch.cat((second, dense(f"decoder.block{i}_1", second)), 1)
            decoded.append(dense(f"decoder.block{i}_2", third))
        residual = conv("decoder.rconv1", act(conv("decoder.rconv0.0", decoded[-1])))
        return decoded, F.pixel_shuffle(residual, 4)

    def up(frame: Tensor) -> Tensor:
        return F.interpolate(frame, scale_factor=4, mode="bilinear", align_corners=False)

    efst = EFST(64, zero_init=False)  # held to the official one by its own tests
    load_official(efst, {k.removeprefix("efst."): v for k, v in state.items() if k.startswith("efst.")})
    encoded = [encode(frame) for frame in x]
    fused = [efst(torch.stack([levels[i] for levels in encoded], 1)) for i in range(4)]
    decoded, residual = decode(encoded[3], fused)
    out = [up(x[3]) + residual]
    there, back = flow.estimate(up(x[3]), up(x[4])), flow.estimate(up(x[4]), up(x[3]))
    for t in times:
        to_3 = -(1 - t) * t * there + t**2 * back
        to_4 = (1 - t) ** 2 * there - t * (1 - t) * back

        def between(a: Tensor, b: Tensor, to_3: Tensor = to_3, to_4: Tensor = to_4) -> Tensor:
            return (warp(a, to_3, "border") + warp(b, to_4, "border")) / 2

        intermediate = [between(a, b) for a, b in zip(encoded[3], encoded[4], strict=True)]
        out.append(up(between(x[3], x[4])) + decode(intermediate, decoded)[1])
    return torch.stack(out, 1)


@torch.no_grad()
def test_the_whole_network_is_the_papers(golden: ModuleType, state: dict[str, Tensor], official: STVUN) -> None:
    """No output of the whole official network is stored; its flow, fusion and decoder are, and hold by themselves."""
    case = golden.load("stvun_network")
    frames = case.input()
    out = official(frames, times=TIMES)
    assert [*out.transpose(0, 1).shape] == case.spec["outputs"][0]["shape"]  # official: a list of frames
    flow = PWCNet()
    flow.load_state_dict(official.pwcnet.state_dict())
    expected = by_the_paper(state, list((2 * frames - 1).unbind(1)), TIMES, flow)
    torch.testing.assert_close(2 * out - 1, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_flow_of_sizes_that_the_official_one_cannot_take(official: STVUN) -> None:
    """Frames of 16 n are enlarged by 4 to what PWC-Net takes; others to the size above, and the flow is scaled back."""
    reference, supporting = torch.rand(2, 1, 3, 12, 16)
    up = [2 * F.interpolate(frame, size=(64, 64), mode="bilinear") - 1 for frame in (reference, supporting)]
    flow = F.interpolate(official.pwcnet.estimate(*up), size=(12, 16), mode="bilinear")  # type: ignore[operator]
    flow[:, 1] *= 12 / 16
    torch.testing.assert_close(official.pwcnet(reference, supporting), flow)
    assert isinstance(official.pwcnet, EnlargedPWCNet)


@pytest.mark.parametrize("time", TIMES)
def test_steady_motion_is_divided_at_the_time(time: float) -> None:
    there, back = torch.full((1, 2, 2, 2), 8.0), torch.full((1, 2, 2, 2), -8.0)
    to_first, to_second = intermediate_flows(there, back, time)
    assert (to_first == -8 * time).all()
    assert (to_second == 8 * (1 - time)).all()


@pytest.mark.parametrize(("time", "shift"), [(0.25, 1), (0.5, 2), (0.75, 3)])
@torch.no_grad()
def test_frames_in_between_show_the_motion(time: float, shift: int) -> None:
    """A picture that moves four pixels to the right a frame is a whole number of pixels on its way."""
    picture = torch.rand(1, 3, 8, 40)
    frames = torch.stack([picture[..., 12 - 4 * t : 36 - 4 * t] for t in range(3)], dim=1)
    network = silent(tiny(flow=Constant(4.0, 0.0)))
    context = Context(frames)
    out = network(frames, context, times=(time,))
    moment = picture[..., 8 - shift : 32 - shift]
    inner = (..., slice(4, -4))
    low = context.memo["interpolated"]
    torch.testing.assert_close(low[:, 0][inner], moment[inner])
    bilinear = F.interpolate(low[:, 0], scale_factor=4, mode="bilinear")
    torch.testing.assert_close(out[:, 1], bilinear)
    torch.testing.assert_close(out[:, 0], F.interpolate(frames[:, 1], scale_factor=4, mode="bilinear"))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 12)], ids=str)
@torch.no_grad()
def test_any_scale_and_size(scale: int, size: tuple[int, int]) -> None:
    frames = torch.rand(2, 3, 3, *size)
    context = Context(frames)
    out = silent(tiny(scale=scale))(frames, context, (0.5,))
    assert out.shape == (2, 2, 3, scale * size[0], scale * size[1])
    assert context.memo["interpolated"].shape == (2, 1, 3, *size)
    for number, frame in enumerate((frames[:, 1], context.memo["interpolated"][:, 0])):
        torch.testing.assert_close(out[:, number], F.interpolate(frame, scale_factor=scale, mode="bilinear"))


def test_only_the_last_layer_depends_on_the_scale() -> None:
    large, small = tiny(scale=4).state_dict(), tiny(scale=2).state_dict()
    assert large.keys() == small.keys()
    others = {key for key in large if large[key].shape != small[key].shape}
    assert others == {"decoder.last.weight", "decoder.last.bias"}


@torch.no_grad()
def test_aligned_fusion_pads_to_four() -> None:
    network, frames = tiny(fusion="pcd_tsa"), torch.rand(1, 3, 3, 5, 6)
    padded = F.pad(frames.flatten(0, 1), (0, 2, 0, 3), mode="replicate").unflatten(0, (1, 3))
    assert torch.equal(network(frames, times=TIMES), network(padded, times=TIMES)[..., :20, :24])


@torch.no_grad()
def test_aligned_fusion_is_that_of_edvr() -> None:
    """Whose outputs are held to the official ones."""
    edvr, fusion = EDVR(8, frames=3), AlignedFusion(8, 3)
    for parameter in edvr.parameters():
        nn.init.normal_(parameter, std=0.1)  # fresh offsets are zero
    state = {re.sub(r"^fusion\.", "tsa.", key): value for key, value in edvr.state_dict().items()}
    fusion.load_state_dict({key: state[key] for key in fusion.state_dict()})
    pyramid = edvr.extract(torch.rand(2, 3, 3, 8, 12))
    aligned = torch.stack([edvr.pcd_align(pyramid.frame(t), pyramid.frame(1)) for t in range(3)], dim=1)
    torch.testing.assert_close(fusion(pyramid.level1), edvr.fusion(aligned))


@pytest.mark.parametrize(
    ("arguments", "millions"),
    [({"fusion": "early"}, 30.5), ({"share_decoded": False}, 30.9), ({"fusion": "pcd_tsa"}, 32.4), ({}, 30.9)],
    ids=str,
)
def test_parameters_of_the_papers_table_3(arguments: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):
        network = STVUN(**arguments)
    # The row "w/o EFST" has 30.57 million here, for the paper's 30.5.
    assert abs(sum(p.numel() for p in network.parameters()) / 1e6 - millions) < 0.08


@torch.no_grad()
def test_ablations_differ_where_they_should() -> None:
    whole, frames = tiny(), torch.rand(1, 3, 3, 8, 8)
    without_decoded = tiny(share_decoded=False)
    without_decoded.load_state_dict(whole.state_dict())
    one, other = whole(frames, times=(0.5,)), without_decoded(frames, times=(0.5,))
    assert torch.equal(one[:, 0], other[:, 0])
    assert not torch.equal(one[:, 1], other[:, 1])
    early = tiny(fusion="early")
    early.load_state_dict({key: value for key, value in whole.state_dict().items() if "fusion.fusion" not in key})
    nn.init.zeros_(whole.fusion.fusion.alpha.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(whole.fusion.fusion.alpha.bias)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(whole.fusion.fusion.beta.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(whole.fusion.fusion.beta.bias)  # type: ignore[union-attr, arg-type]
    assert torch.equal(early(frames, times=(0.5,)), whole(frames, times=(0.5,)))


@torch.no_grad()
def test_times_by_themselves_and_together() -> None:
    network, frames = tiny(), torch.rand(2, 3, 3, 8, 12)
    together = network(frames, times=TIMES)
    assert together.shape == (2, 4, 3, 32, 48)
    assert torch.equal(network(frames), together[:, :1])
    for number, time in enumerate(TIMES, start=1):
        assert torch.equal(network(frames, times=[time]), together[:, [0, number]])
    always = tiny(times=TIMES)
    always.load_state_dict(network.state_dict())
    assert torch.equal(always(frames), together)
    assert torch.equal(always(frames, times=()), together[:, :1])
    assert (together[:, 1:] - together[:, 1:2]).abs().amax((0, 2, 3, 4)).argmax() == 2  # further away, more different


@torch.no_grad()
def test_windows_in_a_batch_do_not_meet() -> None:
    network, frames = tiny(), torch.rand(2, 3, 3, 8, 12)
    both = network(frames, times=TIMES)
    torch.testing.assert_close(both[1:], network(frames[1:], times=TIMES), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_clip_through_a_sliding_window() -> None:
    network, clip = tiny(), torch.rand(1, 5, 3, 8, 8)
    out = SlidingWindow(network)(clip)
    assert out.shape == (1, 5, 3, 32, 32)
    torch.testing.assert_close(out[:, 2:3], network(clip[:, 1:4]), rtol=0, atol=1e-6)


class Shift(Plugin):
    """Adds a constant, and writes down what each site was given."""

    def __init__(self, channels: int, *, sites: tuple[str, ...], by: float = 0.0) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict({site: nn.Identity() for site in sites})
        self.by = by

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        context.memo.setdefault((self, site, t), []).append((feature, given))
        return feature + self.by


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_every_site_is_met_with_its_declared_shape(arguments: dict[str, Any], training: bool) -> None:
    network, frames = tiny(**arguments).train(training), torch.rand(2, 3, 3, 8, 12)
    context = Context(frames)
    model = attach(network, shift=Shift(8, sites=tuple(network.sites)))
    assert torch.equal(model(frames, context, times=TIMES), network(frames, times=TIMES))
    met = {key[1:]: value for key, value in context.memo.items() if isinstance(key, tuple)}
    assert [site for site, _ in met] == list(network.sites)
    assert [given["time"] for _, given in met["intermediate", 1]] == list(TIMES)
    for (site, t), calls in met.items():
        clip = (3,) if network.sites[site].kind == "clip" else ()
        assert t == (None if clip else 1)
        for feature, given in calls:
            assert feature.shape == (2, *clip, 8, 8, 12)
            assert torch.equal(given.get("neighbours", feature), feature if clip else met["features", None][0][0])


@pytest.mark.parametrize("site", list(tiny().sites))
@torch.no_grad()
def test_every_site_reaches_the_result(site: str) -> None:
    network, frames = tiny(), torch.rand(1, 3, 3, 8, 12)
    model = attach(network, shift=Shift(8, sites=(site,), by=0.1))
    moved = (model(frames, times=(0.5,)) - network(frames, times=(0.5,))).abs().amax((0, 2, 3, 4))
    assert moved[1] > 1e-5
    assert (moved[0] > 1e-5) == (site != "intermediate")


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_gradients_reach_every_parameter(arguments: dict[str, Any]) -> None:
    network = tiny(**arguments)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)  # fresh offsets of deformable convolutions are zero
    frames = torch.rand(1, 3, 3, 8, 12)
    network(frames, times=(0.5,)).square().mean().backward()
    dead = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert dead == []
    network.zero_grad()
    network(frames).square().mean().backward()  # the first phase of the paper's training
    still = {name.split(".")[0] for name, value in network.named_parameters() if value.grad is None}
    assert still == {"pwcnet"}


def test_loss_m_reaches_the_flow() -> None:
    network, frames = tiny(), torch.rand(1, 3, 3, 8, 12)
    context = Context(frames)
    network(frames, context, times=(0.5,))
    (context.memo["interpolated"][:, 0] - torch.rand(1, 3, 8, 12)).abs().mean().backward()
    reached = {name.split(".")[0] for name, value in network.named_parameters() if value.grad is not None}
    assert reached == {"pwcnet"}


@torch.no_grad()
def test_half_precision_stays_near_float32() -> None:
    network, frames = tiny(), torch.rand(1, 3, 3, 16, 16)
    exact = network(frames, times=TIMES)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(frames, times=TIMES)
    assert mixed.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(network).to(dtype)(frames.to(dtype), times=TIMES)
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.05)
    torch.testing.assert_close(mixed, exact, rtol=0, atol=0.05)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    network, frames = tiny(channels=4, times=(0.5,)), torch.rand(1, 3, 3, 8, 9)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(frames), network(frames), rtol=0, atol=1e-5)


def test_messages() -> None:
    network = tiny()
    with pytest.raises(ValueError, match=r"takes windows of 3 frames, got 4; .* SlidingWindow\(model\)"):
        network(torch.rand(1, 4, 3, 8, 8))
    for times in ((0.5, 1.5), (0.0,), (1,), (float("nan"),)):
        with pytest.raises(
            ValueError, match=rf"between the centre frame, 0, and the next, 1, got {times[-1]}; the cen"
        ):
            network(torch.rand(1, 3, 3, 8, 8), times=times)
        with pytest.raises(ValueError, match="times lie between"):
            STVUN(times=times)
    with pytest.raises(TypeError, match=r"times is a sequence of numbers, got 0.5; write times=\(0.5,\)"):
        network(torch.rand(1, 3, 3, 8, 8), times=0.5)
    for frames in (1, 4):
        with pytest.raises(ValueError, match=rf"frames must be odd, .* and 3 at least, got {frames}"):
            STVUN(frames=frames)
    with pytest.raises(ValueError, match="scale is 5; expected one of 1, 2, 3, 4"):
        STVUN(scale=5)
    with pytest.raises(ValueError, match="fusion is 'tsa'; expected one of 'efst', 'early', 'pcd_tsa'"):
        STVUN(fusion="tsa")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="8 deformable groups do not divide 12 channels"):
        STVUN(channels=12, fusion="pcd_tsa")


def test_weights_of_another_variant_are_listed_and_refused() -> None:
    state = renamed(tiny().state_dict())
    with pytest.raises(ValueError, match=r"another variant.*24 unexpected in the file: fusion.fusion.theta.weight"):
        load_official(tiny(fusion="early"), state)
