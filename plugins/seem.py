"""SEEM: refine features with the masks of the objects in the frame.

Paper: Lu, Xiao, Bai, Xiong, Wang, "Can SAM Boost Video Super-Resolution?", 2023, sections 3.2 to 3.5. The authors
released no code; this follows the text, with the details below where a literal reading would not train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.maps import Maps
from vsrplug.plugin import Plugin
from vsrplug.site import SiteSpec


class SEEM(nn.Module):
    """SAM-guided refinement: F + F_m + CAB(F_m), where F_m comes from F and the semantic representation (eq. 2, 3).

    Two convolutions on [F, R] give F_m; a channel attention block weighs its channels; the sum is added to F
    (the `+` of eq. 8, 9, 13 and 14 is inside). The second convolution starts at zero: F_m is zero, and so is the
    residual, whatever the attention says. The squeeze is never below four units: with the usual reduction of 16, narrow
    features would leave one or two, which a LeakyReLU can silence for good.

    Args:
        channels: width c of the feature F.
        representation: width d of the semantic representation R; `channels` unless given.
        reduction: r of eq. 2.
        zero_init: start as the identity; False to train a network from scratch.

    Shape:
        feature: (b, c, h, w), representation: (b, d, h, w) -> (b, c, h, w)
    """

    def __init__(
        self, channels: int, representation: int | None = None, reduction: int = 16, zero_init: bool = True
    ) -> None:
        super().__init__()
        squeezed = max(channels // reduction, 4)
        first = nn.Conv2d(channels + (representation or channels), channels, 3, padding=1)
        last = nn.Conv2d(channels, channels, 3, padding=1)
        self.mapping = nn.Sequential(first, nn.LeakyReLU(0.1), last)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )
        if zero_init:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, feature: Tensor, representation: Tensor) -> Tensor:
        """The refined feature, (b, c, h, w)."""
        mapped = self.mapping(torch.cat([feature, representation.to(feature.dtype)], 1))
        return feature + (mapped + mapped * self.attention(mapped)).to(feature.dtype)


class SemanticRepresentation(nn.Module):
    """R = f_r([frame, masks]) of eq. 1: two convolutions and one residual block.

    Args:
        masks: m, planes of object masks; frames with fewer are padded with zeros by the mask source.
        channels: d, width of the representation.

    Shape:
        frames: (b, t, 3, h, w) in [0, 1], masks: (b, t, m, h, w) -> (b, t, d, h, w)
    """

    def __init__(self, masks: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Sequential(
            nn.Conv2d(3 + masks, channels, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(0.1),
        )
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, frames: Tensor, masks: Tensor) -> Tensor:
        """The semantic representation of every frame, (b, t, d, h, w)."""
        seen = torch.cat([frames, masks.to(frames.dtype)], 2).flatten(0, 1)
        embedded = self.embedding(seen)
        return (embedded + self.block(embedded)).unflatten(0, frames.shape[:2])


class SEEMPlugin(Plugin):
    """SEEM at several sites, sharing one semantic representation that is computed once a pass.

    Needs `Context(frames, masks=...)`. By default where the paper puts it: on EDVR at the reference feature of the
    alignment, the fused and the reconstructed feature (eq. 8, 9); on BasicVSR before and after the residual blocks of
    both branches (eq. 13, 14), and on BasicVSR++, which the paper does not treat, after those of every branch.

    Args:
        channels: width of the sites.
        sites: where it goes.
        masks: planes of object masks a frame; 64 in the paper (an 8x8 grid of points).
        representation: width of R; `channels` unless given.
        reduction, zero_init: as in `SEEM`.
    """

    default_sites: ClassVar[tuple[str, ...]] = (
        "reference",
        "fused",
        "reconstructed",
        "backward_input",
        "forward_input",
        "backward_output",
        "forward_output",
        "backward_1_output",
        "forward_1_output",
        "backward_2_output",
        "forward_2_output",
    )

    def __init__(
        self,
        channels: int,
        *,
        sites: Sequence[str] | None = None,
        masks: int = 64,
        representation: int | None = None,
        reduction: int = 16,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, sites=sites)
        self.masks = masks
        self.representation = SemanticRepresentation(masks, representation or channels)
        self.at = nn.ModuleDict({site: SEEM(channels, representation, reduction, zero_init) for site in self.sites})

    def choose_sites(self, known: Mapping[str, SiteSpec]) -> tuple[str, ...]:
        """The default sites among `known`, without the fused clip of recurrent networks, which eq. 14 leaves alone."""
        return tuple(s for s in super().choose_sites(known) if (s, known[s].kind) != ("fused", "clip"))

    def prepare(self, context: Context) -> None:
        """Compute R once for all frames and sites.

        Raises:
            ValueError: the pass has no masks, or another number of planes than this plug-in was made for.
        """
        if context.masks is None:
            raise ValueError("SEEM needs object masks: call model(frames, Context(frames, masks=...)), (b, t, m, h, w)")
        if context.masks.shape[2] != self.masks:
            raise ValueError(
                f"this SEEM was made for masks={self.masks} planes a frame, the pass has {context.masks.shape[2]}; pad "
                "with zeros, or make both with the same number"
            )
        context.memo[self] = self.representation(context.frames, context.masks)

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        """Refine the feature of frame t, (b, c, h, w), or of all frames, (b, t, c, h, w)."""
        representation: Tensor = context.memo[self]
        if feature.ndim == 4:
            return self._refine(site, feature, representation[:, t])
        return self._refine(site, feature.flatten(0, 1), representation.flatten(0, 1)).view_as(feature)

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
        """The masks of the frame, once: they are the same for all sites."""
        if site != self.sites[0] or context.masks is None:
            return {}
        return {"masks": {"the frame's masks": context.masks[0, at[0]] > 0.5}}

    def _refine(self, site: str, feature: Tensor, representation: Tensor) -> Tensor:
        if representation.shape[-2:] != feature.shape[-2:]:  # a site with a stride
            representation = F.interpolate(representation, size=feature.shape[-2:], mode="area")
        return self.at[site](feature, representation)
