"""`Superpixels`: masks without a segmentation network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Superpixels:
    """Masks without a segmentation network: each is a patch of similar colour, found by SLIC on one frame alone.

    Masks are sorted by area, the largest first, and equal areas by SLIC's own order (rows, then columns). SLIC finds
    about `count` segments: missing ones are empty masks, and those beyond `count`, the smallest, are dropped, so that
    their pixels lie in no mask. The same frame always gives the same masks.

    Source: R. Achanta et al., "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", TPAMI 2012.

    Args:
        count: `m`, the number of masks of a frame.
        compactness: weight of nearness against likeness of colour (CIELAB); higher is squarer.

    Raises:
        ValueError: an argument out of range, or frames that are not (t, 3, h, w).
    """

    def __init__(self, count: int = 16, compactness: float = 10.0) -> None:
        if count < 1 or compactness <= 0:
            raise ValueError(f"count and compactness must be positive, got count={count}, compactness={compactness}")
        self.count = count
        self.compactness = compactness

    @property
    def settings(self) -> dict[str, Any]:
        """What the masks depend on."""
        return {"source": "superpixels", "count": self.count, "compactness": self.compactness}

    def __call__(self, frames: Tensor) -> Tensor:
        """Masks (t, count, h, w), float32, 0 or 1, of frames (t, 3, h, w) in [0, 1]; on the frames' device."""
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"superpixels need frames (t, 3, h, w), got {tuple(frames.shape)}; give one clip a call")
        from skimage.segmentation import slic  # loads slowly, and most runs have no masks

        masks = torch.zeros(len(frames), self.count, *frames.shape[-2:])
        for planes, frame in zip(masks, frames.detach().float().cpu(), strict=True):
            labels = slic(
                frame.permute(1, 2, 0).double().numpy(),
                n_segments=self.count,
                compactness=self.compactness,
                start_label=0,
                channel_axis=-1,
            )
            areas = np.bincount(labels.ravel())
            largest = np.argsort(-areas, kind="stable")[: self.count]
            segments = torch.from_numpy(labels)
            for plane, label in zip(planes, largest, strict=False):
                plane.copy_(segments == int(label))
        return masks.to(frames.device)
