"""Image cleaning: take noise and compression artefacts off the frames before propagation amplifies them.

Paper: Chan, Zhou, Xu, Loy, "Investigating Tradeoffs in Real-World Video Super-Resolution" (RealBasicVSR), CVPR 2022,
section 3.1; paper 002.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.plugin import Plugin
from vsrplug.site import Kind

from ._blocks import ResidualBlock

CHUNK_PIXELS = 2**20  # cleaned at once: at width 64 in float32, one activation is 256 MiB


class ImageCleaning(nn.Module):
    """Clean frames by residual blocks, again and again while there is something to clean: x_i+1 = x_i + C(x_i).

    Training makes one pass. In eval mode (dynamic refinement) a clip is passed on until the mean absolute residual
    C(x_i) of all its frames falls below the threshold, `passes` times at most. Each clip of a batch stops on its own,
    so that its result does not depend on its neighbours; the official code takes the mean over the batch, which is the
    same for batches of one, what it is tested with. Compiled, all passes are computed, and those after the stop
    discarded: no value is read back to decide.

    The last convolution starts at zero, so that the module is the identity until trained.

    Args:
        channels: of the frames.
        width: channels of the residual blocks.
        blocks: their number.
        threshold: mean absolute residual below which a clip is clean, in 1/255 of the value range; the official
            configurations test with 5 (and 1.5 before adversarial training). 0 always makes all passes.
        passes: at most.
        zero_init: start as the identity; False to train a network from scratch.

    Raises:
        ValueError: fewer than one pass.

    Shape:
        frames: (b, t, c, h, w) in [0, 1] -> (b, t, c, h, w), not clamped.
    """

    official_names: ClassVar[tuple[tuple[str, str], ...]] = (  # mmagic's key below `image_cleaning.` -> ours
        (r"^0\.main\.0\.", "first."),
        (r"^0\.main\.2\.", "blocks."),
        (r"^1\.", "last."),
    )

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        blocks: int = 20,
        threshold: float = 5.0,
        passes: int = 3,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if passes < 1:
            raise ValueError(f"passes is {passes}; expected 1 or more")
        self.threshold = threshold
        self.passes = passes
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        if zero_init:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, frames: Tensor) -> Tensor:
        """The cleaned frames, (b, t, c, h, w); the tensor given is left as it is.

        Raises:
            ValueError: not a clip of frames with `channels` channels.
        """
        if frames.ndim != 5 or frames.shape[2] != self.first.in_channels:
            raise ValueError(
                f"frames must be (b, t, {self.first.in_channels}, h, w), got {tuple(frames.shape)}; one frame is a "
                "clip with t = 1"
            )
        residual = self.residual(frames)
        cleaned = frames + residual
        if self.training:
            return cleaned
        unclean = torch.ones(len(frames), 1, 1, 1, 1, dtype=torch.bool, device=frames.device)
        precise = torch.promote_types(frames.dtype, torch.float32)
        for _ in range(self.passes - 1):
            # Per clip, and once clean for good: a later pass may find more to do, but is not asked.
            change = residual.abs().mean((1, 2, 3, 4), keepdim=True, dtype=precise)
            unclean = unclean & (change >= self.threshold / 255)
            if not torch.compiler.is_compiling() and not unclean.any():
                break
            residual = self.residual(cleaned)
            cleaned = torch.where(unclean, cleaned + residual, cleaned)
        return cleaned

    def residual(self, frames: Tensor) -> Tensor:
        """C(x), what one pass adds: (b, t, c, h, w) -> (b, t, c, h, w)."""
        flat = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # twice as fast on the CPU
        pieces = flat.split(max(1, CHUNK_PIXELS // (flat.shape[-2] * flat.shape[-1])))
        cleaned = [self.last(self.blocks(F.leaky_relu(self.first(piece), 0.1, inplace=True))) for piece in pieces]
        return torch.cat(cleaned).unflatten(0, frames.shape[:2]).to(frames.dtype)


def cleaning_loss(cleaned: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference between cleaned frames and the ground truth averaged down to their size.

    The slides say that a mean squared error suffices; the official configurations train with this one, and so do we.

    Args:
        cleaned: (b, t, 3, h, w).
        target: (b, t, 3, s h, s w), s a whole number.

    Raises:
        ValueError: the target is of other frames, or no whole multiple of their size.
    """
    h, w = cleaned.shape[-2:]
    scale = target.shape[-1] // w
    if target.shape != (*cleaned.shape[:3], scale * h, scale * w) or scale < 1:
        raise ValueError(
            f"cleaned frames {tuple(cleaned.shape)} are compared with a target (b, t, 3, s h, s w), s a whole number, "
            f"got {tuple(target.shape)}; crop the ground truth to a multiple of the frames"
        )
    precise = torch.promote_types(cleaned.dtype, torch.float32)
    clean = F.avg_pool2d(target.flatten(0, 1).to(precise), scale).unflatten(0, target.shape[:2])
    return (cleaned.to(precise) - clean).abs().mean()


class ImageCleaningPlugin(Plugin):
    """An `ImageCleaning` at each site. Reports the loss `<name>/cleaning` where the pass has a `target`.

    The trainer gives the target. The loss is what tells this plug-in to clean rather than to help along: give it a
    weight, `losses={"pixel": 1, "<name>/cleaning": 1}` being the official one.

    Args:
        channels: width of the sites: 3, they hold frames.
        sites: where it goes; by default `input`, the frames that the whole network sees.
        width, blocks, threshold, passes, zero_init: as in `ImageCleaning`.

    Raises:
        ValueError: a site that does not hold frames.
    """

    default_sites: ClassVar[tuple[str, ...]] = ("input",)
    kinds: ClassVar[tuple[Kind, ...]] = ("clip",)

    def __init__(
        self,
        channels: int,
        *,
        sites: Sequence[str] | None = None,
        width: int = 64,
        blocks: int = 20,
        threshold: float = 5.0,
        passes: int = 3,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, sites=sites)
        if channels != 3:
            raise ValueError(
                f"ImageCleaning cleans RGB frames, got channels={channels}; put it at a clip site of 3 channels such "
                "as 'input'. The width of its blocks is the argument width"
            )
        self.at = nn.ModuleDict(
            {site: ImageCleaning(channels, width, blocks, threshold, passes, zero_init) for site in self.sites}
        )

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        """Clean frames (b, t, 3, h, w)."""
        cleaned = self.at[site](feature)
        if context.target is not None:
            context.add_loss(self, "cleaning", cleaning_loss(cleaned, context.target), site=site, t=t)
        return cleaned
