"""One phase after another: which parameters move when, with which optimizer state, and resuming to the bit anywhere."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zlib
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from vsrplug import Context, VSRModule, attach
from vsrplug.backbones import EDVR, BasicVSR, SPyNet
from vsrplug.callbacks import EMA
from vsrplug.checkpoints import WholeCheckpoints
from vsrplug.losses import charbonnier
from vsrplug.phases import Timeline
from vsrplug.plugged import PluggedModel
from vsrplug.plugins import LatentAttentionPlugin, MemoryBankPlugin
from vsrplug.tuning import Staged, Tuning

from .test_module import Kill, Noisy, Record, data, trainer, weights

THREE = {
    "backbone": {"steps": 3, "train": ["backbone.*"], "freeze": ["flow"], "losses": {"pixel": 1.0}},
    "bank": {
        "steps": 4, "train": ["plugins.bank.*"], "freeze": ["*.output.*"], "lr": 5e-3,
        "losses": {"bank/quantisation": 1.0},
    },
    "all": {"lr": 1e-3, "rates": {"flow": 0.125}},
}  # fmt: skip
COSINE = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=1)  # each phase has its own length


def plugged() -> PluggedModel:
    torch.manual_seed(1)
    backbone = BasicVSR(8, 1, flow=SPyNet(levels=2, widths=(4, 4, 4, 4)), reconstruction_channels=4)
    return attach(backbone, bank=partial(MemoryBankPlugin, groups=4, entries=4), noisy=Noisy(8))


def module(tuning: Tuning | Staged, model: PluggedModel | None = None, **arguments: Any) -> VSRModule:
    defaults: dict[str, Any] = {"optimizer": partial(torch.optim.Adam, lr=1e-2), "seed": 3}
    return VSRModule(model or plugged(), tuning, **defaults | arguments)


def fit(given: VSRModule, steps: int, *callbacks: Any, **arguments: Any) -> VSRModule:
    trainer(steps, *callbacks).fit(given, data(masks=None, **arguments))
    return given


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_each_phase_moves_exactly_what_it_names() -> None:
    record = Record()
    first = weights(plugged())
    fit(module(Staged(THREE), schedule=COSINE), 10, record)
    names = set(first)
    bank = {name for name in names if name.startswith("plugins.bank.") and ".output." not in name}
    flow = {name for name in names if ".spynet." in name}
    expected = [{name for name in names if name.startswith("backbone.")} - flow] * 3 + [bank] * 4 + [names] * 3
    for step, wanted in enumerate(expected):
        found = moved(record.steps[step - 1] if step else first, record.steps[step])
        if step == 7:  # behind the bank's last layer, which is still zero, gradients are zero for this one step
            wanted = wanted - bank
        assert found == wanted, (step, sorted(wanted ^ found))


@pytest.mark.parametrize("ema", [False, True])
def test_killed_at_any_step_of_three_phases_it_ends_with_the_weights_of_an_undisturbed_run(
    tmp_path: Path, ema: bool
) -> None:
    def run(folder: str, *callbacks: Any, ckpt: Path | None = None, workers: int = 0) -> VSRModule:
        given = module(Staged(THREE), schedule=COSINE)
        saving = ModelCheckpoint(tmp_path / folder, "last", every_n_train_steps=1, enable_version_counter=False)
        averages = [EMA(decay=0.5)] if ema else []
        running = trainer(10, saving, *averages, *callbacks, plugins=[WholeCheckpoints()], enable_checkpointing=True)
        torch.manual_seed(zlib.crc32(str(folder).encode()))  # the global generator may be anywhere
        running.fit(given, data(masks=None, workers=workers), ckpt_path=ckpt, weights_only=True)
        return given

    whole = weights(run("whole").model)
    steps = [3, 7, *random.Random(0).sample([1, 2, 4, 5, 6, 8, 9], 6)] * (1 if ema else 2)  # 3 and 7 are the edges
    for number, step in enumerate(steps):
        folder = f"killed{number}"
        with pytest.raises(RuntimeError, match="killed"):
            run(folder, Kill(step))
        resumed = run(folder, ckpt=tmp_path / folder / "last.ckpt", workers=2 if step == 3 else 0)
        assert not moved(whole, weights(resumed.model)), step


def test_a_phase_without_lr_goes_on_with_optimizer_state_and_schedule() -> None:
    """Cut into three phases that name the same things, a run is the run in one piece, bit for bit."""
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6)
    whole = fit(module(Tuning(), schedule=schedule), 6)
    cut = fit(module(Staged({"a": {"steps": 2}, "b": {"steps": 1}, "c": {}}), schedule=schedule), 6)
    assert not moved(weights(whole.model), weights(cut.model))


def test_what_joins_later_learns_at_its_own_rate_on_the_common_schedule() -> None:
    """BasicVSR's: flow fixed, then at an eighth. SGD by hand, on the cosine of the whole run."""
    tuning = Staged({"fixed": {"steps": 2, "freeze": ["flow"]}, "all": {"rates": {"flow": 0.125}}})
    lr, steps = 0.5, 4
    record, samples = Record(), data(masks=None)
    model = attach(plugged().backbone)
    given = module(tuning, model, optimizer=partial(torch.optim.SGD, lr=lr), schedule=COSINE)
    by_hand = attach(plugged().backbone)
    trainer(steps, record).fit(given, samples)
    for step in range(steps):
        parts = [samples.samples[2 * step + i] for i in range(2)]
        lr_clip, hr = (torch.stack([part[key] for part in parts]) for key in ("lr", "hr"))
        loss = charbonnier(by_hand(lr_clip, Context(lr_clip)), hr)
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            cosine = (1 + torch.cos(torch.tensor(torch.pi * step / steps, dtype=torch.float64)).item()) / 2
            for (name, parameter), gradient in zip(by_hand.named_parameters(), gradients, strict=True):
                rate = (0.0 if step < 2 else 0.125) if ".spynet." in name else 1.0
                parameter -= lr * rate * cosine * gradient
                assert torch.allclose(record.steps[step][name], parameter, atol=1e-6), (step, name)


