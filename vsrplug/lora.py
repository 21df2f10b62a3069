"""`LoRA`: low-rank layers on a backbone's convolutions, made by huggingface peft."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vsrplug.frozen import LeanConv2d
from vsrplug.site import unknown_name

if TYPE_CHECKING:
    from vsrplug._lora_layer import LowRankConv2d

ADAPTER = "default"  # peft's own name for an adapter that is the only one


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation: a convolution W becomes W x + alpha / rank * B A x.

    A is a convolution like W with `rank` outputs, B a 1x1 convolution that starts at zero, so that the backbone
    computes what it did, to the last bit, until trained. The layers are peft's and need the extra `vsrplug[lora]`.

    They belong to the backbone, unlike plug-ins: every model that shares it computes with them. Where one is to stay
    plain, give each its own `copy.deepcopy(backbone)`. Load official weights before inserting: the keys of the
    convolutions gain a `base_layer.` until `merge` or `remove`.

    Args:
        rank: width of the bottleneck.
        alpha: scale of the update, times `1 / rank`.
        targets: names of `nn.Conv2d` as in `backbone.named_modules()`, or shell patterns (`*`, `?`) over them. Patterns
            leave out what peft cannot adapt faithfully (groups, dilation, other padding than zeros, subclasses that may
            convolve otherwise); such a convolution named in full is an error.

    Raises:
        ValueError: rank or alpha is not positive, or there are no targets.
        TypeError: targets is a string, whose letters would be taken for patterns.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. 3.

    Example:
        >>> LoRA(rank=4, targets=("*_trunk.*",)).insert(backbone)
    """

    rank: int = 8
    alpha: float = 8.0
    targets: Sequence[str] = ("*",)

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise TypeError(
                f"targets is a sequence of patterns, got the string {self.targets!r}; write targets=({self.targets!r},)"
            )
        object.__setattr__(self, "targets", tuple(self.targets))
        if not isinstance(self.rank, int) or self.rank < 1 or not self.alpha > 0 or not self.targets:
            raise ValueError(
                "LoRA takes a whole rank of 1 or more, a positive alpha and one target or more, got "
                f"rank={self.rank}, alpha={self.alpha}, targets={self.targets}"
            )

    def insert(self, backbone: nn.Module) -> list[str]:
        """Put the low-rank layers on the convolutions; their parameters are trainable, of the rest nothing changes.

        Returns:
            Names of the convolutions that have them now and had not: none where these very layers are there already.

        Raises:
            ValueError: a target matches no convolution, or one that cannot be adapted, or the backbone has low-rank
                layers with other settings; nothing has been changed.
            ImportError: peft is not installed.
        """
        chosen = self._choose(backbone)
        if _layers(backbone):
            return []
        from vsrplug._lora_layer import LowRankConv2d

        made: dict[nn.Module, nn.Module] = {}  # a convolution that has several names gets one layer, under all of them
        for name, convolution in chosen.items():
            if convolution not in made:
                made[convolution] = LowRankConv2d(convolution, self.rank, self.alpha, name)
        for name, convolution in chosen.items():
            backbone.set_submodule(name, made[convolution])
        return list(chosen)

    def shapes(self, backbone: nn.Module) -> dict[str, tuple[int, ...]]:
        """Key -> shape of each entry that these layers add to the backbone's state dict, inserted or not.

        Raises:
            ValueError: as `insert`.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for name, convolution in self._choose(backbone).items():
            shapes[f"{name}.lora_A.{ADAPTER}.weight"] = (self.rank, convolution.in_channels, *convolution.kernel_size)
            shapes[f"{name}.lora_B.{ADAPTER}.weight"] = (convolution.out_channels, self.rank, 1, 1)
        return shapes

    @staticmethod
    def of(backbone: nn.Module) -> LoRA | None:
        """The settings of the layers that a backbone has, every convolution by its name; None where it has none."""
        layers = _layers(backbone)
        for layer in layers.values():  # all alike: `insert` adds none to those there are
            return LoRA(layer.rank, layer.alpha, tuple(layers))
        return None

    @staticmethod
    def merge(backbone: nn.Module) -> list[str]:
        """Fold the low-rank layers into their convolutions, and take them off: modules and keys are those of before.

        Returns:
            Names of the convolutions that were changed.

        Raises:
            ValueError: a weight would not be finite; nothing has been changed.
        """
        folded = {name: layer.folded for name, layer in _layers(backbone).items()}
        for name, weight in folded.items():
            if not weight.isfinite().all():
                raise ValueError(f"LoRA: the weight of {name!r} would have NaN or infinite entries; nothing was merged")
        LoRA.remove(backbone)
        with torch.no_grad():
            for name, weight in folded.items():
                backbone.get_submodule(name).weight.copy_(weight)  # type: ignore[operator]
        return list(folded)

    @staticmethod
    def remove(backbone: nn.Module) -> list[str]:
        """Take the low-rank layers off; the backbone's state dict is, bit for bit, the one under them.

        Returns:
            Names of the convolutions that had them.
        """
        layers = _layers(backbone)
        for name, layer in layers.items():
            if layer.merged:
                layer.unmerge()
            backbone.set_submodule(name, layer.base_layer)
        return list(layers)

    def _choose(self, backbone: nn.Module) -> dict[str, nn.Conv2d]:
        """Name -> convolution that these layers go on, or are on."""
        from vsrplug.plugged import PluggedModel

        if isinstance(backbone, PluggedModel):
            raise TypeError("LoRA goes on a backbone, not on the model with its plug-ins; give it model.backbone")
        known, layers = dict(_convolutions(backbone)), _layers(backbone)
        unfit = {name: reason for name in known if name not in layers and (reason := _unfit(known[name]))}
        matched: set[nn.Module] = set()
        for target in self.targets:
            names = [name for name in known if name == target or fnmatchcase(name, target)]
            if not names:
                # The numbers of repeated blocks as *: few enough to read, and patterns that may be given.
                shortened = dict.fromkeys(re.sub(r"(?<=\.)\d+\b", "*", name) for name in known)
                raise ValueError("LoRA: " + unknown_name("convolution that matches", target, shortened))
            if target in unfit or unfit.keys() >= set(names):
                name = target if target in unfit else names[0]
                raise ValueError(f"LoRA: {name!r} cannot be adapted: {unfit[name]}; leave it out of targets")
            matched |= {known[name] for name in names if name not in unfit}
        chosen = {name: convolution for name, convolution in known.items() if convolution in matched}
        present = LoRA.of(backbone)
        if present and (present.rank, present.alpha, set(present.targets)) != (self.rank, self.alpha, set(chosen)):
            raise ValueError(
                f"LoRA: rank={self.rank}, alpha={self.alpha:g} on {len(chosen)} convolutions was asked for, but this "
                f"backbone has rank={present.rank}, alpha={present.alpha:g} on {len(present.targets)} already; call "
                "LoRA.merge(backbone) or LoRA.remove(backbone) first"
            )
        for name, layer in layers.items():
            if layer.merged:
                raise ValueError(f"LoRA: the layer of {name!r} is merged; call its unmerge() first")
        return chosen


def base_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The state dict as if `LoRA` had never been inserted: the same keys and, bit for bit, the same values.

    Like those of a state dict, the tensors share memory with the network.
    """
    layers = _layers(backbone)
    state = {}
    for key, value in backbone.state_dict().items():
        owner, added, rest = _split(key, layers)
        if not added:
            state[key] = value
        elif added == "base_layer":
            state[f"{owner}.{rest}"] = layers[owner].base_weight.detach() if rest == "weight" else value
    return state


