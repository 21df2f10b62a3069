"""Memory-augmented attention: a learned bank of typical local details that every pixel may consult.

Paper: Yu, Liu, Bo, Mei, "Memory-Augmented Non-Local Attention for Video Super-Resolution", 2021, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.plugin import Plugin


class MemoryBank(nn.Module):
    """Refine a feature with details memorised from the whole training set (MANA eq. 2).

    With Q = query(GroupNorm(F)) and M the memory, C' x N:  Y = M softmax(M^T Q / sqrt(C')),  F + W Y.

    The 1/sqrt(C') is the official code's; eq. 2 leaves it out. The output projection W starts at zero, so that the
    module is the identity until trained.

    Args:
        channels: width c of the feature.
        entries: N, columns of the memory (the paper's 512, the official code's 256).
        embedding: C', width of the query; half of `channels` unless given.
        groups: groups of the normalisation; the official code's 32 where `channels` can be split so.
        zero_init: start as the identity; False to train a network from scratch.

    Shape:
        feature: (b, c, h, w) -> (b, c, h, w)
    """

    def __init__(
        self,
        channels: int,
        entries: int = 256,
        embedding: int | None = None,
        groups: int = 32,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"channels={channels} cannot be normalised in groups={groups}; give groups that divide it")
        embedding = embedding or channels // 2
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # the official code's; torch's is 1e-5
        self.query = nn.Conv2d(channels, embedding, 1)
        # Unit-variance entries: with 1/sqrt(C') the scores of a unit query have unit variance, so no entry starts dead.
        self.memory = nn.Parameter(torch.randn(embedding, entries))
        self.output = nn.Conv2d(embedding, channels, 1)
        if zero_init:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, feature: Tensor) -> Tensor:
        """The refined feature, (b, c, h, w)."""
        return self.refine(feature)[0]

    def refine(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The refined feature (b, c, h, w), and the quantisation loss: mean |Q - Y|, a scalar (MANA 3.4, stage two)."""
        query = self.query(self.norm(feature))
        read = recall(query, self.memory)
        residual = self.output(read).to(feature.dtype)
        return feature + residual, (query - read).abs().mean(dtype=_precise(query))


def recall(query: Tensor, memory: Tensor) -> Tensor:
    """What the memory holds for each query: MANA eq. 2 before the output projection.

    Args:
        query: (b, c', h, w)
        memory: (c', n)

    Returns:
        (b, c', h, w), in the query's dtype.
    """
    pixels = query.flatten(2).transpose(1, 2)  # b (h w) c'
    entries = memory.to(query.dtype)
    scores = pixels @ (entries / memory.shape[0] ** 0.5)  # b (h w) n
    weights = scores.softmax(-1, dtype=_precise(query)).to(query.dtype)
    return (weights @ entries.T).transpose(1, 2).unflatten(2, query.shape[2:])


def _precise(x: Tensor) -> torch.dtype:
    """float32, or the dtype of `x` where that is better."""
    return torch.promote_types(x.dtype, torch.float32)


class MemoryBankPlugin(Plugin):
    """A `MemoryBank` at each site. Reports the loss `<name>/quantisation`.

    Args:
        channels: width of the sites.
        sites: where it goes; by default what leaves the propagation or the fusion: `fused` of window networks,
            `{backward,forward}_output` of recurrent ones.
        entries, embedding, groups, zero_init: as in `MemoryBank`.
    """

    default_sites: ClassVar[tuple[str, ...]] = ("backward_output", "forward_output", "fused")

    def __init__(
        self,
        channels: int,
        *,
        sites: Sequence[str] | None = None,
        entries: int = 256,
        embedding: int | None = None,
        groups: int = 32,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict(
            {site: MemoryBank(channels, entries, embedding, groups, zero_init) for site in self.sites}
        )

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        """Refine a feature, (b, c, h, w) or (b, t, c, h, w), of that shape and dtype; a clip's frames one by one."""
        frames = feature.flatten(0, 1) if feature.ndim == 5 else feature
        bank: MemoryBank = self.at[site]  # type: ignore[assignment]
        refined, quantisation = bank.refine(frames)
        context.add_loss(self, "quantisation", quantisation, site=site, t=t)
        return refined.view_as(feature)
