"""Beside the training loop: `Progress` for whoever watches, `Pictures` for TensorBoard, and averaged weights, `EMA`."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from vsrplug.degradations import imresize


class Progress(Callback):
    """A bar where stderr is a terminal; elsewhere, such as a log file, one line at each validation.

    Stands in for Lightning's own bars (`enable_progress_bar=False`), which count epochs, of which an endless stream
    has none, and squeeze the figures of long names into a narrow column.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar at the step the run starts or goes on from."""
        self._bar = Bar(
            *(TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeRemainingColumn()),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            disable=not (trainer.is_global_zero and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, figures="")
        self._start, self._first = time.monotonic(), trainer.global_step
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar; its figures change with the loggers', since reading them waits for the device."""
        shown: dict[str, Any] = {"completed": trainer.global_step}
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            shown["figures"] = _figures(trainer)
        self._bar.update(self._task, **shown)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Figures of the validation, in the bar or on a line."""
        if not self._bar.disable:
            self._bar.update(self._task, figures=_figures(trainer))
        elif trainer.is_global_zero:
            a_second = (trainer.global_step - self._first) / (time.monotonic() - self._start)
            line = f"step {trainer.global_step}/{trainer.max_steps}  {_figures(trainer)}  {a_second:.2f} steps/s"
            print(line, file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""
        self._bar.update(self._task, figures=_figures(trainer))
        self._bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back before an error is printed."""
        if hasattr(self, "_bar"):
            self._bar.stop()


class Pictures(Callback):
    """At each validation, the middle frame of the first clip in TensorBoard.

    From left to right: low resolution, bicubic, restored, truth.

    `validation_step` must return `{"sr": (1, t, 3, s h, s w)}`, as `VSRModule`'s does.
    """

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the picture of the first clip."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if batch_idx or not outputs or not loggers or not trainer.is_global_zero:
            return
        middle = batch["hr"].shape[1] // 2
        lr, sr, hr = (clip[0, middle].float() for clip in (batch["lr"], outputs["sr"], batch["hr"]))
        scale = hr.shape[-1] // lr.shape[-1]
        enlarged = F.interpolate(lr[None], scale_factor=scale, mode="nearest")[0]
        row = torch.cat([enlarged, imresize(lr[None], scale)[0], sr, hr], -1).clamp(0, 1)
        for logger in loggers:
            title = f"{batch['name'][0]}: low resolution, bicubic, restored, truth"
            logger.experiment.add_image(title, row.cpu(), trainer.global_step)


class EMA(WeightAveraging):
    """Exponential moving average of the weights: what validation sees, and what is left when training ends.

    Lightning's `EMAWeightAveraging` computes decay * average + (1 - decay) * weight, which rounds: frozen weights would
    drift away from themselves. This one moves the average by (1 - decay) of the difference, which for them is zero.

    After n steps the average keeps min(decay, (1 + n) / (10 + n)): else it would remember the first weights for some
    thousand steps, and a short run would end with a share of them.

    Args:
        decay: share of the average that each step keeps in the long run.
    """

    def __init__(self, decay: float = 0.999) -> None:
        def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
            kept = min(decay, (1 + int(count)) / (10 + int(count)))
            return averaged + (current - averaged) * (1 - kept)

        super().__init__(avg_fn=average)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that goes on from its last step does not train, so Lightning never comes to the end of training."""
        self._copy_average_to_current(pl_module)


def _figures(trainer: Trainer) -> str:
    """Losses and metrics by the last part of their names."""
    metrics = trainer.progress_bar_metrics
    return "  ".join(f"{name.rpartition('/')[2]} {float(value):.4g}" for name, value in metrics.items())
