"""Every network at every scale: clips of any size and length, and a start from the weights of x4."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug import Context, load_official
from vsrplug.backbones import IconVSR, LatentVSR, SlidingWindow

from .small_networks import NETWORKS, on_clips

# What a silent last layer leaves is what the results are added to.
LAST = {"real_basicvsr": "basicvsr.conv_last", "stvun": "decoder.last", "latent_vsr": "upscale"}


def silenced(network: nn.Module, layer: str) -> nn.Module:
    """With a last layer of zeros, and a cleaning that leaves the frames."""
    layers = [layer, *(name for name, _ in network.named_modules() if name == "image_cleaning.last")]
    for parameter in (p for name in layers for p in network.get_submodule(name).parameters()):
        nn.init.zeros_(parameter)
    return network


def base(network: nn.Module, frames: Tensor) -> Tensor:
    """What the network adds to: frames enlarged bilinearly; IconVSR mirrors them first, LatentVSR has no skip."""
    h, w = (network.scale * side for side in frames.shape[-2:])
    if isinstance(network, LatentVSR):
        return frames.new_zeros(*frames.shape[:3], h, w)
    if isinstance(network, IconVSR):
        frames = Context(frames).pad(4, "reflect")
    large = F.interpolate(frames[0], scale_factor=network.scale, mode="bilinear", align_corners=False)
    return large[None, ..., :h, :w]


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_size_and_length_comes_back_enlarged_frame_for_frame(name: str) -> None:
    last = LAST.get(name, "conv_last")
    for scale, sizes in ((1, [(3, 5)]), (2, [(3, 5)]), (3, [(3, 5)]), (4, [(1, 1), (3, 5), (17, 23)])):
        network = NETWORKS[name](8, scale).eval()
        plain = silenced(copy.deepcopy(network), last)
        for h, w in sizes:
            for t in (1, 2, 3):
                frames = torch.rand(1, t, 3, h, w)
                expected = base(network, frames)
                torch.testing.assert_close(on_clips(plain)(frames), expected)
                restored = on_clips(network)(frames)
                assert restored.shape == expected.shape
                assert restored.isfinite().all()
                assert not torch.equal(restored, expected)


@pytest.mark.parametrize("name", [name for name, make in NETWORKS.items() if make(8, 4).window])
def test_too_short_a_clip_for_a_window_says_how_many_frames_it_takes(name: str) -> None:
    network = SlidingWindow(NETWORKS[name](8, 4))
    for t, smaller in ((1, "'replicate'"), (2, "'reflection' or 'replicate'")):
        says = rf"the clip has {t} frames and the window 3: .* needs 3 at least; give a longer clip.* with {smaller}$"
        with pytest.raises(ValueError, match=says):
            network(torch.rand(1, t, 3, 8, 8))


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_x4_starts_another_scale_and_the_report_names_what_was_not_carried(name: str, scale: int) -> None:
    last = LAST.get(name, "conv_last")
    four, other = NETWORKS[name](8, 4), NETWORKS[name](8, scale)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    given = four.state_dict()
    carried = {key for key, value in before.items() if key in given and given[key].shape == value.shape}
    report = load_official(other, given, strict=False)
    assert set(report.loaded) == carried
    assert set(report.missing) == before.keys() - carried
    assert set(report.unexpected) == given.keys() - carried
    where = last.rpartition(".")[0]
    head = tuple(f"{where}.{layer}".strip(".") for layer in ("upconv1", "upconv2", "conv_hr", "last", "upscale"))
    assert report.unexpected
    assert [key for key in report.missing + report.unexpected if not key.startswith(head)] == []
    for key, value in other.state_dict().items():
        assert torch.equal(value, given[key] if key in carried else before[key]), key
    if report.missing:
        assert f"{len(report.missing)} missing: {report.missing[0]}" in str(report)
    assert f"{len(report.unexpected)} unexpected: {report.unexpected[0]}" in str(report)
