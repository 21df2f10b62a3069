"""Weights of BasicSR, mmagic and our own training runs, read into a network of ours with every entry accounted for."""

from __future__ import annotations

import inspect
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vsrplug.site import unknown_name

SHIPPED = ("basicvsr_tiny",)  # networks whose weights lie in the package
WRAPPERS = ("params_ema", "params", "state_dict")  # BasicSR, BasicSR, mmagic and Lightning; the first present is read
# prefix of a network's entries in a checkpoint -> what else such a checkpoint holds, which is not the network
BESIDE = {
    "generator_ema": ("generator", "discriminator", "perceptual_loss", "step_counter"),
    "generator": ("discriminator", "perceptual_loss", "step_counter"),
    "backbone": ("plugins",),
    "module": (),
    "model": (),
    "net": (),
    "_orig_mod": (),
}


@dataclass
class LoadReport:
    """What became of every entry: names of the network in `loaded` and `missing`, of the file in the other two."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        groups = {"missing": self.missing, "unexpected": self.unexpected, "ignored": self.ignored}
        lines = [f"{len(names)} {what}: {_some(names)}" for what, names in groups.items() if names]
        return "; ".join([f"{len(self.loaded)} loaded", *lines])


def load_official(
    network: nn.Module, state_dict_or_path: Mapping[str, Any] | str | Path, *, strict: bool = True
) -> LoadReport:
    """Read official weights into a network, all of them or none.

    Wrappers (`params_ema`, `params`, `state_dict`) and prefixes (`module.`, `generator.`, `model.backbone.`, ...) are
    taken off, names of other code bases are changed by the network's own table `official_names`, and constants that a
    file carries (SPyNet's mean and std) are compared and reported as ignored. Where authors publish one block that is
    several modules here, each takes its own entries, and those of the others, the patterns of its `official_ignored`,
    are reported as ignored.

    Args:
        network: one of `vsrplug.backbones`, or a plain module of `vsrplug.plugins`, of the file's width, depth and
            variant.
        state_dict_or_path: a .pth, .pt, .ckpt or .safetensors file, or what `torch.load` made of it.
        strict: False carries over what has the same name and shape, to start from a network of another scale or
            another fusion; the rest of the network stays as it is, and the report names it.

    Returns:
        The report; if `strict`, `missing` and `unexpected` are empty, or there would be an error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read or would run code, or an entry is left over on either side or has another
            shape (if not `strict`: nothing fits). The network is then as it was.
    """
    path = state_dict_or_path if isinstance(state_dict_or_path, (str, Path)) else None
    where = f"{type(network).__name__} and {path or 'the state dict given'}"
    state, ignored = _unwrap(state_dict_or_path if path is None else _read(Path(path)), str(path or "the dict given"))
    own = network.state_dict()
    renamed = _rename(network, state)
    while not renamed.keys() & own.keys():
        stripped = _strip(state, ignored)
        if stripped is None:
            break
        state = stripped
        renamed = _rename(network, state)
    constants = {name: value for name, value in network.named_buffers() if name not in own}
    for name in renamed.keys() & constants.keys():
        found, value = renamed.pop(name).flatten().cpu().float(), constants[name].flatten().cpu().float()
        # Loose enough for a half-precision file, close enough to tell other constants.
        if found.shape != value.shape or not torch.allclose(found, value, rtol=1e-2):
            raise ValueError(f"{where} differ in the constant {name}: {value.tolist()} here, {found.tolist()} there")
        ignored.append(name)
    others = getattr(network, "official_ignored", ())
    for name in [name for name in renamed if any(re.fullmatch(pattern, name) for pattern in others)]:
        del renamed[name]
        ignored.append(name)
    fitting = {name: value for name, value in renamed.items() if name in own and own[name].shape == value.shape}
    if strict or not fitting:
        _compare(network, where, own, renamed)
    network.load_state_dict(fitting, strict=strict)
    return LoadReport(
        loaded=list(fitting),
        missing=[name for name in own if name not in fitting],
        unexpected=[name for name in renamed if name not in fitting],
        ignored=sorted(ignored),
    )


def load_backbone(name: str, path: str | Path | None = None, *, strict: bool = True, **kwargs: Any) -> nn.Module:
    """Make a network of `vsrplug.backbones` by its name.

    Args:
        name: such as "edvr" or "basicvsr"; "basicvsr_tiny" has weights in the package.
        path: a file for `load_official`; None leaves the network freshly initialised, except "basicvsr_tiny".
        strict: False carries over what fits of the file, and warns of what does not.
        kwargs: for its constructor.

    Raises:
        ValueError: no such network, or the file does not fit it.
        FileNotFoundError: no such file.

    Example:
        >>> backbone = load_backbone("basicvsr", "BasicVSR_REDS4-543c8261.pth")
    """
    from vsrplug import backbones

    if name not in backbones.NETWORKS:
        raise ValueError(unknown_name("backbone", name, backbones.NETWORKS))
    network = backbones.NETWORKS[name](**kwargs)
    if path is None and name in SHIPPED:
        path = Path(backbones.__file__).with_name(f"{name}.safetensors")
        if not path.exists():
            raise FileNotFoundError(
                f"this installation lacks {path}; install vsrplug again, or train it: vsrplug train experiment={name}"
            )
    if path is not None:
        report = load_official(network, path, strict=strict)
        if report.missing or report.unexpected:
            warnings.warn(f"{path} was carried over in part: {report}", stacklevel=2)
    return network


def _read(path: Path) -> Any:
    """What a weights file holds, on the CPU, without running any code of it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no weights file {path}; official ones are linked from BasicSR's docs/ModelZoo.md and mmagic's "
            "configs/*/README.md: put it there, or give backbone.path=... (for all of an experiment's, the folder: "
            "paths.weights=..., which is the variable VSRPLUG_WEIGHTS)"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); download it again") from error
    with path.open("rb") as file:  # opened here, so that no permission is an OSError and a damaged file is not
        try:
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged pickle may raise anything
            wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
            if isinstance(error, pickle.UnpicklingError) and wanted:
                raise ValueError(
                    f"{path} was refused: it asks for the Python object {wanted[1]}, and reading that would run code. "
                    "If you trust the file, read it elsewhere and save its state_dict alone"
                ) from error
            raise ValueError(
                f"{path} cannot be read: cut short, damaged, or a pickle that is no PyTorch checkpoint (nothing of it "
                "was run); download it again"
            ) from error


