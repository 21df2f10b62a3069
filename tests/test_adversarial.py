"""Adversarial training: losses in float64, two optimizers in turn by hand, who moves when, resuming to the bit."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from vsrplug import Context, attach
from vsrplug.adversarial import AdversarialModule, cross_entropy
from vsrplug.backbones import RealBasicVSR, SPyNet
from vsrplug.callbacks import EMA
from vsrplug.checkpoints import WholeCheckpoints
from vsrplug.discriminator import UNetDiscriminator
from vsrplug.losses import l1
from vsrplug.perceptual import PerceptualLoss
from vsrplug.plugged import PluggedModel
from vsrplug.real_degradation import sharpen
from vsrplug.tuning import Staged, Tuning

from .test_module import Kill, data, trainer

WEIGHTS = {"pixel": 1.0, "backbone/cleaning": 0.5, "adversarial": 0.05}
PHASES = {
    "alone": {"steps": 3, "losses": {"pixel": 1.0, "backbone/cleaning": 1.0}, "freeze": ["flow"]},
    "both": {"steps": 3},
    "afresh": {"lr": 3e-3},
}


def network() -> PluggedModel:
    torch.manual_seed(1)
    return attach(RealBasicVSR(8, 1, 1, flow=SPyNet(levels=2, widths=(4, 4, 4, 4)), reconstruction_channels=4))


def judge() -> UNetDiscriminator:
    torch.manual_seed(2)
    return UNetDiscriminator(4)


def made(tuning: Tuning | Staged | None = None, **arguments: Any) -> AdversarialModule:
    defaults: dict[str, Any] = {
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        "losses": WEIGHTS,
        "pixel": l1,
        "seed": 3,
        "discriminator": judge(),
        "discriminator_lr": 2e-3,
    }
    return AdversarialModule(network(), tuning or Tuning(), **defaults | arguments)


def everything(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def a_batch() -> dict[str, Tensor]:
    return {"lr": torch.rand(1, 3, 3, 8, 8), "hr": torch.rand(1, 3, 3, 32, 32)}


# The discriminator


def test_the_discriminator_is_the_official_network() -> None:
    """Every layer written out in float64; what the official constructor's default has is 4,376,897 parameters."""
    assert sum(parameter.numel() for parameter in UNetDiscriminator().parameters()) == 4_376_897
    torch.manual_seed(0)
    module = UNetDiscriminator(6).eval()
    state = {name: value.double() for name, value in module.state_dict().items()}

    def normal(name: str) -> Tensor:
        weight = state[f"{name}.parametrizations.weight.original"]
        u, v = (state[f"{name}.parametrizations.weight.0.{vector}"] for vector in ("_u", "_v"))
        return weight / (u @ (weight.flatten(1) @ v))

    def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
        columns = F.unfold(x, weight.shape[-1], padding=1, stride=stride)
        size = [math.floor((n + 2 - weight.shape[-1]) / stride) + 1 for n in x.shape[-2:]]
        y = (weight.flatten(1) @ columns).unflatten(2, size)
        return y if bias is None else y + bias.view(-1, 1, 1)

    def leaky(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    def twice(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    frames = torch.rand(2, 3, 16, 24)
    x0 = leaky(convolved(frames.double(), state["first.weight"], state["first.bias"]))
    x1 = leaky(convolved(x0, normal("down.0"), stride=2))
    x2 = leaky(convolved(x1, normal("down.1"), stride=2))
    x3 = leaky(convolved(x2, normal("down.2"), stride=2))
    x4 = leaky(convolved(twice(x3), normal("up.0"))) + x2
    x5 = leaky(convolved(twice(x4), normal("up.1"))) + x1
    x6 = leaky(convolved(twice(x5), normal("up.2"))) + x0
    x7 = leaky(convolved(leaky(convolved(x6, normal("last.0"))), normal("last.1")))
    expected = convolved(x7, state["logits.weight"], state["logits.bias"])
    assert (module(frames) - expected).abs().max() < 1e-5


def test_its_layers_have_spectral_norm_one() -> None:
    module = judge().train()
    for _ in range(200):
        module(torch.rand(1, 3, 8, 8))
    normalised = [layer for layer in module.modules() if hasattr(layer, "parametrizations")]
    assert len(normalised) == 8
    module.eval()
    for layer in normalised:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_it_takes_frames_of_any_size() -> None:
    assert judge()(torch.rand(2, 3, 9, 21)).shape == (2, 1, 9, 21)
    for shape in ((2, 3, 7, 21), (3, 9, 21), (1, 2, 3, 9, 21), (1, 4, 9, 9)):
        with pytest.raises(ValueError, match=r"the discriminator takes frames \(n, 3, h, w\) of 8 x 8 or more, got"):
            judge()(torch.rand(shape))


# Losses


def test_cross_entropy_is_the_mean_of_the_definition() -> None:
    logits = torch.randn(2, 1, 3, 4)
    for true in (True, False):
        terms = [-math.log(1 / (1 + math.exp(-x if true else x))) for x in logits.double().flatten().tolist()]
        assert cross_entropy(logits, true).item() == pytest.approx(np.mean(terms), rel=1e-6)
    assert cross_entropy(logits.bfloat16(), True).dtype == torch.float32


@pytest.fixture
def vgg(tmp_path: Path) -> Path:
    """As much of a file in torchvision's layout as the tests look at, with random weights."""
    torch.manual_seed(4)
    channels = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256)}
    state = {"classifier.6.bias": torch.zeros(1000)}
    for layer, (inputs, outputs) in channels.items():
        state[f"features.{layer}.weight"] = torch.randn(outputs, inputs, 3, 3) / math.sqrt(4 * inputs)
        state[f"features.{layer}.bias"] = torch.randn(outputs) / 10
    torch.save(state, tmp_path / "vgg19.pth")
    return tmp_path / "vgg19.pth"


