"""What one pass knows: padding, routing, auxiliary losses, and the messages about a Context that does not fit."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vsrplug import Context, Plugin
from vsrplug.context import Routes


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
    assert context.losses == {"one/fit": 4.0, "one/size": 7.0, "two/fit": 8.0}


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
