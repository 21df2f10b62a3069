"""What torch's counter of operations does not know: formulas of more operators, and a watch over the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Operators of torch that are, or may hide, a convolution or a matrix product. One without a formula is not a zero.
_PRODUCT = re.compile(r"(^|_)((add|badd|addb)?(mm|mv|bmm)|v?dot|conv([123]d)?|convolution|rnn|attention)(_|$)")


class Watch(TorchDispatchMode):
    """Notes the operators that might multiply, and that torch's counter would take for zero."""

    supports_higher_order_operators = True  # the counter refuses those that it does not know

    def __init__(self) -> None:
        super().__init__()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, OpOverload) and func.overloadpacket not in flop_registry:
            torchs_own = func.namespace in ("aten", "prim", "prims", "profiler")
            if not torchs_own or _PRODUCT.search(func.overloadpacket.__name__):
                self.unknown.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def register_formulas() -> None:
    """Tell torch's counters of operators they do not know, ours and torchvision's, as far as these are loaded."""
    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten.mv: lambda matrix, vector, **_: 2 * prod(matrix),
        aten.addmv: lambda added, matrix, vector, **_: 2 * prod(matrix),
        aten.dot: lambda left, right, **_: 2 * prod(left),
        aten.vdot: lambda left, right, **_: 2 * prod(left),
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # not in every torch
    }
    if hasattr(torch.ops.torchvision, "deform_conv2d"):
        formulas[torch.ops.torchvision.deform_conv2d] = _deformable
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)
    for in_place, operator in ((aten.addmm_, aten.addmm), (aten.baddbmm_, aten.baddbmm), (aten.addmv_, aten.addmv)):
        if in_place not in flop_registry:
            register_flop_formula(in_place, get_raw=True)(flop_registry[operator])
    if hasattr(torch.ops.vsrplug, "gaussian_attention") and torch.ops.vsrplug.gaussian_attention not in flop_registry:
        register_flop_formula(torch.ops.vsrplug.gaussian_attention, get_raw=True)(_gaussian_attention)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores, and what they weigh: (b, heads, n, c), (b, heads, m, c), (b, heads, m, c')."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _deformable(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """As an ordinary convolution; sampling is not counted."""
    return 2 * prod(out_shape) * prod(weight[1:])


def _gaussian_attention(
    query: Tensor, key: Tensor, value: Tensor, sigma: Tensor, weighting: str, eps: float, **_: Any
) -> int:
    from vsrplug.plugins._gaussian_blocks import operations  # whoever called the operator has loaded it

    if isinstance(sigma, FakeTensor):
        raise ValueError("how far Gaussian attention looks depends on the value of sigma, which is not at hand")
    with unset_fake_temporarily():
        return operations(key, value.shape[-1], sigma, weighting, eps)
