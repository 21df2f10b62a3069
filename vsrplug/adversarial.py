"""`AdversarialModule`: trains a restoring network against a discriminator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.module import VSRModule
from vsrplug.plugged import PluggedModel
from vsrplug.tuning import Staged, Tuning


class AdversarialModule(VSRModule):
    """`VSRModule` with a perceptual and an adversarial loss: the second stage of RealBasicVSR's training (002).

    In a step the restored clip is judged, and both networks move: the model by its weighted losses, the discriminator
    by how well it told the truth from that clip. Neither's gradient knows of the other's move, as in the official code,
    where the discriminator is shown what was restored before the model moved. So one backward pass and one optimizer
    with a group for each is the same as two of them in turn; and Lightning's automatic optimisation, with its steps,
    clipping, accumulation, loss scaling and DDP, serves a training of two networks as it does one of one. A schedule
    applies to both rates.

    Between phases the discriminator follows the model: it plays where the phase's losses name `adversarial`, keeps its
    optimizer state where the model does, and stands still, without being called, elsewhere.

    Args:
        model, tuning: as in `VSRModule`.
        discriminator: (n, 3, H, W) in [0, 1] -> logits of any shape, positive for the truth.
        discriminator_lr: its rate.
        perceptual: the loss `perceptual`, between restored and taught clips (b, t, 3, H, W), or None.
        **arguments: of `VSRModule`. `losses` may name `perceptual` and `adversarial` too.

    Losses:
        `adversarial`, of the model: cross-entropy of what the discriminator says of restored frames and "true";
        `discriminator`, its own, always of weight 1: cross-entropy on true frames (`hr` as it is, not `target` of it),
        and on restored ones.
    """

    def __init__(
        self,
        model: PluggedModel,
        tuning: Tuning | Staged,
        *,
        discriminator: nn.Module,
        discriminator_lr: float = 1e-4,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model, tuning, **arguments)
        self.discriminator = discriminator
        self.discriminator_lr = discriminator_lr
        self.perceptual = perceptual
        self._set(0)

    def _weights(self, phase: int) -> Mapping[str, float]:
        weights = super()._weights(phase)
        return {**weights, "discriminator": 1.0} if _named("adversarial", weights) else weights

    def _further(self, sr: Tensor, hr: Tensor, plain: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
        values = {}
        if self.perceptual is not None and _named("perceptual", weights):
            values["perceptual"] = self.perceptual(sr, hr)
        if _named("adversarial", weights):
            restored, true = sr.flatten(0, 1), plain.flatten(0, 1)
            with _still(self.discriminator):
                values["adversarial"] = cross_entropy(self.discriminator(restored), True)
            values["discriminator"] = cross_entropy(self.discriminator(true), True)
            values["discriminator"] += cross_entropy(self.discriminator(restored.detach()), False)
        return values

    def _set(self, phase: int) -> None:
        super()._set(phase)
        self.discriminator.requires_grad_(_named("adversarial", self._weights(phase)))

    def _groups(self, lr: float) -> list[dict[str, Any]]:
        learning = [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]
        own = {"params": learning, "lr": self.discriminator_lr, "name": "discriminator"}
        return [*super()._groups(lr), *([own] if learning else [])]


def cross_entropy(logits: Tensor, true: bool) -> Tensor:
    """Mean binary cross-entropy of logits and one answer for all: the vanilla loss of adversarial networks."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, float(true)).float())


def _named(loss: str, weights: Mapping[str, float]) -> bool:
    return any(fnmatchcase(loss, pattern) for pattern in weights)


@contextmanager
def _still(network: nn.Module) -> Iterator[None]:
    """Gradients go through the network, and to its parameters none."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
