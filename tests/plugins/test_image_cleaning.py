"""`ImageCleaning` against the official RealBasicVSR, and against its definition written out in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug import Context, attach, load_official
from vsrplug.backbones import EDVR, BasicVSR, SPyNet
from vsrplug.plugins import ImageCleaning, ImageCleaningPlugin, cleaning_loss, image_cleaning


def noisy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def small_basicvsr() -> BasicVSR:
    return BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8)


def convolved(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """A 3x3 convolution with zero border as a product with every neighbourhood, in float64."""
    weight, bias = state[f"{name}.weight"].double(), state[f"{name}.bias"].double()
    columns = F.unfold(x, 3, padding=1)
    return (weight.flatten(1) @ columns + bias[:, None]).unflatten(2, x.shape[-2:])


def one_pass(state: dict[str, Tensor], frame: Tensor) -> Tensor:
    """C(x) of one frame (1, 3, h, w), under the official names."""
    x = convolved(frame, state, "0.main.0")
    x = torch.where(x > 0, x, 0.1 * x)
    for block in range(sum(key.endswith("conv1.bias") for key in state)):
        inner = convolved(x, state, f"0.main.2.{block}.conv1").clamp(min=0)
        x = x + convolved(inner, state, f"0.main.2.{block}.conv2")
    return convolved(x, state, "1")


def by_definition(state: dict[str, Tensor], clip: Tensor, threshold: float) -> tuple[Tensor, list[float]]:
    """Dynamic refinement of one clip (t, 3, h, w): frame by frame, and the mean change of each pass, times 255."""
    cleaned, changes = clip.double(), []
    while len(changes) < 3:
        residuals = torch.cat([one_pass(state, frame[None]) for frame in cleaned])
        cleaned = cleaned + residuals
        changes.append(255 * residuals.abs().sum().item() / residuals.numel())
        if changes[-1] < threshold:
            break
    return cleaned, changes


def passes_of(module: ImageCleaning) -> list[int]:
    """A list that grows by one entry with every pass over a batch that is small enough for one piece."""
    counted: list[int] = []
    module.last.register_forward_hook(lambda *_: counted.append(1))
    return counted


@torch.no_grad()
def test_the_official_network(golden: ModuleType) -> None:
    case = golden.load("mmagic_realbasicvsr")
    made, state = case.constructor, case.state_dict()
    network = BasicVSR(channels=made["mid_channels"], blocks=made["num_propagation_blocks"])
    load_official(network, part(state, "basicvsr."))
    plugin = ImageCleaningPlugin(
        3, width=made["mid_channels"], blocks=made["num_cleaning_blocks"], threshold=made["dynamic_refine_thres"]
    )
    report = load_official(plugin.at["input"], part(state, "image_cleaning."))
    assert not report.ignored
    model, frames = attach(network, cleaning=plugin).eval(), case.input()
    kept = frames.clone()
    assert case.check({"out": model(frames)}) <= 1e-5
    assert torch.equal(frames, kept)
    assert case.check({"out": network(frames)}) > 0.01  # without cleaning it is another network


@pytest.mark.parametrize(("name", "passes"), [("refine", 3), ("stop2", 2)])
@torch.no_grad()
def test_the_official_cases_of_dynamic_refinement(golden: ModuleType, name: str, passes: int) -> None:
    case = golden.load(f"mmagic_realbasicvsr_{name}")
    made, state = case.constructor, part(case.state_dict(), "image_cleaning.")
    threshold = made["dynamic_refine_thres"]
    module = ImageCleaning(width=made["mid_channels"], blocks=made["num_cleaning_blocks"], threshold=threshold)
    load_official(module, state)
    counted = passes_of(module.eval())
    frames = case.input()
    cleaned = module(frames)
    expected, changes = by_definition(state, frames[0], threshold)
    assert len(counted) == len(changes) == passes
    assert [change < threshold for change in changes] == [False] * (passes - 1) + [passes < 3]
    torch.testing.assert_close(cleaned[0].double(), expected, rtol=0, atol=1e-5)
    counted.clear()
    torch.testing.assert_close(
        module.train()(frames)[0].double(), frames[0] + one_pass(state, frames[0].double()), rtol=0, atol=1e-5
    )
    assert len(counted) == 1  # training never refines


def test_official_keys_in_order(golden: ModuleType) -> None:
    official = golden.full_size("mmagic_realbasicvsr_64_20_20")
    keys = [(key, shape) for key, shape, _ in official["state_dict"] if key.startswith("image_cleaning.")]
    module = ImageCleaning()
    load_official(module, {key.removeprefix("image_cleaning."): torch.ones(shape) for key, shape in keys})
    assert [list(value.shape) for value in module.state_dict().values()] == [shape for _, shape in keys]
    assert all(bool((parameter == 1).all()) for parameter in module.parameters())
    assert sum(p.numel() for p in module.parameters()) == 1_480_643


def batch_of_unlike_clips() -> tuple[ImageCleaning, Tensor]:
    """A module and three clips of which the first is clean after one pass, the second after two, the third never."""
    module = ImageCleaning(width=4, blocks=1, threshold=255 * 0.02)
    with torch.no_grad():  # C(x) = -x / 2 for x > 0
        for parameter in module.parameters():
            parameter.zero_()
        for channel in range(3):
            module.first.weight[channel, channel, 1, 1] = 1
            module.last.weight[channel, channel, 1, 1] = -0.5
    return module.eval(), torch.tensor([0.03, 0.06, 0.8]).view(3, 1, 1, 1, 1).expand(3, 2, 3, 5, 7).clone()


def test_each_clip_of_a_batch_stops_on_its_own() -> None:
    module, clips = batch_of_unlike_clips()
    kept = clips.clone()
    together = module(clips)
    assert torch.equal(clips, kept)
    for clip, cleaned, factor in zip(clips, together, (0.5, 0.25, 0.125), strict=True):
        torch.testing.assert_close(cleaned, factor * clip)
        torch.testing.assert_close(module(clip[None])[0], cleaned)
    counted = passes_of(module)
    module(clips[:1])
    assert len(counted) == 1
    torch.testing.assert_close(module.train()(clips), 0.5 * clips)


def test_compiled_stops_where_it_should() -> None:
    torch._dynamo.reset()  # the limit on recompilations counts over the whole process
    module, clips = batch_of_unlike_clips()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(clips), module(clips))


def test_threshold_zero_makes_all_passes() -> None:
    module = ImageCleaning(width=4, blocks=1, threshold=0, passes=4).eval()
    counted, frames = passes_of(module), torch.rand(1, 2, 3, 5, 4)
    assert torch.equal(module(frames), frames)
    assert len(counted) == 4
    counted.clear()
    module.threshold = 1e-3
    assert torch.equal(module(frames), frames)  # untrained, nothing changes: clean after one pass
    assert len(counted) == 1


@torch.no_grad()
def test_bounded_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, frames = noisy(ImageCleaning(width=4, blocks=1)).eval(), torch.rand(2, 5, 3, 6, 9)
    whole, counted = module(frames), passes_of(module)
    monkeypatch.setattr(image_cleaning, "CHUNK_PIXELS", 3 * 6 * 9)
    torch.testing.assert_close(module(frames), whole)
    assert len(counted) % 4 == 0  # ten frames in pieces of three


def test_gradients() -> None:
    module = noisy(ImageCleaning(width=2, blocks=1, threshold=0, passes=2, zero_init=False)).double().eval()
    frames = torch.rand(1, 2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def cleaned(frames: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), frames)

    assert torch.autograd.gradcheck(cleaned, (frames, *module.parameters()))


def test_starts_as_the_identity_or_not() -> None:
    frames = torch.rand(1, 2, 3, 7, 5)
    assert torch.equal(ImageCleaning(width=4, blocks=2)(frames), frames)
    assert not torch.equal(ImageCleaning(width=4, blocks=2, zero_init=False)(frames), frames)


@pytest.mark.parametrize("scale", [1, 3])
def test_the_loss_is_that_against_the_averaged_truth(scale: int) -> None:
    cleaned = torch.rand(2, 3, 3, 5, 4)
    target = torch.rand(2, 3, 3, 5 * scale, 4 * scale)
    total = 0.0
    for index in torch.cartesian_prod(*(torch.arange(n) for n in cleaned.shape)).tolist():
        b, t, c, y, x = index
        block = target[b, t, c, scale * y : scale * (y + 1), scale * x : scale * (x + 1)].double()
        total += abs(cleaned[b, t, c, y, x].item() - block.sum().item() / scale**2)
    assert cleaning_loss(cleaned, target).item() == pytest.approx(total / cleaned.numel(), abs=1e-6)
    halved = cleaning_loss(cleaned.bfloat16(), target.bfloat16())
    assert halved.dtype == torch.float32
    assert halved.item() == pytest.approx(total / cleaned.numel(), abs=0.01)


def test_reported_only_where_there_is_a_target() -> None:
    plugin = noisy(ImageCleaningPlugin(3, width=4, blocks=1))
    model, frames = attach(small_basicvsr(), cleaning=plugin).train(), torch.rand(1, 2, 3, 6, 9)
    context = Context(frames)
    model(frames, context)
    assert context.losses == {}
    target = torch.rand(1, 2, 3, 24, 36)
    context = Context(frames, target=target)
    model(frames, context)
    torch.testing.assert_close(
        context.losses, {"cleaning/cleaning": cleaning_loss(plugin.at["input"](frames), target)}, rtol=0, atol=0
    )
    context.losses["cleaning/cleaning"].backward()
    assert [name for name, p in plugin.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_everything_behind_sees_the_cleaned_frames() -> None:
    network = small_basicvsr().eval()
    plugin = noisy(ImageCleaningPlugin(3, width=4, blocks=1))
    model, frames = attach(network, cleaning=plugin), torch.rand(2, 3, 3, 9, 8)
    with torch.no_grad():
        assert torch.equal(model(frames), network(plugin.at["input"](frames)))


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="passes is 0; expected 1 or more"):
        ImageCleaning(passes=0)
    with pytest.raises(ValueError, match=r"must be \(b, t, 3, h, w\), got \(2, 3, 8, 8\); one frame is a clip with"):
        ImageCleaning(width=4, blocks=1)(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must be \(b, t, 1, h, w\), got \(1, 2, 3, 8, 8\)"):
        ImageCleaning(1, width=4, blocks=1)(torch.rand(1, 2, 3, 8, 8))
    for target in (torch.rand(1, 2, 3, 14, 16), torch.rand(1, 3, 3, 16, 16), torch.rand(1, 2, 3, 2, 2)):
        with pytest.raises(ValueError, match=r"\(1, 2, 3, 4, 4\) are compared with a target .*; crop the ground truth"):
            cleaning_loss(torch.rand(1, 2, 3, 4, 4), target)
    edvr = EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=4)
    with pytest.raises(ValueError, match="got channels=8; put it at a clip site of 3 channels such as 'input'"):
        attach(edvr, cleaning=lambda channels: ImageCleaningPlugin(8, sites=("features",)))
    with pytest.raises(ValueError, match="serves clip sites, but 'fused' is a frame site"):
        attach(edvr, cleaning=ImageCleaningPlugin(3, sites=("fused",)))
