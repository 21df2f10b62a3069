"""How one phase of a tuning follows another: when, with which optimizer and schedule, and whether its losses reach."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from vsrplug.tuning import Tuning

Schedule = Callable[[torch.optim.Optimizer], LRScheduler]


class Timeline:
    """When each phase runs, in optimizer steps.

    Args:
        phases: name -> phase, in order.
    """

    def __init__(self, phases: Mapping[str, Tuning]) -> None:
        self.names = list(phases)
        self.phases = list(phases.values())
        self.starts = [0, *accumulate(phase.steps or 0 for phase in self.phases[:-1])]

    def at(self, step: int) -> int:
        """Index of the phase that the step numbered `step`, from 0, belongs to."""
        return sum(start <= step for start in self.starts) - 1

    def fresh(self, index: int) -> int:
        """Index of the phase whose optimizer and schedule this one goes on with: itself, where it starts afresh."""
        return max((i for i in range(1, index + 1) if self.phases[i].lr is not None), default=0)

    def length(self, index: int, max_steps: int) -> int:
        """Steps of the schedule that runs in this phase: until the next phase that starts afresh."""
        first = self.fresh(index)
        later = [i for i in range(index + 1, len(self.phases)) if self.phases[i].lr is not None]
        end = self.starts[later[0]] if later else self._end(max_steps)
        return end - self.starts[first]

    def check(self, max_steps: int) -> None:
        """Raise ValueError if training ends before the last phase begins, or goes on after it."""
        last = self.phases[-1].steps
        if max_steps <= self.starts[-1]:
            name = self.names[self.at(max_steps - 1)]
            total = f"{self.starts[-1] + last}" if last else f"more than {self.starts[-1]}"
            raise ValueError(
                f"tuning: trainer.max_steps={max_steps} ends in phase {name!r}, the last is {self.names[-1]!r}; the "
                f"phases take {total} steps: set trainer.max_steps, or shorten them (tuning.phases.{name}.steps=...)"
            )
        if last is not None and self.starts[-1] + last < max_steps:
            raise ValueError(
                f"tuning: the phases take {self.starts[-1] + last} steps, but trainer.max_steps={max_steps}; give the "
                f"last phase, {self.names[-1]!r}, steps=null (until training ends), or the trainer as many steps"
            )

    def _end(self, max_steps: int) -> int:
        last = self.phases[-1].steps
        return max_steps if last is None else self.starts[-1] + last


def make_schedule(make: Schedule, optimizer: torch.optim.Optimizer, length: int | None, done: int = 0) -> LRScheduler:
    """The schedule of a phase: a partial with `T_max` or `total_steps` is given the phase's length there.

    Args:
        make: partial of a schedule.
        optimizer: of the phase, as made.
        length: steps the schedule runs; None leaves it as it is.
        done: how many of them are over.
    """
    if isinstance(make, partial) and length is not None:
        lengths = {key: length for key in ("T_max", "total_steps") if key in make.keywords}
        make = partial(make, **lengths)
    schedule = make(optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step")
        for _ in range(done):
            schedule.step()
    return schedule


def keep_state(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Give the new optimizer the state (moments, steps) of those parameters that the old one had too."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]


def wrap_again(trainer: Trainer) -> None:
    """Let DDP look anew at which parameters learn: it decides at construction whose gradients it waits for."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.model.module
        strategy.configure_ddp()


def unreached(model: nn.Module, names: Iterable[str], loss: Tensor) -> list[str]:
    """Those of the parameters named that get no gradient of `loss`; nothing is accumulated."""
    parameters = {name: model.get_parameter(name) for name in names}
    if not loss.requires_grad:
        return list(parameters)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]


def not_reached(phase: str, losses: Sequence[str], names: Sequence[str]) -> str:
    """The error's text."""
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    where = f"phase {phase!r}: " if phase else ""
    return (
        f"tuning: {where}its losses ({', '.join(losses)}) do not reach {len(names)} of the parameters it trains: "
        f"{shown}. They would not learn, and several devices would wait for their gradients for ever; add them to "
        "freeze, or a loss that reaches them"
    )


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's buffers, for `restore_buffers`."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def restore_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Undo what a trial pass did to running statistics."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[name])