def test_perceptual_loss_is_the_weighted_distance_of_features(vgg: Path) -> None:
    loss = PerceptualLoss(vgg, {7: 0.3, 2: 0.1})
    state = {name: value.double() for name, value in torch.load(vgg, weights_only=True).items()}

    def features(clip: Tensor) -> tuple[Tensor, Tensor]:
        x = clip.double().flatten(0, 1)
        x = (x - torch.tensor([0.485, 0.456, 0.406]).double().view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).double().view(3, 1, 1)

        def convolved(x: Tensor, layer: int) -> Tensor:
            return F.conv2d(x, state[f"features.{layer}.weight"], state[f"features.{layer}.bias"], padding=1)

        second = convolved(convolved(x, 0).clamp(min=0), 2)
        pooled = second.clamp(min=0).unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
        return second, convolved(convolved(pooled, 5).clamp(min=0), 7)

    sr, hr = torch.rand(2, 2, 3, 12, 8, requires_grad=True), torch.rand(2, 2, 3, 12, 8, requires_grad=True)
    (a2, a7), (b2, b7) = features(sr), features(hr)
    expected = 0.1 * (a2 - b2).abs().mean() + 0.3 * (a7 - b7).abs().mean()
    given = loss(sr, hr)
    assert given.item() == pytest.approx(expected.item(), rel=1e-5)
    by_hand = torch.autograd.grad(expected, sr)[0]
    found = torch.autograd.grad(given, [sr, hr], allow_unused=True)
    assert torch.allclose(found[0], by_hand, atol=1e-7)
    assert found[1] is None
    assert not any(parameter.requires_grad for parameter in loss.network.parameters())


def test_safetensors_will_do(vgg: Path, tmp_path: Path) -> None:
    save_file(torch.load(vgg, weights_only=True), tmp_path / "vgg19.safetensors")
    clips = torch.rand(2, 1, 1, 3, 8, 8)
    one, other = (PerceptualLoss(path, {2: 1.0})(*clips) for path in (vgg, tmp_path / "vgg19.safetensors"))
    assert torch.equal(one, other)