def test_a_phase_with_lr_starts_afresh() -> None:
    """Its first Adam step is one of a new Adam: every element moves by the rate, whatever moments there were."""
    record = Record()
    tuning = Staged({"a": {"steps": 3}, "b": {"lr": 1e-4}})
    fit(module(tuning, attach(plugged().backbone)), 4, record)
    step = record.steps[3]["backbone.fusion.weight"] - record.steps[2]["backbone.fusion.weight"]
    assert step.abs().max().item() == pytest.approx(1e-4, rel=2e-2)
    assert step.abs().median().item() == pytest.approx(1e-4, rel=2e-2)


def test_a_phase_whose_losses_do_not_reach_is_an_error_before_the_first_step() -> None:
    phases = {"first": {"steps": 2}, "bank": {"train": ["plugins.bank.*"], "losses": {"bank/quantisation": 1.0}}}
    given = module(Staged(phases))
    before = weights(given.model)
    message = (
        r"phase 'bank': its losses \(bank/quantisation\) do not reach 2 of the parameters it trains: "
        r"plugins\.bank\.at\.fused\.output\.bias, plugins\.bank\.at\.fused\.output\.weight\. .*add them to freeze"
    )
    with pytest.raises(ValueError, match=message):
        fit(given, 4)
    assert not moved(before, weights(given.model))


def test_the_trial_pass_leaves_no_trace() -> None:
    """Losses that reach everything: the run is the one without a trial, statistics of normalisation included."""

    def run(check: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = plugged()
        model.backbone.conv_hr = nn.Sequential(model.backbone.conv_hr, nn.BatchNorm2d(4))  # type: ignore[arg-type]
        given = module(Tuning(), model)
        if not check:
            given._check_reach = lambda batch: None  # type: ignore[method-assign]
        fit(given, 2)
        return given.model.state_dict()

    one, other = run(True), run(False)
    assert any(name.endswith("running_mean") for name in one)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("phases", "steps", "message"),
    [
        (
            {"a": {"steps": 2}, "b": {"steps": 2}},
            5,
            r"take 4 steps, but trainer\.max_steps=5; give the last phase",
        ),
        ({"a": {"steps": 2}, "b": {"steps": 2}}, 2, r"max_steps=2 ends in phase 'a', the last is 'b'; .* take 4 steps"),
        ({"a": {"steps": 2}, "b": {}}, 1, r"max_steps=1 ends in phase 'a'.*take more than 2 steps.*phases\.a\.steps"),
    ],
)
def test_phases_and_trainer_agree_on_the_steps(phases: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module(Staged(phases)), steps)


