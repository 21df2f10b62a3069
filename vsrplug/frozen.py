"""What is frozen costs little: `lean` makes frozen convolutions keep their weights alone for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lean(model: nn.Module) -> None:
    """Let every frozen convolution of a model keep its input no longer; call it after `requires_grad` was set.

    PyTorch's convolution keeps its input for the gradient of its weight, also where that weight is frozen. Modules of
    the exact type `nn.Conv2d` whose parameters are all frozen become `LeanConv2d`, those that learn again become
    `nn.Conv2d`; nothing else changes. Outputs and gradients are the same to the last bit, and so are names, state dict
    and hooks. Works on any network, our own or not, and on the `base_layer` of peft's adapters.
    """
    for module in model.modules():
        if type(module) in (nn.Conv2d, LeanConv2d):
            learns = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            module.__class__ = nn.Conv2d if learns else LeanConv2d


class LeanConv2d(nn.Conv2d):
    """An `nn.Conv2d` that keeps its weight alone for the backward pass, as long as weight and bias are frozen.

    It has no state of its own, so that a convolution is turned into one, and back, by its class: see `lean`.

    Shape:
        x: as `nn.Conv2d`, (b, c, h, w) -> (b, o, h', w'), equal to it to the last bit.
    """

    @property
    def frozen(self) -> bool:
        """Whether neither weight nor bias learns at the moment."""
        return not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, o, h', w')."""
        if not (self.frozen and x.requires_grad and x.ndim == 4):  # without a batch: rare, left to torch
            return super().forward(x)
        x, padding = self._padded(x)
        return _FrozenConvolution.apply(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input after what torch pads beforehand, and the zeros on either side that are left to the convolution."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, self.padding
        left, right, top, bottom = sides = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            return F.pad(x, sides, self.padding_mode), (0, 0)
        padding = min(top, bottom), min(left, right)
        odd = left - padding[1], right - padding[1], top - padding[0], bottom - padding[0]  # "same", an even kernel
        return F.pad(x, odd) if any(odd) else x, padding


class _FrozenConvolution(torch.autograd.Function):
    """`F.conv2d` with a gradient for its input only. That gradient is linear in the weight, so it differentiates on."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
        ctx.save_for_backward(weight)  # the parameter itself: under autocast not a copy in half precision for each call
        ctx.shape, ctx.strides = x.shape, x.stride()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Never read: its shape and layout alone choose the kernel, the very one that the kept input would choose.
        unread = grad.new_empty_strided(ctx.shape, ctx.strides)
        geometry = (ctx.stride, ctx.padding, ctx.dilation, False, (0, 0), ctx.groups)
        grad_input, _, _ = torch.ops.aten.convolution_backward(
            grad, unread, weight.to(grad.dtype), None, *geometry, (True, False, False)
        )
        return grad_input, None, None, None, None, None, None


def relu_before(following: nn.Module, x: Tensor) -> Tensor:
    """`relu(x)` as the input of `following`; `x` may be overwritten.

    A convolution that learns keeps this result, and the ReLU shares it. One that keeps nothing would leave it to the
    ReLU, which needs to know only where it is positive: a byte instead of the number.

    Args:
        following: the module that will be given the result.
        x: any shape.
    """
    if x.requires_grad and isinstance(following, LeanConv2d) and following.frozen:
        return _MaskedReLU.apply(x)
    return F.relu(x, inplace=True)


class _MaskedReLU(torch.autograd.Function):
    """`F.relu` in place that keeps one byte an element.

    In place, since a result of its own between kept masks would leave the CPU's allocator with holes it cannot fill.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.mark_dirty(output)
        ctx.save_for_backward(output.bool())  # on the CPU six times as fast as output > 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        # As bytes, since casts from bool are slow on the CPU; F.relu's own kernel, so that Inf in a gradient stays Inf.
        return torch.ops.aten.threshold_backward(grad, positive.view(torch.uint8).to(grad.dtype), 0)
