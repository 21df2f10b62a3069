"""Deformable alignment layers of any network: where their offsets are, how large, and how to limit them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.ops import DeformConv2d

_SATURATED = 0.9  # of the bound of a bounded offset: there tanh has lost four fifths of its slope


@dataclass(frozen=True, eq=False)
class AlignmentLayer:
    """A layer that samples features at learned offsets. Found by `alignment_layers`.

    Attributes:
        name: as in `network.named_modules()`.
        module: `conv_offset`, whose output they are part of, or a torchvision `DeformConv2d`, which is given them.
        channels: the first so many channels of that output are offsets; None for `DeformConv2d`.
        bound: pixels; the offset is bound * tanh(output). None: it is the output itself.
        parameters: of what predicts the offsets, as far as it can be told.
    """

    name: str
    module: nn.Module
    channels: int | None
    bound: float | None
    parameters: tuple[nn.Parameter, ...]

    def limit(self, threshold: float) -> float:
        """Pixels above which the offsets have exploded: `threshold`, or, where they are bounded, nine tenths of the
        bound if that is less: so far out nothing can bring them back, hardly any gradient passes the tanh."""
        return threshold if self.bound is None else min(threshold, _SATURATED * self.bound)

    def watch(self, see: Callable[[Tensor], None] | None, threshold: float | None = None) -> RemovableHandle:
        """Put a hook on the layer, until the handle's `remove`.

        Args:
            see: called in every forward pass with the mean absolute offset, a scalar in pixels, on the layer's device;
                before they are limited. Of a bounded offset, the learned part alone, without the flow it is added to.
            threshold: no offset goes beyond `limit(threshold)`; None leaves them. The gradient of one that would
                passes only where a step against it leads back, so that it can return. Inside, nothing changes by a bit.
        """
        limit = None if threshold is None else self.limit(threshold)

        def limited(offset: Tensor) -> Tensor:
            if see is not None:
                pixels = offset.detach().float()
                see((pixels if self.bound is None else self.bound * pixels.tanh()).abs().mean())
            if limit is None:
                return offset
            return _Limited.apply(offset, limit if self.bound is None else math.atanh(limit / self.bound))

        def predicted(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            offset = limited(output[:, : self.channels])
            return None if limit is None else torch.cat((offset, output[:, self.channels :]), dim=1)

        def given(module: nn.Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if "offset" in keywords:
                return args, keywords | {"offset": limited(keywords["offset"])}
            return (args[0], limited(args[1]), *args[2:]), keywords

        if self.channels is None:
            return self.module.register_forward_pre_hook(given, with_kwargs=True)
        return self.module.register_forward_hook(predicted)


def alignment_layers(network: nn.Module) -> list[AlignmentLayer]:
    """Every deformable layer of a network, ours or not.

    Known are the packs of the field, whose submodule `conv_offset` predicts offsets and masks together, in thirds
    (ours, BasicSR's and mmagic's, those guided by a flow too), and torchvision's `DeformConv2d`, whose offsets come
    from outside: taken for their parameters are those of the module around it with "offset" in their name.
    """
    layers = []
    modules = dict(network.named_modules())
    for name, module in modules.items():
        predictor = getattr(module, "conv_offset", None)
        if isinstance(module, DeformConv2d):
            around = modules[name.rpartition(".")[0]].named_parameters()
            parameters = tuple(parameter for key, parameter in around if "offset" in key)
            layers.append(AlignmentLayer(name, module, None, None, parameters))
        elif isinstance(predictor, nn.Module) and not any(isinstance(m, DeformConv2d) for m in module.modules()):
            channels = _offset_channels(predictor, getattr(module, "weight", None))
            if channels:
                bound = getattr(module, "max_residual", getattr(module, "max_residue_magnitude", None))
                layers.append(AlignmentLayer(name, predictor, channels, bound, tuple(predictor.parameters())))
    return layers


def _offset_channels(predictor: nn.Module, weight: Any) -> int:
    """Two channels a kernel point and group of three, y, x and the mask; 0 where the widths say it is no such pack."""
    convolutions = [module for module in predictor.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions or not isinstance(weight, Tensor) or weight.ndim != 4:
        return 0
    channels, points = convolutions[-1].out_channels, weight.shape[2:].numel()
    return 0 if channels % (3 * points) else channels // 3 * 2


class _Limited(torch.autograd.Function):
    """Clamp whose gradient leads back inside: outside, plain clamping has none, and what went there would stay."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        outward = ((x > ctx.limit) & (gradient < 0)) | ((x < -ctx.limit) & (gradient > 0))
        return gradient.masked_fill(outward, 0), None
