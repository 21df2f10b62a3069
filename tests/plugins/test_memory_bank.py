"""`MemoryBank` against eq. 2 written out in float64, and against the loss that the official block computed."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from vsrplug import Context, attach
from vsrplug.backbones import BasicVSR, SPyNet
from vsrplug.plugins import MemoryBank, MemoryBankPlugin


def noisy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def one_pixel(values: list[float], weight: list[list[float]], bias: list[float]) -> list[float]:
    return [b + sum(w * v for w, v in zip(row, values, strict=True)) for row, b in zip(weight, bias, strict=True)]


def by_loops(module: MemoryBank, feature: Tensor) -> tuple[Tensor, float]:
    """Eq. 2 pixel by pixel and entry by entry, in Python's float64."""
    b, c, h, w = feature.shape
    groups, size = module.norm.num_groups, c // module.norm.num_groups
    query_w, query_b = module.query.weight[:, :, 0, 0].tolist(), module.query.bias.tolist()
    out_w, out_b = module.output.weight[:, :, 0, 0].tolist(), module.output.bias.tolist()
    memory = module.memory.T.tolist()  # a list of entries, each C' numbers
    width = module.memory.shape[0]
    refined, distances = torch.empty(b, c, h, w, dtype=torch.float64), []
    for n in range(b):
        normed = torch.empty(c, h, w, dtype=torch.float64)
        for g in range(groups):
            part = feature[n, g * size : (g + 1) * size].double()
            mean = part.sum() / part.numel()
            variance = ((part - mean) ** 2).sum() / part.numel()
            normed[g * size : (g + 1) * size] = (part - mean) / (variance + module.norm.eps).sqrt()
        for y in range(h):
            for x in range(w):
                affine = zip(
                    normed[:, y, x].tolist(), module.norm.weight.tolist(), module.norm.bias.tolist(), strict=True
                )
                query = one_pixel([value * gain + shift for value, gain, shift in affine], query_w, query_b)
                weights = [math.exp(sum(q * m for q, m in zip(query, e, strict=True)) / width**0.5) for e in memory]
                read = [
                    sum(a * e[i] for a, e in zip(weights, memory, strict=True)) / sum(weights) for i in range(width)
                ]
                distances += [abs(q - r) for q, r in zip(query, read, strict=True)]
                refined[n, :, y, x] = feature[n, :, y, x].double() + torch.tensor(one_pixel(read, out_w, out_b))
    return refined, sum(distances) / len(distances)


def test_equation_2_and_its_loss() -> None:
    module = noisy(MemoryBank(8, entries=7, embedding=3, groups=4))
    feature = torch.randn(2, 8, 3, 4)
    refined, quantisation = by_loops(module, feature)
    found, loss = module.refine(feature)
    assert (found - refined).abs().max() < 1e-5
    assert abs(loss.item() - quantisation) < 1e-5
    assert torch.equal(module(feature), found)
    assert (refined - feature).abs().max() > 0.1


def test_the_loss_of_the_official_block(golden: ModuleType) -> None:
    """Its `qloss` depends on the normalisation, the query and the memory alone, so it pins all three."""
    case = golden.load("mana_attention")
    state, clip = case.state_dict(), case.input()
    width, entries = state["mb"].shape
    module = MemoryBank(clip.shape[2], entries, width)
    renamed = {"norm": "norm", "query": "phi", "output": "W_z1"}
    ours = {f"{to}.{end}": state[f"{name}.{end}"] for to, name in renamed.items() for end in ("weight", "bias")}
    module.load_state_dict(ours | {"memory": state["mb"]})
    with torch.no_grad():
        loss = module.refine(clip[:, clip.shape[1] // 2])[1]
    assert case.check({"qloss": loss}) < 1e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients(layout: torch.memory_format) -> None:
    module = noisy(MemoryBank(4, entries=3, embedding=2, groups=2)).double()
    feature = torch.randn(2, 4, 2, 3, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def refined(feature: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), feature)

    assert torch.autograd.gradcheck(refined, (feature, *module.parameters()))


def test_starts_as_the_identity_or_not() -> None:
    feature = torch.randn(1, 32, 5, 6)
    assert torch.equal(MemoryBank(32)(feature), feature)
    assert not torch.equal(MemoryBank(32, zero_init=False)(feature), feature)
    module = MemoryBank(32)
    assert module.memory.shape == (16, 256)
    with torch.no_grad():
        module.output.weight.normal_()
    assert not torch.equal(module(feature), feature)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="channels=48 cannot be normalised in groups=32; give groups that divide it"):
        MemoryBank(48)
    with pytest.raises(ValueError, match="channels=16 cannot be normalised in groups=32"):
        attach(BasicVSR(16, 1, flow=SPyNet(levels=2, widths=(4, 4))), bank=MemoryBankPlugin)


def test_a_clip_is_its_frames() -> None:
    plugin = noisy(MemoryBankPlugin(8, sites=("fused",), groups=4, entries=5))
    network = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)
    model = attach(network, bank=plugin)
    seen: list[tuple[Tensor, Tensor]] = []
    plugin.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    context = Context(torch.rand(2, 3, 3, 6, 7))
    model(context.frames, context)
    ((clip, refined),) = seen
    assert clip.shape == (2, 3, 8, 6, 7)
    results = [plugin.at["fused"].refine(clip[:, t]) for t in range(3)]
    torch.testing.assert_close(refined, torch.stack([frame for frame, _ in results], 1))
    torch.testing.assert_close(context.losses, {"bank/quantisation": sum(loss for _, loss in results) / 3})


def test_the_loss_is_the_mean_over_sites_and_steps() -> None:
    plugin = noisy(MemoryBankPlugin(8, groups=4, entries=5))
    network = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)
    losses: list[Tensor] = []
    for site in plugin.sites:
        refine = plugin.at[site].refine
        plugin.at[site].refine = lambda feature, refine=refine: losses.append(refine(feature)[1]) or refine(feature)
    context = Context(torch.rand(1, 3, 3, 6, 7))
    attach(network, bank=plugin)(context.frames, context)
    assert len(losses) == 3 + 3 + 1
    torch.testing.assert_close(context.losses["bank/quantisation"], torch.stack(losses).mean())
