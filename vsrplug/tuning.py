"""Which parameters learn, when, and at what rate: patterns over parameter names, in one phase or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from vsrplug.frozen import lean
from vsrplug.site import unknown_name

if TYPE_CHECKING:
    from vsrplug.lora import LoRA

_NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_FLOW_ESTIMATORS = {"spynet", "pwcnet", "raft", "flownet"}


@dataclass(frozen=True)
class Tuning:
    """What of a model is trained: a whole run of it, or one phase of `Staged`.

    Patterns are shell patterns (`*`, `?`) over the names of `model.named_parameters()`, which start with `backbone.`
    and `plugins.<name>.`, or one of the words `bias` and `norm` (the backbone's biases, and the parameters of its
    normalisation layers), `flow` (of a flow estimator), `offsets` (of convolutions that predict deformable offsets),
    `lora` (low-rank layers).

    Running statistics of normalisation layers go by the same patterns, under their own names such as
    `backbone.bn.running_mean`: those of a frozen backbone stay, and `freeze=["*.running_*"]` keeps all.

    Args:
        train: a parameter learns if one of these matches it,
        freeze: and none of these.
        rates: pattern -> factor on the learning rate; the first that matches counts, 1 where none does.
        weight_decay: pattern -> weight decay; the first that matches counts, the optimizer's own where none does.
        lora: low-rank layers to put on the backbone's convolutions, or None; `train` has to name them.
        steps: optimizer steps of this phase; None for the last one: until training ends.
        lr: the phase starts afresh at this rate, optimizer state and schedule too. None: it goes on with the rate,
            the schedule and the optimizer state that there are; the first phase has the optimizer's rate.
        losses: weight by name, as `VSRModule` takes them; None for the run's.

    Raises:
        ValueError: a string where a list of patterns belongs.
    """

    train: Sequence[str] = ("*",)
    freeze: Sequence[str] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    lora: LoRA | None = None
    steps: int | None = None
    lr: float | None = None
    losses: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in ("train", "freeze"):
            if isinstance(patterns := getattr(self, name), str):
                raise ValueError(f"tuning: {name} is a list of patterns, got {patterns!r}; try {name}=[{patterns}]")

    @property
    def phases(self) -> dict[str, Tuning]:
        """Name -> phase: this one alone."""
        return {"": self}

    def apply(self, model: nn.Module) -> int:
        """Set `requires_grad` of every parameter, and return how many scalars are trainable now.

        Normalisation layers whose statistics are frozen are put in eval mode; frozen convolutions keep no input for
        the backward pass.

        Raises:
            ValueError: a pattern matches no parameter, or nothing is left to train; nothing has been changed.
                No pattern at all, or `plugins.*` on a model without plug-ins, trains nothing: the frozen baseline.
        """
        inserted = self.lora.insert(model.get_submodule("backbone")) if self.lora else []
        try:
            names = self.trained(model)
        except ValueError:
            if self.lora and inserted:
                self.lora.remove(model.get_submodule("backbone"))
            raise
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        lean(model)
        for layer in self.frozen_statistics(model):
            layer.eval()
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def trained(self, model: nn.Module) -> set[str]:
        """Names of the parameters that learn; the model is only looked at.

        Raises:
            ValueError: as `apply`.
        """
        known = dict(_tunable(model))
        for pattern in (*self.train, *self.freeze, *self.rates, *self.weight_decay):
            without_plugins = pattern == "plugins.*" and not len(getattr(model, "plugins", ()))
            if not without_plugins and not any(_matches(name, known, pattern) for name in known):
                raise ValueError(_no_match(pattern, list(known)))
        names = {name for name, _ in model.named_parameters() if self._learns(name, known)}
        without_plugins = list(self.train) == ["plugins.*"] and not len(getattr(model, "plugins", ()))
        if not names and self.train and not without_plugins:
            raise ValueError(
                f"tuning: train={list(self.train)} without freeze={list(self.freeze)} leaves nothing to train; known: "
                f"{', '.join(_shortened(list(known)))}"
            )
        return names

    def frozen_statistics(self, model: nn.Module) -> list[nn.Module]:
        """Normalisation layers whose running statistics do not learn: these belong in eval mode."""
        known = dict(_tunable(model))
        return [
            owner for name, owner in known.items() if name.endswith("running_mean") and not self._learns(name, known)
        ]

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups of the trainable parameters alone, one for each rate and weight decay, named after them."""
        known = dict(_tunable(model))
        groups: dict[tuple[float, float | None], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = _first(self.rates, name, known)
                key = (1.0 if rate is None else rate, _first(self.weight_decay, name, known))
                groups.setdefault(key, []).append(parameter)
        return [
            {"params": parameters, "lr": lr * rate, "name": f"x{rate:g}"}
            | ({} if decay is None else {"weight_decay": decay, "name": f"x{rate:g} decay {decay:g}"})
            for (rate, decay), parameters in groups.items()
        ]

    def _learns(self, name: str, known: Mapping[str, nn.Module]) -> bool:
        chosen = any(_matches(name, known, pattern) for pattern in self.train)
        return chosen and not any(_matches(name, known, pattern) for pattern in self.freeze)


class Staged:
    """Several phases, one after another.

    Args:
        phases: name -> `Tuning`, or its arguments; in the order they run. All but the last give `steps`.
        lora: low-rank layers that are there from the first phase on, or None.

    Raises:
        ValueError: no phase, an argument that `Tuning` does not have, steps missing or not positive, low-rank layers
            in a phase.

    Example:
        >>> Staged({"bank": {"train": ["plugins.bank.*"], "steps": 5000}, "all": {"lr": 1e-5}})
    """

    def __init__(self, phases: Mapping[str, Tuning | Mapping[str, Any]], lora: LoRA | None = None) -> None:
        if not phases:
            raise ValueError("tuning: a staged tuning has one phase or more, got none")
        arguments = [f.name for f in fields(Tuning)]
        self.phases: dict[str, Tuning] = {}
        for position, (name, given) in enumerate(phases.items(), 1):
            if not isinstance(given, Tuning):
                for key in given:
                    if key not in arguments:
                        raise ValueError(f"tuning: phase {name!r}: " + unknown_name("argument", key, arguments))
                given = Tuning(**given)
            if given.lora is not None:
                raise ValueError(f"tuning: phase {name!r}: lora belongs to the whole run; give it beside phases")
            if given.steps is None and position < len(phases):
                raise ValueError(f"tuning: phase {name!r} has no steps; only the last may go on until training ends")
            if given.steps is not None and given.steps < 1:
                raise ValueError(f"tuning: phase {name!r} has steps={given.steps}; a phase takes one step or more")
            self.phases[name] = given
        self.lora = lora

    def apply(self, model: nn.Module) -> int:
        """Check every phase on this model, then set it up for the first; returns the scalars that one trains.

        Raises:
            ValueError: as `Tuning.apply`, with the name of the phase; nothing has been changed.
        """
        inserted = self.lora.insert(model.get_submodule("backbone")) if self.lora else []
        try:
            self.trained(model)
        except ValueError:
            if self.lora and inserted:
                self.lora.remove(model.get_submodule("backbone"))
            raise
        return next(iter(self.phases.values())).apply(model)

    def trained(self, model: nn.Module) -> set[str]:
        """Names of the parameters that learn in one phase or another.

        Raises:
            ValueError: as `apply`.
        """
        names: set[str] = set()
        for phase, tuning in self.phases.items():
            try:
                names |= tuning.trained(model)
            except ValueError as error:
                raise ValueError(f"phase {phase!r}: {error}") from None
        return names


def _tunable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name -> the module that holds it, of parameters and running statistics; shared parameters once."""
    modules = dict(model.named_modules())
    for name, _ in model.named_parameters():
        yield name, modules[name.rpartition(".")[0]]
    for prefix, module in modules.items():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            yield f"{prefix}.running_mean", module
            yield f"{prefix}.running_var", module


def _matches(name: str, known: Mapping[str, nn.Module], pattern: str) -> bool:
    parts = name.split(".")
    if pattern == "bias":
        return parts[-1] == "bias" and parts[0] != "plugins"
    if pattern == "norm":
        own = parts[0] != "plugins" and not parts[-1].startswith("running_")
        return own and isinstance(known[name], _NORMALISATION)
    if pattern == "flow":
        return not _FLOW_ESTIMATORS.isdisjoint(parts)
    if pattern == "offsets":
        return "conv_offset" in parts
    if pattern == "lora":
        return any(part.startswith("lora_") for part in parts)
    return fnmatchcase(name, pattern)


def _first(values: Mapping[str, float], name: str, known: Mapping[str, nn.Module]) -> float | None:
    return next((value for pattern, value in values.items() if _matches(name, known, pattern)), None)


def _no_match(pattern: str, names: Sequence[str]) -> str:
    reasons = {
        "bias": "no layer of the backbone has a bias",
        "norm": "the backbone has no normalisation layer",
        "flow": "this model has no flow estimator with parameters",
        "offsets": "this model has no deformable alignment",
        "lora": "no low-rank layers are there: give lora=LoRA(...)",
    }
    if pattern in reasons:
        return f"tuning: {pattern!r} matches nothing, {reasons[pattern]}; leave it out"
    return "tuning: " + unknown_name("parameter that matches", pattern, _shortened(names))


def _shortened(names: Sequence[str]) -> list[str]:
    """Names up to their third dot, once each: enough to see what there is in a network of hundreds of entries."""
    return list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
