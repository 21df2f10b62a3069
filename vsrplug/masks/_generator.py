"""segment-anything's mask generator, with the images of a batch encoded at once. Imported where the package is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam
from torch import Tensor

Image = NDArray[np.uint8]  # (h, w, 3)


class BatchedGenerator(SamAutomaticMaskGenerator):
    """`generate`, of several images of one size; the arguments are the generator's own."""

    def __init__(self, model: Sam, **options: Any) -> None:
        super().__init__(model, **options)
        self.predictor = _Encoded(model)

    def generate_batch(self, images: list[Image]) -> list[list[dict[str, Any]]]:
        """The records of `generate`, of each image."""
        self.predictor.encode(images)
        return [self.generate(image) for image in images]


class _Encoded(SamPredictor):
    """A predictor whose images were encoded before they are set, one after another."""

    def __init__(self, model: Sam) -> None:
        super().__init__(model)
        self._embeddings: list[Tensor] = []

    @torch.no_grad()
    def encode(self, images: list[Image]) -> None:
        """Encode images of one size."""
        resized = np.stack([self.transform.apply_image(image) for image in images])
        inputs = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
        self.input_size = tuple(inputs.shape[-2:])
        # Only the encoder, which is nearly all of the work: scores lie close to their thresholds.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features = self.model.image_encoder(self.model.preprocess(inputs))
        self._embeddings = list(features.float().split(1))

    def set_image(self, image: Image, image_format: str = "RGB") -> None:
        """Take the next embedding as that of the image."""
        self.features = self._embeddings.pop(0)
        self.original_size = image.shape[:2]
        self.is_image_set = True

    def reset_image(self) -> None:
        """Forget the image, but not those that are to come."""
        self.is_image_set = False
        self.features = None  # type: ignore[assignment]  # as the class itself does
