"""SPyNet against the official output, and what the resizing around it must give."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from vsrplug import load_official
from vsrplug.backbones import SPyNet


@torch.no_grad()
def test_official_output(golden: ModuleType) -> None:
    case = golden.load("basicsr_spynet")
    net, x = SPyNet(), case.input()
    assert load_official(net, case.state_dict()).ignored == []
    assert case.check({"flow": net(x[:, 0], x[:, 1])}) <= 1e-5


def test_official_keys_in_order(golden: ModuleType) -> None:
    case = golden.load("basicsr_spynet")
    official = [(key, shape) for key, shape, _ in case.spec["state_dict"] if key not in case.kept]
    assert [(key, list(value.shape)) for key, value in SPyNet().state_dict().items()] == official
    assert sum(p.numel() for p in SPyNet().parameters()) == 1_440_300


@pytest.mark.parametrize(("h", "w"), [(13, 23), (9, 8), (1, 1), (1, 30)])
@torch.no_grad()
def test_other_sizes_are_resized_and_the_flow_back(h: int, w: int) -> None:
    net = SPyNet(levels=4, widths=(4, 8, 4, 4))
    reference, supporting = torch.rand(2, 2, 3, h, w)
    up = -(-h // 8) * 8, -(-w // 8) * 8
    large = [F.interpolate(frame, size=up, mode="bilinear") for frame in (reference, supporting)]
    flow = F.interpolate(net(*large), size=(h, w), mode="bilinear")
    flow[:, 0] *= w / up[1]
    flow[:, 1] *= h / up[0]
    torch.testing.assert_close(net(reference, supporting), flow)


@torch.no_grad()
def test_flow_stays_float32_in_half_precision(golden: ModuleType) -> None:
    case = golden.load("basicsr_spynet")
    net, x = SPyNet(), case.input()
    net.load_state_dict(case.state_dict())
    flow = net(x[:, 0], x[:, 1])
    with torch.autocast("cpu", torch.bfloat16):
        autocast = net(x[:, 0], x[:, 1])
    x = x.bfloat16()
    half = net.to(torch.bfloat16)(x[:, 0], x[:, 1])
    for other in (autocast, half):
        assert other.dtype == torch.float32
        assert (other - flow).abs().mean() < 0.05 * flow.abs().mean()


def test_every_level_learns() -> None:
    net = SPyNet(levels=3, widths=(4, 8, 4, 4))
    net(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}  # mean and std are constants
