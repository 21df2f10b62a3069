"""Long-range latent attention: what every position of the key clips has to say about a pixel.

Paper: Wang, Dong, Gong, Chen, "Efficient Video Super-Resolution with Latent Attention", Computer Science 50(11A), 2023,
section 4.1. The authors released no code; docs/plugins/latent_attention.md says what is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._latent_block import LatentAttentionBlock, channels_last, doubled, halved, leaky, over_clips


class LongRangeAttention(LatentAttentionBlock):
    """Attention of every position over all positions of the key clips (eq. 9 to 11).

    A convolution and a pooling halve the frames, keys and values are pooled once more:
    softmax(phi(x')^T theta(x)) g(x') with linear phi, theta and g, without 1/sqrt(c'). A transposed convolution
    restores the size. No scores are stored: memory is linear in t h w and in the size of the keys, also of the backward
    pass. Time grows with the product of the two.

    The key clips may have any number of frames and any size; one softmax goes over all of them. Arguments as in
    `LatentAttentionBlock`.
    """

    def __init__(
        self, channels: int, embedding: int | None = None, variational: bool = True, zero_init: bool = True
    ) -> None:
        super().__init__(channels, embedding, variational, zero_init)
        width = self.embedding
        self.reduce = nn.Conv3d(channels, width, 3, padding=1)
        self.theta = nn.Linear(width, width, bias=False)
        self.phi = nn.Linear(width, width, bias=False)
        self.g = nn.Linear(width, width, bias=False)
        self.enlarge = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)

    def attend(self, query: Tensor, *keys: Tensor, at: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """The weights that chosen positions give to the keys, for pictures (fig. 7).

        Args:
            query, keys: as in `forward`.
            at: frame, row and column of each position, in pixels of the query.

        Returns:
            For each key clip (b, len(at), n, h', w'), where h' and w' are its h and w halved twice, rounded up. The
            weights of one position over all key clips sum to 1.

        Raises:
            IndexError: a position outside the query.
        """
        reduced, others = self._reduced(query, keys)
        t, h, w = query.shape[1], *query.shape[3:]
        for position in at:
            if any(not 0 <= i < size for i, size in zip(position, (t, h, w), strict=True)):
                raise IndexError(f"there is no frame, row, column {tuple(position)} in a clip of {t} x {h} x {w}")
        frames, rows, columns = ([position[axis] // (2 if axis else 1) for position in at] for axis in range(3))
        phi = [halved(self.phi(other)) for other in others]
        scores = self.theta(reduced)[:, frames, rows, columns] @ _positions(phi).mT
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        sizes = [found.shape[1:4] for found in phi]
        parts = weights.split([math.prod(size) for size in sizes], -1)
        return [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]

    def _attended(self, query: Tensor, keys: Sequence[Tensor]) -> Tensor:
        reduced, others = self._reduced(query, keys)
        theta = self.theta(reduced).flatten(1, 3)
        phi, g = (_positions([halved(linear(other)) for other in others]) for linear in (self.phi, self.g))
        # Zeros fill c' up to a multiple of 8 and change no score: torch's kernels for other widths store all scores.
        theta, phi, g = (F.pad(x, (0, -self.embedding % 8)).unsqueeze(1) for x in (theta, phi, g))
        gathered = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)[:, 0, :, : self.embedding]
        return leaky(doubled(self.enlarge, gathered.unflatten(1, reduced.shape[1:4]), query.shape[3:]))

    def _reduced(self, query: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Query and keys at half the size, (b, t, h/2, w/2, c'); the query among the keys is computed once."""
        self._check(query, keys)
        reduced = self._reduce(query)
        return reduced, [reduced if key is query else self._reduce(key) for key in keys or (query,)]

    def _reduce(self, clip: Tensor) -> Tensor:
        return halved(leaky(over_clips(self.reduce, channels_last(clip))))


def _positions(clips: Sequence[Tensor]) -> Tensor:
    """Clips (b, n, h, w, c') as one row of positions, (b, n h w + ..., c')."""
    return torch.cat([clip.flatten(1, 3) for clip in clips], 1)
