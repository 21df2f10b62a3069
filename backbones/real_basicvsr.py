"""`RealBasicVSR`: frames are cleaned before BasicVSR propagates what is in them.

Chan, Zhou, Xu, Loy, "Investigating Tradeoffs in Real-World Video Super-Resolution", CVPR 2022; paper 002.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.site import SiteSpec

from ..plugins.image_cleaning import ImageCleaning, cleaning_loss
from .basicvsr import BasicVSR


class RealBasicVSR(nn.Module):
    """A degraded clip, any number of frames, to the clip enlarged: `ImageCleaning`, then `BasicVSR`.

    Training cleans once. In eval mode a clip is cleaned again, three times at most, until its mean absolute change
    falls below `refine_threshold` (dynamic refinement). The default, the official constructor's, is reached at once;
    the official test configurations have 5, and 1.5 for the network before adversarial training.

    Sites: those of `BasicVSR`, of which `input` is the frames as they come, and `cleaned` (clip), the frames that flow,
    trunks and skip see.

    Losses:
        `backbone/cleaning`, where the pass has a target: mean absolute difference of the frames at `cleaned` to the
        target averaged down to their size. The official weight is 1.

    Args:
        channels: width of the propagated features and of the cleaning's blocks.
        propagation_blocks: residual blocks of each direction.
        cleaning_blocks: residual blocks of the cleaning.
        refine_threshold: mean absolute change below which a clip is clean, in 1/255 of the value range.
        scale: 1, 2, 3 or 4; official weights have 4.
        flow, reconstruction_channels, checkpointing: as in `BasicVSR`.

    Raises:
        ValueError: a scale it cannot build.
    """

    window: ClassVar[int | None] = None
    multiple: ClassVar[int] = 1
    official_names: ClassVar[tuple[tuple[str, str], ...]] = tuple(
        (pattern.replace("^", rf"^{part}\."), f"{part}.{ours}")
        for part, network in (("image_cleaning", ImageCleaning), ("basicvsr", BasicVSR))
        for pattern, ours in network.official_names
    )

    def __init__(
        self,
        channels: int = 64,
        propagation_blocks: int = 20,
        cleaning_blocks: int = 20,
        refine_threshold: float = 255.0,
        scale: int = 4,
        flow: nn.Module | None = None,
        reconstruction_channels: int = 64,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.scale = scale
        self.image_cleaning = ImageCleaning(3, channels, cleaning_blocks, refine_threshold, zero_init=False)
        self.basicvsr = BasicVSR(channels, propagation_blocks, scale, flow, reconstruction_channels, checkpointing)
        self.sites = {"input": SiteSpec(3, "clip"), "cleaned": SiteSpec(3, "clip")} | self.basicvsr.sites

    def forward(self, frames: Tensor, context: Context | None = None) -> Tensor:
        """Clean and enlarge a clip.

        Args:
            frames: (b, t, 3, h, w) in [0, 1]; the tensor given is left as it is.
            context: of this pass; `context.flows` is set, those between cleaned frames.

        Returns:
            (b, t, 3, s h, s w), not clamped.
        """
        context = Context(frames) if context is None else context
        cleaned = self.image_cleaning(context.refine("input", context.pad(self.multiple)))
        cleaned = context.refine("cleaned", cleaned)
        if context.target is not None:
            context.add_loss(None, "cleaning", cleaning_loss(cleaned, context.target), site="cleaned")
        return self.basicvsr.restore(cleaned, context)
