"""`MANA`: a window of frames fused by attention to neighbours and to a memory, without alignment. Paper 000.

Yu, Liu, Bo, Mei, "Memory-Augmented Non-Local Attention for Video Super-Resolution", 2021.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.site import SiteSpec

from ..plugins._blocks import ResidualBlock
from ..plugins.gaussian_cross_frame_attention import GaussianCrossFrameAttention, check_centre
from ..plugins.memory_bank import recall
from ._reconstruction import PixelShuffleHead


class MemoryAttention(nn.Module):
    """MANA eq. 2 for queries that another attention made: a `MemoryBank` without normalisation and query of its own.

    The output projection starts at zero (3.4).

    Args:
        channels: width of the result.
        embedding: C', width of the queries.
        entries: N, columns of the memory.

    Shape:
        query: (b, C', h, w) -> residual (b, channels, h, w), and the quantisation loss, mean |Q - Y|, a scalar.
    """

    def __init__(self, channels: int, embedding: int, entries: int) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(embedding, entries))
        self.output = nn.Conv2d(embedding, channels, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """(b, C', h, w) -> (b, channels, h, w), and the loss in float32 at least."""
        read = recall(query, self.memory)
        return self.output(read), (query - read).abs().mean(dtype=torch.promote_types(query.dtype, torch.float32))


class MANA(PixelShuffleHead):
    """Memory-augmented non-local attention: one SR frame, the centre's, from a window of LR frames.

    Each frame is encoded by itself. The centre's feature is refined by two residuals that share a normalisation and a
    query: Gaussian-weighted attention to all frames of the window (eq. 1) and attention to a memory learned from the
    whole training set (eq. 2). It is decoded, enlarged, and added to the centre frame enlarged bilinearly.

    For clips of any length use `SlidingWindow(MANA())`. Any height and width.

    Sites:
        `features` (clip): encoded frames. `attended` (frame): the centre's feature after both attentions, given
        `neighbours`, the encoded frames (b, t, c, h, w). `reconstructed` (frame): after the decoder. Frame sites are
        given the time step of the centre frame.

    Losses:
        `backbone/quantisation`: mean distance of the queries to what the memory holds for them, which trains the memory
        in the paper's second stage (3.4).

    Args:
        channels: C, width of the features.
        frames: T, length of the window, odd.
        encoder_blocks: residual blocks that each frame goes through.
        decoder_blocks: residual blocks after the attentions.
        memory_size: N, entries of the memory, the paper's 512, the official code's 256; 0 leaves the memory out, the
            paper's "No_Mem".
        scale: enlargement, 1 to 4; the paper's is 4.
        groups: groups of the normalisation; they divide `channels`.

    Raises:
        ValueError: arguments that do not go together.

    Shape:
        frames: (b, t, 3, h, w) in [0, 1], t equal to `frames` -> (b, 1, 3, s h, s w), not clamped.
    """

    multiple: ClassVar[int] = 1
    official_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^nonloc_spatial\.norm\.", "attention.norm."),
        (r"^nonloc_spatial\.mb$", "memory_bank.memory"),
        (r"^nonloc_spatial\.W_z1\.", "memory_bank.output."),
        *(
            (pattern.replace("^", r"^nonloc_spatial\."), f"attention.{ours}")
            for pattern, ours in GaussianCrossFrameAttention.official_names
        ),
    )
    official_ignored: ClassVar[tuple[str, ...]] = (r"nonloc_spatial\.D",)  # squared distances, of one size of frames

    def __init__(
        self,
        channels: int = 128,
        frames: int = 7,
        encoder_blocks: int = 5,
        decoder_blocks: int = 40,
        memory_size: int = 512,
        scale: int = 4,
        groups: int = 32,
    ) -> None:
        super().__init__()
        check_centre(frames)
        if memory_size < 0:
            raise ValueError(f"memory_size is {memory_size}; expected the number of entries, or 0 for no memory")
        self.channels = channels
        self.scale = scale
        self.window = frames
        self.centre = frames // 2
        self.sites = {
            "features": SiteSpec(channels, "clip"),
            "attended": SiteSpec(channels, "frame"),
            "reconstructed": SiteSpec(channels, "frame"),
        }
        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder = nn.Sequential(*(ResidualBlock(channels) for _ in range(encoder_blocks)))
        self.attention = GaussianCrossFrameAttention(channels, frames, groups=groups)
        self.memory_bank = MemoryAttention(channels, channels // 2, memory_size) if memory_size else None
        self.decoder = nn.Sequential(*(ResidualBlock(channels) for _ in range(decoder_blocks)))
        self.add_head(channels, scale)

    def forward(self, frames: Tensor, context: Context | None = None, extracted: Tensor | None = None) -> Tensor:
        """Super-resolve the centre frame.

        Args:
            frames: (b, t, 3, h, w) in [0, 1], t equal to `window`.
            context: of this pass; made here where there is none.
            extracted: what `extract` gave for these frames. The site `features` is not called then.

        Returns:
            (b, 1, 3, s h, s w), not clamped.

        Raises:
            ValueError: a number of frames other than `window`.
        """
        context = Context(frames) if context is None else context
        if frames.shape[1] != self.window:
            raise ValueError(
                f"this MANA takes windows of {self.window} frames, got {frames.shape[1]}; for a clip of any length use "
                "SlidingWindow(model)"
            )
        features = context.refine("features", self.extract(frames)) if extracted is None else extracted
        centre = features[:, self.centre]
        attended = self.attention(centre, features)
        if self.memory_bank is not None:
            residual, quantisation = self.memory_bank(self.attention.query(self.attention.norm(centre)))
            attended = attended + residual.to(attended.dtype)
            context.add_loss(None, "quantisation", quantisation, site="attended", t=self.centre)
        attended = context.refine("attended", attended, t=self.centre, neighbours=features)
        decoded = self.decoder(attended.contiguous(memory_format=torch.channels_last))
        reconstructed = context.refine("reconstructed", decoded, t=self.centre)
        return self.on_frames(reconstructed, frames[:, self.centre]).unsqueeze(1)

    def extract(self, frames: Tensor) -> Tensor:
        """Features of frames, each on its own: the part of the network that windows of one clip have in common.

        Args:
            frames: (b, t, 3, h, w) in [0, 1], any t.

        Returns:
            (b, t, c, h, w)
        """
        flat = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.encoder(F.leaky_relu(self.conv_first(flat), 0.1)).unflatten(0, frames.shape[:2])
