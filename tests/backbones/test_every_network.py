"""What holds for every network: it learns, half precision stays near, and copies, files and graphs change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug import load_official
from vsrplug.data import DemoClips
from vsrplug.degradations import BI

from .small_networks import NETWORKS

# Without times STVUN computes no flow: its own tests ask for frames in between.
UNUSED = {"stvun": "pwcnet."}


def small(name: str, width: int = 8) -> nn.Module:
    return NETWORKS[name](width, 4).eval()


def clip(h: int = 8, w: int = 7) -> Tensor:
    return torch.rand(1, 3, 3, h, w)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_learns(name: str) -> None:
    network = small(name).train()
    with torch.no_grad():
        for parameter in network.parameters():  # fresh offsets of deformable convolutions are zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    network(clip(16, 16)).square().mean().backward()
    dead = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert [key for key in dead if not key.startswith(UNUSED.get(name, "-"))] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_beats_the_skip_on_a_clip(name: str) -> None:
    """Fresh layers add noise to the skip: twenty steps reach its error, and then the rest is gained."""
    hr = torch.stack(list(DemoClips(split="train", clips=1, frames=3, size=(32, 32))[0].frames()))[None]
    lr = BI(4)(hr[0])[None]
    network = NETWORKS[name](16, 4).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.9, 0.99))
    truth = hr[:, [1]] if network.window else hr
    frames = lr[:, [1]] if network.window else lr
    skip = F.interpolate(frames[0], scale_factor=4, mode="bilinear", align_corners=False)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (network(lr) - truth).abs().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.95 * (skip - truth[0]).abs().mean()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_half_precision_stays_near(name: str) -> None:
    network, frames = small(name), clip(16, 16)
    exact = network(frames)
    for dtype, near in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        with torch.autocast("cpu", dtype):
            mixed = network(frames)
        half = copy.deepcopy(network).to(dtype)(frames.to(dtype))
        assert half.dtype == dtype
        for rounded in (mixed, half):
            assert (rounded.float() - exact).abs().max() < near * exact.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_copies_and_files_compute_the_same(name: str) -> None:
    network, other, frames = small(name), small(name), clip()
    expected = network(frames)
    assert torch.equal(copy.deepcopy(network)(frames), expected)
    assert not torch.equal(other(frames), expected)
    report = load_official(other, {"params": network.state_dict()})
    assert sorted(report.loaded) == sorted(network.state_dict())
    assert report.ignored == []
    assert torch.equal(other(frames), expected)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()  # the limit on recompilations counts over the whole process
    network, frames = small(name), clip(9, 8)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(frames), network(frames), rtol=1e-5, atol=1e-5)
