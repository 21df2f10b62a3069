"""`SecondOrderPropagation` against a recurrence written out in float64, every sample of every warp by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vsrplug import Context, ForeignSite, attach
from vsrplug.backbones import EDVR, BasicVSR
from vsrplug.context import Flows
from vsrplug.plugins import SecondOrderPropagation, SecondOrderPropagationPlugin, compose_flows

C = 4


class Motion(nn.Module):
    """A stand-in for a flow network: flows of about two pixels, rough and different for every pair."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, reference: Tensor, supporting: Tensor) -> Tensor:
        return 6 * self.conv(torch.cat((reference, supporting), 1))


def network() -> BasicVSR:
    return BasicVSR(C, 1, scale=2, flow=Motion(), reconstruction_channels=4).double()


def noisy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def warped(image: Tensor, flow: Tensor) -> Tensor:
    """Bilinear, zero outside: pixel by pixel, corner by corner."""
    out = torch.zeros_like(image)
    h, w = image.shape[-2:]
    for n in range(len(image)):
        for y in range(h):
            for x in range(w):
                to_x, to_y = x + flow[n, 0, y, x].item(), y + flow[n, 1, y, x].item()
                for corner_y in (math.floor(to_y), math.floor(to_y) + 1):
                    for corner_x in (math.floor(to_x), math.floor(to_x) + 1):
                        if 0 <= corner_y < h and 0 <= corner_x < w:
                            weight = (1 - abs(to_x - corner_x)) * (1 - abs(to_y - corner_y))
                            out[n, :, y, x] += weight * image[n, :, corner_y, corner_x]
    return out


def merged(module: SecondOrderPropagation, feature: Tensor, aligned: Tensor) -> Tensor:
    first, _, last = module.merge
    hidden = F.conv2d(torch.cat((feature, aligned), 1), first.weight, first.bias, padding=1)
    hidden = torch.where(hidden > 0, hidden, hidden / 10)
    return feature + F.conv2d(hidden, last.weight, last.bias, padding=1)


def by_loops(net: BasicVSR, at: nn.ModuleDict, clip: Tensor) -> Tensor:
    """BasicVSR with second-order propagation; each direction counts its own steps, from its own first frame."""
    branches = []
    for way, order in (("backward", [4, 3, 2, 1, 0]), ("forward", [0, 1, 2, 3, 4])):
        features: list[Tensor] = []
        flows: list[Tensor] = []
        for step, t in enumerate(order):
            feature = torch.zeros_like(clip[:, 0, :1]).expand(-1, C, -1, -1)
            if step > 0:
                flows.append(net.spynet(clip[:, t], clip[:, order[step - 1]]))
                feature = warped(features[-1], flows[-1])
            if step > 1:
                far = warped(features[-2], flows[-1] + warped(flows[-2], flows[-1]))
                if f"{way}_warped" in at:
                    feature = merged(at[f"{way}_warped"], feature, far)
            feature = getattr(net, f"{way}_trunk")(torch.cat((clip[:, t], feature), 1), lambda x: x)
            if step > 1 and f"{way}_output" in at:
                feature = merged(at[f"{way}_output"], feature, far)
            features.append(feature)
        branches.append(features if way == "forward" else features[::-1])
    out = []
    for t in range(5):
        fused = F.leaky_relu(net.fusion(torch.cat([branch[t] for branch in branches], 1)), 0.1)
        enlarged = F.interpolate(clip[:, t], scale_factor=2, mode="bilinear", align_corners=False)
        out.append(net.head(fused) + enlarged)
    return torch.stack(out, 1)


