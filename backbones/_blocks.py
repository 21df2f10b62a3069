"""What several backbones share: the trunk of residual blocks, and work in bounded chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..plugins._blocks import ResidualBlock

CHUNK_PIXELS = 2**20  # at 64 channels in float32, one activation of a chunk is 256 MiB


class ResidualTrunk(nn.Module):
    """A convolution, LeakyReLU(0.1), then residual blocks: a propagation branch of BasicVSR.

    Args:
        in_channels: width of what enters.
        channels: width of the blocks and of the result.
        blocks: number of residual blocks.
        checkpointing: keep only what enters the residual blocks, and compute them again in the backward pass. The
            convolution and `refine` before them run once, so that plug-ins draw noise and report losses once.

    Shape:
        x: (b, in_channels, h, w) -> (b, channels, h, w)
    """

    def __init__(self, in_channels: int, channels: int, blocks: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.main = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks))),
        )

    def forward(self, x: Tensor, refine: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(b, in_channels, h, w) -> (b, channels, h, w); `refine` is applied to what enters the residual blocks."""
        # A 3x3 convolution on the CPU is about twice as fast on channels_last, and the layout carries through.
        entered = self.main[1](self.main[0](x.contiguous(memory_format=torch.channels_last)))
        if refine is not None:
            entered = refine(entered)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.main[2], entered, use_reentrant=False)
        return self.main[2](entered)


def in_chunks(function: Callable[..., Tensor], *batches: Tensor, pixels: int) -> Tensor:
    """`function(*batches)` in pieces along the batch, so that memory does not grow with the length of a clip.

    Args:
        function: maps batches (n, ...) to (n, ...), each entry on its own.
        batches: tensors of the same length n.
        pixels: size of the largest activation of one entry; a piece has `CHUNK_PIXELS` at most, or one entry.
    """
    size = max(1, CHUNK_PIXELS // pixels)
    if len(batches[0]) <= size:
        return function(*batches)
    return torch.cat([function(*piece) for piece in zip(*(batch.split(size) for batch in batches), strict=True)])
