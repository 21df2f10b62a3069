"""Searches that waste less: `Pruning` stops runs that fall behind those that are done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lightning import Callback, LightningModule, Trainer

from vsrplug.json_files import read_json
from vsrplug.plugin_files import whole_file
from vsrplug.site import unknown_name

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

CURVE = "curve.json"
METRICS = "metrics.json"


class Pruning(Callback):
    """Stops a run of a search when a pruner of Optuna says that it is hopeless.

    Hydra's Optuna sweeper does not prune: it sees a trial when it is over. So the runs see each other. Each leaves its
    figure at every validation, `curve.json`, in its folder, and compares it with the curves that lie in the folders
    beside its own and belong to a run that came to its end: there is a `metrics.json` that does not say `pruned`.

    A run that is stopped leaves the training loop as if it had no more steps, with `stopped` set.

    Args:
        pruner: decides from the curves, such as `optuna.pruners.MedianPruner()`. It is given the curves and nothing
            else, which serves the median, percentile, threshold and patient pruners; halving ones keep books in the
            study of the search, which runs cannot see.
        folder: of this run, in that of the search.
        monitor: the figure to compare, by the name it is logged under; more is better.

    Raises:
        ValueError: while training, no such figure is logged.
    """

    def __init__(self, pruner: BasePruner, folder: str | Path, monitor: str) -> None:
        self.pruner = pruner
        self.folder = Path(folder)
        self.monitor = monitor
        self.curve: dict[int, float] = {}  # step -> figure
        self.stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the curve of a run that was killed, up to the step it goes on from."""
        self.curve = {step: psnr for step, psnr in _curve(self.folder).items() if step <= trainer.global_step}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add to the curve, compare, and stop or not."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(f"Pruning: {unknown_name('figure', self.monitor, sorted(trainer.callback_metrics))}")
        self.curve[trainer.global_step] = float(trainer.callback_metrics[self.monitor])
        behind = False
        if trainer.is_global_zero:
            with whole_file(self.folder / CURVE) as temporary:
                Path(temporary).write_text(json.dumps(self.curve, indent=2) + "\n", encoding="utf-8")
            behind = trainer.global_step != trainer.max_steps and self._behind()  # at its last step it is done
        self.stopped = bool(trainer.strategy.broadcast(behind))  # other devices may have seen other folders
        trainer.should_stop = trainer.should_stop or self.stopped

    def _behind(self) -> bool:
        import optuna

        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study
        try:
            study = optuna.create_study(direction="maximize", pruner=self.pruner)
        finally:
            optuna.logging.set_verbosity(level)
        for folder in sorted(self.folder.parent.iterdir()):
            curve = _curve(folder) if folder != self.folder and _came_to_its_end(folder) else {}
            if curve:
                done = study.ask()
                for step, figure in curve.items():
                    done.report(figure, step)
                study.tell(done, curve[max(curve)])
        this = study.ask()
        for step, figure in self.curve.items():
            this.report(figure, step)
        return bool(this.should_prune())


def _came_to_its_end(folder: Path) -> bool:
    figures = read_json(folder / METRICS)
    return bool(figures) and not figures.get("pruned")


def _curve(folder: Path) -> dict[int, float]:
    return {int(step): float(figure) for step, figure in read_json(folder / CURVE).items()}
