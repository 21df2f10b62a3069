"""The layer that `vsrplug.lora` puts around a convolution; importing this file imports peft."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from peft import LoraConfig
    from peft.tuners import lora
except ImportError as error:
    raise ImportError(f"low-rank layers come from peft ({error}); install it: pip install 'vsrplug[lora]'") from error

from vsrplug.lora import ADAPTER


class LowRankConv2d(lora.Conv2d):
    """peft's low-rank convolution, which keeps the base weights while it is merged and does not let itself be bypassed.

    peft unmerges by subtracting what it added, which rounds; this one brings the base back to the last bit.

    Args:
        convolution: what it is put around.
        rank, alpha: as in `vsrplug.lora.LoRA`.
        name: of the convolution in its network, for errors.
    """

    kept: Tensor | None

    def __init__(self, convolution: nn.Conv2d, rank: int, alpha: float, name: str) -> None:
        config = LoraConfig(r=rank, lora_alpha=alpha)
        super().__init__(convolution, ADAPTER, config=config, r=rank, lora_alpha=alpha)
        self.rank, self.alpha, self.name = rank, float(alpha), name
        self.register_buffer("kept", None, persistent=False)
        if not convolution.weight.is_contiguous():  # channels_last: the layers around it should be laid out alike
            self.lora_A.to(memory_format=torch.channels_last)
        self.train(convolution.training)

    def __getattr__(self, name: str) -> Any:
        """The shape of the convolution, which networks ask for: `in_channels`, `stride` and so on."""
        if name in nn.Conv2d.__constants__:
            return getattr(self.base_layer, name)
        return super().__getattr__(name)

    @property
    def base_weight(self) -> Tensor:
        """The convolution's own weight, also while the low-rank update is merged into it."""
        return self.base_layer.weight if self.kept is None else self.kept

    @property
    def folded(self) -> Tensor:
        """The weight of one convolution that does the same as this layer."""
        base, update = self.base_weight.detach(), self.get_delta_weight(ADAPTER).detach()
        precision = torch.promote_types(base.dtype, torch.float32)
        return (base.to(precision) + update.to(precision)).to(base.dtype)

    @property
    def weight(self) -> Tensor:
        """Not to be read: a module that convolves with it would pass over the low-rank layers, and nobody told."""
        raise RuntimeError(
            f"the weight of {self.name!r} was read from outside, past its LoRA layers, which would have no effect; "
            "leave this convolution out of LoRA's targets"
        )

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """peft's sum for one adapter, laid out in memory as the convolution alone lays out its result.

        Another layout would choose other kernels in the next layers, which round otherwise: the identity at the start
        has to hold to the last bit.
        """
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **keywords)
        base = self.base_layer(x)
        update = self.lora_B[ADAPTER](self.lora_A[ADAPTER](x))
        adapted = torch.add(base, update, alpha=self.scaling[ADAPTER])
        return adapted if adapted.stride() == base.stride() else torch.empty_like(base).copy_(adapted)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's, and the base weight is kept."""
        base = self.base_weight.detach().clone()
        super().merge(safe_merge, adapter_names)
        if self.merged:
            self.kept = base

    def unmerge(self) -> None:
        """As peft's, but exact."""
        super().unmerge()
        if self.kept is not None:
            with torch.no_grad():
                self.base_layer.weight.copy_(self.kept)
            self.kept = None
