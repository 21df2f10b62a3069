"""Which parameters learn, and at what rate: patterns over parameter names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vsrplug.site import unknown_name


@dataclass(frozen=True)
class Tuning:
    """What of a model is trained.

    Patterns are shell patterns (`*`, `?`) over the names of `model.named_parameters()`, which start with `backbone.`
    and `plugins.<name>.`.

    Args:
        train: a parameter learns if one of these matches it.
        rates: pattern -> factor on the learning rate; the first that matches counts, 1 where none does.
    """

    train: Sequence[str] = ("*",)
    rates: Mapping[str, float] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> int:
        """Set `requires_grad` of every parameter, and return how many scalars are trainable now.

        Raises:
            ValueError: a pattern matches no parameter; nothing has been changed. `plugins.*` on a model without
                plug-ins is allowed and leaves nothing to train: the frozen baseline.
        """
        names = [name for name, _ in model.named_parameters()]
        for pattern in (*self.train, *self.rates):
            frozen_baseline = pattern == "plugins.*" and not len(getattr(model, "plugins", ()))
            if not frozen_baseline and not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError("tuning: " + unknown_name("parameter that matches", pattern, _shortened(names)))
        trainable = 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in self.train))
            trainable += parameter.numel() * parameter.requires_grad
        return trainable

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups of the trainable parameters alone, one for each rate, named after it."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = next((rate for pattern, rate in self.rates.items() if fnmatchcase(name, pattern)), 1.0)
                groups.setdefault(rate, []).append(parameter)
        return [{"params": parameters, "lr": lr * rate, "name": f"x{rate:g}"} for rate, parameters in groups.items()]


def _shortened(names: Sequence[str]) -> list[str]:
    """Names up to their third dot, once each: enough to see what there is in a network of hundreds of entries."""
    return list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
