"""Memory-augmented attention: a learned bank of typical local details that every pixel may consult.

Paper: Yu, Liu, Bo, Mei, "Memory-Augmented Non-Local Attention for Video Super-Resolution", 2021, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.maps import Maps, at_site
from vsrplug.plugin import Plugin


class MemoryBank(nn.Module):
    """Refine a feature with details memorised from the whole training set (MANA eq. 2).

    With Q = query(GroupNorm(F)) and M the memory, C' x N:  Y = M softmax(M^T Q / sqrt(C')),  F + W Y.

    The 1/sqrt(C') is the official code's; eq. 2 leaves it out. The output projection W starts at zero, so that the
    module is the identity until trained.

    The authors publish it as half of one block, whose other half is the cross-frame attention: `load_official` takes
    from such a block, `MemoryBank(channels, entries=256)`, what is the memory's and reports the rest as ignored. There
    the two halves share the normalisation and the query projection; a bank of one's own has its own.

    Args:
        channels: width c of the feature.
        entries: N, columns of the memory (the paper's 512, the official code's 256).
        embedding: C', width of the query; half of `channels` unless given.
        groups: groups of the normalisation; the official code's 32 where `channels` can be split so.
        zero_init: start as the identity; False to train a network from scratch.

    Shape:
        feature: (b, c, h, w) -> (b, c, h, w)
    """

    official_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^mb$", "memory"),
        (r"^phi\.", "query."),
        (r"^W_z1\.", "output."),
    )
    # The attention's: its Gaussian's distances and width, its key, value and output projections.
    official_ignored: ClassVar[tuple[str, ...]] = ("D", "std", r"(theta|g|W_z)\.(weight|bias)")

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

    def maps(self, feature: Tensor, *, at: tuple[int, int, int] | None = None) -> Maps:
        """How the first feature (c, h, w) of a batch reads the memory, for pictures.

        Args:
            feature: (b, c, h, w).
            at: not used: every pixel is shown.

        Returns:
            `"recall"`: the entropy of each pixel's weights, from 0 (one entry) to log2 N bits (all alike), and the
            number of the entry with the largest weight, both (h, w).
        """
        query = self.query(self.norm(feature[:1]))[0]
        scores = torch.einsum("chw,cn->hwn", query, self.memory.to(query.dtype)) / math.sqrt(len(query))
        weights = scores.softmax(-1, dtype=_precise(scores))
        entropy = torch.special.entr(weights).sum(-1) / math.log(2)
        return {"recall": {"entropy, bits": entropy, "strongest entry": weights.argmax(-1)}}


def recall(query: Tensor, memory: Tensor) -> Tensor:
    """What the memory holds for each query: MANA eq. 2 before the output projection.

    It is attention whose keys and values are both the memory, so that torch's own kernels apply, with the factor
    1/sqrt(c'), a softmax in float32 at least, and no matrix of all pixels by all entries, forward or backward.

    Args:
        query: (b, c', h, w)
        memory: (c', n)

    Returns:
        (b, c', h, w), in the query's dtype.
    """
    # The kernels want the numbers of a pixel, and of an entry, side by side; else they fall back on the matrix.
    pixels = query.permute(0, 2, 3, 1).contiguous()  # b h w c'
    entries = memory.to(query.dtype).T.contiguous().expand(len(pixels), 1, -1, -1)  # b 1 n c'
    read = F.scaled_dot_product_attention(pixels.flatten(1, 2).unsqueeze(1), entries, entries)  # b 1 (h w) c'
    return read.view_as(pixels).permute(0, 3, 1, 2)


def _precise(x: Tensor) -> torch.dtype:
    """float32, or the dtype of `x` where that is better."""
    return torch.promote_types(x.dtype, torch.float32)


class MemoryBankPlugin(Plugin):
    """A `MemoryBank` at each site. Reports the loss `<name>/quantisation`.

    Args:
        channels: width of the sites.
        sites: where it goes; by default what leaves the propagation or the fusion: `fused` of window networks,
            the outputs of the branches of recurrent ones.
        entries, embedding, groups, zero_init: as in `MemoryBank`.
    """

    default_sites: ClassVar[tuple[str, ...]] = (
        "backward_output",
        "forward_output",
        "backward_1_output",
        "forward_1_output",
        "backward_2_output",
        "forward_2_output",
        "fused",
    )

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

    def maps(
        self,
        feature: Tensor,
        context: Context,
        *,
        site: str,
        at: tuple[int, int, int],
        t: int | None = None,
        **given: Any,
    ) -> Maps:
        """Which entries the pixels of the frame recall, see `MemoryBank.maps`."""
        bank: MemoryBank = self.at[site]  # type: ignore[assignment]
        return at_site(bank.maps(feature[:1, at[0]] if feature.ndim == 5 else feature), site)
