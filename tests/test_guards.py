"""Guards of a training run: offsets pushed up on purpose, numbers that are none, and runs they leave to the bit."""

from __future__ import annotations

import csv
import json
import math
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset
from torchvision.ops import DeformConv2d

from vsrplug import VSRDataModule, VSRModule, attach
from vsrplug.backbones import EDVR, BasicVSR, SPyNet
from vsrplug.callbacks import EMA
from vsrplug.checkpoints import WholeCheckpoints
from vsrplug.degradations import BI
from vsrplug.finite_guard import FiniteGuard
from vsrplug.offset_guard import Action, OffsetGuard
from vsrplug.offsets import alignment_layers
from vsrplug.plugged import PluggedModel
from vsrplug.plugins import FlowGuidedDeformableAlignmentPlugin
from vsrplug.tuning import Staged, Tuning

ACTIONS = get_args(Action)


class Clip:
    """Frames in memory."""

    def __init__(self, name: str, frames: int = 5, size: tuple[int, int] = (48, 48)) -> None:
        self.name = name
        self.pixels = torch.randint(0, 256, (frames, 3, *size), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        return (frame.float() / 255 for frame in self.pixels[start:stop])


def edvr() -> PluggedModel:
    torch.manual_seed(1)
    return attach(EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=2))


def guided() -> PluggedModel:
    torch.manual_seed(1)
    backbone = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4, 4, 4)), reconstruction_channels=4)
    return attach(backbone, align=partial(FlowGuidedDeformableAlignmentPlugin, groups=2))


# What is pushed, its mean offset then, and its limit at a threshold of 50 pixels.
PUSHED = {
    "edvr": (edvr, "backbone.pcd_align.dcn_pack.l2", 80.0, 50.0),
    "guided": (guided, "plugins.align.at.forward_warped", 10.0, 9.0),
}
BOTH = pytest.mark.parametrize("pushed", PUSHED)


class Push(lightning.Callback):
    """Adds to the bias of what predicts a layer's offsets, after a step; comes after the guard."""

    def __init__(self, layer: str, step: int, by: float = 80.0) -> None:
        self.layer, self.step, self.by = layer, step, by

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert hooks(pl_module) == 0  # what comes between steps, such as validation, sees the network as it is
        if trainer.global_step == self.step:
            (found,) = (x for x in alignment_layers(pl_module.model) if x.name == self.layer)
            with torch.no_grad():
                found.parameters[-1][: found.channels] += self.by


class Record(lightning.Callback):
    """Rates and samples before every step; weights, averages and the optimizer's state after it."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.averages: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []
        self.samples: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.samples.append(batch["hr"].double().sum().item())
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append(
            {k: v.detach().clone() for k, v in getattr(pl_module, "model", pl_module).state_dict().items()}
        )
        state = trainer.optimizers[0].state_dict()["state"]
        self.moments.append({f"{i}.{k}": v.clone() for i, entries in state.items() for k, v in entries.items()})
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                assert callback._average_model is not None
                self.averages.append({k: v.clone() for k, v in callback._average_model.state_dict().items()})


class Kill(lightning.Callback):
    """Ends the process, as far as a test can, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def data(**arguments: Any) -> VSRDataModule:
    torch.manual_seed(2)
    return VSRDataModule([Clip("a"), Clip("b")], BI(), **{"frames": 3, "patch": 8, "batch_size": 2} | arguments)


def trainer(steps: int, *callbacks: Any, **arguments: Any) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        val_check_interval=10**6,
        **{"logger": False, "enable_checkpointing": False, "plugins": [WholeCheckpoints()]} | arguments,
    )


def module(model: PluggedModel, schedule: Any = None, **tuning: Any) -> VSRModule:
    return VSRModule(model, Tuning(**tuning), optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=schedule, seed=3)


def fit(made: VSRModule, steps: int, *callbacks: Any, ckpt: Path | None = None, **arguments: Any) -> VSRModule:
    trainer(steps, *callbacks, **arguments).fit(made, data(), ckpt_path=ckpt, weights_only=True)
    return made


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@BOTH
def test_a_healthy_run_is_unchanged_to_the_bit(pushed: str) -> None:
    records = []
    for guards in ([], *([OffsetGuard(action, every_n_steps=2), FiniteGuard()] for action in ACTIONS)):
        records.append(Record())
        fit(module(PUSHED[pushed][0]()), 3, *guards, EMA(0.9), records[-1])
    for guarded in records[1:]:
        for kind in ("weights", "averages", "moments"):
            plain = getattr(records[0], kind)
            assert len(plain) == 3
            assert all(map(equal, plain, getattr(guarded, kind)))


