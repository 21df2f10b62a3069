"""`PWCNet`: optical flow by pyramid, warping and cost volume. Sun et al., "PWC-Net", CVPR 2018; the flow net of STVUN
(paper 004)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plugins._blocks import warp

PYRAMID = (16, 32, 64, 96, 128, 196)  # channels of the levels at 1/2, 1/4, ... 1/64 of the frame
DENSE = (128, 128, 96, 64, 32)  # what each layer of a level's estimator adds
CONTEXT = ((128, 1), (128, 2), (128, 4), (96, 8), (64, 16), (32, 1))  # channels and dilation
RADIUS = 4  # of the search, in pixels of a level
UNIT = 20.0  # the network counts flow in 20 pixels of the frame
MULTIPLE = 2 ** len(PYRAMID)


class PWCNet(nn.Module):
    """Flow from `reference` into `supporting`, coarse to fine: from features at 1/64 of the size to those at 1/4.

    At each level the supporting feature is warped by the flow so far, compared with the reference within 4 pixels, and
    a dense network reads the flow from that cost volume; dilated convolutions refine the last one. Frames of any size
    are resized to multiples of 64 and the flow back.

    Borders are as in the authors' PyTorch 1.2: a sample beyond the frame takes the nearest pixel, and the outer pixels'
    centres are the ends of the grid. The layer `deconv2` of official files has no effect on the flow; there is none
    here, and its entries are reported as ignored.
    """

    official_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^conv6aa\.0\.", "pyramid.5.0."),  # the last level has its first two the other way round
        (r"^conv6a\.0\.", "pyramid.5.2."),
        (r"^conv6b\.0\.", "pyramid.5.4."),
        *(
            (rf"^conv{level}{name}\.0\.", f"pyramid.{level - 1}.{place}.")
            for level in range(1, 6)
            for name, place in (("a", 0), ("aa", 2), ("b", 4))
        ),
        *(
            (rf"^{theirs.format(level)}\.", f"estimators.{6 - level}.{ours}.")
            for level in range(6, 1, -1)
            for theirs, ours in (
                (r"conv{}_(\d)\.0", r"dense.\1"),
                ("predict_flow{}", "predict"),
                ("deconv{}", "enlarge_flow"),
                ("upfeat{}", "enlarge_feature"),
            )
        ),
        *((rf"^dc_conv{layer}(\.0)?\.", f"context.{2 * (layer - 1)}.") for layer in range(1, 8)),
    )
    official_ignored: ClassVar[tuple[str, ...]] = (r"estimators\.4\.enlarge_flow\.(weight|bias)",)  # deconv2

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = nn.ModuleList(
            _activated(
                nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
                nn.Conv2d(wide, wide, 3, padding=1),
                nn.Conv2d(wide, wide, 3, padding=1),
            )
            for narrow, wide in zip((3, *PYRAMID), PYRAMID, strict=False)
        )
        volume = (2 * RADIUS + 1) ** 2
        # Below the coarsest level, an estimator sees the reference feature and four channels from the level above too.
        inputs = (volume, *(volume + channels + 4 for channels in PYRAMID[-2:0:-1]))
        self.estimators = nn.ModuleList(
            _Estimator(channels, last=level == len(inputs) - 1) for level, channels in enumerate(inputs)
        )
        widths = (inputs[-1] + sum(DENSE), *(width for width, _ in CONTEXT))
        dilated = [
            nn.Conv2d(narrow, wide, 3, padding=dilation, dilation=dilation)
            for narrow, (wide, dilation) in zip(widths, CONTEXT, strict=False)
        ]
        self.context = nn.Sequential(*_activated(*dilated), nn.Conv2d(widths[-1], 2, 3, padding=1))

    def forward(self, reference: Tensor, supporting: Tensor) -> Tensor:
        """Flow such that `warp(supporting, flow)` looks like `reference`.

        Args:
            reference: (b, 3, h, w) in [0, 1].
            supporting: (b, 3, h, w) in [0, 1].

        Returns:
            (b, 2, h, w) in pixels, x then y; float32 also where the frames or the weights are bfloat16.
        """
        h, w = reference.shape[-2:]
        height, width = -(-h // MULTIPLE) * MULTIPLE, -(-w // MULTIPLE) * MULTIPLE
        flow = self.estimate(*(resized(frame, height, width) for frame in (reference, supporting)))
        flow = F.interpolate(flow, size=(h, w), mode="bilinear", align_corners=False)
        return flow * flow.new_tensor((UNIT * w / width, UNIT * h / height)).view(1, 2, 1, 1)

    def estimate(self, reference: Tensor, supporting: Tensor) -> Tensor:
        """What the official class returns: flow at a quarter of the size, not yet in pixels.

        Args:
            reference: (b, 3, h, w), h and w multiples of 64, in the range of values that the weights were trained for.
            supporting: (b, 3, h, w).

        Returns:
            (b, 2, h/4, w/4) in 20 pixels of the frames, x then y; float32 at least.
        """
        b = len(reference)
        feature = torch.cat((reference, supporting)).contiguous(memory_format=torch.channels_last)
        levels = []
        for level in self.pyramid:
            feature = level(feature)
            levels.append((feature[:b], feature[b:]))
        estimators = cast("Sequence[_Estimator]", self.estimators)
        feature, flow = estimators[0](cost_volume(*levels[-1]))
        for depth, (coarser, estimator) in zip(range(len(levels) - 1, 1, -1), pairwise(estimators), strict=True):
            near, far = levels[depth - 1]
            flow, carried = coarser.enlarge_flow(flow), coarser.enlarge_feature(feature)
            volume = cost_volume(near, warp(far, flow * (UNIT / 2**depth), padding="border"))
            feature, flow = estimator(torch.cat((volume, near, flow, carried), dim=1))
        precise = torch.promote_types(flow.dtype, torch.float32)
        return flow.to(precise) + self.context(feature).to(precise)


def cost_volume(reference: Tensor, supporting: Tensor) -> Tensor:
    """How alike each pixel of `reference` is to those of `supporting` within `RADIUS`: the mean product over channels.

    One product a displacement: with the channels innermost nothing is faster on a CPU, and autograd keeps no copies.

    Args:
        reference: (b, c, h, w).
        supporting: (b, c, h, w); beyond its border are zeros.

    Returns:
        (b, 81, h, w) after LeakyReLU(0.1): displacements row by row, from (-4, -4) on, in the dtype of the features.
    """
    h, w = reference.shape[-2:]
    precise = torch.promote_types(reference.dtype, torch.float32)
    near, far = (
        feature.to(precise).contiguous(memory_format=torch.channels_last)
        for feature in (reference, F.pad(supporting, (RADIUS,) * 4))
    )
    reach = range(2 * RADIUS + 1)
    volume = torch.stack([(near * far[..., y : y + h, x : x + w]).mean(1) for y in reach for x in reach], dim=1)
    return F.leaky_relu(volume, 0.1).to(reference.dtype)


class _Estimator(nn.Module):
    """Reads a level's flow: dense layers, each of which sees the input and what those before it made of it."""

    def __init__(self, inputs: int, last: bool) -> None:
        super().__init__()
        self.dense = nn.ModuleList()
        for width in DENSE:
            self.dense.append(nn.Conv2d(inputs, width, 3, padding=1))
            inputs += width
        self.predict = nn.Conv2d(inputs, 2, 3, padding=1)
        if not last:  # what the next level is given
            self.enlarge_flow = nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1)
            self.enlarge_feature = nn.ConvTranspose2d(inputs, 2, 4, stride=2, padding=1)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(b, inputs, h, w) -> layers' outputs and the input, (b, inputs + 448, h, w), and the flow (b, 2, h, w)."""
        seen = seen.contiguous(memory_format=torch.channels_last)
        for layer in self.dense:
            seen = torch.cat((F.leaky_relu(layer(seen), 0.1), seen), dim=1)
        return seen, self.predict(seen)


def resized(frame: Tensor, height: int, width: int) -> Tensor:
    """(b, 3, h, w) -> (b, 3, height, width), bilinear, in the frame's dtype."""
    precise = frame.to(torch.promote_types(frame.dtype, torch.float32))
    return F.interpolate(precise, size=(height, width), mode="bilinear", align_corners=False).to(frame.dtype)


def _activated(*layers: nn.Conv2d) -> nn.Sequential:
    """The layers, each with a LeakyReLU(0.1) after it."""
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.LeakyReLU(0.1, inplace=True))))
