"""PWCNet against the official output, its cost volume against a loop, and what the resizing around it must give."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vsrplug import load_official
from vsrplug.backbones import PWCNet
from vsrplug.backbones.pwcnet import cost_volume


@pytest.fixture(scope="module")
def official(golden: ModuleType) -> PWCNet:
    """With the weights of the golden case."""
    net = PWCNet()
    load_official(net, golden.load("stvun_pwcnet").state_dict())
    return net


def pair(golden: ModuleType) -> tuple[Tensor, Tensor]:
    frames = golden.load("stvun_pwcnet").input()
    return frames[:, 0], frames[:, 1]


@torch.no_grad()
def test_official_output(golden: ModuleType, official: PWCNet) -> None:
    case = golden.load("stvun_pwcnet")
    assert case.check({"flow2": official.estimate(*pair(golden))}) <= 1e-5  # of a flow up to 2.8


def test_every_official_entry_is_accounted_for(golden: ModuleType) -> None:
    case = golden.load("stvun_pwcnet")
    net = PWCNet()
    report = load_official(net, case.state_dict())
    unused = "estimators.4.enlarge_flow"
    assert report.ignored == [f"{unused}.bias", f"{unused}.weight"]  # deconv2, which the official class does not call
    assert sorted(report.loaded) == sorted(net.state_dict())
    assert sum(p.numel() for p in net.parameters()) + 2 * 2 * 4 * 4 + 2 == 9_374_340
    for ours, theirs in (("pyramid.5.0.weight", "conv6aa.0.weight"), ("context.12.bias", "dc_conv7.bias")):
        assert torch.equal(net.state_dict()[ours], case.state_dict()[theirs])


def test_cost_volume_is_the_mean_product_within_four_pixels() -> None:
    near, far = torch.randn(2, 2, 3, 3, 6, dtype=torch.float64)
    volume = cost_volume(near, far)
    assert volume.shape == (2, 81, 3, 6)
    for index, (dy, dx) in enumerate((dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)):
        for y in range(3):
            for x in range(6):
                inside = 0 <= y + dy < 3 and 0 <= x + dx < 6
                mean = (near[:, :, y, x] * far[:, :, y + dy, x + dx]).mean(1) if inside else torch.zeros(2).double()
                torch.testing.assert_close(volume[:, index, y, x], torch.where(mean > 0, mean, 0.1 * mean))


@torch.no_grad()
def test_flow_is_in_pixels_of_the_frames(golden: ModuleType, official: PWCNet) -> None:
    """Sun et al. train on flow divided by 20; the quarter of the size is enlarged."""
    coarse = official.estimate(*pair(golden))
    expected = 20 * F.interpolate(coarse, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(official(*pair(golden)), expected)


@pytest.mark.parametrize(("h", "w"), [(70, 65), (9, 8), (1, 1), (1, 30)])
@torch.no_grad()
def test_other_sizes_are_resized_and_the_flow_back(official: PWCNet, h: int, w: int) -> None:
    reference, supporting = torch.rand(2, 1, 3, h, w)
    up = -(-h // 64) * 64, -(-w // 64) * 64
    large = [F.interpolate(frame, size=up, mode="bilinear") for frame in (reference, supporting)]
    flow = 20 * F.interpolate(official.estimate(*large), size=(h, w), mode="bilinear")
    flow[:, 0] *= w / up[1]
    flow[:, 1] *= h / up[0]
    torch.testing.assert_close(official(reference, supporting), flow)


@torch.no_grad()
def test_pairs_in_a_batch_do_not_meet(official: PWCNet) -> None:
    reference, supporting = torch.rand(2, 2, 3, 64, 64)
    both = official(reference, supporting)
    torch.testing.assert_close(both[1:], official(reference[1:], supporting[1:]), rtol=1e-4, atol=1e-4)
    assert (both - official(supporting, reference)).abs().max() > 0.1


@torch.no_grad()
def test_flow_stays_float32_in_half_precision(golden: ModuleType, official: PWCNet) -> None:
    flow = official(*pair(golden))
    with torch.autocast("cpu", torch.bfloat16):
        others = [official(*pair(golden))]
    for dtype in (torch.bfloat16, torch.float16):
        reference, supporting = (frame.to(dtype) for frame in pair(golden))
        others.append(copy.deepcopy(official).to(dtype)(reference, supporting))
    for other in others:
        assert other.dtype == torch.float32
        assert (other - flow).abs().mean() < 0.05 * flow.abs().mean()


def test_gradients_reach_every_parameter(official: PWCNet) -> None:
    net = copy.deepcopy(official)
    net(*torch.rand(2, 1, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.slow
def test_compiles_in_one_graph(official: PWCNet) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(official, fullgraph=True, backend="aot_eager")
        reference, supporting = torch.rand(2, 1, 3, 16, 20)
        torch.testing.assert_close(compiled(reference, supporting), official(reference, supporting), rtol=0, atol=1e-3)