@BOTH
def test_the_mean_is_logged_every_so_many_steps_and_the_warning_names_layer_and_figures(
    pushed: str, tmp_path: Path
) -> None:
    make, layer, mean, limit = PUSHED[pushed]
    logger, record = CSVLogger(tmp_path, name="", version=""), Record()
    made = module(make())
    with pytest.warns(UserWarning, match="the offsets of") as caught:
        fit(made, 6, OffsetGuard(every_n_steps=2), Push(layer, 3), record, logger=logger)
    (text,) = [str(w.message) for w in caught if "the offsets of" in str(w.message)]  # step 4 only: not twice as high
    found = re.fullmatch(rf"step 4: the offsets of {layer} are ([\d.]+) pixels in the mean, above {limit:g}", text)
    assert found
    assert float(found[1]) == pytest.approx(mean, rel=0.05)
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    logged = {int(row["step"]): float(row[f"offsets/{layer}"]) for row in table if row[f"offsets/{layer}"]}
    assert sorted(logged) == [0, 2, 4]
    assert logged[2] < 1
    assert logged[4] == pytest.approx(mean, rel=0.05)
    names = {key for key in table[0] if key.startswith("offsets/")}
    assert names == {f"offsets/{found.name}" for found in alignment_layers(made.model)}
    assert hooks(made) == 0


