"""Plug-in files: one safetensors file with everything that was tuned, and data in its metadata to rebuild it from.

That is plug-ins, low-rank layers, and the entries of the backbone that changed: biases, norms, or all of it. A file
never names code to run: class names are looked up among the plug-ins of this library and the classes the caller passes,
constructor arguments are plain JSON.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vsrplug.foreign import ForeignSite
from vsrplug.lora import LoRA, base_state, lora_state
from vsrplug.plugged import PluggedModel, attach, fingerprint
from vsrplug.plugin import Plugin
from vsrplug.site import unknown_name

FORMAT = "vsrplug-plugins-1"


def save_plugins(model: PluggedModel, path: str | Path, *, backbone: bool = True) -> None:
    """Write what was tuned of a model, weights and how to rebuild it, to one safetensors file.

    That is its plug-ins, the low-rank layers of its backbone (`vsrplug.lora`), and backbone entries that changed since
    `attach` (biases that were tuned, say), without which the rest would not give this model back. The file is written
    under a temporary name and renamed.

    Args:
        model: what `attach` returned, trained or not.
        path: where to; conventionally `*.safetensors`.
        backbone: False refuses to save where backbone entries changed, instead of saving them too.

    Raises:
        ValueError: nothing is attached or changed, a constructor argument cannot be written as JSON, or (with
            `backbone=False`) the backbone changed.
        OSError: the file could not be written; an older file of that name is as it was.
    """
    lora = LoRA.of(model.backbone)
    now = fingerprint(model.backbone)
    changed = sorted(key for key in now if now[key] != model.fingerprint.get(key))
    if changed and not backbone:
        raise ValueError(
            f"{len(changed)} backbone entries changed since attach ({_first(changed)}); the plug-ins alone would not "
            "give this model back. Save with backbone=True, or restore the backbone."
        )
    if not (model.plugins or changed or lora):
        raise ValueError("no plug-in is attached, and the backbone is as it was at attach: there is nothing to save")
    state = _entries(model)
    tuned = {f"backbone.{key}" for key in (*changed, *lora_state(model.backbone))}
    plugins = cast("Mapping[str, Plugin]", model.plugins)
    metadata = {
        "format": FORMAT,
        # in the order of attach, which is the order they run in at a site
        "plugins": json.dumps({name: _describe(name, plugin) for name, plugin in plugins.items()}),
        "foreign": json.dumps({name: asdict(site) for name, site in model.foreign.items()}),
        "lora": json.dumps(asdict(lora) if lora else None),
        "fingerprint": json.dumps(model.fingerprint),
    }
    # A copy each: sites may share a parameter, and safetensors refuses tensors that share memory.
    contiguous = torch.contiguous_format
    copies = {
        key: value.detach().cpu().clone(memory_format=contiguous)
        for key, value in state.items()
        if key.startswith("plugins.") or key in tuned
    }
    write_safetensors(copies, path, metadata)


def load_plugins(
    model: nn.Module, path: str | Path, *, force: bool = False, classes: Iterable[type[Plugin]] = ()
) -> PluggedModel:
    """Read a plug-in file onto a backbone or a model that has these plug-ins already.

    The result computes what the saved model did, bit for bit. So the entries of the backbone that the file does not
    hold must be those of the backbone it was saved with; a file that holds all of them fits any backbone of that shape.

    Args:
        model: a backbone (plug-ins are rebuilt and attached, low-rank layers inserted), or a `PluggedModel` whose
            plug-ins of the same names take the weights.
        path: what `save_plugins` wrote.
        force: load although the backbone has other weights than the one the plug-ins were trained on.
        classes: plug-in classes of your own that the file may name, besides those of `vsrplug.plugins`.

    Returns:
        The model given, or a new one around the backbone given.

    Raises:
        ValueError: not a plug-in file, a class that is not known, another backbone, other low-rank layers, or keys and
            shapes that do not fit; nothing has been changed.
        ImportError: the file has low-rank layers and peft is not installed; nothing has been changed.
    """
    metadata, tensors = _read(path)
    try:
        described, places, saved = (json.loads(metadata[key]) for key in ("plugins", "foreign", "fingerprint"))
        foreign = {name: ForeignSite(**site) for name, site in places.items()}
        settings = json.loads(metadata.get("lora", "null"))  # files of vsrplug 0.1 may lack it
        lora = LoRA(**settings) if settings else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its description of the plug-ins cannot be read ({error}); save it again") from None
    plugged = model if isinstance(model, PluggedModel) else None
    backbone = plugged.backbone if plugged else model
    own = fingerprint(backbone)
    compared = sorted(key for key in saved.keys() | own.keys() if f"backbone.{key}" not in tensors)
    differing = [key for key in compared if saved.get(key) != own.get(key)]
    if differing and not force:
        raise ValueError(
            f"{path} was trained on a backbone with other weights: {len(differing)} of {len(compared)} entries differ "
            f"({_first(differing)}). Load the same backbone weights, or pass force=True."
        )
    if plugged is None:
        known = _known(classes)
        plugins = {name: _rebuild(path, description, known) for name, description in described.items()}
        plugged = attach(backbone, sites=foreign, **plugins)
    elif set(described) != set(plugged.plugins):
        raise ValueError(
            f"{path} holds plug-ins {sorted(described)}, this model has {sorted(plugged.plugins)}; give the backbone "
            "alone and they are attached as saved"
        )
    _check(path, tensors, plugged, lora)
    if lora:
        lora.insert(backbone)
    state = _entries(plugged)
    with torch.no_grad():
        for key, value in tensors.items():
            state[key].copy_(value)
    if not differing:  # saved again, it is the same file, whatever the entries were that this one replaced
        plugged.fingerprint = saved
    return plugged


def write_safetensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to `path` under a temporary name first, so that a full disk or a kill leaves the old file."""
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata)


