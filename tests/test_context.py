"""What one pass knows: padding, routing, auxiliary losses, and the messages about a Context that does not fit."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vsrplug import Context, Plugin, attach
from vsrplug.context import Routes
from vsrplug.site import SiteSpec


class Scale(Plugin):
    """Multiplies by a number, so that order and number of applications can be read off the result."""

    def __init__(self, factor: float = 2.0, offset: float = 0.0) -> None:
        super().__init__(4, sites=("here",))
        self.at = nn.ModuleDict({"here": nn.Identity()})
        self.factor, self.offset = factor, offset

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        return feature * self.factor + self.offset


def started(**plugins: Plugin) -> Context:
    context = Context(torch.rand(1, 2, 3, 4, 4))
    routes: Routes = {"here": list(plugins.items())}
    context.begin(routes)
    return context


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": torch.zeros(3, 4, 4)}, r"frames must be \(b, t, 3, h, w\), got shape \(3, 4, 4\)"),
        (
            {"frames": torch.zeros(1, 2, 3, 4, 4), "masks": torch.zeros(1, 2, 4, 4)},
            r"masks must be \(b, t, m, h, w\) like the frames \(1, 2, 3, 4, 4\), got \(1, 2, 4, 4\)",
        ),
        (
            {"frames": torch.zeros(1, 2, 3, 4, 4), "masks": torch.zeros(1, 3, 5, 4, 4)},
            r"masks must be .* got \(1, 3, 5, 4, 4\)",
        ),
        (
            {"frames": torch.zeros(1, 2, 3, 4, 4), "masks": torch.zeros(1, 2, 5, 16, 16)},
            r"masks must be .* got \(1, 2, 5, 16, 16\)",
        ),
    ],
)
def test_shapes_are_checked(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Context(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8])
def test_frames_and_masks_are_padded_alike_once(dtype: torch.dtype) -> None:
    frames = torch.rand(2, 2, 3, 5, 6)
    masks = (torch.rand(2, 2, 4, 5, 6) > 0.5).to(dtype)
    context = Context(frames, masks=masks)
    padded = context.pad(4)
    assert context.masks is not None
    assert context.masks.dtype == dtype
    for whole, part in ((padded, frames), (context.masks, masks)):
        assert whole.shape[-2:] == (8, 8)
        for y in range(8):
            for x in range(8):
                assert torch.equal(whole[..., y, x], part[..., min(y, 4), min(x, 5)])
    assert context.pad(4) is padded
    fitting = Context(frames)
    assert fitting.pad(1) is frames


def test_the_target_is_padded_with_the_frames() -> None:
    target = torch.rand(1, 2, 3, 20, 24)
    context = Context(torch.rand(1, 2, 3, 5, 6), target=target)
    for _ in range(2):  # the second time nothing is left to do
        context.pad(4)
        assert context.target is not None
        assert context.target.shape == (1, 2, 3, 32, 32)
        assert torch.equal(context.target[..., :20, :24], target)
        assert torch.equal(context.target[..., 31, 31], target[..., 19, 23])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize(("h", "w"), [(5, 6), (3, 2), (1, 4)])
def test_frames_masks_and_target_are_mirrored_alike(h: int, w: int, dtype: torch.dtype) -> None:
    lr = torch.arange(2 * 3 * h * w).view(1, 2, 3, h, w).float()
    masks = (torch.rand(1, 2, 4, h, w) > 0.5).to(dtype)
    y, x = torch.arange(4 * h).view(-1, 1), torch.arange(4 * w)
    context = Context(lr, masks=masks, target=(1000 * y + x).expand(1, 2, 3, -1, -1))
    padded = context.pad(8, "reflect")
    assert padded.shape[-2:] == (8, 8)
    assert context.masks is not None
    assert context.masks.dtype == dtype
    rows, columns = (np.pad(np.arange(side), (0, 8 - side), mode="reflect") for side in (h, w))
    for whole, part in ((padded, lr), (context.masks, masks)):
        assert torch.equal(whole, part[..., rows, :][..., columns])
    assert context.pad(8, "reflect") is padded
    # Where a low-resolution pixel is a mirrored one, so are the pixels of the target that it covers.
    target = context.target
    assert target is not None
    assert target.shape[-2:] == (32, 32)
    if h == 5:
        assert target[0, 0, 0, :, 0].div(1000).tolist()[20:] == [15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4]
    assert torch.equal(target[..., : 4 * h, : 4 * w], (1000 * y + x).expand(1, 2, 3, -1, -1))
    means = [
        t.float().unflatten(-1, (-1, 4)).mean(-1).unflatten(-2, (-1, 4)).mean(-2)
        for t in (target, target[..., : 4 * h, : 4 * w])
    ]
    assert torch.equal(means[0], means[1][..., rows, :][..., columns])


def test_a_model_mirrors_before_its_plugins_prepare_where_its_backbone_does() -> None:
    class Backbone(nn.Module):
        sites: ClassVar[dict[str, SiteSpec]] = {"here": SiteSpec(3, "clip")}
        multiple, padding_mode = 4, "reflect"

        def forward(self, frames: Tensor, context: Context) -> Tensor:
            return context.refine("here", context.pad(self.multiple, "reflect"))

    class Seen(Scale):
        def prepare(self, context: Context) -> None:
            context.memo[self] = context.frames

    frames = torch.rand(1, 2, 3, 6, 7)
    plugin = Seen(1.0)
    plugin.channels = 3
    context = Context(frames)
    out = attach(Backbone(), it=plugin)(frames, context)
    assert torch.equal(context.memo[plugin], out)
    assert torch.equal(out[0], nn.functional.pad(frames[0], (0, 1, 0, 2), mode="reflect"))


def test_a_feature_passes_untouched_where_nothing_is_attached() -> None:
    feature = torch.rand(1, 4, 4, 4)
    assert Context(torch.rand(1, 2, 3, 4, 4)).refine("here", feature) is feature
    assert started(one=Scale()).refine("elsewhere", feature) is feature


def test_plugins_of_a_site_run_in_the_order_of_attach() -> None:
    context = started(double=Scale(2.0), shifted=Scale(1.0, 1.0))
    assert torch.equal(context.refine("here", torch.ones(1, 4, 1, 1)), torch.full((1, 4, 1, 1), 3.0))


def test_a_plugin_keeps_shape_and_dtype() -> None:
    class Wider(Scale):
        def forward(self, feature: Tensor, *args: Any, **given: Any) -> Tensor:
            return torch.cat([feature, feature], 1)

    class Finer(Scale):
        def forward(self, feature: Tensor, *args: Any, **given: Any) -> Tensor:
            return feature.double()

    feature = torch.rand(1, 4, 2, 2)
    with pytest.raises(TypeError, match=r"plug-in 'w' at site 'here' was given \(1, 4, 2, 2\) .* \(1, 8, 2, 2\)"):
        started(w=Wider()).refine("here", feature)
    with pytest.raises(TypeError, match=r"returned \(1, 4, 2, 2\) torch.float64; a plug-in keeps shape and dtype"):
        started(f=Finer()).refine("here", feature)


def test_the_memory_layout_is_kept() -> None:
    class Contiguous(Scale):
        def forward(self, feature: Tensor, *args: Any, **given: Any) -> Tensor:
            return feature.contiguous() * 2

    feature = torch.rand(2, 4, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
    refined = started(c=Contiguous()).refine("here", feature)
    assert refined.stride() == feature.stride()
    assert torch.equal(refined, feature * 2)
    refined.sum().backward()
    assert torch.equal(feature.grad, torch.full_like(feature, 2.0))


def test_losses_are_means_over_sites_and_steps_and_a_repeated_one_replaces() -> None:
    one, two = Scale(), Scale()
    context = started(one=one, two=two)
    for value, t in ((1.0, 0), (9.0, 1), (5.0, 1)):
        context.add_loss(one, "fit", torch.tensor(value), site="here", t=t)
    context.add_loss(one, "fit", torch.tensor(6.0), site="there")
    context.add_loss(one, "size", torch.tensor(7.0), site="here")
    context.add_loss(two, "fit", torch.tensor(8.0), site="here", t=0)
    for value in (3.0, 2.0):
        context.add_loss(None, "fit", torch.tensor(value), site="here")
    assert context.losses == {"one/fit": 4.0, "one/size": 7.0, "two/fit": 8.0, "backbone/fit": 2.0}


def test_a_loss_of_a_plugin_that_is_not_attached() -> None:
    with pytest.raises(RuntimeError, match="this Scale reports the loss 'fit' to a pass it is not attached to"):
        started(one=Scale()).add_loss(Scale(), "fit", torch.zeros(()), site="here")


def test_a_loss_without_gradient_in_a_pass_with_gradient_warns() -> None:
    plugin = Scale()
    context = started(one=plugin)
    with torch.no_grad(), pytest.warns(UserWarning, match="one/fit was computed without gradient .* use_reentrant=Fal"):
        context.add_loss(plugin, "fit", torch.zeros(()), site="here")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        started(one=plugin).add_loss(plugin, "fit", torch.zeros(()), site="here")


def test_one_context_one_pass() -> None:
    context = started()
    with pytest.raises(RuntimeError, match="used by an earlier pass; make a new one for every call of the model"):
        context.begin({})
    assert Context(torch.rand(1, 2, 3, 4, 4)).losses == {}


@pytest.mark.parametrize("shape", [(1, 2, 3, 2, 3), (1, 2, 3, 20, 23), (1, 2, 3, 20, 30), (3, 20, 24)])
def test_a_target_that_is_no_enlargement(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"target must be \(b, t, 3, s h, s w\).*of the frames \(1, 2, 3, 5, 6\)"):
        Context(torch.rand(1, 2, 3, 5, 6), target=torch.rand(shape))
