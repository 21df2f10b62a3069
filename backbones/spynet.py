"""`SPyNet`: optical flow from coarse to fine. Ranjan and Black, "Optical flow estimation using a spatial pyramid
network", CVPR 2017; the flow net of BasicVSR (paper 002)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plugins._blocks import warp

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SPyNet(nn.Module):
    """Flow from `reference` into `supporting`, refined from the coarsest level of an image pyramid to the finest.

    At each level a network of 7x7 convolutions sees the reference, the supporting frame warped by the flow so far,
    and that flow, and adds to it. Frames of any size are resized to multiples of 2**(levels - 1) and the flow back.

    Args:
        levels: of the pyramid; official weights have 6.
        widths: channels of the hidden layers of a level; official weights have (32, 64, 32, 16).
    """

    official_names: ClassVar[tuple[tuple[str, str], ...]] = tuple(
        # mmagic counts the convolutions, BasicSR the entries of a Sequential with activations between them.
        (rf"^basic_module\.(\d+)\.basic_module\.{conv}\.conv\.", rf"basic_module.\1.basic_module.{2 * conv}.")
        for conv in range(5)
    )

    mean: Tensor
    std: Tensor

    def __init__(self, levels: int = 6, widths: Sequence[int] = (32, 64, 32, 16)) -> None:
        super().__init__()
        self.basic_module = nn.ModuleList(_Level(widths) for _ in range(levels))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, reference: Tensor, supporting: Tensor) -> Tensor:
        """Flow such that `warp(supporting, flow)` looks like `reference`.

        Args:
            reference: (b, 3, h, w) in [0, 1].
            supporting: (b, 3, h, w) in [0, 1].

        Returns:
            (b, 2, h, w) in pixels, x then y; float32 also where the frames or the weights are bfloat16.
        """
        h, w = reference.shape[-2:]
        multiple = 2 ** (len(self.basic_module) - 1)
        height, width = -(-h // multiple) * multiple, -(-w // multiple) * multiple
        pyramids = [self._pyramid(frame, height, width) for frame in (reference, supporting)]
        flow = pyramids[0][0].new_zeros(len(reference), 2, height // multiple, width // multiple)
        for level, (estimate, ref, sup) in enumerate(zip(self.basic_module, *pyramids, strict=True)):
            if level:
                flow = 2 * F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=True)
            seen = torch.cat((ref, warp(sup, flow, padding="border"), flow), dim=1)
            flow = flow + estimate(seen.to(reference.dtype)).to(flow.dtype)
        flow = F.interpolate(flow, size=(h, w), mode="bilinear", align_corners=False)
        return flow * flow.new_tensor((w / width, h / height)).view(1, 2, 1, 1)

    def _pyramid(self, frame: Tensor, height: int, width: int) -> list[Tensor]:
        """Normalised frames from the coarsest to (height, width), in float32 or better: flow adds up over levels."""
        frame = frame.to(torch.promote_types(frame.dtype, torch.float32))
        frame = F.interpolate(frame, size=(height, width), mode="bilinear", align_corners=False)
        pyramid = [(frame - self.mean) / self.std]
        for _ in range(len(self.basic_module) - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        return pyramid[::-1]


class _Level(nn.Module):
    """The network of one level: (b, 8, h, w), reference, warped supporting frame and flow -> (b, 2, h, w)."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((8, *widths, 2)):
            layers += [nn.Conv2d(inputs, outputs, 7, padding=3), nn.ReLU(inplace=True)]
        self.basic_module = nn.Sequential(*layers[:-1])

    def forward(self, seen: Tensor) -> Tensor:
        """What to add to the flow."""
        return self.basic_module(seen.contiguous(memory_format=torch.channels_last))
