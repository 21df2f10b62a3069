"""One ordinary checkpoint of a tuned model, with nothing left to assemble: `save_merged`."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from vsrplug.lora import LoRA
from vsrplug.plugged import PluggedModel
from vsrplug.plugin_files import save_plugins, whole_file
from vsrplug.site import unknown_name

LAYOUTS = {"basicsr": ".pth", "vsrplug": ".safetensors"}


def save_merged(model: PluggedModel, path: str | Path, layout: str = "basicsr") -> None:
    """Write a model as one checkpoint: what was tuned in its place, low-rank layers folded into their convolutions.

    The model stays as it is. The file is written under a temporary name and renamed.

    Args:
        model: what `attach` or `load_plugins` returned.
        path: where to, with the ending of the layout.
        layout: `"basicsr"`: `{"params": state dict}` under BasicSR's keys, its constants too, for BasicSR and all that
            reads its files (`.pth`). `"vsrplug"`: every entry of the network and the plug-ins (`.safetensors`), for
            `load_plugins` onto an untrained backbone of the same shape; `load_official` reads the network out of it.

    Raises:
        ValueError: an unknown layout, another ending, or what BasicSR has no place for: plug-ins, other networks.
        OSError: it could not be written; an older file of that name is as it was.
    """
    check_layout(layout, path)
    if layout == "basicsr":
        _check_basicsr(model)
    merged = deepcopy(model)
    LoRA.merge(merged.backbone)
    if layout == "basicsr":
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            torch.save({"params": _with_constants(merged.backbone)}, file)
    else:
        merged.fingerprint = {}  # no entry is taken to be known already: all of them are saved
        save_plugins(merged, path)


def check_layout(layout: str, path: str | Path) -> None:
    """Raise ValueError unless there is such a layout, and `path` has its ending."""
    if layout not in LAYOUTS:
        raise ValueError(unknown_name("layout", layout, LAYOUTS))
    if Path(path).suffix != LAYOUTS[layout]:
        others = [f"layout={other} for {ending}" for other, ending in LAYOUTS.items() if other != layout]
        raise ValueError(f"layout={layout} is a {LAYOUTS[layout]} file, got {path}; rename it, or {', '.join(others)}")


def _check_basicsr(model: PluggedModel) -> None:
    from vsrplug import backbones  # the core knows no network; only a layout that is theirs needs them

    elsewhere = "layout=vsrplug holds it"
    if model.plugins:
        raise ValueError(
            f"BasicSR has no place for plug-ins, and this model has {', '.join(model.plugins)}; {elsewhere} with them"
        )
    networks = (backbones.EDVR, backbones.BasicVSR, backbones.IconVSR, backbones.BasicVSRPlusPlus)
    if not isinstance(model.backbone, networks):
        raise ValueError(
            f"BasicSR has no {type(model.backbone).__name__} of these keys, but "
            f"{', '.join(network.__name__ for network in networks)}; {elsewhere}"
        )
    flow = getattr(model.backbone, "spynet", None)
    if flow is not None and not isinstance(flow, backbones.SPyNet):
        raise ValueError(
            f"BasicSR's {type(model.backbone).__name__} finds flow with a SPyNet, this one with "
            f"{type(flow).__name__}; {elsewhere}"
        )


def _with_constants(network: nn.Module) -> dict[str, Tensor]:
    """The state dict and, in their places, the buffers that are no part of it here: SPyNet's mean and std."""
    state: dict[str, Tensor] = {}
    for prefix, module in network.named_modules():
        state |= module.named_parameters(prefix, recurse=False)
        state |= module.named_buffers(prefix, recurse=False)
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}
