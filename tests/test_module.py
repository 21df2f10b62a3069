"""Training under Lightning: what moves, at what rate, by which loss; averages, validation, and resuming to the bit."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from vsrplug import Context, Plugin, VSRDataModule, VSRModule, attach
from vsrplug.backbones import EDVR, STVUN, BasicVSR, SlidingWindow, SPyNet
from vsrplug.callbacks import EMA
from vsrplug.checkpoints import WholeCheckpoints
from vsrplug.degradations import BI
from vsrplug.evaluation import evaluate
from vsrplug.losses import charbonnier, l1
from vsrplug.metrics import psnr
from vsrplug.module import clip_network
from vsrplug.plugged import PluggedModel
from vsrplug.plugins import MemoryBankPlugin, SEEMPlugin
from vsrplug.protocols import Protocol
from vsrplug.tuning import Staged, Tuning


class Clip:
    """Frames in memory."""

    def __init__(self, name: str, frames: int = 6, size: tuple[int, int] = (48, 64)) -> None:
        self.name = name
        self.pixels = torch.randint(0, 256, (frames, 3, *size), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        return (frame.float() / 255 for frame in self.pixels[start:stop])


class Noisy(Plugin):
    """Draws random numbers in training, as dropout does."""

    default_sites = ("fused",)

    def __init__(self, channels: int, *, sites: tuple[str, ...] | None = None) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict({site: nn.Conv2d(channels, channels, 1) for site in self.sites})

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        frames = feature.flatten(0, 1)
        return feature + (self.at[site](frames) * torch.randn_like(frames)).view_as(feature)


def superpixels(lr: Tensor) -> Tensor:
    """Two masks a frame."""
    return torch.stack([lr[:, 0] > 0.5, lr[:, 1] > 0.5], 1).float()


def recurrent(**plugins: Any) -> PluggedModel:
    torch.manual_seed(1)
    backbone = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4, 4, 4)), reconstruction_channels=4)
    return attach(backbone, **plugins)


def plugged() -> PluggedModel:
    return recurrent(seem=partial(SEEMPlugin, masks=2), bank=partial(MemoryBankPlugin, groups=4, entries=4))


def trainer(steps: int, *callbacks: Any, **arguments: Any) -> lightning.Trainer:
    defaults: dict[str, Any] = {"val_check_interval": 10**6, "logger": False, "enable_checkpointing": False}
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **defaults | arguments,
    )


def data(**arguments: Any) -> VSRDataModule:
    torch.manual_seed(2)
    clips = [Clip("a"), Clip("b", 5)]
    return VSRDataModule(clips, BI(), **{"frames": 3, "patch": 8, "batch_size": 2, "masks": superpixels} | arguments)


def batch(frames: int = 3, size: int = 8) -> dict[str, Any]:
    lr, hr = torch.rand(2, frames, 3, size, size), torch.rand(2, frames, 3, 4 * size, 4 * size)
    return {"lr": lr, "hr": hr, "masks": (torch.rand(2, frames, 2, size, size) > 0.5).float()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Record(lightning.Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(weights(pl_module.model))


class Kill(lightning.Callback):
    """Ends the process, as far as a test can, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("ema", "accumulate", "tuning"),
    [(False, 1, Tuning(["plugins.*"])), (True, 1, Tuning(rates={"*.spynet.*": 0.125})), (True, 2, Tuning())],
)
def test_a_killed_run_goes_on_to_the_weights_of_an_undisturbed_one(
    tmp_path: Path, ema: bool, accumulate: int, tuning: Tuning
) -> None:
    def fit(folder: str, *callbacks: Any, ckpt: Path | None = None) -> VSRModule:
        model = plugged()
        module = VSRModule(
            attach(model.backbone, **dict(model.plugins), noisy=Noisy(8)),
            tuning,
            optimizer=partial(torch.optim.Adam, lr=1e-2),
            schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=8),
            losses={"pixel": 1.0, "*/quantisation": 0.1},
            seed=3,
        )
        # Under one name, as `vsrplug train` keeps them.
        saving = ModelCheckpoint(tmp_path / folder, "last", every_n_train_steps=2, enable_version_counter=False)
        averages = [EMA(decay=0.5)] if ema else []
        arguments = {"enable_checkpointing": True, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
        running = trainer(8, saving, *averages, *callbacks, plugins=[WholeCheckpoints()], **arguments)
        torch.manual_seed(zlib.crc32(str(folder).encode()))  # the global generator may be anywhere
        running.fit(module, data(), ckpt_path=ckpt, weights_only=True)
        return module

    whole = fit("whole")
    with pytest.raises(RuntimeError, match="killed"):
        fit("killed", Kill(5))
    resumed = fit("killed", ckpt=tmp_path / "killed" / "last.ckpt")
    first = weights(plugged())
    for name, value in weights(whole.model).items():
        assert torch.equal(value, resumed.model.get_parameter(name)), name
        if tuning.train == ["plugins.*"] and name.startswith("backbone."):
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("train", [["*"], ["plugins.*"], ["plugins.bank.*"]])
def test_exactly_the_expected_parameters_move(train: list[str], ema: bool) -> None:
    module = VSRModule(plugged(), Tuning(train), optimizer=partial(torch.optim.Adam, lr=1e-2))
    before = weights(module.model)
    fitted = trainer(3, *([EMA(decay=0.9)] if ema else []))  # 0.9: arithmetic that is not exact by luck
    fitted.fit(module, data())
    moved = {name for name, value in weights(module.model).items() if not torch.equal(value, before[name])}
    prefix = train[0].rstrip("*")
    assert {name for name in before if name.startswith(prefix)} == moved
    optimized = {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.model.parameters() if p.requires_grad}
    assert module.trainable == sum(before[name].numel() for name in moved)


def test_rates_scale_the_step_and_the_schedule_keeps_the_ratio() -> None:
    """Two steps of SGD by hand: each group goes down its gradient at its own rate, on the cosine."""
    lr, steps = 0.5, 4
    tuning = Tuning(rates={"backbone.spynet.*": 0.125, "plugins.*": 2.0})
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
    module = VSRModule(plugged(), tuning, optimizer=partial(torch.optim.SGD, lr=lr), schedule=schedule)
    record, samples = Record(), data()
    trainer(2, record, gradient_clip_val=None).fit(module, samples)
    model = plugged()
    for step in range(2):
        parts = [samples.samples[2 * step + i] for i in range(2)]
        lr_clip, hr, masks = (torch.stack([part[key] for part in parts]) for key in ("lr", "hr", "masks"))
        loss = charbonnier(model(lr_clip, Context(lr_clip, masks=masks)), hr)
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                rate = 0.125 if name.startswith("backbone.spynet.") else 2.0 if name.startswith("plugins.") else 1.0
                if gradient is not None:
                    parameter -= lr * rate * cosine * gradient
                assert torch.allclose(record.steps[step][name], parameter, atol=1e-6), (step, name)


def test_gradient_clipping_bounds_the_step() -> None:
    module = VSRModule(plugged(), Tuning(), optimizer=partial(torch.optim.SGD, lr=1.0))
    before = weights(module.model)
    trainer(1, gradient_clip_val=1e-3).fit(module, data())
    steps = [(value - before[name]).double() for name, value in weights(module.model).items()]
    assert math.sqrt(sum(float(step.square().sum()) for step in steps)) == pytest.approx(1e-3, rel=1e-2)


def test_averaged_weights_are_what_validation_sees_and_what_remains() -> None:
    """Against an average in float64: the weights after the first step, then kept * average + (1 - kept) * weights."""
    decay, seen = 0.2, []

    class Spy(lightning.Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(weights(pl_module.model))  # two validations of one clip

    module = VSRModule(
        plugged(), Tuning(["plugins.*"]), optimizer=partial(torch.optim.Adam, lr=1e-2), validation=protocol(Clip("c"))
    )
    record = Record()
    averaging = EMA(decay=decay)
    trainer(4, record, averaging, Spy(), val_check_interval=2).fit(module, data(validation=module.validation))
    averages = [{name: value.double() for name, value in record.steps[0].items()}]
    for n, step in enumerate(record.steps[1:], 1):
        kept = min(decay, (1 + n) / (10 + n))  # 2/11 the first time, then the decay
        averages.append({name: kept * averages[-1][name] + (1 - kept) * value for name, value in step.items()})
    for average, found in zip((averages[1], averages[3], averages[3]), (*seen, weights(module.model)), strict=True):
        for name, value in found.items():
            assert torch.allclose(value.double(), average[name], atol=1e-6), name
    assert not torch.allclose(record.steps[3]["plugins.bank.at.fused.memory"], seen[1]["plugins.bank.at.fused.memory"])


def test_the_loss_is_the_weighted_sum_of_what_is_named() -> None:
    model, given = plugged(), batch()
    losses = {"pixel": 0.5, "*/quantisation": 0.25}
    module = VSRModule(model, Tuning(), losses=losses, pixel=l1)
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    logged: dict[str, Tensor] = {}
    total = module.training_step(given, 0)
    context = Context(given["lr"], masks=given["masks"])
    sr = model(given["lr"], context)
    pixel, quantisation = (sr - given["hr"]).abs().mean(), context.losses["bank/quantisation"]
    assert total.item() == pytest.approx(0.5 * pixel.item() + 0.25 * quantisation.item(), rel=1e-6)
    assert {name: value.item() for name, value in logged.items()} == pytest.approx(
        {"train/pixel": pixel.item(), "train/bank/quantisation": quantisation.item()}
    )
    assert not any(value.requires_grad for value in logged.values())


def test_an_auxiliary_loss_alone_reaches_nothing_behind_it() -> None:
    module = VSRModule(plugged(), Tuning(["plugins.*"]), losses={"bank/quantisation": 1.0})
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    module.training_step(batch(), 0).backward()
    reached = {name for name, p in module.model.named_parameters() if p.grad is not None and p.grad.any()}
    last = {name.removeprefix("plugins.bank.at.fused.") for name in reached if "bank.at.fused." in name}
    assert last == {"memory", "norm.weight", "norm.bias", "query.weight", "query.bias"}  # and not the output


def test_a_loss_that_nothing_reports_is_an_error_that_says_what_exists() -> None:
    module = VSRModule(plugged(), Tuning(), losses={"pixel": 1.0, "bank/quantization": 0.1})
    message = r"losses: there is no loss that matches 'bank/quantization'; did you mean 'bank/quantisation'\? Known: "
    with pytest.raises(ValueError, match=message + r"pixel, bank/quantisation\.$"):
        module.training_step(batch(), 0)
    with pytest.raises(ValueError, match=r"no loss that matches 'flow'.*Known: pixel\.$"):  # no true flow in this batch
        VSRModule(recurrent(), Tuning(), losses={"flow": 1.0}).training_step(batch(), 0)


def test_the_flow_loss_is_the_distance_to_the_true_flow() -> None:
    model, given = recurrent(), batch()
    true = {way: torch.randn(2, 2, 2, 8, 8) for way in ("flow_backward", "flow_forward")}
    module = VSRModule(model, Tuning(), losses={"flow": 0.02})
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    loss = module.training_step(given | true, 0)
    lr, distances = given["lr"], []
    for b, i in np.ndindex(2, 2):
        earlier, later = lr[b : b + 1, i], lr[b : b + 1, i + 1]
        for way, (reference, supporting) in (("flow_backward", (earlier, later)), ("flow_forward", (later, earlier))):
            flow = model.backbone.spynet(reference, supporting)[0]  # type: ignore[operator]
            off = (flow - true[way][b, i]).detach().double().numpy()
            distances.append(np.sqrt((off**2).sum(0)).mean())
    assert loss.item() == pytest.approx(0.02 * np.mean(distances), rel=1e-4)
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained
    assert all(name.startswith("backbone.spynet.") for name in trained)


def edvr() -> PluggedModel:
    torch.manual_seed(1)
    return attach(EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=2))


def protocol(*clips: Clip) -> Protocol:
    return Protocol("tiny_bi_y", clips or [Clip("c", 4, (48, 48)), Clip("d", 3, (48, 64))], BI(), "y", border=2)


def test_a_window_network_is_trained_on_the_centre_frame() -> None:
    module, given = VSRModule(edvr(), Tuning()), batch()
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    loss = module.training_step(given, 0)
    sr = module(given["lr"])
    assert sr.shape[1] == 1
    assert loss.item() == pytest.approx(charbonnier(sr[:, 0], given["hr"][:, 1]).item(), rel=1e-6)
    longer = {
        key: torch.cat((torch.rand_like(clip[:, :1]), clip, torch.rand_like(clip)), 1) for key, clip in given.items()
    }
    middle = {key: clip[:, 2:5] for key, clip in longer.items()}  # of seven frames
    assert torch.equal(module.training_step(longer, 0), module.training_step(middle, 0))
    before = weights(module.model)
    trainer(2).fit(module, data(masks=None))
    assert any(not torch.equal(value, before[name]) for name, value in weights(module.model).items())


def stvun(**arguments: Any) -> PluggedModel:
    torch.manual_seed(1)
    return attach(STVUN(4, frames=3, flow=SPyNet(levels=2, widths=(4, 4, 4, 4)), **arguments))


def with_frames_in_between(count: int, frames: int = 3) -> dict[str, Any]:
    between = batch(count)
    return batch(frames) | {"lr_between": between["lr"], "hr_between": between["hr"]}


@pytest.mark.parametrize("times", [(), (0.1, 0.2)])
def test_space_time_losses_are_those_of_the_paper(times: tuple[float, ...]) -> None:
    """Eq. 7, 9, 11 and 12, frame by frame; the network's own times do not count."""
    model, given = stvun(times=times), with_frames_in_between(3, frames=5)
    module = VSRModule(model, Tuning(), losses={"interpolated": 2.0, "pixel": 3.0, "between": 5.0}, pixel=l1)
    logged: dict[str, Tensor] = {}
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    total = module.training_step(given, 0)
    window = given["lr"][:, 1:4]
    losses = {"pixel": 0.0, "between": 0.0, "interpolated": 0.0}
    for k, time in enumerate((0.25, 0.5, 0.75)):
        context = Context(window)
        sr = model(window, context, times=(time,))
        low = context.memo["interpolated"][:, 0]
        losses["pixel"] = (sr[:, 0] - given["hr"][:, 2]).abs().mean().item()
        losses["between"] += (sr[:, 1] - given["hr_between"][:, k]).abs().mean().item()
        losses["interpolated"] += (low - given["lr_between"][:, k]).abs().mean().item()
    assert {name: value.item() for name, value in logged.items()} == pytest.approx(
        {f"train/{name}": value for name, value in losses.items()}, rel=1e-5
    )
    expected = 2 * losses["interpolated"] + 3 * losses["pixel"] + 5 * losses["between"]
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_the_interpolated_frames_teach_the_flow_alone() -> None:
    module = VSRModule(stvun(), Tuning(), losses={"interpolated": 1.0})
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    module.training_step(with_frames_in_between(1), 0).backward()
    reached = {name for name, p in module.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached
    assert all(name.startswith("backbone.pwcnet.") for name in reached)


def test_frames_in_between_are_not_made_while_no_loss_asks_for_them() -> None:
    given, asked = with_frames_in_between(2), []
    module = VSRModule(stvun(), Tuning(freeze=["flow"]), losses={"pixel": 1.0}, pixel=l1)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    module.model.backbone.register_forward_pre_hook(lambda _, __, kw: asked.append(kw["times"]), with_kwargs=True)
    loss = module.training_step(given, 0)
    assert asked == [()]
    plain = {key: given[key] for key in ("lr", "hr")}
    assert torch.equal(loss, VSRModule(stvun(), Tuning(freeze=["flow"]), pixel=l1)._loss(plain, {"pixel": 1.0})[0])
    message = r"losses: there is no loss that matches 'between'\..* Known: pixel\.$"
    for model, samples in ((stvun(), plain), (edvr(), given)):  # no such frames in the data; a network without
        with pytest.raises(ValueError, match=message):
            VSRModule(model, Tuning(), losses={"between": 1.0})._loss(samples, {"between": 1.0})


def test_space_then_space_time_trains_each_phase_part() -> None:
    parts = [f"backbone.{part}.*" for part in ("encoder", "fusion", "decoder")]
    tuning = Staged(
        {
            "space": {"steps": 2, "train": parts, "lr": 1e-3, "losses": {"pixel": 1.0}},
            "space_time": {"train": ["*"], "lr": 1e-3, "losses": {"interpolated": 1.0, "pixel": 1.0, "between": 1.0}},
        }
    )
    module, record = VSRModule(stvun(), tuning), Record()
    first = weights(module.model)
    torch.manual_seed(2)
    samples = VSRDataModule([Clip("a", 7), Clip("b", 5)], BI(), frames=3, patch=8, batch_size=2, between=1)
    trainer(4, record).fit(module, samples)

    def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
        return {name.split(".")[1] for name, value in after.items() if not torch.equal(value, before[name])}

    assert moved(first, record.steps[1]) == {"encoder", "fusion", "decoder"}
    assert moved(record.steps[1], record.steps[3]) == {"encoder", "fusion", "decoder", "pwcnet"}


def test_an_output_of_another_length_or_size_is_refused() -> None:
    """One frame would be compared with each of several, without a word."""
    given = batch()
    for key, clip in (("hr", given["hr"][..., ::2, ::2]), ("hr", given["hr"][:, :1])):
        with pytest.raises(
            ValueError, match=r"the model returned \(2, 3, 3, 32, 32\) for frames \(2, 3, 3, 8, 8\), the gr"
        ):
            VSRModule(recurrent(), Tuning())._loss(given | {key: clip}, {"pixel": 1.0})


@pytest.mark.parametrize("make", [edvr, recurrent, plugged])
def test_validation_reports_the_protocols_figures_of_whole_clips(make: Any) -> None:
    measured, masks = protocol(), superpixels if make is plugged else None
    module = VSRModule(make(), Tuning(), validation=measured)
    validating = trainer(0)
    samples = data(masks=masks, validation=measured)
    (figures,) = validating.validate(module, samples, verbose=False)
    report = evaluate(clip_network(module.model), measured, masks=masks, progress=False)
    expected = {"val/tiny_bi_y/psnr": report.psnr, "val/tiny_bi_y/ssim": report.ssim}
    assert figures == pytest.approx(expected, rel=1e-5)  # Lightning averages in float32


def test_validation_of_a_window_network_restores_every_frame() -> None:
    module = VSRModule(edvr(), Tuning(), validation=protocol())
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    logged: dict[str, float] = {}
    clip = Clip("c", 4, (48, 48))
    hr = torch.stack(list(clip.frames()))
    lr = BI()(hr)[None]
    with torch.inference_mode():
        outputs = module.validation_step({"lr": lr, "hr": hr[None], "name": ["c"]}, 0)
        assert outputs is not None
        windows = [[2, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 1]]  # "reflection_circle" by hand
        by_hand = torch.cat([module.model(lr[:, window]) for window in windows], 1)
    assert torch.allclose(outputs["sr"], by_hand, atol=1e-5)
    assert logged["val/tiny_bi_y/psnr"] == pytest.approx(psnr(by_hand[0], hr, "y", 2).mean().item(), abs=1e-3)


def test_without_a_protocol_nothing_is_validated() -> None:
    assert VSRModule(recurrent(), Tuning()).validation_step(batch(), 0) is None


def test_clip_network_leaves_recurrent_networks_alone() -> None:
    model = recurrent()
    assert clip_network(model) is model
    assert isinstance(clip_network(edvr()), SlidingWindow)