def test_the_mean_is_over_frames_and_accumulated_batches() -> None:
    """Against hooks of the test's own, in float64."""
    seen: dict[int, list[float]] = {0: [], 1: []}
    means: dict[int, float] = {}
    model = edvr()
    with torch.no_grad():
        for found in alignment_layers(model):
            found.parameters[0].normal_(std=0.1)
    pack = model.get_submodule("backbone.pcd_align.cas_dcnpack.conv_offset")

    class Logger(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            means[step or 0] = metrics.get("offsets/backbone.pcd_align.cas_dcnpack", means.get(step or 0))

    class Spy(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            offsets = seen[trainer.global_step].append
            self.hook = pack.register_forward_hook(lambda m, i, o: offsets(o[:, :36].double().abs().mean().item()))

        def on_train_batch_end(self, *_: Any) -> None:
            self.hook.remove()

    guard = OffsetGuard(every_n_steps=1)
    fit(module(model), 2, Spy(), guard, accumulate_grad_batches=2, logger=Logger("/nowhere"))
    assert len(seen[1]) == 6  # two batches of three frames
    assert means[1] == pytest.approx(sum(seen[1]) / 6, rel=1e-5)
    assert len(set(seen[1])) == 6


# Steps, with a measurement at every other and the push after the third (index 2): good 0 and 2, exploded 4.
@BOTH
def test_log_changes_nothing(pushed: str) -> None:
    make, layer, _, _ = PUSHED[pushed]
    plain, guarded = Record(), Record()
    fit(module(make()), 6, Push(layer, 3), plain)
    with pytest.warns(UserWarning, match="the offsets of"):
        fit(module(make()), 6, OffsetGuard("log", every_n_steps=2), Push(layer, 3), guarded)
    assert all(map(equal, plain.weights, guarded.weights))


@BOTH
def test_lower_multiplies_the_rate_of_the_offsets_group_from_that_step_on(pushed: str) -> None:
    """What the weights do is compared with a run whose rates are lowered by hand."""
    make, layer, _, _ = PUSHED[pushed]
    rates = {"rates": {"offsets": 0.5}}

    class ByHand(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 4:
                (group,) = (group for group in optimizer.param_groups if group["name"] == "x0.5")
                group["lr"] *= 0.25

    by_hand, guarded = Record(), Record()
    fit(module(make(), **rates), 7, Push(layer, 3), ByHand(), by_hand)
    with pytest.warns(UserWarning, match=r"; the rate of what predicts them is lowered, times 0\.25$"):
        fit(module(make(), **rates), 7, OffsetGuard("lower", every_n_steps=2, factor=0.25), Push(layer, 3), guarded)
    assert guarded.rates == by_hand.rates
    assert sorted(guarded.rates[5]) == pytest.approx([0.5 * 0.25 * 1e-3, 1e-3])
    assert all(map(equal, by_hand.weights, guarded.weights))


class Largest(lightning.Callback):
    """The largest absolute offset of a layer in every step, as hooks before it left it."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.steps: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        (found,) = (x for x in alignment_layers(pl_module.model) if x.name == self.layer)
        self.steps.append(0.0)

        def see(module: nn.Module, args: Any, output: Tensor) -> None:
            offset = output[:, : found.channels].detach()
            offset = offset if found.bound is None else found.bound * offset.tanh()
            self.steps[-1] = max(self.steps[-1], offset.abs().max().item())

        self.hook = found.module.register_forward_hook(see)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.hook.remove()


@BOTH
def test_clamp_limits_the_offsets_from_the_next_step_on_and_says_at_the_end_who_depends_on_it(pushed: str) -> None:
    make, layer, mean, limit = PUSHED[pushed]
    raw, limited = Largest(layer), Largest(layer)
    guard = OffsetGuard("clamp", every_n_steps=2)
    with pytest.warns(UserWarning, match="from the next step on they are clamped to that") as caught:
        fit(module(make()), 7, raw, guard, limited, Push(layer, 3))
    assert all(largest >= 0.95 * mean for largest in raw.steps[3:])
    assert limited.steps[:5] == raw.steps[:5]
    assert limited.steps[5:] == pytest.approx([limit, limit], abs=1e-4)
    texts = [str(w.message) for w in caught]
    assert (
        f"the offsets of {layer} were still above their limit when last measured; the network as saved has no clamp "
        "and samples there"
    ) in texts


@BOTH
def test_roll_back_returns_to_the_last_good_step_while_samples_and_schedule_go_on(pushed: str) -> None:
    make, layer, _, _ = PUSHED[pushed]
    schedule = partial(lr_scheduler.CosineAnnealingLR, T_max=8)
    plain, guarded = Record(), Record()
    fit(module(make(), schedule), 7, EMA(0.9), plain)
    pushes = [Push(layer, 3), Push(layer, 6)]
    with pytest.warns(UserWarning, match=r"averages are again those of step 2 \(1 of 3 roll-backs\)$"):
        fit(module(make(), schedule), 7, OffsetGuard("roll_back", every_n_steps=2), EMA(0.9), *pushes, guarded)
    assert all(map(equal, plain.weights[:2], guarded.weights[:2]))
    assert not equal(guarded.weights[2], guarded.weights[1])
    # Step 4 begins with the push; it ends with the state that step 2 began with, and the average takes that in.
    assert equal(guarded.weights[4], guarded.weights[1])
    assert equal(guarded.moments[4], guarded.moments[1])
    kept = (1 + 2) / (10 + 2)  # EMA's share after two steps
    assert guarded.averages[4]["n_averaged"] == 3
    for key, value in guarded.weights[1].items():
        was = guarded.averages[1][f"module.model.{key}"].double()
        expected = was + (1 - kept) * (value.double() - was)
        assert torch.allclose(guarded.averages[4][f"module.model.{key}"].double(), expected, atol=1e-7), key
    assert not equal(guarded.moments[5], guarded.moments[4])
    assert equal(guarded.weights[6], guarded.weights[1])  # a second time to the same
    assert equal(guarded.moments[6], guarded.moments[1])
    assert guarded.rates == plain.rates
    assert guarded.samples == plain.samples
    assert len(set(guarded.samples)) == 7


def test_after_as_many_roll_backs_as_allowed_the_run_stops() -> None:
    make, layer, _, _ = PUSHED["edvr"]
    pushes = [Push(layer, step) for step in (1, 2, 3)]
    message = r"step 3: the offsets of .*l2 are [\d.]+ pixels in the mean, above 50, after 2 roll-backs already; lower"
    with pytest.warns(UserWarning, match="roll-backs"), pytest.raises(ValueError, match=message):
        fit(module(make()), 6, OffsetGuard("roll_back", every_n_steps=1, patience=2), *pushes)


@pytest.mark.parametrize("pixels", [80, math.nan])
def test_a_run_that_starts_exploded_has_nothing_to_return_to(pixels: float) -> None:
    model = edvr()
    with torch.no_grad():
        model.get_parameter("backbone.pcd_align.dcn_pack.l1.conv_offset.bias").fill_(pixels)
    made = module(model)
    with pytest.raises(ValueError, match=r"step 0: .* above 50, and there is no good state to return to; start from"):
        fit(made, 3, OffsetGuard("roll_back"))
    assert hooks(made) == 0


@pytest.mark.parametrize(("action", "pushed"), [("lower", "guided"), ("clamp", "edvr"), ("roll_back", "edvr")])
@pytest.mark.filterwarnings("ignore:step 4", "ignore:the offsets of")
def test_a_killed_run_goes_on_to_the_weights_of_an_undisturbed_one(action: Action, pushed: str, tmp_path: Path) -> None:
    make, layer, _, _ = PUSHED[pushed]

    def run(folder: str, *callbacks: Any, ckpt: Path | None = None) -> VSRModule:
        saving = ModelCheckpoint(tmp_path / folder, "last", every_n_train_steps=2, enable_version_counter=False)
        guard = OffsetGuard(action, every_n_steps=2)
        made = module(make(), partial(lr_scheduler.CosineAnnealingLR, T_max=7), rates={"offsets": 0.5})
        return fit(made, 7, guard, EMA(0.9), saving, Push(layer, 3), *callbacks, ckpt=ckpt, enable_checkpointing=True)

    whole = run("whole")
    for step, folder in ((4, "before it acts"), (6, "after")):
        with pytest.raises(RuntimeError, match="killed"):
            run(folder, Kill(step))
        resumed = run(folder, ckpt=tmp_path / folder / "last.ckpt")
        assert equal(whole.model.state_dict(), resumed.model.state_dict()), folder


class Shift(lightning.LightningModule):
    """The smallest network with a deformable layer; its offsets are as many pixels as the batch says."""

    def __init__(self, schedule: Any = None, train_offsets: bool = True, offset_name: str = "offset") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.schedule = schedule
        self.add_module(offset_name, nn.Conv2d(1, 18, 1))
        self.predictor = offset_name
        self.deform = DeformConv2d(1, 1, 3, padding=1)
        predictor: Any = self.get_submodule(offset_name)
        nn.init.zeros_(predictor.weight)
        nn.init.ones_(predictor.bias)
        predictor.requires_grad_(train_offsets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pixels = batch["pixels"].view(-1, 1, 1, 1)
        offset = self.get_submodule(self.predictor)(batch["lr"]) * pixels
        return (self.deform(batch["lr"], offset) - batch["hr"]).square().mean()

    def configure_optimizers(self) -> Any:
        rest = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith(self.predictor)]
        offsets = [p for p in self.get_submodule(self.predictor).parameters() if p.requires_grad]
        groups = [{"params": part, "lr": lr} for part, lr in ((rest, 1e-2), (offsets, 1e-3)) if part]
        optimizer = torch.optim.Adam(groups)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def samples(*pixels: float) -> list[dict[str, Any]]:
    """A sample for each, with that many pixels of offset."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, shift in enumerate(pixels):
        lr, hr = torch.rand(2, 1, 8, 8, generator=generator)
        made.append({"lr": lr, "hr": hr, "pixels": torch.tensor(shift), "name": f"clip {i}"})
    return made


class Stream(IterableDataset[Any]):
    """Samples without an end that Lightning would know of, as `VSRDataModule` has them."""

    def __init__(self, clips: list[dict[str, Any]]) -> None:
        self.clips = clips

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.clips)


def shift(made: Any, clips: list[dict[str, Any]], *callbacks: Any, batch_size: int = 1, **arguments: Any) -> Any:
    steps = len(clips) // batch_size
    trainer(steps, *callbacks, **arguments).fit(made, DataLoader(Stream(clips), batch_size=batch_size))
    return made


def warmed_up(optimizer: Any) -> Any:
    first, then = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lr_scheduler.SequentialLR(optimizer, [first, then], [5])


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        partial(lr_scheduler.CosineAnnealingLR, T_max=10),
        partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
        partial(lr_scheduler.MultiStepLR, milestones=[3, 6]),
        partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
        partial(lr_scheduler.OneCycleLR, max_lr=[0.1, 0.2], total_steps=12),
        partial(lr_scheduler.CyclicLR, base_lr=1e-3, max_lr=[0.1, 0.2], step_size_up=3),
        warmed_up,
    ],
)
def test_a_lowered_rate_stays_lowered_whatever_the_schedule(schedule: Any) -> None:
    clips = samples(*[1.0] * 2, *[80.0] * 8)  # once: it does not double
    plain, guarded = Record(), Record()
    shift(Shift(schedule), clips, plain)
    with pytest.warns(UserWarning, match="step 2: the offsets of deform are .* is lowered, times 0.5") as caught:
        shift(Shift(schedule), clips, OffsetGuard("lower", every_n_steps=1), guarded)
    assert sum("is lowered" in str(w.message) for w in caught) == 1
    for step, ((rest, offsets), lowered) in enumerate(zip(plain.rates, guarded.rates, strict=True)):
        assert lowered == pytest.approx([rest, offsets * (0.5 if step > 2 else 1)], rel=1e-9), step