def _unwrap(checkpoint: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a checkpoint, and the names of those beside it that were passed over."""
    ignored: list[str] = []
    while isinstance(checkpoint, Mapping):
        present = [key for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)]
        if not present:
            break
        ignored += [f"{other}.{key}" for other in present[1:] for key in checkpoint[other]]
        checkpoint = checkpoint[present[0]]
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise ValueError(f"{source} holds no weights but {type(checkpoint).__name__}; expected a state dict")
    foreign = [str(key) for key, value in checkpoint.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(
            f"{source} is no state dict: {_some(foreign)} are no tensors; expected tensors by name, alone or under "
            f"{', '.join(WRAPPERS)}"
        )
    return dict(checkpoint), ignored


def _strip(state: dict[str, Tensor], ignored: list[str]) -> dict[str, Tensor] | None:
    """The state dict without the outermost prefix all of its network has, or None where there is no such prefix."""
    tops = {key.partition(".")[0] for key in state}
    for prefix, beside in BESIDE.items():
        if prefix in tops and tops <= {prefix, *beside}:
            ignored += [key for key in state if not key.startswith(f"{prefix}.")]
            return {key.removeprefix(f"{prefix}."): v for key, v in state.items() if key.startswith(f"{prefix}.")}
    return None


def _rename(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the network's names."""
    rules: Iterable[tuple[str, str]] = getattr(network, "official_names", ())
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        if name in renamed:
            raise ValueError(f"two entries are both {name} for {type(network).__name__}, one of them {key}")
        renamed[name] = value
    return renamed


def _compare(network: nn.Module, where: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the two have the same names and shapes."""
    common = [name for name in own if name in given]
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    reshaped = [
        f"{name} {tuple(own[name].shape)} here, {tuple(given[name].shape)} there"
        for name in common
        if own[name].shape != given[name].shape
    ]
    if not (missing or unexpected or reshaped):
        return
    kinds = {_kind(name) for name in common}
    arguments = ", ".join(inspect.signature(type(network)).parameters)
    if 2 * len(common) < min(len(own), len(given)) or not common:
        hint = "these are weights of another network"
    elif not (missing or unexpected):
        hint = f"the layers agree, but not their sizes: make the network with the file's arguments, of {arguments}"
    elif all(_kind(name) in kinds for name in missing + unexpected):
        sizes = " and sizes" if reshaped else ""
        hint = f"the same kinds of layers, more or fewer: make the network with the file's number of blocks{sizes}"
    else:
        hint = "part of it agrees: the file may hold another variant or scale of this network"
    groups = {"missing in the file": missing, "unexpected in the file": unexpected, "of another shape": reshaped}
    differences = [f"{len(names)} {what}: {_some(names)}" for what, names in groups.items() if names]
    raise ValueError(f"{where} do not fit ({hint}); nothing was loaded. " + ". ".join(differences))


def _kind(name: str) -> str:
    """The name without the numbers of repeated blocks."""
    return re.sub(r"\.\d+(?=\.)", ".N", name)


def _some(names: list[str], count: int = 10) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
