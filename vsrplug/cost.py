"""What a model costs, before any of it is computed: operations of a forward pass, and memory of the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vsrplug._flop_formulas import Watch, register_formulas
from vsrplug.context import Context
from vsrplug.plugged import PluggedModel, is_native
from vsrplug.plugin import Plugin


@dataclass
class Flops:
    """Operations of one forward pass, by part: `"backbone"`, then `"plugins.<name>"` in the order they were attached.

    A plug-in's are what it adds to the backbone and the plug-ins before it, so that the parts sum up to the whole: its
    own work, and what the network does because of it.

    Attributes:
        counted: part -> operations.
        uncounted: part -> why it has no figure.
        restored: frames that the pass gives; 0 where its result is no clip and no frame.
    """

    counted: dict[str, int] = field(default_factory=dict)
    uncounted: dict[str, str] = field(default_factory=dict)
    restored: int = 0

    @property
    def total(self) -> int | None:
        """Of the whole model; None where a part of it was not counted."""
        return None if self.uncounted else sum(self.counted.values())


def count_flops(model: nn.Module, context: Callable[[], Context]) -> Flops:
    """Operations of one forward pass, without computing it: tensors have shapes and no values.

    A multiplication and an addition are two operations. Convolutions and matrix products are counted, attention among
    them; nothing else is: activations, normalisation, sampling, resizing, Fourier transforms. The pass is one in train
    mode and without its backward; work that depends on values, such as the repetitions of image cleaning, is counted
    once, as there. It is counted as the CPU does it in float32, wherever and whatever the model is.

    What needs values, or an operator that might multiply and has no formula, is not counted, and the result says why.

    Args:
        model: what `attach` returned, or any network. It is not changed.
        context: makes the pass's input, on the CPU; called anew for every pass that is counted, and what it makes takes
            no memory. `functools.partial(example, model)` will do for most.

    Example:
        >>> flops = count_flops(model, lambda: Context(torch.empty(1, 7, 3, 64, 64)))
        >>> flops.counted["backbone"] / 1e9
    """
    register_formulas()
    flops, mode = Flops(), FakeTensorMode(allow_non_fake_inputs=True)
    try:
        twin = _twin(model, mode)
    except Exception as error:
        return Flops(uncounted={"backbone": f"the network cannot be copied: {_reason(error)}"})
    plugins = dict(twin.plugins.items()) if isinstance(twin, PluggedModel) else {}
    attached: dict[str, nn.Module] = {}
    for name in ("", *plugins):
        part = f"plugins.{name}" if name else "backbone"
        if part != "backbone" and "backbone" in flops.uncounted:
            flops.uncounted[part] = "the backbone was not counted"
            continue
        with_part = {key: plugin for key, plugin in plugins.items() if key in attached or key == name}
        if isinstance(twin, PluggedModel):
            twin.plugins = nn.ModuleDict(with_part)
        try:
            total, flops.restored = _count(twin, context, mode)
        except Exception as error:
            flops.uncounted[part] = _reason(error)
            continue
        flops.counted[part] = total - sum(flops.counted.values())
        attached = with_part
    return flops


def example(model: nn.Module, frames: int = 7, size: Sequence[int] = (64, 64)) -> Context:
    """A clip of zeros on the CPU for a model, with whatever its plug-ins may ask for.

    Masks, as many planes as the plug-ins' attribute `masks` says; one key frame where their attribute `keys` is set;
    and the ground truth, as in training, where the network's `scale` is known.

    Args:
        model: what `attach` returned, or any network.
        frames: length of the clip; a window network has its window instead.
        size: height and width.

    Raises:
        ValueError: no frames, or no size.
    """
    if frames < 1 or len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"a clip has one frame or more and a size [height, width], got frames={frames}, size={[*size]}"
        )
    network = model.backbone if isinstance(model, PluggedModel) else model
    plugins = [module for module in model.modules() if isinstance(module, Plugin)]
    t, (h, w) = getattr(network, "window", None) or frames, size
    planes = max((int(getattr(plugin, "masks", None) or 0) for plugin in plugins), default=0)
    keyed = any(getattr(plugin, "keys", None) is not None for plugin in plugins)
    scale = getattr(network, "scale", None)

    return Context(
        torch.zeros(1, t, 3, h, w),
        masks=torch.zeros(1, t, planes, h, w) if planes else None,
        keys=torch.zeros(1, 1, 3, h, w) if keyed else None,
        target=torch.zeros(1, t, 3, scale * h, scale * w) if isinstance(scale, int) else None,
    )


def dry_step(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], groups: Iterable[Mapping[str, Any]]
) -> torch.optim.Optimizer:
    """An optimizer that has made one step, on parameters that are not the model's own and take no memory.

    Its `param_groups` say what it would do to each group, and `state_bytes` what it keeps. An optimizer that looks at
    values to decide what to do is given zeros instead, and the memory it would have in training.

    Args:
        make: as `VSRModule(optimizer=...)` takes it, such as `functools.partial(torch.optim.Adam, lr=1e-4)`.
        groups: what it would be given, as of `Tuning.groups`; nothing of it is changed.

    Raises:
        TypeError, ValueError: what the optimizer says of these parameters.
    """
    groups = [{**group, "params": list(group["params"])} for group in groups]
    try:
        return _step(make, groups, FakeTensorMode(allow_non_fake_inputs=True))
    except DataDependentOutputException:
        return _step(make, groups, nullcontext())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer keeps from step to step, in bytes."""
    kept = tree_leaves(list(optimizer.state.values()))
    return sum(leaf.numel() * leaf.element_size() for leaf in kept if isinstance(leaf, Tensor))


