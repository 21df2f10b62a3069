"""`PerceptualLoss`: how far apart restored and true frames are for VGG19."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG19_Weights, vgg19

from vsrplug.official import load_official

LAYERS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}


class PerceptualLoss:
    """Weighted sum of mean absolute differences between features of VGG19, before their activation.

    Johnson et al. 2016, with the layers of ESRGAN and Real-ESRGAN that RealBasicVSR is trained with (002): the second
    convolution of blocks 1 and 2 and the fourth of blocks 3, 4 and 5.

    No `nn.Module`, so that these constant 20 million parameters are in no checkpoint. They move to the device of what
    they are shown.

    Args:
        path: VGG19's weights, in torchvision's layout.
        layers: position in torchvision's `vgg19().features` -> weight.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else, or would run code; a layer that VGG19 does not have.
    """

    def __init__(self, path: str | Path, layers: Mapping[int, float] = LAYERS) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"the perceptual loss needs VGG19's weights in {path}; download them from "
                f"{VGG19_Weights.IMAGENET1K_V1.url}"
            )
        self.network = VGG19Features(layers)
        load_official(self.network, path)
        self.weights = [layers[position] for position in self.network.positions]

    def __call__(self, sr: Tensor, hr: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            sr, hr: (b, t, 3, H, W) in [0, 1]; the gradient is that of `sr` alone.
        """
        self.network.to(sr.device)
        with torch.no_grad():
            truth = self.network(hr.flatten(0, 1))
        restored = self.network(sr.flatten(0, 1))
        terms = zip(self.weights, restored, truth, strict=True)
        return torch.stack([weight * F.l1_loss(a.float(), b.float()) for weight, a, b in terms]).sum()


class VGG19Features(nn.Module):
    """Frames (n, 3, h, w) in [0, 1] -> what convolutions of VGG19 give, in order, before their activation.

    Args:
        positions: in torchvision's `vgg19().features`.

    Raises:
        ValueError: at one of them is no convolution.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, positions: Iterable[int]) -> None:
        super().__init__()
        self.positions = sorted(positions)
        with torch.device("meta"):  # shapes alone: the classifier, left out, has 120 million parameters
            every = vgg19().features
        known = [i for i, layer in enumerate(every) if isinstance(layer, nn.Conv2d)]
        if not self.positions or not set(self.positions) <= set(known):
            raise ValueError(f"layers are among VGG19's convolutions {known}, got {self.positions}")
        last = self.positions[-1]
        beyond = (rf"features\.{i}\..*" for i in known if i > last)
        self.official_ignored = (r"classifier\..*", *beyond)
        self.features = every[: last + 1].to_empty(device="cpu").requires_grad_(False)
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # what comes before it is wanted
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Features (n, c, h', w'), one for each position."""
        x, found = (frames - self.mean) / self.deviation, []
        for position, layer in enumerate(self.features):
            x = layer(x)
            if position in self.positions:
                found.append(x)
        return found