@contextmanager
def whole_file(path: str | Path) -> Iterator[str]:
    """A temporary name beside `path` to write to; renamed to `path` at the end, or removed where that is not reached.

    Raises:
        OSError: it could not be written; an older file of that name is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        raise OSError(f"{path} could not be written ({error}); a file that was there is as it was") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _entries(model: PluggedModel) -> dict[str, Tensor]:
    """Key in a file -> the model's own tensor: plug-ins, the backbone by the keys it has without `LoRA`, then that."""
    state = {f"plugins.{key}": value for key, value in model.plugins.state_dict().items()}
    for key, value in (base_state(model.backbone) | lora_state(model.backbone)).items():
        state[f"backbone.{key}"] = value
    return state


def _check(path: str | Path, tensors: Mapping[str, Tensor], model: PluggedModel, lora: LoRA | None) -> None:
    """Raise ValueError unless the entries of the file are those of the model, once it has these low-rank layers."""
    present = LoRA.of(model.backbone)
    if present and not lora:
        raise ValueError(
            f"{path} has no LoRA layers, the backbone has them on {len(present.targets)} convolutions; take them off "
            "first: LoRA.remove(model.backbone)"
        )
    try:
        added = lora.shapes(model.backbone) if lora else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shapes = {key: tuple(value.shape) for key, value in _entries(model).items()}
    shapes |= {f"backbone.{key}": shape for key, shape in added.items()}
    held = {key: tuple(value.shape) for key, value in tensors.items()}
    needed = {key for key in shapes if key.startswith("plugins.") or key.removeprefix("backbone.") in added}
    wrong = sorted(needed - held.keys() | held.keys() - shapes.keys())
    wrong += sorted(key for key in held.keys() & shapes.keys() if held[key] != shapes[key])
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} entries do not fit this model: {', '.join(wrong[:10])}")


def _describe(name: str, plugin: Plugin) -> dict[str, Any]:
    arguments = {key: value for key, value in plugin.arguments.items() if key != "sites"}
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise ValueError(
            f"plug-in {name!r} was made with an argument that is not plain data ({error}), so a file could not rebuild "
            "it; give its constructor numbers, strings and lists"
        ) from None
    return {"class": type(plugin).__name__, "arguments": arguments, "sites": plugin.sites}


def _rebuild(path: str | Path, description: dict[str, Any], known: dict[str, type[Plugin]]) -> Plugin:
    name = description["class"]
    if name not in known:
        raise ValueError(f"{path}: {unknown_name('plug-in class', name, known)} Pass your own with classes=[{name}].")
    arguments, sites = description["arguments"], description["sites"]
    parameters = inspect.signature(known[name].__init__).parameters.values()
    try:
        if any(parameter.name == "sites" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return known[name](**arguments, sites=sites)
        plugin = known[name](**arguments)  # its sites are fixed, or the default ones, some of which may be left out
        plugin.keep_sites(sites)
        return plugin
    except TypeError as error:
        raise ValueError(
            f"{path}: {name} cannot be made with the arguments in the file ({error}); it was saved by another version "
            "of that class"
        ) from None


def _known(classes: Iterable[type[Plugin]]) -> dict[str, type[Plugin]]:
    from vsrplug import plugins  # the contract does not know the plug-ins; only a file that names one needs them

    ours = (getattr(plugins, name) for name in plugins.__all__)
    allowed = [c for c in ours if isinstance(c, type) and issubclass(c, Plugin)] + list(classes)
    return {c.__name__: c for c in allowed}


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no plug-in file {path}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is cut short ({error}); save it again") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but no plug-in file: it lacks the format mark {FORMAT!r}")
    return metadata, tensors


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