def _step(make: Callable[..., torch.optim.Optimizer], groups: Iterable[Mapping[str, Any]], mode: Any) -> Any:
    with mode, torch.no_grad():
        optimizer = make([{**group, "params": [_learning(p) for p in group["params"]]} for group in groups])
        optimizer.step()
    return optimizer


def _learning(parameter: Tensor) -> nn.Parameter:
    twin = nn.Parameter(torch.zeros_like(parameter))
    twin.grad = torch.zeros_like(parameter)
    return twin


def _twin(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy in train mode whose parameters and buffers have shapes only, as in float32 on the CPU.

    Those of one element keep their value: the work of an operator may depend on it, as attention's does on sigma.
    """
    stand_ins: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        if tensor.numel() == 1:
            value = tensor.detach().to("cpu", dtype, copy=True)
        else:
            with mode:
                value = torch.empty_like(tensor, device="cpu", dtype=dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        stand_ins[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    return copy.deepcopy(model, stand_ins).train()


def _count(model: nn.Module, make: Callable[[], Context], mode: FakeTensorMode) -> tuple[int, int]:
    """Operations of one pass, and the frames that it gives.

    Raises:
        Exception: whatever the network says to tensors without values; ValueError: an operator without a formula.
    """
    with mode, Watch() as watch, FlopCounterMode(display=False) as counter, torch.no_grad():
        context = make()
        if isinstance(model, PluggedModel) or is_native(model):
            out = model(context.frames, context)
        else:
            out = model(context.frames)
    if watch.unknown:
        raise ValueError(
            f"no formula for the operations of {', '.join(sorted(watch.unknown))}; give one with "
            "torch.utils.flop_counter.register_flop_formula"
        )
    ndim = out.ndim if isinstance(out, Tensor) else 0
    return counter.get_total_flops(), out.shape[1] if ndim == 5 else int(ndim == 4)


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, DataDependentOutputException):
        return f"it reads values back to decide what to do ({error.func}), and there are none yet"
    first = (str(error).strip().splitlines() or [""])[0]
    return first if first and isinstance(error, ValueError) else f"{type(error).__name__}: {first}".rstrip(": ")
