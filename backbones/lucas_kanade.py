"""`LucasKanade`: optical flow without weights, for networks that are trained from nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plugins._blocks import warp


class LucasKanade(nn.Module):
    """Flow from `reference` into `supporting` by local least squares, coarse to fine; nothing in it learns.

    At each level of an image pyramid, and a few times over, the supporting frame is warped by the flow so far; within a
    window around each pixel the remaining motion d solves  (G + damping) d = -sum g (warped - reference),  where g is
    the gradient, the mean of both frames', and G the sum of g g^T over the window. Where there is no texture the
    damping leaves the flow of the coarser level.

    Source: Lucas and Kanade, "An iterative image registration technique", 1981; coarse to fine as Bouguet, 2000.

    Args:
        levels: of the pyramid; each doubles the motion that is found.
        iterations: at each level.
        radius: of the window's box, which is applied twice.
        damping: added to the diagonal of G, whose entries are means of squared gradients of grey values in [0, 1].
    """

    def __init__(self, levels: int = 4, iterations: int = 2, radius: int = 4, damping: float = 1e-3) -> None:
        super().__init__()
        self.levels = levels
        self.iterations = iterations
        self.radius = radius
        self.window = 2 * radius + 1
        self.damping = damping

    @torch.no_grad()
    def forward(self, reference: Tensor, supporting: Tensor) -> Tensor:
        """Flow such that `warp(supporting, flow)` looks like `reference`.

        Args:
            reference: (b, 3, h, w) in [0, 1].
            supporting: (b, 3, h, w) in [0, 1].

        Returns:
            (b, 2, h, w) in pixels, x then y; float32 at least, without gradient.
        """
        pyramids = [self._pyramid(frame) for frame in (reference, supporting)]
        flow = pyramids[0][0].new_zeros(len(reference), 2, *pyramids[0][0].shape[-2:])
        for ref, sup in zip(*pyramids, strict=True):
            (h, w), (below_h, below_w) = ref.shape[-2:], flow.shape[-2:]
            flow = F.interpolate(flow, size=(h, w), mode="bilinear", align_corners=False)
            flow = flow * flow.new_tensor((w / below_w, h / below_h)).view(1, 2, 1, 1)
            for _ in range(self.iterations):
                flow = flow + self._remaining(ref, warp(sup, flow, padding="border"))
        return flow

    def _pyramid(self, frame: Tensor) -> list[Tensor]:
        """Grey frames (b, 1, h, w) from the coarsest to the finest."""
        red, green, blue = frame.to(torch.promote_types(frame.dtype, torch.float32)).split(1, dim=1)
        pyramid = [0.299 * red + 0.587 * green + 0.114 * blue]
        for _ in range(self.levels - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2, ceil_mode=True, count_include_pad=False))
        return pyramid[::-1]

    def _remaining(self, reference: Tensor, warped: Tensor) -> Tensor:
        """What least squares says is left of the motion, at most one pixel each way, (b, 2, h, w)."""
        x, y = _gradient((reference + warped) / 2)
        difference = warped - reference
        products = torch.cat((x * x, x * y, y * y, x * difference, y * difference), dim=1)
        for _ in range(2):
            for size, padding in (((self.window, 1), (self.radius, 0)), ((1, self.window), (0, self.radius))):
                products = F.avg_pool2d(products, size, stride=1, padding=padding, count_include_pad=False)
        xx, xy, yy, xd, yd = products.unbind(1)
        xx, yy = xx + self.damping, yy + self.damping
        determinant = xx * yy - xy * xy
        motion = torch.stack((xy * yd - yy * xd, xy * xd - xx * yd), dim=1) / determinant[:, None]
        return motion.clamp(-1, 1)


def _gradient(frame: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y of (b, 1, h, w), of the border repeated once."""
    padded = F.pad(frame, (1, 1, 1, 1), mode="replicate")
    x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return x, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
