"""Flow-guided alignment in the official BasicVSR++, and against torchvision's deformable convolution."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from vsrplug import Context, attach, load_official
from vsrplug.backbones import EDVR, BasicVSR, SPyNet
from vsrplug.backbones._blocks import ResidualTrunk
from vsrplug.backbones._reconstruction import PixelShuffleHead
from vsrplug.plugins import FlowGuidedDeformableAlignment, FlowGuidedDeformableAlignmentPlugin
from vsrplug.plugins._blocks import warp


def noisy(module: nn.Module, amount: float = 0.2) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return module


class PlusPlus(PixelShuffleHead):
    """BasicVSR++ as its paper draws it, around the module under test."""

    official_names = BasicVSR.official_names

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.spynet = SPyNet()
        self.feat_extract = ResidualTrunk(3, channels, 5)
        branches = ("backward_1", "forward_1", "backward_2", "forward_2")
        self.deform_align = nn.ModuleDict({b: FlowGuidedDeformableAlignment(channels, sources=2) for b in branches})
        self.backbone = nn.ModuleDict(
            {branch: ResidualTrunk((2 + i) * channels, channels, blocks) for i, branch in enumerate(branches)}
        )
        self.reconstruction = ResidualTrunk(5 * channels, channels, 5)
        self.add_head(channels, 4)

    def forward(self, frames: Tensor) -> Tensor:
        steps = range(frames.shape[1])
        spatial = [self.feat_extract(frames[:, t]) for t in steps]
        done: dict[str, dict[int, Tensor]] = {}
        for branch in self.deform_align:
            back = 1 if branch.startswith("backward") else -1  # where the step before lies
            known: dict[int, Tensor] = {}
            for t in reversed(steps) if back == 1 else steps:
                if known:
                    sources, flows = self.steps_before(frames, known, t, back)
                    feature = self.deform_align[branch](sources, flows, spatial[t])
                else:
                    feature = torch.zeros_like(spatial[t])
                seen = [spatial[t], *(other[t] for other in done.values()), feature]
                known[t] = feature + self.backbone[branch](torch.cat(seen, dim=1))
            done[branch] = known
        restored = []
        for t in steps:
            seen = [spatial[t], *(branch[t] for branch in done.values())]
            skip = F.interpolate(frames[:, t], scale_factor=4, mode="bilinear", align_corners=False)
            restored.append(self.head(self.reconstruction(torch.cat(seen, dim=1))) + skip)
        return torch.stack(restored, dim=1)

    def steps_before(self, frames: Tensor, known: dict[int, Tensor], t: int, back: int) -> tuple[Tensor, Tensor]:
        """The features of one and of two steps before frame t, and the flows to them; zeros where there is none."""
        near = self.spynet(frames[:, t], frames[:, t + back])
        one = known[t + back]
        two, far = torch.zeros_like(one), torch.zeros_like(near)
        if t + 2 * back in known:
            two = known[t + 2 * back]
            far = near + warp(self.spynet(frames[:, t + back], frames[:, t + 2 * back]), near)
        return torch.stack((one, two), dim=1), torch.stack((near, far), dim=1)


@torch.no_grad()
def test_the_official_network(golden: ModuleType) -> None:
    case = golden.load("mmagic_basicvsrpp")
    network = PlusPlus(case.constructor["mid_channels"], case.constructor["num_blocks"])
    load_official(network, case.state_dict())
    assert case.check({"out": network(case.input())}) <= 1e-5


@pytest.mark.parametrize(("name", "channels"), [("mmagic_basicvsrpp_64_7", 64), ("mmagic_basicvsrpp_128_25", 128)])
def test_official_keys_in_order(golden: ModuleType, name: str, channels: int) -> None:
    prefix = "deform_align.forward_2."
    official = golden.full_size(name)["state_dict"]
    keys = [(key.removeprefix(prefix), shape) for key, shape, _ in official if key.startswith(prefix)]
    ours = FlowGuidedDeformableAlignment(channels, sources=2).state_dict()
    assert [(key, list(value.shape)) for key, value in ours.items()] == keys


def by_torchvision(module: FlowGuidedDeformableAlignment, sources: Tensor, flows: Tensor, reference: Tensor) -> Tensor:
    """Every offset set by itself: source by source, group by group, point by point."""
    n, groups = module.sources, module.groups
    warped = [warp(sources[:, i], flows[:, i]) for i in range(n)]
    seen = torch.cat([warped[0], reference, *warped[1:], *(flows[:, i] for i in range(n))], dim=1)
    predicted = module.conv_offset(seen)
    offset = torch.empty_like(predicted[:, : 18 * groups])
    for group in range(groups):
        flow = flows[:, group * n // groups]
        for point in range(9):
            at = 18 * group + 2 * point
            offset[:, at] = flow[:, 1] + module.max_residual * torch.tanh(predicted[:, at])  # vertical first
            offset[:, at + 1] = flow[:, 0] + module.max_residual * torch.tanh(predicted[:, at + 1])
    mask = 1 / (1 + torch.exp(-predicted[:, 18 * groups :]))
    together = torch.cat([sources[:, i] for i in range(n)], dim=1)
    return deform_conv2d(together, offset, module.weight, module.bias, padding=1, mask=mask)


def given(n: int, c: int, r: int, h: int, w: int, b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    sources, reference = torch.randn(b, n, c, h, w).double(), torch.randn(b, r, h, w).double()
    return sources, 3 * torch.randn(b, n, 2, h, w).double(), reference


@pytest.mark.parametrize(
    ("n", "c", "groups", "r", "h", "w"),
    [(1, 4, 4, 3, 7, 5), (1, 6, 2, None, 1, 9), (2, 8, 16, 8, 5, 8), (3, 4, 6, 1, 6, 1)],
)
def test_equals_torchvision_along_the_flows(n: int, c: int, groups: int, r: int | None, h: int, w: int) -> None:
    module = noisy(FlowGuidedDeformableAlignment(c, n, groups, r, max_residual=2.5)).double()
    sources, flows, reference = given(n, c, c if r is None else r, h, w)
    expected = by_torchvision(module, sources, flows, reference)
    torch.testing.assert_close(module(sources, flows, reference), expected, rtol=0, atol=1e-11)
    warped = torch.stack([warp(sources[:, i], flows[:, i]) for i in range(n)], dim=1)
    torch.testing.assert_close(module(sources, flows, reference, warped), expected, rtol=0, atol=1e-11)
    assert not torch.allclose(module(sources, flows, reference, torch.zeros_like(warped)), expected)


def test_gradients() -> None:
    module = noisy(FlowGuidedDeformableAlignment(2, 2, 2, 1)).double()
    sources, flows, reference = (x.requires_grad_() for x in given(2, 2, 1, 3, 2, b=1))
    names = [name for name, _ in module.named_parameters()]

    def aligned(sources: Tensor, flows: Tensor, reference: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, values, (sources, flows, reference))

    inputs = (sources, flows, reference, *module.parameters())
    assert torch.autograd.gradcheck(aligned, inputs, fast_mode=True)


def test_starts_on_the_flow_with_half_the_weight() -> None:
    module = FlowGuidedDeformableAlignment(4, 2, 4, 3).double()
    sources, flows, reference = given(2, 4, 3, 6, 8)
    flows = torch.tensor([[2.0, -1.0], [0.0, 1.0]], dtype=torch.float64).view(1, 2, 2, 1, 1).expand_as(flows)
    shifted = []  # by whole pixels, zero outside
    for i, (dx, dy) in enumerate(((2, -1), (0, 1))):
        padded = F.pad(sources[:, i], (3, 3, 3, 3))
        shifted.append(padded[..., 2 + dy : 2 + dy + 8, 2 + dx : 2 + dx + 10])
    expected = 0.5 * F.conv2d(torch.cat(shifted, dim=1), module.weight)
    torch.testing.assert_close(module(sources, flows, reference), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero_init", [False, True])
def test_every_parameter_learns_from_the_second_step(zero_init: bool) -> None:
    module = FlowGuidedDeformableAlignment(4, 2, 4, zero_init=zero_init)
    inputs = [x.float() for x in given(2, 4, 4, 6, 7)]
    assert module(*inputs).any() != zero_init
    started = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (module(*inputs) - 1).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), started, strict=True))


def test_offsets_stay_within_their_bound_of_the_flow() -> None:
    """However large the prediction, the kernel lies 3 pixels beyond the flow and no further."""
    module = FlowGuidedDeformableAlignment(1, 1, 1, 1, max_residual=3.0).double()
    with torch.no_grad():
        module.conv_offset[-1].bias.fill_(1e4)
        module.weight.zero_()
        module.weight[0, 0, 1, 1] = 1
    sources, flows, reference = given(1, 1, 1, 9, 12)
    flows = torch.tensor([2.0, -1.0]).view(1, 1, 2, 1, 1).expand(2, 1, 2, 9, 12).double()
    expected = torch.zeros_like(reference)
    expected[..., :7, :7] = sources[:, 0, :, 2:, 5:]
    torch.testing.assert_close(module(sources, flows, reference), expected, rtol=0, atol=1e-12)


def test_bfloat16_places_offsets_as_precisely_as_float32() -> None:
    module = FlowGuidedDeformableAlignment(1, 1, 1, 1)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[0, 0, 1, 1] = 2  # undoes the mask of 1/2
    ramp = torch.linspace(0, 1, 500).expand(1, 1, 1, 3, 500).bfloat16()
    flows = torch.zeros(1, 1, 2, 3, 500)
    flows[:, :, 0] = 129.5  # bfloat16 knows 129 and 130
    found = module.bfloat16()(ramp, flows, ramp[:, 0])
    assert found.dtype == torch.bfloat16
    exact = warp(ramp[:, 0].float(), flows[:, 0])
    assert (found.float() - exact)[..., :370].abs().max() <= 2**-8


def network(channels: int = 8) -> BasicVSR:
    return BasicVSR(channels, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)


def test_the_plugin_adds_the_alignment_to_what_was_warped() -> None:
    plugin = noisy(FlowGuidedDeformableAlignmentPlugin(8, groups=4))
    model, frames = attach(network(), align=plugin), torch.rand(2, 3, 3, 9, 7)
    assert plugin.sites == ("backward_warped", "forward_warped")
    calls: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor, Context], given: dict, out: Tensor) -> None:
        calls[given["site"], given["t"]] = (args[0], given["source"], given["flow"], out)

    plugin.register_forward_hook(record, with_kwargs=True)
    context = Context(frames)
    with torch.no_grad():
        model(frames, context)
        assert sorted(calls) == [
            (f"{way}_warped", t) for way, ts in (("backward", (0, 1)), ("forward", (1, 2))) for t in ts
        ]
        for (site, t), (feature, source, flow, refined) in calls.items():
            torch.testing.assert_close(feature, warp(source, flow))
            aligned = by_torchvision(plugin.at[site], source[:, None], flow[:, None], frames[:, t])
            torch.testing.assert_close(refined, feature + aligned, rtol=0, atol=1e-5)
            assert (refined - feature).abs().max() > 1e-3


def test_a_site_with_a_stride_sees_the_averaged_frame() -> None:
    plugin = noisy(FlowGuidedDeformableAlignmentPlugin(4, sites=("forward_warped",), groups=2))
    frames, (sources, flows, _) = torch.rand(2, 2, 3, 8, 12), given(1, 4, 3, 2, 3)
    source, flow = sources[:, 0].float(), flows[:, 0].float()
    feature, averaged = warp(source, flow), frames[:, 1].unflatten(3, (3, 4)).unflatten(2, (2, 4)).mean((3, 5))
    refined = plugin(feature, Context(frames), site="forward_warped", t=1, source=source, flow=flow)
    aligned = plugin.at["forward_warped"](source[:, None], flow[:, None], averaged)
    torch.testing.assert_close(refined, feature + aligned)


def test_what_it_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"16 deformable groups cannot be shared out among sources=1 of channels=24; .* try 8"
    ):
        FlowGuidedDeformableAlignment(24)
    with pytest.raises(ValueError, match=r"3 deformable groups cannot .* sources=2 of channels=12; .* try 2"):
        FlowGuidedDeformableAlignment(12, sources=2, groups=3)
    module = FlowGuidedDeformableAlignment(4, 2, 4, 3)
    sources, flows, reference = (x.float() for x in given(2, 4, 3, 5, 6))
    with pytest.raises(
        ValueError, match=r"\(2, 2, 4, 5, 6\), \(2, 2, 2, 5, 6\) and \(2, 3, 5, 6\), got .*\(2, 1, 2, 5, 6\) and"
    ):
        module(sources, flows[:, :1], reference)
    with pytest.raises(ValueError, match=r"takes sources, flows and reference of .*, got .* and \(2, 4, 5, 6\)"):
        module(sources, flows, sources[:, 0])


def test_sites_without_a_flow() -> None:
    align = FlowGuidedDeformableAlignmentPlugin
    model = attach(network(), align=align(8, groups=4, sites=("forward_output",)))
    with pytest.raises(
        ValueError,
        match=r"needs a site that gives source and flow, as 'backward_warped' .*'forward_output' gives nothing",
    ):
        model(torch.rand(1, 2, 3, 8, 8))
    edvr = EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=4)
    with pytest.raises(ValueError, match=r"none of its default sites \(backward_warped, forward_warped, .*exists here"):
        attach(edvr, align=align(8, groups=4))
    model = attach(edvr, align=align(8, groups=4, sites=("fused",)))
    with pytest.raises(ValueError, match="'fused' gives neighbours"):
        model(torch.rand(1, 3, 3, 8, 8))
    with pytest.raises(ValueError, match="serves frame sites, but 'fused' is a clip site"):
        attach(network(), align=align(8, groups=4, sites=("fused",)))
