"""`ResidualConvolutions` against its sum written out in float64, and its count of parameters."""

from __future__ import annotations

import pytest
import torch

from vsrplug import Context, attach
from vsrplug.backbones import EDVR
from vsrplug.plugins import ResidualConvolutions, ResidualConvolutionsPlugin


def by_sums(module: ResidualConvolutions, feature: torch.Tensor) -> torch.Tensor:
    """Nine shifted products a convolution."""

    def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        padded = x.new_zeros(b, c, h + 2, w + 2)
        padded[..., 1:-1, 1:-1] = x
        total = bias.view(1, -1, 1, 1).expand(b, -1, h, w).clone()
        for dy in range(3):
            for dx in range(3):
                part = padded[..., dy : dy + h, dx : dx + w]
                total += (weight[:, :, dy, dx][None, :, :, None, None] * part[:, None]).sum(2)
        return total

    x = feature.double()
    hidden = convolve(x, module.conv1.weight.double(), module.conv1.bias.double()).clamp(min=0)
    return x + convolve(hidden, module.conv2.weight.double(), module.conv2.bias.double())


def test_against_sums_in_float64() -> None:
    torch.manual_seed(0)
    module = ResidualConvolutions(6, width=9, zero_init=False)
    feature = torch.randn(2, 6, 5, 7)
    expected = by_sums(module, feature)
    assert (expected - feature).abs().max() > 0.01
    torch.testing.assert_close(module(feature).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("channels", "width"), [(32, 9), (3, 781)])
def test_parameters_are_what_the_docstring_counts(channels: int, width: int) -> None:
    counted = sum(p.numel() for p in ResidualConvolutions(channels, width).parameters())
    assert counted == 18 * channels * width + width + channels


def test_a_clips_frames_are_refined_one_by_one() -> None:
    torch.manual_seed(0)
    plugin = ResidualConvolutionsPlugin(8, sites=("aligned",), width=4, zero_init=False)
    clip = torch.randn(2, 3, 8, 4, 6)
    refined = plugin(clip, Context(torch.rand(2, 3, 3, 4, 6)), site="aligned")
    for t in range(3):
        torch.testing.assert_close(refined[:, t], plugin.at["aligned"](clip[:, t]), rtol=0, atol=1e-6)


def test_default_sites_are_those_of_the_memory_bank() -> None:
    backbone = EDVR(16, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=4)
    assert attach(backbone, it=ResidualConvolutionsPlugin).plugins["it"].sites == ("fused",)


def test_a_width_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="width is a number of channels, at least 1, got 0"):
        ResidualConvolutions(8, width=0)
