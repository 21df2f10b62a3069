"""Take a training run back to an earlier step without restarting it: `capture` and `rewind`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn


def capture(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Copies of what training changes: weights that learn, buffers, optimizer state and averaged weights.

    Plain data, fit for a checkpoint. Not among it: rates, schedules, the loss scaler's scale and counters, which go on.
    """
    frozen = {name for name, parameter in pl_module.named_parameters() if not parameter.requires_grad}
    return {
        "step": trainer.global_step,
        "weights": _copies(pl_module, frozen),
        "averages": [_copies(average, {f"module.{name}" for name in frozen}) for average in _averages(trainer)],
        "optimizers": [deepcopy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers],
    }


def rewind(state: Mapping[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
    """Go back to what `capture` gave for the same optimizers. `state` stays as it is.

    Gradients are dropped, so an optimizer step under way changes nothing.
    """
    for module, saved in ((pl_module, state["weights"]), *zip(_averages(trainer), state["averages"], strict=False)):
        entries = module.state_dict()
        for key, value in saved.items():
            entries[key].copy_(value)
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        # A copy: an optimizer goes on in the very tensors it is given.
        optimizer.load_state_dict({"state": deepcopy(saved), "param_groups": optimizer.state_dict()["param_groups"]})
        optimizer.zero_grad()


def _averages(trainer: Any) -> list[nn.Module]:
    """The averaged models of callbacks such as `EMA`; Lightning has no public name for them."""
    return [c._average_model for c in trainer.callbacks if isinstance(c, WeightAveraging) and c._average_model]


def _copies(module: nn.Module, without: Iterable[str]) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items() if key not in without}
