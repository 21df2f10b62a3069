"""`OffsetGuard`: a training run guarded against deformable offsets that explode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from vsrplug.offsets import AlignmentLayer, alignment_layers
from vsrplug.rewind import capture, rewind
from vsrplug.site import unknown_name

Action = Literal["log", "lower", "clamp", "roll_back"]


class OffsetGuard(Callback):
    """Watches the mean absolute offset of every deformable alignment layer, and acts before an explosion ruins a run.

    Offsets that run away are the known failure of training EDVR: the layers then sample outside the frame, where
    nothing leads them back. Every `every_n_steps` steps the mean is measured in the training step's own passes, over
    all devices, and logged as `offsets/<module name>`. A layer has exploded when it is above its limit: `threshold`,
    or nine tenths of the bound of offsets that have one, such as the 10 pixels of a flow-guided alignment. A warning
    says so, once and again whenever the mean has doubled; and then, by `action`:

    - `"log"`: nothing else.
    - `"lower"`: the rates of the optimizer groups that hold what predicts the layer's offsets are multiplied by
      `factor`, from this step on and in every later phase of a tuning; the schedule goes on from there. In a tuning,
      `rates={"offsets": ...}` gives offsets a group of their own; otherwise theirs is everybody's.
    - `"clamp"`: from the next step to the end of training, no offset of this layer goes beyond its limit, in training
      steps only: validation measures the network as it is saved. What is logged is the mean before clamping, and a
      warning at the end names the layers that still need it.
    - `"roll_back"`: weights, buffers, optimizer state and averaged weights (`EMA`) return to the last good step, and
      this step moves no weight; samples, schedule and rates go on. Good is a measured step with no mean above half its
      limit (the first of a run or phase: above its limit), so that one goes back to well before the explosion. What it
      began with is kept, in memory and in every checkpoint, which grows by as much. When it would happen more than
      `patience` times, the run stops.

    All decisions are functions of the step, the weights and what this callback puts in checkpoints, so a run that was
    killed goes on to the weights of one that was not. Every device decides alike. A run whose offsets stay below the
    limit is unchanged to the bit. Hooks are on the network during training steps only.

    Args:
        action: what happens, besides the warning, when offsets have exploded.
        threshold: pixels; BasicSR warns at 50.
        every_n_steps: optimizer steps between two measurements; each waits once for the device.
        factor: of `"lower"`.
        patience: of `"roll_back"`.

    Raises:
        ValueError: an action that does not exist, or numbers out of range; while training, a layer whose offsets'
            parameters cannot be told (`"lower"`), or no good state to return to, or none that lasts (`"roll_back"`).
    """

    def __init__(
        self,
        action: Action = "log",
        threshold: float = 50.0,
        every_n_steps: int = 10,
        factor: float = 0.5,
        patience: int = 3,
    ) -> None:
        if action not in get_args(Action):
            raise ValueError("OffsetGuard: " + unknown_name("action", action, get_args(Action)))
        if threshold <= 0 or every_n_steps < 1 or not 0 < factor < 1 or patience < 0:
            raise ValueError(
                "OffsetGuard: threshold is above 0, every_n_steps at least 1, factor between 0 and 1, and patience at "
                f"least 0; got {threshold}, {every_n_steps}, {factor} and {patience}"
            )
        self.action = action
        self.threshold = threshold
        self.every_n_steps = every_n_steps
        self.factor = factor
        self.patience = patience
        self._hooks: list[RemovableHandle] = []
        self._begin()
        self._forget()

    def _begin(self) -> None:
        """What checkpoints keep."""
        self._levels: dict[str, float] = {}  # layer -> its mean when it was last acted on, while it is above
        self._lowered: dict[str, int] = {}  # layer -> how often the rates of its groups were lowered
        self._clamped: list[str] = []
        self._good: dict[str, Any] | None = None
        self._rolled_back = 0

    def _forget(self) -> None:
        """What belongs to a fit or to a step, and to no checkpoint."""
        self._unhook()
        self._layers: dict[str, AlignmentLayer] = {}
        self._optimizers: list[Optimizer] = []
        self._seen: defaultdict[str, list[Tensor]] = defaultdict(list)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A run starts with nothing done; where it goes on from a checkpoint, `load_state_dict` follows."""
        if stage == "fit":
            self._begin()

    def state_dict(self) -> dict[str, Any]:
        """What was done so far, and with `"roll_back"` the last good state."""
        return {
            "levels": dict(self._levels),
            "lowered": dict(self._lowered),
            "clamped": list(self._clamped),
            "good": self._good,
            "rolled_back": self._rolled_back,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the checkpoint's run would have."""
        self._levels, self._lowered, self._clamped, self._good, self._rolled_back = (
            state_dict[key] for key in ("levels", "lowered", "clamped", "good", "rolled_back")
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        self._forget()
        self._layers = {layer.name.removeprefix("model."): layer for layer in alignment_layers(pl_module)}
        self._optimizers = list(trainer.optimizers)
        for name, layer in self._layers.items():
            if self.action == "lower" and not layer.parameters:
                raise ValueError(
                    f"OffsetGuard: what predicts the offsets of {name} cannot be told, as no parameter beside it has "
                    '"offset" in its name, so its rate cannot be lowered; take action="clamp" or "roll_back"'
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put on the hooks that this step needs."""
        needed = self.action == "roll_back" and self._good is None
        measured = trainer.global_step % self.every_n_steps == 0 or needed
        for name, layer in self._layers.items():
            threshold = self.threshold if name in self._clamped else None
            if measured or threshold:
                self._hooks.append(layer.watch(self._seen[name].append if measured else None, threshold))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the hooks off."""
        self._unhook()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge what was measured while the weights are still those it was measured with."""
        if trainer.optimizers != self._optimizers:  # another phase began: its optimizer knows nothing of what was
            self._optimizers = list(trainer.optimizers)
            self._good = None
            for group, times in self._groups(self._lowered):
                self._scale(trainer, group, self.factor**times)
        if not self._seen:
            return
        means = self._means(trainer, pl_module.device)
        for logger in trainer.loggers:
            logger.log_metrics({f"offsets/{name}": mean for name, mean in means.items()}, step=trainer.global_step)
        limits = {name: layer.limit(self.threshold) for name, layer in self._layers.items()}
        # "not <=", since a mean may be NaN.
        above = {name: mean for name, mean in means.items() if not mean <= limits[name]}
        calm = [name for name, mean in means.items() if mean <= limits[name] / 2]
        if self.action == "roll_back" and not above and (len(calm) == len(means) or self._good is None):
            self._good = capture(trainer, pl_module)
        self._levels = {name: level for name, level in self._levels.items() if name not in calm}
        acute = [name for name, mean in above.items() if not mean < 2 * self._levels.get(name, limits[name] / 2)]
        if not acute:
            return
        worst = max(acute, key=lambda name: means[name] / limits[name])
        others = f" (and of {len(acute) - 1} more)" if len(acute) > 1 else ""
        found = (
            f"step {trainer.global_step}: the offsets of {worst}{others} are {means[worst]:.4g} pixels in the mean, "
            f"above {limits[worst]:g}"
        )
        done = self._act(trainer, pl_module, acute, found)
        self._levels |= {name: means[name] for name in acute if self.action != "roll_back"}
        rank_zero_warn(found + done)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which layers depend on being clamped: the network as saved has no clamp."""
        if leaning := [name for name in self._clamped if name in self._levels]:
            rank_zero_warn(
                f"the offsets of {', '.join(leaning)} were still above their limit when last measured; the network as "
                "saved has no clamp and samples there"
            )
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing on the network."""
        self._forget()

    def _act(self, trainer: Trainer, pl_module: LightningModule, acute: list[str], found: str) -> str:
        """Do what `action` says, and say so."""
        if self.action == "clamp":
            self._clamped += [name for name in acute if name not in self._clamped]
            return "; from the next step on they are clamped to that"
        if self.action == "lower":
            groups = [group for group, _ in self._groups(dict.fromkeys(acute, 1))]
            if not groups:
                return "; what predicts them is frozen, so no rate was lowered"
            held = {id(parameter) for group in groups for parameter in group["params"]}
            for name, layer in self._layers.items():  # all that share these groups, so that a later phase knows
                if not held.isdisjoint(map(id, layer.parameters)):
                    self._lowered[name] = self._lowered.get(name, 0) + 1
            for group in groups:
                self._scale(trainer, group, self.factor)
            return f"; the rate of what predicts them is lowered, times {self.factor:g}"
        if self.action == "roll_back":
            if self._good is None:
                raise ValueError(
                    f"{found}, and there is no good state to return to; start from other weights, or raise the "
                    "threshold of OffsetGuard"
                )
            if self._rolled_back >= self.patience:
                raise ValueError(
                    f"{found}, after {self.patience} roll-backs already; lower the rate of the offsets (tuning.rates), "
                    "clip gradients (trainer.gradient_clip_val), or raise the patience of OffsetGuard"
                )
            self._rolled_back += 1
            rewind(self._good, trainer, pl_module)
            return (
                f"; weights, optimizer state and averages are again those of step {self._good['step']} "
                f"({self._rolled_back} of {self.patience} roll-backs)"
            )
        return ""

    def _means(self, trainer: Trainer, device: torch.device) -> dict[str, float]:
        """Layer -> mean over this step's passes on all devices; layers that were not called are left out."""
        totals = torch.zeros(2, len(self._layers), device=device)
        for i, name in enumerate(self._layers):
            if self._seen[name]:
                totals[0, i] = torch.stack(self._seen[name]).sum()
                totals[1, i] = len(self._seen[name])
        self._seen.clear()
        sums, counts = trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        return {name: total / n for name, total, n in zip(self._layers, sums, counts, strict=True) if n}

    def _groups(self, times: Mapping[str, int]) -> Iterable[tuple[dict[str, Any], int]]:
        """Optimizer groups that hold parameters of these layers, each with the largest number given for one of them."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                held = set(map(id, group["params"]))
                inside = [n for name, n in times.items() if not held.isdisjoint(map(id, self._layers[name].parameters))]
                if inside:
                    yield group, max(inside)

    def _scale(self, trainer: Trainer, group: dict[str, Any], factor: float) -> None:
        """Multiply the rate of a group, and what its schedule goes by: the ends of its range and the rate at step 0."""
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):
            if key in group:
                group[key] = group[key] * factor
        for config in trainer.lr_scheduler_configs:
            _scale_base(config.scheduler, group, factor)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _scale_base(schedule: Any, group: dict[str, Any], factor: float) -> None:
    """Multiply the rates that a schedule, and those inside it, started from."""
    for inner in getattr(schedule, "_schedulers", ()):  # SequentialLR and ChainedScheduler
        _scale_base(inner, group, factor)
    index = next((i for i, other in enumerate(schedule.optimizer.param_groups) if other is group), None)
    for key in ("base_lrs", "max_lrs"):
        if index is not None and hasattr(schedule, key):
            getattr(schedule, key)[index] *= factor
