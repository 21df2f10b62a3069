"""Short-range latent attention: a mask of what is near in space and time.

Paper: Wang, Dong, Gong, Chen, "Efficient Video Super-Resolution with Latent Attention", Computer Science 50(11A), 2023,
section 4.2. The authors released no code; docs/plugins/latent_attention.md says what is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._latent_block import LatentAttentionBlock, channels_last, channels_third, doubled, halved, leaky, over_clips


class ShortRangeAttention(LatentAttentionBlock):
    """A mask of what is near in space and time, multiplied into the key clip (eq. 12 to 14).

    M([w_x x', w_y x]) * w_x x', where M goes bottom-up through `stacks` convolutions with a pooling each, and top-down
    through as many transposed convolutions. The one key clip has the query's shape. Other arguments as in
    `LatentAttentionBlock`.

    Args:
        stacks: l of fig. 3; with the paper's 2 a position sees 5 frames.
    """

    def __init__(
        self,
        channels: int,
        embedding: int | None = None,
        variational: bool = True,
        zero_init: bool = True,
        stacks: int = 2,
    ) -> None:
        super().__init__(channels, embedding, variational, zero_init)
        width = self.embedding
        self.key = nn.Linear(channels, width, bias=False)
        self.query = nn.Linear(channels, width, bias=False)
        self.reduce = nn.ModuleList(nn.Conv3d(width if i else 2 * width, width, 3, padding=1) for i in range(stacks))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1) for _ in range(stacks))

    def attend(self, query: Tensor, *keys: Tensor) -> Tensor:
        """The mask, for pictures: (b, t, c', h, w) in [0, 1]; arguments as in `forward`."""
        return channels_third(self._masked(query, keys)[1])

    def _attended(self, query: Tensor, keys: Sequence[Tensor]) -> Tensor:
        key, mask = self._masked(query, keys)
        return key * mask

    def _masked(self, query: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The embedded key and its mask, both (b, t, h, w, c')."""
        self._check(query, keys)
        if len(keys) > 1 or any(key.shape != query.shape for key in keys):
            raise ValueError(
                f"short-range attention takes one key clip of the query's shape {tuple(query.shape)}, got "
                f"{' and '.join(str(tuple(key.shape)) for key in keys)}; long-range attention takes others"
            )
        own = channels_last(query)
        key = self.key(channels_last(keys[0]) if keys else own)
        mask = torch.cat([key, self.query(own)], -1)
        sizes = []
        for reduce in self.reduce:
            sizes.append(mask.shape[2:4])
            mask = halved(leaky(over_clips(reduce, mask)))
        for enlarge in self.enlarge:
            mask = doubled(enlarge, mask, sizes.pop())
            mask = leaky(mask) if sizes else mask.sigmoid()
        return key, mask
