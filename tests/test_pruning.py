"""Runs that see each other's curves: which are stopped, and when, against the median rule written out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from optuna.pruners import MedianPruner, PercentilePruner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vsrplug.pruning import Pruning

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Given(lightning.LightningModule):
    """Its figure at each validation is given."""

    def __init__(self, figures: Sequence[float]) -> None:
        super().__init__()
        self.figures = figures
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/psnr", self.figures[self.trainer.global_step // 2 - 1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train(folder: Path, figures: Sequence[float], pruning: Pruning) -> lightning.Trainer:
    """Eight steps, and a validation every two."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = lightning.Trainer(
        max_steps=8,
        val_check_interval=2,
        num_sanity_val_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning],
    )
    trainer.fit(Given(figures), DataLoader(torch.zeros(100, 1)), DataLoader(torch.zeros(1, 1)))
    return trainer


def leave(folder: Path, figures: Sequence[float], metrics: str | None = '{"psnr": 1.0}') -> None:
    folder.mkdir()
    (folder / "curve.json").write_text(json.dumps({2 * i + 2: figure for i, figure in enumerate(figures)}))
    if metrics is not None:
        (folder / "metrics.json").write_text(metrics)


DONE = ([20.0, 22.0, 23.0, 24.0], [21.0, 21.5, 25.0, 25.0], [19.0, 23.0, 24.0, 24.5])


@pytest.mark.parametrize(
    "figures",
    [[20.5, 22.5, 24.5, 25.0], [19.9, 30, 30, 30], [20.0, 21.9, 30, 30], [20.0, 22.1, 22.0, 30], [20, 22, 24, 1]],
)
def test_a_run_is_stopped_where_its_best_is_below_the_median_of_those_that_are_done(
    figures: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, curve in enumerate(DONE):
        leave(tmp_path / f"done {i}", curve)
    leave(tmp_path / "pruned", [50.0], '{"psnr": 50.0, "pruned": 2}')
    leave(tmp_path / "running", [50.0], None)
    leave(tmp_path / "broken", [50.0], "{")
    (tmp_path / "no curve").mkdir()
    (tmp_path / "no curve" / "metrics.json").write_text('{"psnr": 50.0}')
    (tmp_path / "multirun.yaml").write_text("")
    pruning = Pruning(MedianPruner(n_startup_trials=3), tmp_path / "this", "val/psnr")
    trainer = train(tmp_path / "this", figures, pruning)
    behind = [max(figures[: i + 1]) < np.median([curve[i] for curve in DONE]) for i in range(3)]  # not at the last
    expected = 2 * behind.index(True) + 2 if any(behind) else 8
    assert (trainer.global_step, pruning.stopped) == (expected, any(behind))
    written = json.loads((tmp_path / "this" / "curve.json").read_text())
    assert written == {str(2 * i + 2): pytest.approx(figures[i]) for i in range(expected // 2)}
    assert "new study" not in capsys.readouterr().err


def test_nobody_is_stopped_before_enough_runs_are_done_and_the_pruner_is_one_s_own(tmp_path: Path) -> None:
    for i, curve in enumerate(DONE):
        leave(tmp_path / f"done {i}", curve)
    few = Pruning(MedianPruner(n_startup_trials=4), tmp_path / "few", "val/psnr")
    assert train(tmp_path / "few", [1.0] * 4, few).global_step == 8
    for figure, stopped in ((20.4, True), (20.6, False)):  # of 19, 20 and 21 the upper quarter begins at 20.5
        upper = Pruning(PercentilePruner(25.0, n_startup_trials=1), tmp_path / f"{figure}", "val/psnr")
        train(tmp_path / f"{figure}", [figure, 30, 30, 30], upper)
        assert upper.stopped == stopped


def test_a_curve_goes_on_where_the_run_goes_on(tmp_path: Path) -> None:
    """The best so far decides: a run that was killed must not forget it. What came after its checkpoint is redone."""
    for i, curve in enumerate(DONE):
        leave(tmp_path / f"done {i}", curve)
    leave(tmp_path / "this", [19.0, 26.0, 1.0], None)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 4
    pruning = Pruning(MedianPruner(n_startup_trials=1), tmp_path / "this", "val/psnr")
    pruning.on_train_start(trainer, Given([]))
    assert pruning.curve == {2: 19.0, 4: 26.0}
    trainer.callback_metrics["val/psnr"] = torch.tensor(1.0)
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 6
    trainer.state.fn = TrainerFn.FITTING
    pruning.on_validation_end(trainer, Given([]))
    assert (pruning.curve, pruning.stopped) == ({2: 19.0, 4: 26.0, 6: 1.0}, False)  # 26 is above the median, 24


def test_a_figure_that_nobody_logs_is_an_error(tmp_path: Path) -> None:
    pruning = Pruning(MedianPruner(), tmp_path / "this", "val/psnrs")
    with pytest.raises(ValueError, match=r"Pruning: there is no figure 'val/psnrs'.*val/psnr"):
        train(tmp_path / "this", [1.0] * 4, pruning)
