"""`SegmentAnything`: the masks of the SEEM paper, by the `segment_anything` package."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vsrplug.masks.precomputed import largest_first
from vsrplug.masks.words import MOST
from vsrplug.site import unknown_name

if TYPE_CHECKING:
    from vsrplug.masks._generator import BatchedGenerator


class SegmentAnything:
    """Everything that SAM finds in a frame when asked at a grid of points; the prior of SEEM.

    The network is given low-resolution frames, which it enlarges to 1024 pixels itself. Masks are sorted by area, the
    largest first, equal ones in the generator's order. Of more than `count` the smallest are dropped; missing ones are
    empty. On a GPU the image encoder runs in bfloat16; scores and thresholds stay in float32.

    The file is read when the first masks are made.

    Source: A. Kirillov et al., "Segment Anything", ICCV 2023; paper 003 for the grid and the number (section 4.1).

    Args:
        checkpoint: weights, such as `sam_vit_h_4b8939.pth`.
        model: `"vit_h"`, `"vit_l"` or `"vit_b"`; read from the file's name unless given.
        count: `m`, masks of a frame.
        points_per_side: the grid; 8 in the paper.
        points_per_batch, pred_iou_thresh, stability_score_thresh, box_nms_thresh: as in `SamAutomaticMaskGenerator`.
        batch: frames the image encoder sees at once; None: 4 on a GPU, 1 elsewhere.
        device: where to run; None: a GPU if there is one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an argument is out of range or the file's name says no model; when masks are made, the file is not a
            checkpoint of that model.
        ImportError: when masks are made, the package is not installed.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        model: str | None = None,
        *,
        count: int = MOST,
        points_per_side: int = 8,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        box_nms_thresh: float = 0.7,
        batch: int | None = None,
        device: str | None = None,
    ) -> None:
        if not 1 <= count <= MOST:
            raise ValueError(f"a frame has 1 to {MOST} masks, got count={count}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch = batch or (4 if self.device.type == "cuda" else 1)
        if min(points_per_side, points_per_batch, self.batch) < 1:
            raise ValueError(
                "points_per_side, points_per_batch and batch are counts of at least 1, got "
                f"{points_per_side}, {points_per_batch}, {batch}"
            )
        self.checkpoint = Path(checkpoint).expanduser()
        if not self.checkpoint.is_file():
            raise FileNotFoundError(
                f"there is no checkpoint {self.checkpoint}; segment-anything's own page has sam_vit_h_4b8939.pth, "
                "sam_vit_l_0b3195.pth and sam_vit_b_01ec64.pth"
            )
        self.count = count
        self.model = model or _model_of(self.checkpoint)
        self.options = {
            "points_per_side": points_per_side,
            "pred_iou_thresh": pred_iou_thresh,
            "stability_score_thresh": stability_score_thresh,
            "box_nms_thresh": box_nms_thresh,
        }
        self.points_per_batch = points_per_batch

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the masks depend on; the weights by their content."""
        with self.checkpoint.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        precision = "bfloat16" if self.device.type == "cuda" else "float32"
        named = {"checkpoint": self.checkpoint.name, "sha256": digest, "model": self.model, "precision": precision}
        return {"source": "segment_anything", "count": self.count} | named | self.options

    def __call__(self, frames: Tensor) -> Tensor:
        """Masks (t, count, h, w), float32, 0 or 1, of frames (t, 3, h, w) in [0, 1]; on the frames' device."""
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"segment-anything needs frames (t, 3, h, w), got {tuple(frames.shape)}")
        levels = (frames.detach().cpu().float() * 255).round().clamp(0, 255).to(torch.uint8)
        images = levels.permute(0, 2, 3, 1).contiguous().numpy()
        masks = np.zeros((len(frames), self.count, *frames.shape[-2:]), np.float32)
        for start in range(0, len(images), self.batch):
            found = self._generator.generate_batch(list(images[start : start + self.batch]))
            for planes, records in zip(masks[start:], found, strict=False):
                if records:
                    largest = largest_first(np.stack([record["segmentation"] for record in records]), self.count)
                    planes[: len(largest)] = largest
        return torch.from_numpy(masks).to(frames.device)

    @cached_property
    def _generator(self) -> BatchedGenerator:
        try:
            from segment_anything import sam_model_registry

            from vsrplug.masks._generator import BatchedGenerator
        except ImportError as error:
            raise ImportError(
                f"segment-anything is not installed ({error}); pip install 'vsrplug[masks]', or take source=superpixels"
            ) from error
        if self.model not in sam_model_registry:
            raise ValueError(unknown_name("SAM model", self.model, sam_model_registry))
        state = _read(self.checkpoint)
        if not {"image_encoder", "mask_decoder", "prompt_encoder"} <= {str(key).partition(".")[0] for key in state}:
            raise ValueError(
                f"{self.checkpoint} is no checkpoint of segment-anything: its entries are "
                f"{', '.join(map(str, list(state)[:3]))}, ..."
            )
        network: nn.Module = sam_model_registry[self.model]()
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(
                f"{self.checkpoint} is no checkpoint of SAM's {self.model} ({reason}); give its model: "
                f"source.model=..., one of {', '.join(sam_model_registry)}"
            ) from error
        return BatchedGenerator(network.to(self.device).eval(), points_per_batch=self.points_per_batch, **self.options)


def _model_of(checkpoint: Path) -> str:
    found = [name for name in ("vit_h", "vit_l", "vit_b") if name in checkpoint.name]
    if len(found) != 1:
        raise ValueError(
            f"the name of {checkpoint} does not say which SAM it is; give model=vit_h, vit_l or vit_b "
            "(source.model=... on the command line)"
        )
    return found[0]


def _read(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, read as data only."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{checkpoint} is damaged, or holds more than weights, and was not read ({reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{checkpoint} is no checkpoint of segment-anything: it holds a {type(state).__name__}")
    return state
