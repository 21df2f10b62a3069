"""`BINoise` by the moments of its noise, `BICompression` by what a lossless code of 4:2:0 frames must be."""

from __future__ import annotations

from typing import Any

import av
import pytest
import torch
from torch import Tensor

from vsrplug.corrupted import BICompression, BINoise
from vsrplug.data.demo import DemoClips
from vsrplug.data.training import RandomDegradation, TrainingClips
from vsrplug.degradations import BI


@pytest.fixture(scope="module")
def hr() -> Tensor:
    clip = DemoClips(clips=1, frames=6)[0]
    return torch.stack(list(clip.frames()))[..., :160, :240]


def test_noise_has_its_deviation_and_no_mean() -> None:
    noisy = BINoise(4, 10.0)(torch.full((8, 3, 256, 256), 128 / 255)) * 255
    torch.testing.assert_close(noisy, noisy.round(), rtol=0, atol=1e-4)
    noise = noisy - 128
    n = noise.numel()
    assert noise.mean().abs() < 4 * 10 / n**0.5
    rounded = (10.0**2 + 1 / 12) ** 0.5  # rounding adds the variance of a uniform grey level
    assert noise.std().item() == pytest.approx(rounded, abs=4 * rounded / (2 * n) ** 0.5)
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / noise.var()
    assert neighbours.abs() < 4 / n**0.5


def test_without_noise_it_is_bicubic(hr: Tensor) -> None:
    torch.testing.assert_close(BINoise(4, 0.0)(hr), BI(4)(hr), rtol=0, atol=1e-7)


def test_noise_is_the_clips_own_in_evaluation_and_the_samples_own_in_training(hr: Tensor) -> None:
    degrade = BINoise(4, 10.0)
    assert isinstance(degrade, RandomDegradation)
    assert torch.equal(degrade(hr), degrade(hr.clone()))
    other = hr.clone()
    other[0, 0, 0, 0] = 1 - other[0, 0, 0, 0]
    assert not torch.equal(degrade(hr)[1:], degrade(other)[1:])
    clips = DemoClips(clips=1, frames=6)
    samples = TrainingClips(clips, degrade, frames=3, patch=16, augment=False)
    assert torch.equal(samples[3]["lr"], samples[3]["lr"])
    still = torch.full((3, 64, 64), 0.5)
    drawn = [degrade.degrade(still, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_at_factor_0_only_the_chroma_is_lost(hr: Tensor) -> None:
    """H.264 at 0 is lossless: what is left is the way to 4:2:0 and back, which PyAV's scaler makes without a codec."""
    expected = []
    for frame in (BI(4)(hr) * 255).round().byte():
        picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
        there = picture.reformat(format="yuv420p")
        expected.append(torch.from_numpy(there.to_ndarray(format="rgb24")).permute(2, 0, 1))
    assert torch.equal((BICompression(4, 0)(hr) * 255).round().byte(), torch.stack(expected))


def test_the_higher_the_factor_the_worse(hr: Tensor) -> None:
    bi = BI(4)(hr)
    errors = [(BICompression(4, crf)(hr) - bi).square().mean().item() for crf in (0, 15, 25, 35, 51)]
    assert errors == sorted(errors)
    assert errors[-1] > 4 * errors[1]
    assert torch.equal(BICompression(4, 25)(hr), BICompression(4, 25)(hr))


def test_a_clip_is_coded_as_a_whole(hr: Tensor) -> None:
    """Frames refer to frames: alone they come out otherwise."""
    together = BICompression(4, 35)(hr)
    alone = torch.cat([BICompression(4, 35)(frame[None]) for frame in hr])
    assert not torch.equal(together, alone)


@pytest.mark.parametrize("size", [(4, 4), (12, 20), (36, 52)])
def test_odd_and_small_sizes(size: tuple[int, int]) -> None:
    clip = torch.rand(2, 3, *size).mul(255).round().div(255)
    assert BICompression()(clip).shape == (2, 3, size[0] // 4, size[1] // 4)
    assert BINoise()(clip).shape == (2, 3, size[0] // 4, size[1] // 4)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (BINoise, {"sigma": -1.0}, "sigma is a standard deviation in grey levels, 0 or more, got -1.0"),
        (BINoise, {"scale": 0}, "scale is a whole number of at least 1, got 0"),
        (BICompression, {"crf": 52}, "crf is H.264's constant rate factor, 0 to 51, got 52"),
        (BICompression, {"scale": 0}, "scale is a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_frames_that_are_no_clip() -> None:
    with pytest.raises(ValueError, match=r"codes clips \(t, 3, H, W\), t at least 1, got \(3, 8, 8\)"):
        BICompression()(torch.rand(3, 8, 8))
    with pytest.raises(TypeError, match="hr must be a float tensor"):
        BICompression()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