def lora_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The entries of the state dict that `LoRA` added."""
    layers = _layers(backbone)
    return {key: value for key, value in backbone.state_dict().items() if _split(key, layers)[1].startswith("lora_")}


def _split(key: str, layers: dict[str, LowRankConv2d]) -> tuple[str, str, str]:
    """`a.b.lora_A.default.weight` -> `a.b`, `lora_A`, `default.weight`; empty strings where no layer has the key."""
    found = re.fullmatch(r"(.+)\.(base_layer|lora_\w+)\.(.+)", key) if layers else None
    return found.groups() if found and found[1] in layers else ("", "", "")  # type: ignore[return-value]


def _layers(backbone: nn.Module) -> dict[str, LowRankConv2d]:
    """Name -> low-rank layer, under every name it has."""
    module = sys.modules.get("vsrplug._lora_layer")
    if module is None:  # and peft was not imported: nobody can have made one
        return {}
    return dict(_find(backbone, (module.LowRankConv2d,)))


def _convolutions(backbone: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Name and convolution, under every name it has; of low-rank layers the convolution inside, by the layer's name."""
    layers = _layers(backbone)
    for name, found in _find(backbone, (nn.Conv2d, *{type(layer) for layer in layers.values()})):
        yield name, found.base_layer if name in layers else found


def _find(module: nn.Module, kinds: tuple[type, ...], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Submodules of these kinds, not looking inside them."""
    for name, child in module._modules.items():
        if isinstance(child, kinds):
            yield prefix + name, child
        elif child is not None:
            yield from _find(child, kinds, f"{prefix}{name}.")


def _unfit(convolution: nn.Conv2d) -> str:
    """Why peft's layer would not do what this convolution does, or an empty string."""
    if type(convolution) not in (nn.Conv2d, LeanConv2d):  # the frozen ones are lean
        return f"it is a {type(convolution).__name__}, which may not convolve as nn.Conv2d does"
    if convolution.groups != 1:
        return f"it has groups={convolution.groups}, which cannot be merged"
    if convolution.dilation != (1, 1):
        return f"it has dilation={convolution.dilation}, which peft's layer has not"
    if convolution.padding_mode != "zeros":
        return f"it pads with {convolution.padding_mode!r}, peft's layer with zeros"
    return ""
