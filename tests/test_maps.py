"""Recorded maps: of the frame and the pixel that are asked for, whatever way the network walks a clip, and no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vsrplug import Context, Plugin, attach
from vsrplug.backbones import EDVR, MANA, STVUN, BasicVSR, Bicubic, SlidingWindow, SPyNet
from vsrplug.maps import Maps, recorded
from vsrplug.plugins import GaussianCrossFrameAttentionPlugin, SEEMPlugin


class Seen(Plugin):
    """Shows the very feature it was given, under the place that it was asked about."""

    def __init__(self, channels: int, *, sites: tuple[str, ...]) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict({site: nn.Identity() for site in self.sites})

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        return feature

    def maps(
        self,
        feature: Tensor,
        context: Context,
        *,
        site: str,
        at: tuple[int, int, int],
        t: int | None = None,
        **given: Any,
    ) -> Maps:
        frame = feature[0, at[0]] if feature.ndim == 5 else feature[0]
        return {site: {str(at): frame[0]}}


def edvr(**arguments: Any) -> EDVR:
    return EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=4, **arguments).eval()


def basicvsr() -> BasicVSR:
    return BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8).eval()


def taken(network: nn.Module, clip: Tensor, frame: int, pixel: tuple[int, int], **context: Tensor) -> Maps:
    given = (Context(clip, **context),) if context else ()
    with torch.no_grad(), recorded(network, frame, pixel) as maps:
        network(clip, *given)
    return maps


def test_a_recurrent_network_shows_the_frame_and_the_pixel_at_every_kind_of_site() -> None:
    model = attach(basicvsr(), it=Seen(8, sites=("forward_output", "fused")))
    clip, features = torch.rand(2, 5, 3, 6, 9), {}
    plain = model.plugins["it"].forward
    with torch.no_grad():
        model.plugins["it"].forward = lambda feature, *a, **k: features.setdefault((k["site"], k["t"]), feature)
        model(clip)
        model.plugins["it"].forward = plain
    maps = taken(model, clip, 3, (4, 7))
    assert list(maps) == ["it, forward_output", "it, fused"]
    assert torch.equal(maps["it, forward_output"]["(3, 4, 7)"], features["forward_output", 3][0, 0])
    assert torch.equal(maps["it, fused"]["(3, 4, 7)"], features["fused", None][0, 3, 0])


@pytest.mark.parametrize("site", ["features", "aligned"])  # every window by itself | features shared
def test_a_sliding_window_shows_the_window_around_the_frame(site: str) -> None:
    model = attach(edvr(), it=Seen(8, sites=(site,)), there=Seen(8, sites=("reconstructed",)))
    clip = torch.rand(1, 5, 3, 8, 12)
    along = taken(SlidingWindow(model, "replicate"), clip, 3, (4, 7))
    alone = taken(model, clip[:, 2:5], 1, (4, 7))
    assert along.keys() == alone.keys() == {f"it, {site}", "there, reconstructed"}
    for picture, planes in along.items():
        assert planes.keys() == alone[picture].keys()
        for title, plane in planes.items():
            torch.testing.assert_close(plane, alone[picture][title])
    assert list(along[f"it, {site}"]) == ["(1, 4, 7)"]  # of the window


def test_sites_with_a_stride_and_padding() -> None:
    network = edvr(predeblur=True, hr_input=True)  # stride 4, padded to multiples of 16
    model = attach(network, it=Seen(8, sites=("fused",)), masks=SEEMPlugin(8, masks=2, sites=("fused",)))
    clip, masks = torch.rand(1, 3, 3, 18, 21), torch.rand(1, 3, 2, 18, 21) > 0.5
    for whole in (model, SlidingWindow(model, "replicate")):
        maps = taken(whole, clip, 1, (17, 20), masks=masks)
        assert {at: plane.shape for at, plane in maps["it, fused"].items()} == {"(1, 4, 5)": (5, 6)}
        assert torch.equal(maps["masks, masks"]["the frame's masks"], masks[0, 1])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: STVUN(8, frames=3), {"backbone, confidence"}),
        (lambda: MANA(8, 3, 1, 1, 5, groups=4), {"backbone, attention"}),
        (lambda: Bicubic(), set()),
    ],
)
def test_window_networks_with_modules_that_have_maps(make: Any, expected: set[str]) -> None:
    network = make().eval()
    model, clip = attach(network), torch.rand(1, 5, 3, 8, 9)
    whole = SlidingWindow(model, "replicate") if getattr(network, "window", None) else model
    maps = taken(whole, clip, 2, (3, 4))
    assert maps.keys() == expected
    alone = taken(model, clip[:, 1:4], 1, (3, 4))
    for picture, planes in maps.items():
        assert list(planes) == ["frame -1", "this frame", "frame +1"]
        for title, plane in planes.items():
            torch.testing.assert_close(plane, alone[picture][title])
    assert taken(network, clip[:, 1:4], 1, (3, 4)) == {}  # not plugged: nobody is asked


def test_recording_changes_nothing_and_leaves_no_trace() -> None:
    plugin = GaussianCrossFrameAttentionPlugin(8, groups=4, frames=3, zero_init=False)
    model, clip = attach(basicvsr(), it=plugin).eval(), torch.rand(1, 4, 3, 6, 7)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        plain = model(clip)
        with recorded(model, 2, (3, 4)) as maps:
            assert torch.equal(model(clip), plain)
    assert maps
    with pytest.raises(RuntimeError, match="stop"), recorded(model, 2, (3, 4)):
        raise RuntimeError("stop")
    for name, module in model.named_modules():
        assert dict(vars(module)) == attributes[name]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with torch.no_grad(), recorded(model, 2, (3, 4)) as again:
        model(clip)
    assert again.keys() == maps.keys()


def test_a_plugin_without_maps_shows_none() -> None:
    class Silent(Seen):
        maps = Plugin.maps

    assert taken(attach(basicvsr(), it=Silent(8, sites=("fused",))), torch.rand(1, 3, 3, 6, 7), 1, (0, 0)) == {}