def test_it_acts_again_when_the_mean_has_doubled_or_has_been_calm_between() -> None:
    clips = samples(1, 60, 90, 125, 240, 30, 60, 20, 60)
    guarded = Record()
    with pytest.warns(UserWarning, match="the offsets of deform") as caught:
        shift(Shift(), clips, OffsetGuard("lower", every_n_steps=1), guarded)
    acted = [int(str(w.message).split(":")[0].removeprefix("step ")) for w in caught if "lowered" in str(w.message)]
    assert acted == [1, 3, 8]
    assert guarded.rates[-1][1] == pytest.approx(1e-3 * 0.25)


def test_what_cannot_be_lowered_is_said() -> None:
    message = r"what predicts the offsets of deform cannot be told, .* take action=\"clamp\" or \"roll_back\"$"
    with pytest.raises(ValueError, match=message):
        shift(Shift(offset_name="moves"), samples(80.0), OffsetGuard("lower"))
    with pytest.warns(UserWarning, match="what predicts them is frozen, so no rate was lowered"):
        shift(Shift(train_offsets=False), samples(80.0), OffsetGuard("lower"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "rollback"}, r"OffsetGuard: there is no action 'rollback'; did you mean 'roll_back'"),
        ({"threshold": 0}, "OffsetGuard: threshold is above 0, .* got 0, 10, 0.5 and 3"),
        ({"every_n_steps": 0}, "every_n_steps at least 1, .* got 50.0, 0, 0.5 and 3"),
        ({"factor": 1.0}, "factor between 0 and 1, .* got 50.0, 10, 1.0 and 3"),
        ({"patience": -1}, "patience at least 0; got 50.0, 10, 0.5 and -1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OffsetGuard(**arguments)


@pytest.mark.filterwarnings("ignore:step")
def test_a_later_phase_has_the_lowered_rate_and_a_good_state_of_its_own() -> None:
    phases: dict[str, Any] = {"first": {"steps": 3}, "second": {"lr": 1e-4, "rates": {"offsets": 0.5}}}

    def run(guard: OffsetGuard, *steps: int) -> Record:
        make, layer, _, _ = PUSHED["edvr"]
        made = VSRModule(make(), Staged(phases), optimizer=partial(torch.optim.Adam, lr=1e-3), seed=3)
        fit(made, 7, guard, *(Push(layer, step) for step in steps), record := Record())
        return record

    lowered = run(OffsetGuard("lower", every_n_steps=1), 1)
    assert lowered.rates[0] == [1e-3]
    assert lowered.rates[2] == [5e-4]
    assert sorted(lowered.rates[4]) == pytest.approx([0.5 * 0.5 * 1e-4, 1e-4])
    rolled = run(OffsetGuard("roll_back", every_n_steps=2), 5)  # measured: 0, 2, 3 (new), 4, 6
    assert equal(rolled.weights[6], rolled.weights[3])
    assert equal(rolled.moments[6], rolled.moments[3])


def test_a_second_fit_starts_with_nothing_done() -> None:
    guard = OffsetGuard("clamp", every_n_steps=1)
    with pytest.warns(UserWarning, match="clamped"):
        shift(Shift(), samples(80.0, 80.0), guard)
    assert guard.state_dict()["clamped"] == ["deform"]
    shift(Shift(), samples(1.0, 1.0), guard)
    assert guard.state_dict() == {"levels": {}, "lowered": {}, "clamped": [], "good": None, "rolled_back": 0}


class Rates(lightning.Callback):
    """Leaves the rates at the end in a file a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (self.folder / f"{trainer.global_rank}").write_text(str([g["lr"] for g in trainer.optimizers[0].param_groups]))


class Telling(FiniteGuard):
    """Leaves its error in a file a process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _look(self, trainer: Any, pl_module: Any) -> None:
        try:
            super()._look(trainer, pl_module)
        except ValueError as error:
            (self.folder / f"{trainer.global_rank}").write_text(str(error))
            end = time.monotonic() + 60  # the first to leave has the other ended: nobody knew whether it had stopped
            while len([*self.folder.glob("[01]")]) < 2 and time.monotonic() < end:
                time.sleep(0.05)
            raise


def two_processes(folder: Path, clips: list[dict[str, Any]], *callbacks: Any) -> None:
    """Even clips go to one, odd ones to the other."""
    running = trainer(len(clips) // 2, *callbacks, devices=2, strategy="ddp_fork", default_root_dir=folder)
    running.fit(Shift(), DataLoader(cast("Any", clips)))


def told(folder: Path) -> list[str]:
    return [(folder / rank).read_text() for rank in "01"]


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.timeout(120)
def test_processes_decide_alike(tmp_path: Path) -> None:
    """The mean is 45 pixels over both and 90 in one of them: neither may act at 50, both must at 40."""
    clips = samples(1, 1, 0, 90, 0, 90)
    for threshold, rate in ((50.0, 1e-3), (40.0, 5e-4)):
        two_processes(tmp_path, clips, OffsetGuard("lower", threshold, every_n_steps=1), Rates(tmp_path))
        assert told(tmp_path) == [str([1e-2, rate])] * 2


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.timeout(120)
def test_all_processes_stop_for_the_clip_of_one(tmp_path: Path) -> None:
    clips = samples(*[1.0] * 8)
    clips[5]["hr"][0, 3, 3] = math.nan  # of the second process, in its third step
    with pytest.raises(ProcessRaisedException, match="NaN or Inf"):
        two_processes(tmp_path, clips, Telling(tmp_path))
    errors = told(tmp_path)
    assert errors[0] == errors[1]
    assert errors[0].startswith("step 2: NaN or Inf in the input, clip 'clip 5' (hr); the state before that step is in")
    assert load_file(tmp_path / "not_finite.safetensors")["hr"].isnan().sum() == 1
    assert torch.load(tmp_path / "last_finite.ckpt", weights_only=True)["global_step"] == 2


class Spoil(lightning.Callback):
    """Makes one gradient entry of a parameter infinite, or anything else, in one step or in all."""

    def __init__(self, step: int | None, value: float = math.inf) -> None:
        self.step, self.value = step, value

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.step is None or trainer.global_step == self.step:
            pl_module.deform.weight.grad[0, 0, 1, 1] = self.value


def spoilt(where: str) -> tuple[Any, list[dict[str, Any]], list[Any]]:
    """Something that is wrong in step 2, whose clips are 4 and 5."""
    made, clips, callbacks = Shift(), samples(*[1.0] * 8), []
    if where == "input":
        clips[4]["lr"][0, 0, 0] = math.nan
        clips[5]["lr"][0, 1, 0] = math.inf
        clips[5]["hr"][0, 7, 7] = -math.inf
    elif where == "loss":
        clips[5]["hr"][0, 0, 0] = 1e30  # finite, but not its square
    else:
        callbacks = [Spoil(2)]
    return made, clips, callbacks


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("input", r"input, clips 'clip 4' \(lr\), 'clip 5' \(lr, hr\)(;.*)\. Mend that clip or leave it out"),
        ("loss", r"loss \(inf\), clips 'clip 4', 'clip 5'(;.*)\. A lower rate, or trainer.gradient_clip_val, may help"),
        ("gradient", r"gradient of 1 of 4 parameters \(deform.weight\), clips 'clip 4', 'clip 5'(;.*)\. A lower .*"),
    ],
)
def test_nan_or_inf_stops_the_run_before_a_weight_changes_and_leaves_what_it_takes_to_go_on(
    where: str, text: str, tmp_path: Path
) -> None:
    made, clips, callbacks = spoilt(where)
    record, saving = Record(), ModelCheckpoint(tmp_path, "last", every_n_train_steps=10)
    arguments: dict[str, Any] = {"batch_size": 2, "enable_checkpointing": True}
    with pytest.raises(ValueError, match="NaN or Inf") as caught:
        shift(made, clips, *callbacks, FiniteGuard(), saving, record, **arguments)
    found = re.fullmatch(rf"step 2: NaN or Inf in the {text}", str(caught.value))
    assert found
    files = tmp_path / "last_finite.ckpt", tmp_path / "not_finite.safetensors"
    assert found[1] == f"; the state before that step is in {files[0]}, the batch in {files[1]}"
    assert len(record.weights) == 2
    saved = torch.load(files[0], weights_only=True)
    assert equal(saved["state_dict"], record.weights[1])
    assert equal(saved["state_dict"], made.state_dict())
    with safe_open(files[1], "pt") as file:
        assert file.metadata() == {"name": json.dumps(["clip 4", "clip 5"]), "step": "2"}
        assert torch.equal(
            file.get_tensor("lr").nan_to_num(7), torch.stack([c["lr"] for c in clips[4:6]]).nan_to_num(7)
        )
    # Mended, it goes on as if nothing had been.
    clips = samples(*[1.0] * 8)
    whole = shift(Shift(), clips, batch_size=2)
    resumed = Shift()
    trainer(4).fit(resumed, DataLoader(Stream(clips[4:]), batch_size=2), ckpt_path=files[0], weights_only=True)
    assert equal(whole.state_dict(), resumed.state_dict())


