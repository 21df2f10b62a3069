"""`ResidualConvolutions`: the control that a plug-in has to beat, two plain convolutions of as many parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.plugin import Plugin


class ResidualConvolutions(nn.Module):
    """x + conv(relu(conv(x))) with a hidden width of one's choice.

    What any added layers would have gained. A module that knows of time, masks or a memory should do better than this
    with as many parameters, 18 c width + width + c, at the same sites and after the same steps.

    Args:
        channels: width `c` of the feature.
        width: channels between the two 3x3 convolutions.
        zero_init: start as the identity.

    Shape:
        feature: (b, c, h, w) -> (b, c, h, w).

    Raises:
        ValueError: a width below 1.

    Source: the residual block of EDSR (Lim et al., CVPRW 2017), without its scaling.
    """

    def __init__(self, channels: int, width: int = 64, zero_init: bool = True) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width is a number of channels, at least 1, got {width}")
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1)
        if zero_init:
            nn.init.zeros_(self.conv2.weight)
            nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, feature: Tensor) -> Tensor:
        """The refined feature, (b, c, h, w)."""
        return feature + self.conv2(F.relu(self.conv1(feature)))


class ResidualConvolutionsPlugin(Plugin):
    """`ResidualConvolutions` at each site, a control for comparisons at equal parameters.

    Args:
        channels: width of the sites.
        sites: where it goes, usually those of the plug-in it is compared with; by default what leaves the propagation
            or the fusion, as for `MemoryBankPlugin`.
        width, zero_init: as in `ResidualConvolutions`.
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
        self, channels: int, *, sites: Sequence[str] | None = None, width: int = 64, zero_init: bool = True
    ) -> None:
        super().__init__(channels, sites=sites)
        self.at = nn.ModuleDict({site: ResidualConvolutions(channels, width, zero_init) for site in self.sites})

    def forward(self, feature: Tensor, context: Context, *, site: str, t: int | None = None, **given: Any) -> Tensor:
        """Refine a feature, (b, c, h, w) or (b, t, c, h, w), of that shape and dtype; a clip's frames one by one."""
        frames = feature.flatten(0, 1) if feature.ndim == 5 else feature
        refined: Tensor = self.at[site](frames)
        return refined.view_as(feature)
