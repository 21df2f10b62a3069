"""`MemoryBank` against eq. 2 written out in float64, and against the loss that the official block computed."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vsrplug import Context, attach, load_official
from vsrplug.backbones import BasicVSR, SPyNet
from vsrplug.maps import recorded
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


def test_the_authors_block(golden: ModuleType) -> None:
    """Its `qloss` depends on the normalisation, the query and the memory alone, so it pins all three."""
    case = golden.load("mana_attention")
    clip, block = case.input(), case.state_dict() | {"D": torch.zeros(256, 256)}
    module = MemoryBank(clip.shape[2], entries=256)
    report = load_official(module, {"params": {f"module.{key}": value for key, value in block.items()}})
    assert sorted(report.loaded) == sorted(module.state_dict())
    of_attention = [f"{name}.{end}" for name in ("W_z", "g", "theta") for end in ("bias", "weight")]
    assert report.ignored == sorted(["D", "std", *of_attention])
    assert (report.missing, report.unexpected) == ([], [])
    with torch.no_grad():
        refined, loss = module.refine(clip[:, clip.shape[1] // 2])
    assert case.check({"qloss": loss}) < 1e-6
    attended = attention_by_hand(block, clip)
    assert case.check({"z": (refined + attended).float()}) < 1e-5


def attention_by_hand(block: dict[str, Tensor], clip: Tensor) -> Tensor:
    """The other residual of the block, MANA eq. 1 as the authors' code has it: every frame by itself, float64."""
    block, frames = {key: value.double() for key, value in block.items()}, clip.double().unbind(1)
    h, w = clip.shape[-2:]
    row, column = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    distance = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2

    def projected(name: str, feature: Tensor) -> Tensor:
        normed = nn.functional.group_norm(feature, 32, block["norm.weight"], block["norm.bias"], eps=1e-6)
        return (
            torch.einsum("oc,bcp->bpo", block[f"{name}.weight"][..., 0, 0], normed.flatten(2)) + block[f"{name}.bias"]
        )

    query, found = projected("phi", frames[len(frames) // 2]), []
    for frame in frames:
        weights = (query @ projected("theta", frame).transpose(1, 2)).softmax(-1)
        found.append(weights * torch.exp(-distance / (2 * block["std"] ** 2)) @ projected("g", frame))
    residual = torch.cat(found, -1) @ block["W_z.weight"][..., 0, 0].T + block["W_z.bias"]
    return residual.transpose(1, 2).unflatten(2, (h, w))


def test_entries_that_are_no_part_of_the_block(golden: ModuleType) -> None:
    block = golden.load("mana_attention").state_dict()
    module = MemoryBank(64)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 unexpected in the file: W_z2.weight"):
        load_official(module, block | {"W_z2.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 missing in the file: memory"):
        load_official(module, {key: value for key, value in block.items() if key != "mb"})
    with pytest.raises(ValueError, match=r"of another shape: memory \(32, 512\) here, \(32, 256\) there"):
        load_official(MemoryBank(64, entries=512), block)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    load_official(module, MemoryBank(64).state_dict())  # of our own making


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [value for value in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(value, Tensor)]
        self.elements = max([self.elements, *(value.numel() for value in made)])
        return out


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("entries", [128, 1024])
def test_no_matrix_of_pixels_by_entries(entries: int, layout: torch.memory_format) -> None:
    module, feature = noisy(MemoryBank(32, entries)), torch.randn(1, 32, 50, 60).to(memory_format=layout)
    with Largest() as seen:
        refined, loss = module.refine(feature.requires_grad_())
        (refined.square().mean() + loss).backward()
    assert seen.elements == feature.numel() < 50 * 60 * entries


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


def test_maps_of_the_recall_by_loops() -> None:
    plugin = noisy(MemoryBankPlugin(8, sites=("fused",), groups=4, entries=5))
    network = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)
    seen: list[Tensor] = []
    plugin.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    model = attach(network, bank=plugin)
    with torch.no_grad(), recorded(model, 1, (0, 0)) as maps:
        model(torch.rand(2, 3, 3, 6, 7))
    bank: Any = plugin.at["fused"]
    query = bank.query(bank.norm(seen[0][:, 1]))[0].double().detach()
    planes = maps["bank, recall at fused"]
    for y in range(6):
        for x in range(7):
            scores = [
                sum(q * m for q, m in zip(query[:, y, x].tolist(), e, strict=True)) for e in bank.memory.T.tolist()
            ]
            exponents = [math.exp(score / len(query) ** 0.5) for score in scores]
            weights = [value / sum(exponents) for value in exponents]
            entropy = -sum(weight * math.log2(weight) for weight in weights)
            assert abs(planes["entropy, bits"][y, x].item() - entropy) < 1e-5
            assert planes["strongest entry"][y, x] == weights.index(max(weights))
    assert 0 < planes["entropy, bits"].min() < planes["entropy, bits"].max() < math.log2(5)
