"""PCD alignment of EDVR: deformable convolutions whose offsets are found on a pyramid, from coarse to fine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..plugins._blocks import lrelu
from ..plugins._deformable import DeformablePack
from ._predeblur import enlarge


class Pyramid(NamedTuple):
    """Features of frames at three sizes: `level1` (b, t, c, h, w), `level2` and `level3` at 1/2 and 1/4 of that."""

    level1: Tensor
    level2: Tensor
    level3: Tensor

    def frame(self, t: int) -> Pyramid:
        """The features of frame `t`, each (b, c, ...)."""
        return Pyramid(*(level[:, t] for level in self))


class PCDAlignment(nn.Module):
    """Pyramid, cascading and deformable alignment of one frame's features to those of the reference frame.

    Offsets are found on the coarsest level first; on the way to the next they are enlarged and, being pixels, doubled.

    Args:
        channels: width `c` of the features.
        deform_groups: deformable groups.

    Shape:
        neighbour, reference: pyramids of (b, c, h, w), (b, c, h/2, w/2), (b, c, h/4, w/4) -> (b, c, h, w).

    Source: Wang et al., "EDVR", CVPRW 2019, section 3.2, eq. 1-4.
    """

    def __init__(self, channels: int, deform_groups: int) -> None:
        super().__init__()

        def merge() -> nn.Conv2d:
            return nn.Conv2d(2 * channels, channels, 3, padding=1)

        def smooth() -> nn.Conv2d:
            return nn.Conv2d(channels, channels, 3, padding=1)

        def deform() -> DeformablePack:
            return DeformablePack(channels, channels, deform_groups)

        self.offset_conv1 = nn.ModuleDict({"l3": merge(), "l2": merge(), "l1": merge()})
        self.offset_conv2 = nn.ModuleDict({"l3": smooth(), "l2": merge(), "l1": merge()})
        self.offset_conv3 = nn.ModuleDict({"l2": smooth(), "l1": smooth()})
        self.dcn_pack = nn.ModuleDict({"l3": deform(), "l2": deform(), "l1": deform()})
        self.feat_conv = nn.ModuleDict({"l2": merge(), "l1": merge()})
        self.cas_offset_conv1 = merge()
        self.cas_offset_conv2 = smooth()
        self.cas_dcnpack = deform()

    def forward(self, neighbour: Pyramid, reference: Pyramid) -> Tensor:
        """Pyramids of (b, c, ...) -> aligned feature (b, c, h, w)."""
        offset = self._offset("l3", neighbour.level3, reference.level3, None)
        aligned = lrelu(self.dcn_pack["l3"](neighbour.level3, offset))

        offset = self._offset("l2", neighbour.level2, reference.level2, enlarge(offset) * 2)
        fine = self.dcn_pack["l2"](neighbour.level2, offset)
        aligned = lrelu(self.feat_conv["l2"](torch.cat((fine, enlarge(aligned)), dim=1)))

        offset = self._offset("l1", neighbour.level1, reference.level1, enlarge(offset) * 2)
        fine = self.dcn_pack["l1"](neighbour.level1, offset)
        aligned = self.feat_conv["l1"](torch.cat((fine, enlarge(aligned)), dim=1))

        offset = lrelu(self.cas_offset_conv1(torch.cat((aligned, reference.level1), dim=1)))
        return lrelu(self.cas_dcnpack(aligned, lrelu(self.cas_offset_conv2(offset))))

    def _offset(self, level: str, neighbour: Tensor, reference: Tensor, coarse: Tensor | None) -> Tensor:
        """The feature that a level's offsets are read from, given that of the coarser level, enlarged."""
        offset = lrelu(self.offset_conv1[level](torch.cat((neighbour, reference), dim=1)))
        if coarse is None:
            return lrelu(self.offset_conv2[level](offset))
        offset = lrelu(self.offset_conv2[level](torch.cat((offset, coarse), dim=1)))
        return lrelu(self.offset_conv3[level](offset))