@pytest.mark.parametrize("places", [("warped",), ("output",), ("warped", "output")], ids="-".join)
@torch.no_grad()
def test_a_clip_of_five_frames(places: tuple[str, ...]) -> None:
    net, clip = network(), torch.rand(2, 5, 3, 5, 6, dtype=torch.float64)
    sites = tuple(f"{way}_{place}" for way in ("backward", "forward") for place in places)
    plugin = noisy(SecondOrderPropagationPlugin(C, sites=sites).double())
    plain = net(clip)
    context = Context(clip)
    out = attach(net, second=plugin)(clip, context)
    assert (out - by_loops(net, plugin.at, clip)).abs().max() < 1e-10
    assert (out[:, 2] - plain[:, 2]).abs().max() > 1e-3
    assert context.flows is not None
    assert 0.5 < context.flows.forward.abs().mean() < 4


@pytest.mark.parametrize(("h", "w"), [(5, 6), (2, 7), (4, 3), (3, 9)])
@torch.no_grad()
def test_the_plain_module(h: int, w: int) -> None:
    module = noisy(SecondOrderPropagation(3).double())
    feature, earlier = torch.randn(2, 2, 3, h, w, dtype=torch.float64)
    near, far = 2 * torch.randn(2, 2, 2, h, w, dtype=torch.float64)
    flow = near + warped(far, near)
    torch.testing.assert_close(compose_flows(near, far), flow, rtol=0, atol=1e-12)
    expected = merged(module, feature, warped(earlier, flow))
    torch.testing.assert_close(module(feature, earlier, flow), expected, rtol=0, atol=1e-12)


def test_steps_of_a_linear_motion_compose() -> None:
    """Where a step moves p to A p + d, two steps move it to A (A p + d) + d, which bilinear sampling gives exactly."""
    matrix, shift = torch.tensor([[0.98, 0.03], [-0.02, 1.01]]), torch.tensor([0.4, -0.7])
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij")
    position = torch.stack((x, y))

    def moved(position: Tensor) -> Tensor:
        return torch.einsum("ij,jhw->ihw", matrix, position) + shift[:, None, None]

    step = (moved(position) - position)[None]
    two = compose_flows(step, step)[0]
    inner = (slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close((position + two)[inner], moved(moved(position))[inner], rtol=0, atol=1e-5)
    assert compose_flows(step.bfloat16(), step.bfloat16()).dtype == torch.float32


def test_gradients() -> None:
    module = noisy(SecondOrderPropagation(2)).double()
    feature, earlier = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    # Samples between pixels: where one crosses a pixel, bilinear sampling has no derivative.
    near, far = (0.2 + 0.3 * torch.rand(2, 1, 2, 3, 4, dtype=torch.float64)).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def refined(feature: Tensor, earlier: Tensor, near: Tensor, far: Tensor, *parameters: Tensor) -> Tensor:
        given = feature, earlier, compose_flows(near, far)
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), given)

    assert torch.autograd.gradcheck(refined, (feature, earlier, near, far, *module.parameters()))


def test_starts_as_the_identity_or_not() -> None:
    feature, earlier, flow = torch.randn(1, C, 5, 6), torch.randn(1, C, 5, 6), torch.randn(1, 2, 5, 6)
    assert torch.equal(SecondOrderPropagation(C)(feature, earlier, flow), feature)
    assert not torch.equal(SecondOrderPropagation(C, zero_init=False)(feature, earlier, flow), feature)


@torch.no_grad()
def test_the_first_two_steps_have_nothing_to_bring() -> None:
    net = network()
    sites = ("backward_warped", "forward_warped", "backward_output", "forward_output")
    model = attach(net, second=noisy(SecondOrderPropagationPlugin(C, sites=sites).double()))
    clip = torch.rand(1, 3, 3, 5, 6, dtype=torch.float64)
    for t in (1, 2):
        assert torch.equal(model(clip[:, :t]), net(clip[:, :t]))
    changed = [not torch.equal(one, other) for one, other in zip(model(clip)[0], net(clip)[0], strict=True)]
    assert changed == [True, False, True]  # the last step of either direction, at frames 0 and 2