def test_the_timeline() -> None:
    given = {"a": {"steps": 3}, "b": {"steps": 2}, "c": {"steps": 5, "lr": 1.0}, "d": {}}
    timeline = Timeline(Staged(given).phases)
    assert [timeline.at(step) for step in range(12)] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert [timeline.fresh(index) for index in range(4)] == [0, 0, 2, 2]
    assert [timeline.length(index, 20) for index in range(4)] == [5, 5, 15, 15]


def test_a_checkpoint_of_more_phases_is_refused(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
    running = trainer(3, saving, plugins=[WholeCheckpoints()], enable_checkpointing=True)
    running.fit(module(Staged({"a": {"steps": 1}, "b": {}})), data(masks=None))
    with pytest.raises(ValueError, match="is of phase 2 of a tuning, this one has 1; give the tuning it was made with"):
        trainer(4).fit(module(Tuning()), data(masks=None), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


class Normalised(nn.Module):
    """A network of somebody else, with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, 48, 3, padding=1), nn.BatchNorm2d(48), nn.PixelShuffle(4))

    def forward(self, frames: Tensor) -> Tensor:
        return self.last(self.features(frames.flatten(0, 1))).unflatten(0, frames.shape[:2])


@pytest.mark.parametrize(
    ("tuning", "learning", "statistics"),
    [
        (Tuning(), {f"backbone.{n}.{i}" for n in ("features", "last") for i in (0, 1)}, {"features", "last"}),
        (Tuning(["norm"]), {"backbone.features.1", "backbone.last.1"}, set()),
        (Tuning(["norm", "*.running_*"]), {"backbone.features.1", "backbone.last.1"}, {"features", "last"}),
        (Tuning(["backbone.last.*"]), {"backbone.last.0", "backbone.last.1"}, {"last"}),
        (Tuning(["*"], ["*.running_*"]), {f"backbone.{n}.{i}" for n in ("features", "last") for i in (0, 1)}, set()),
    ],
)
def test_statistics_of_normalisation_follow_the_patterns(
    tuning: Tuning, learning: set[str], statistics: set[str]
) -> None:
    from vsrplug import ForeignSite

    torch.manual_seed(0)
    site = ForeignSite("features", channels=8, kind="clip", order="forward")
    model = attach(Normalised(), sites={"features": site}, bank=MemoryBankPlugin(8, groups=4, sites=("features",)))
    model.detach("bank")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    given = fit(module(tuning, model), 2)
    changed = moved(state, given.model.state_dict())
    owners = {name.rpartition(".")[0] for name in changed if not name.endswith(("mean", "var", "tracked"))}
    assert owners == learning
    assert {name.split(".")[1] for name in changed if name.endswith("running_mean")} == statistics


def test_a_normalisation_layer_that_a_later_phase_releases_learns_again() -> None:
    record: list[dict[str, Tensor]] = []

    class Statistics(Record):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            record.append({name: value.clone() for name, value in pl_module.model.named_buffers()})

    from vsrplug import ForeignSite

    site = ForeignSite("features", channels=8, kind="clip", order="forward")
    model = attach(Normalised(), sites={"features": site})
    tuning = Staged({"last": {"steps": 2, "train": ["backbone.last.*"]}, "all": {}})
    fit(module(tuning, model), 4, Statistics())
    means = [step["backbone.features.1.running_mean"] for step in record]
    assert [torch.equal(a, b) for a, b in pairwise(means)] == [True, False, False]


def test_the_variance_of_latent_attention_is_closed_while_frozen() -> None:
    torch.manual_seed(0)
    model = attach(EDVR(8, 3, 1, 1, 2), latent_attention=LatentAttentionPlugin(8, sites=("aligned",), zero_init=False))
    frames = torch.rand(1, 3, 3, 16, 16)
    model.train()
    mean, both = ({"freeze": ["plugins.*.log_variance.*"]}, {})
    for arguments, same in ((mean, True), (both, False)):
        Tuning(**arguments).apply(model)
        assert torch.equal(model(frames), model(frames)) is same


def test_two_processes_through_a_phase_switch_equal_one_with_the_doubled_batch(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    for devices, out in ((1, "one"), (2, "two")):
        arguments = [sys.executable, str(script), str(devices), str(tmp_path / out)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("one.0", "two.0", "two.1"))
    assert first == second  # to the last digit
    for name, values in one.items():
        assert torch.tensor(values).sub(torch.tensor(first[name])).abs().max().item() <= 1e-5, name