def test_weights_it_cannot_take(vgg: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"VGG19's weights in .*nothing\.pth; download them from https://.*vgg19"
    ):
        PerceptualLoss(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match=r"VGG19Features and .*vgg19.pth do not fit .*missing in the file"):
        PerceptualLoss(vgg)  # it ends before the layers that are asked for
    torch.save({"features.0.weight": nn.Sequential()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="was refused: it asks for the Python object"):
        PerceptualLoss(tmp_path / "code.pth")
    for layers in ({}, {3: 1.0}, {99: 1.0}):
        with pytest.raises(ValueError, match=r"layers are among VGG19's convolutions \[0, 2, 5, 7, 10, .*34\], got"):
            PerceptualLoss(vgg, layers)


# Gradients


def test_gradients_reach_the_right_network_only() -> None:
    module = made()
    batch = a_batch()
    _, values = module._loss(batch, module._weights(0))
    own = list(module.discriminator.parameters())
    model = list(module.model.parameters())
    assert all(parameter.requires_grad for parameter in own)  # again
    for name in ("pixel", "backbone/cleaning", "adversarial"):
        assert not any(torch.autograd.grad(values[name], own, allow_unused=True, retain_graph=True)), name
    assert not any(torch.autograd.grad(values["discriminator"], model, allow_unused=True, retain_graph=True))
    gradients = torch.autograd.grad(values["discriminator"], own, retain_graph=True)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    reached = torch.autograd.grad(values["adversarial"], model, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in reached)


def test_the_steps_are_those_of_two_optimizers_in_turn() -> None:
    """The official order: the model by its losses, then the discriminator on the truth and on what was restored."""
    module, samples = made(), data(masks=None)
    trainer(3).fit(module, samples)
    model, discriminator = network(), judge()
    first = torch.optim.Adam(model.parameters(), lr=1e-2)
    second = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    for step in range(3):
        parts = [samples.samples[2 * step + i] for i in range(2)]
        lr, hr = (torch.stack([part[key] for part in parts]) for key in ("lr", "hr"))
        context = Context(lr, target=hr)
        sr = model(lr, context)
        discriminator.requires_grad_(False)
        said = discriminator(sr.flatten(0, 1))
        loss = l1(sr, hr) + 0.5 * context.losses["backbone/cleaning"] + 0.05 * F.softplus(-said).mean()
        first.zero_grad()
        loss.backward()
        first.step()
        discriminator.requires_grad_(True)
        second.zero_grad()
        F.softplus(-discriminator(hr.flatten(0, 1))).mean().backward()
        F.softplus(discriminator(sr.detach().flatten(0, 1))).mean().backward()
        second.step()
    for found, by_hand in ((module.model, model), (module.discriminator, discriminator)):
        for name, value in by_hand.state_dict().items():
            assert torch.allclose(found.state_dict()[name], value, atol=1e-6), name


# Who moves when


def test_two_steps_move_both_networks_and_nothing_that_is_frozen() -> None:
    module = made(Tuning(freeze=["flow", "*.fusion.*"]))
    before = everything(module)
    fitted = trainer(2, EMA(decay=0.9))
    fitted.fit(module, data(masks=None))
    parameters = {name for name, _ in module.named_parameters()}
    frozen = {name for name in parameters if ".spynet." in name or ".fusion." in name}
    assert frozen
    assert moved(before, everything(module)) & parameters == parameters - frozen
    (optimizer,) = fitted.optimizers
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("x1", 1e-2), ("discriminator", 2e-3)]
    assert fitted.global_step == 2
    assert module.trainable == sum(p.numel() for p in module.model.parameters() if p.requires_grad)