def test_a_gradient_whose_square_overflows_is_none_of_its_business() -> None:
    plain, guarded = Record(), Record()
    for record, *guards in ([plain], [guarded, FiniteGuard()]):
        shift(Shift(), samples(*[1.0] * 4), Spoil(2, 1e30), *guards, record)
    assert all(map(equal, plain.weights, guarded.weights))
    assert len(guarded.weights) == 4


def test_of_accumulated_batches_only_the_one_to_blame_is_named(tmp_path: Path) -> None:
    made, clips, _ = spoilt("loss")
    with pytest.raises(ValueError, match=r"^step 1: NaN or Inf in the loss \(inf\), clip 'clip 5'; "):
        shift(made, clips, FiniteGuard(), accumulate_grad_batches=4, default_root_dir=tmp_path)
    assert load_file(tmp_path / "not_finite.safetensors")["hr"].max() == 1e30


def test_clips_without_names_are_numbered(tmp_path: Path) -> None:
    made, clips, _ = spoilt("input")
    for clip in clips:
        del clip["name"]
    with pytest.raises(ValueError, match=r"input, clips number 0 \(lr\), number 1 \(lr, hr\);"):
        shift(made, clips, FiniteGuard(), batch_size=2, default_root_dir=tmp_path)


def test_where_nothing_can_be_saved_the_error_is_still_the_one_that_matters(tmp_path: Path) -> None:
    made, clips, callbacks = spoilt("gradient")
    (tmp_path / "file").touch()
    message = r"NaN or Inf in the gradient .*; the state before it could not be saved \(.*file.*\)\. A lower"
    with pytest.raises(ValueError, match=message):
        shift(made, clips, *callbacks, FiniteGuard(), batch_size=2, default_root_dir=tmp_path / "file")


def test_infinite_gradients_of_float16_are_the_loss_scalers_business(tmp_path: Path) -> None:
    """Its scale of 2^40 overflows; it halves until it does not. Gradients never finite end at a scale of 1/2."""

    def run(spoil: list[Any], clips: int, scale: float) -> Any:
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        plugins = [precision, WholeCheckpoints()]
        shift(
            made := Shift(), samples(*[1.0] * clips), *spoil, FiniteGuard(), plugins=plugins, default_root_dir=tmp_path
        )
        return made, precision.scaler

    made, scaler = run([], 40, 2.0**40)
    assert 1 < scaler.get_scale() < 2**30
    assert not torch.equal(made.deform.weight, Shift().deform.weight)
    with pytest.raises(
        ValueError, match=r"^step 5: NaN or Inf in the gradient of 1 of 4 parameters \(deform\.weight\)"
    ):
        run([Spoil(None)], 10, 16.0)


def test_a_loss_of_nan_is_not(tmp_path: Path) -> None:
    made, clips, _ = spoilt("loss")
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"step 2: NaN or Inf in the loss"):
        shift(made, clips, FiniteGuard(), batch_size=2, plugins=[precision], default_root_dir=tmp_path)
