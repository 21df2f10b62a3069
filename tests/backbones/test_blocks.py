"""Shared blocks against loops in float64 and against the parts they are made of."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.backbones._blocks import CHUNK_PIXELS, ResidualTrunk, in_chunks
from vsrplug.backbones._reconstruction import PixelShuffleHead
from vsrplug.plugins._blocks import ResidualBlock, warp


def warp_by_loop(feature: Tensor, flow: Tensor, padding: str) -> Tensor:
    """Backward warping, one pixel at a time in float64."""
    n, c, h, w = feature.shape
    feature, flow = feature.double(), flow.double()
    out = torch.zeros(n, c, h, w, dtype=torch.float64)

    def pixel(i: int, y: int, x: int) -> Tensor:
        if padding == "zeros" and not (0 <= y < h and 0 <= x < w):
            return torch.zeros(c, dtype=torch.float64)
        return feature[i, :, min(max(y, 0), h - 1), min(max(x, 0), w - 1)]

    for i in range(n):
        for y in range(h):
            for x in range(w):
                px, py = x + flow[i, 0, y, x].item(), y + flow[i, 1, y, x].item()
                if padding == "border":
                    px, py = min(max(px, 0), w - 1), min(max(py, 0), h - 1)
                x0, y0 = math.floor(px), math.floor(py)
                ax, ay = px - x0, py - y0
                top = (1 - ax) * pixel(i, y0, x0) + ax * pixel(i, y0, x0 + 1)
                bottom = (1 - ax) * pixel(i, y0 + 1, x0) + ax * pixel(i, y0 + 1, x0 + 1)
                out[i, :, y, x] = (1 - ay) * top + ay * bottom
    return out


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_warp_equals_a_loop(padding: str) -> None:
    feature, flow = torch.randn(2, 3, 5, 7), 4 * torch.randn(2, 2, 5, 7)
    expected = warp_by_loop(feature, flow, padding)
    assert (warp(feature, flow, padding) - expected).abs().max() < 1e-5
    assert (warp(feature.double(), flow.double(), padding) - expected).abs().max() < 1e-12


def test_warp_places_bfloat16_as_precisely_as_float32() -> None:
    ramp = torch.linspace(0, 1, 400).expand(1, 1, 8, 400)
    flow = torch.full((1, 2, 8, 400), 0.5)
    half = warp(ramp.bfloat16(), flow, "border")
    assert half.dtype == torch.bfloat16
    # of 400 px, bfloat16 coordinates would be off by 1 px and more, which is 2.5e-3 here and up to 1 at the end
    assert (half.float() - warp(ramp.bfloat16().float(), flow, "border")).abs().max() <= 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(warp(ramp, flow), warp(ramp, flow))
        assert warp(ramp, flow).dtype == torch.float32


def test_blocks_start_near_the_identity_and_compute_the_equation() -> None:
    block = ResidualBlock(32)
    assert block.conv1.weight.std().item() == pytest.approx(0.1 * math.sqrt(2 / (32 * 9)), rel=0.05)
    assert block.conv2.bias is not None
    assert not block.conv2.bias.any()
    x = torch.randn(1, 32, 6, 6)
    kept = x.clone()
    assert torch.equal(block(x), x + block.conv2(torch.relu(block.conv1(x))))
    assert torch.equal(x, kept)


def test_trunk_refines_what_enters_the_residual_blocks() -> None:
    trunk = ResidualTrunk(5, 8, 2)
    x = torch.randn(1, 5, 6, 6)
    psi = F.leaky_relu(trunk.main[0](x), 0.1)
    seen = []
    refined = trunk(x, lambda entered: seen.append(entered.clone()) or 2 * entered)
    torch.testing.assert_close(seen[0], psi)
    torch.testing.assert_close(refined, trunk.main[2](2 * psi))
    torch.testing.assert_close(trunk(x), trunk.main[2](psi))


def test_chunks_change_nothing() -> None:
    a, b = torch.randn(7, 3, 4, 4), torch.randn(7, 3, 4, 4)
    sizes = []

    def add(x: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return x + y

    assert torch.equal(in_chunks(add, a, b, pixels=CHUNK_PIXELS // 3), a + b)
    assert sizes == [3, 3, 1]
    assert torch.equal(in_chunks(add, a, b, pixels=10 * CHUNK_PIXELS), a + b)
    assert sizes[3:] == [1] * 7


class Head(PixelShuffleHead):
    def __init__(self, scale: int) -> None:
        super().__init__()
        self.add_head(8, scale, width=4)


def plain_head(scale: int) -> nn.Module:
    """The same layers in a row."""
    act = nn.LeakyReLU(0.1)

    def conv(inputs: int, outputs: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    ups = {
        1: [],
        2: [conv(8, 16), nn.PixelShuffle(2), act],
        3: [conv(8, 36), nn.PixelShuffle(3), act],
        4: [conv(8, 32), nn.PixelShuffle(2), act, conv(8, 16), nn.PixelShuffle(2), act],
    }[scale]
    return nn.Sequential(*ups, conv(4 if ups else 8, 4), act, conv(4, 3))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_head_is_its_layers_in_a_row(scale: int) -> None:
    head, plain = Head(scale), plain_head(scale)
    plain.load_state_dict(dict(zip(plain.state_dict(), head.state_dict().values(), strict=True)))
    feature = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(head.head(feature), plain(feature))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_head_adds_to_the_frames_at_the_size_of_the_result(scale: int) -> None:
    head, feature, frames = Head(scale), torch.randn(2, 8, 5, 6), torch.rand(2, 3, 5, 6)
    enlarged = nn.Upsample(scale_factor=scale, mode="bilinear")(frames) if scale > 1 else frames
    torch.testing.assert_close(head.on_frames(feature, frames), head.head(feature) + enlarged, rtol=0, atol=1e-6)
    large = torch.rand(2, 3, 5 * scale, 6 * scale)
    assert torch.equal(head.on_frames(feature, large), head.head(feature) + large)


def test_head_refuses_other_scales() -> None:
    with pytest.raises(ValueError, match="scale is 8; expected one of 1, 2, 3, 4"):
        Head(8)