class Steps(Kill):
    """The state after every step, and never a kill."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.states.append(everything(pl_module))


def test_the_discriminator_plays_in_the_phases_that_name_it() -> None:
    steps, called = Steps(), []
    module = made(Staged(PHASES))
    module.discriminator.register_forward_hook(lambda *_: called.append(module.global_step))
    before = everything(module)
    trainer(8, steps).fit(module, data(masks=None))
    for step, state in enumerate(steps.states):
        its = {name for name in moved(steps.states[step - 1] if step else before, state) if "discriminator" in name}
        assert bool(its) == (step >= 3), step
    assert sorted({step for step in called if step > 0}) == [3, 4, 5, 6, 7]  # and 0, by the trial passes
    for phase, plays in enumerate((False, True, True)):  # what DDP waits for
        module._set(phase)
        assert {parameter.requires_grad for parameter in module.discriminator.parameters()} == {plays}
    # Adam's first step is the rate itself, and later ones are not: its state went on in `both`, and began in `afresh`.
    name = "discriminator.logits.bias"
    sizes = [(b[name] - a[name]).abs().item() for a, b in zip(steps.states[2:], steps.states[3:], strict=False)]
    assert sizes[0] == pytest.approx(2e-3, rel=1e-3)
    assert sizes[3] == pytest.approx(2e-3, rel=1e-3)


def test_the_trial_pass_leaves_no_trace() -> None:
    def run(check: bool) -> dict[str, Tensor]:
        module = made()
        if not check:
            module._check_reach = lambda batch: None  # type: ignore[method-assign]
        trainer(2).fit(module, data(masks=None))
        return everything(module)

    assert not moved(run(True), run(False))  # spectral normalisation has vectors that each pass moves


def test_target_is_taught_and_the_truth_is_shown_to_the_discriminator(vgg: Path) -> None:
    """As RealBasicVSR is trained: sharpened frames for pixels, cleaning and perception, true ones for the game."""
    perceptual = PerceptualLoss(vgg, {2: 1.0})
    module = made(target=sharpen, perceptual=perceptual, losses={"*": 1.0})
    shown: list[Tensor] = []
    module.discriminator.register_forward_pre_hook(lambda _, given: shown.append(given[0].detach()))
    batch = a_batch()
    _, values = module._loss(batch, {**WEIGHTS, "perceptual": 1.0})
    sr, sharp = shown[0].unflatten(0, (1, 3)), sharpen(batch["hr"])
    assert not torch.allclose(sharp, batch["hr"], atol=1e-3)
    assert values["pixel"].item() == pytest.approx(l1(sr, sharp).item(), rel=1e-6)
    assert values["perceptual"].item() == pytest.approx(perceptual(sr, sharp).item(), rel=1e-6)
    cleaned = module.model.backbone.image_cleaning(batch["lr"])
    clean = F.avg_pool2d(sharp[0], 4)[None]
    assert values["backbone/cleaning"].item() == pytest.approx(l1(cleaned, clean).item(), rel=1e-5)
    assert torch.equal(shown[1], batch["hr"].flatten(0, 1))
    assert torch.equal(shown[2], shown[0])


def test_a_perceptual_loss_that_is_not_given_is_unknown() -> None:
    with pytest.raises(ValueError, match="there is no loss that matches 'perceptual'"):
        trainer(1).fit(made(losses={"perceptual": 1.0}), data(masks=None))


# Resuming and several devices


@pytest.mark.parametrize("step", [2, 3, 5, 6])
def test_killed_and_resumed_both_networks_are_those_of_an_undisturbed_run(
    tmp_path: Path, step: int, undisturbed: dict[str, Tensor]
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        staged(tmp_path, Kill(step))
    resumed = staged(tmp_path, ckpt=tmp_path / "last.ckpt")
    assert not moved(undisturbed, everything(resumed))


def staged(folder: Path, *callbacks: Any, ckpt: Path | None = None) -> AdversarialModule:
    """Eight steps of three phases with averages and a cosine, saved after every step."""
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=1)
    module = made(Staged(PHASES), schedule=schedule)
    saving = ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)
    running = trainer(8, saving, EMA(decay=0.5), *callbacks, plugins=[WholeCheckpoints()], enable_checkpointing=True)
    torch.manual_seed(zlib.crc32(str(folder).encode()))  # the global generator may be anywhere
    running.fit(module, data(masks=None), ckpt_path=ckpt, weights_only=True)
    return module


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return everything(staged(tmp_path_factory.mktemp("whole")))


def test_constant_weights_are_in_no_checkpoint(vgg: Path) -> None:
    module = made(perceptual=PerceptualLoss(vgg, {2: 1.0}))
    assert {name.partition(".")[0] for name in module.state_dict()} == {"model", "discriminator"}


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_adversaries.py")
    for devices, out in ((1, "one"), (2, "two")):
        arguments = [sys.executable, str(script), str(devices), str(tmp_path / out)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("one.0", "two.0", "two.1"))
    assert first == second  # to the last digit
    for name, values in one.items():
        assert torch.tensor(values).sub(torch.tensor(first[name])).abs().max().item() <= 1e-5, name