def branch(plugin: SecondOrderPropagationPlugin, inputs: Tensor, context: Context, checkpointed: bool) -> list[Tensor]:
    """A recurrent branch around one output site, each of its steps recomputed in the backward pass or not."""
    feature, outputs = torch.zeros_like(inputs[:, 0]), []
    for t in range(inputs.shape[1]):

        def step(feature: Tensor, t: int = t) -> Tensor:
            return plugin(torch.tanh(feature + inputs[:, t]), context, site="forward_output", t=t)

        feature = checkpoint(step, feature, use_reentrant=False) if checkpointed else step(feature)
        outputs.append(feature)
    return outputs


def test_gradient_checkpointing() -> None:
    plugin = noisy(SecondOrderPropagationPlugin(C, sites=("forward_output",)))
    inputs, flow = torch.randn(1, 5, C, 6, 7), torch.randn(1, 4, 2, 6, 7)
    results = []
    for checkpointed in (False, True):
        given, motion = inputs.clone().requires_grad_(), flow.clone().requires_grad_()
        context = Context(torch.rand(1, 5, 3, 6, 7))
        context.flows = Flows(flow, motion)
        plugin.zero_grad()
        torch.stack(branch(plugin, given, context, checkpointed)).square().mean().backward()
        results.append([given.grad, motion.grad, *(parameter.grad for parameter in plugin.parameters())])
    for one, other in zip(*results, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("h", "w"), [(6, 8), (7, 9)])
@torch.no_grad()
def test_a_site_with_a_stride(h: int, w: int) -> None:
    """Flows are in LR pixels: at stride 2 they are averaged, and as many feature pixels long as they cross."""
    plugin = noisy(SecondOrderPropagationPlugin(C, sites=("backward_output",)))
    context = Context(torch.rand(1, 3, 3, h, w))
    context.flows = Flows(2 * torch.randn(1, 2, 2, h, w), torch.zeros(1, 2, 2, h, w))
    features = torch.randn(3, 1, C, (h + 1) // 2, (w + 1) // 2)
    found = [plugin(feature, context, site="backward_output", t=2 - i) for i, feature in enumerate(features)]
    flow = compose_flows(context.flows.backward[:, 0], context.flows.backward[:, 1])
    flow = F.adaptive_avg_pool2d(flow, features.shape[-2:])
    flow[:, 0] *= features.shape[-1] / w
    flow[:, 1] *= features.shape[-2] / h
    assert torch.equal(found[1], features[1])
    torch.testing.assert_close(found[2], plugin.at["backward_output"](features[2], features[0], flow))


class Recurrent(nn.Module):
    """A network of someone else: no sites, no context; its submodule `body` is called once a frame."""

    def __init__(self, backwards: bool = False) -> None:
        super().__init__()
        self.body, self.backwards = nn.Conv2d(3 + C, C, 3, padding=1), backwards

    def forward(self, frames: Tensor) -> Tensor:
        feature, features = torch.zeros_like(frames[:, 0, :1]).expand(-1, C, -1, -1), []
        order = range(frames.shape[1])
        for t in reversed(order) if self.backwards else order:
            feature = self.body(torch.cat((frames[:, t], feature), 1))
            features.append(feature)
        return torch.stack(features, 1)


@pytest.mark.parametrize("way", ["backward", "forward"])
@torch.no_grad()
def test_a_foreign_network(way: Any) -> None:
    net, clip = Recurrent(way == "backward"), torch.rand(1, 4, 3, 5, 6)
    site = f"{way}_output"
    plugin = noisy(SecondOrderPropagationPlugin(C, sites=(site,)))
    model = attach(net, sites={site: ForeignSite("body", channels=C, kind="frame", order=way)}, second=plugin)
    context = Context(clip)
    context.flows = Flows(torch.randn(1, 3, 2, 5, 6), torch.randn(1, 3, 2, 5, 6))
    feature, expected = torch.zeros(1, C, 5, 6), []
    order = [3, 2, 1, 0] if way == "backward" else [0, 1, 2, 3]
    for step, t in enumerate(order):
        feature = net.body(torch.cat((clip[:, t], feature), 1))
        if step > 1:  # the pair that each flow belongs to: {0, 1}, {1, 2} or {2, 3}, named by its lower frame
            near, far = (getattr(context.flows, way)[:, min(order[i], order[i - 1])] for i in (step, step - 1))
            feature = merged(plugin.at[site], feature, warped(expected[-2], near + warped(far, near)))
        expected.append(feature)
    torch.testing.assert_close(model(clip, context), torch.stack(expected, 1))


def test_no_flows() -> None:
    site = {"forward_output": ForeignSite("body", channels=C, kind="frame", order="forward")}
    model = attach(Recurrent(), sites=site, second=SecondOrderPropagationPlugin(C, sites=tuple(site)))
    message = (
        "second-order propagation at site 'forward_output' needs optical flow, and this network sets none; use one "
        "that estimates flow, such as BasicVSR, or set context.flows = Flows(backward, forward) before the call"
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        model(torch.rand(1, 1, 3, 5, 6))  # in the first step already


def test_flows_of_another_clip() -> None:
    plugin = SecondOrderPropagationPlugin(C)
    context = Context(torch.rand(1, 4, 3, 5, 6))
    context.flows = Flows(torch.zeros(1, 4, 2, 5, 6), torch.zeros(1, 4, 2, 5, 6))
    message = r"flows of a clip \(1, 4, 3, 5, 6\) are \(1, 3, 2\) \+ \(h, w\), got \(1, 4, 2, 5, 6\); see vsrplug.con"
    with pytest.raises(ValueError, match=message):
        plugin(torch.rand(1, C, 5, 6), context, site="forward_warped", t=1, source=torch.rand(1, C, 5, 6))


def test_a_network_that_gives_no_step_or_no_source() -> None:
    plugin, feature = SecondOrderPropagationPlugin(C), torch.rand(1, C, 5, 6)
    context = Context(torch.rand(1, 2, 3, 5, 6))
    context.flows = Flows(torch.zeros(1, 1, 2, 5, 6), torch.zeros(1, 1, 2, 5, 6))
    with pytest.raises(ValueError, match="gives no `source`, the feature before alignment; use an output site"):
        plugin(feature, context, site="forward_warped", t=1)
    with pytest.raises(ValueError, match="gives no time step `t`; use an output site that is called once a frame"):
        plugin(feature, context, site="forward_warped", source=feature)
    assert not context.memo


def test_sites_that_have_no_direction() -> None:
    for site in ("fused", "forward_input", "forwards_output", "input"):
        with pytest.raises(ValueError, match=rf"cannot go to site '{site}': it takes the warped and output sites of"):
            SecondOrderPropagationPlugin(C, sites=("backward_output", site))
    names = ("backward_1_output", "forward_2_output", "forward_warped")
    assert SecondOrderPropagationPlugin(C, sites=names).sites == names


def test_a_window_network_has_no_such_sites() -> None:
    net = EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=4)
    with pytest.raises(ValueError, match=r"none of its default sites \(backward_warped, forward_warped\) exists here"):
        attach(net, second=SecondOrderPropagationPlugin)


@pytest.mark.parametrize(
    ("earlier", "flow"), [((1, C, 5, 7), (1, 2, 5, 6)), ((1, C, 5, 6), (1, 5, 6, 2)), ((2, C, 5, 6), (1, 2, 5, 6))]
)
def test_tensors_that_do_not_belong_together(earlier: tuple[int, ...], flow: tuple[int, ...]) -> None:
    message = (
        f"second-order propagation of a feature (1, {C}, 5, 6) takes an earlier one of that shape and a flow "
        f"(1, 2, 5, 6), got {earlier} and {flow}"
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        SecondOrderPropagation(C)(torch.rand(1, C, 5, 6), torch.rand(earlier), torch.rand(flow))
