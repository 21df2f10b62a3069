"""Photographs in motion (`DemoClips`): training clips that need no download, with their true flow.

Every clip is a scene of 1 to 4 layers. The background and the occluders before it show photographs (reduced, mirrored,
recoloured), collages of photographs, or, for about one layer in six, drawn text, windows and stripes. Each layer moves
along a smooth random path of homographies of its own, so there is parallax, occlusion, sub-pixel and large motion,
rotation, zoom and shake; some clips have motion blur, some drift in brightness, a few stand still.

The photographs come inside the scikit-image wheel. Used are only those which scikit-image's documentation
(`skimage.data`) states to be in the public domain, under CC0, or without known copyright restrictions; `PHOTOGRAPHS`
lists each with its licence and source. Left out for lack of such a statement or for another licence: moon, page,
motorcycle, colorwheel, logo. The test clips show photographs which no training clip shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from vsrplug.context import Flows
from vsrplug.data._canvas import Picture
from vsrplug.data._motion import Array, true_flows
from vsrplug.data._scene import random_scene, render

Split = Literal["train", "test"]


class Photograph(NamedTuple):
    """A photograph of the scikit-image wheel.

    Attributes:
        file: its name in `skimage/data`.
        split: where it is shown.
        licence: as scikit-image's documentation states it.
        source: who made it, where it was taken from.
        weight: how often it is drawn, relative to the others (textures often, near-empty pictures seldom).
    """

    file: str
    split: Split
    licence: str
    source: str
    weight: int


PHOTOGRAPHS = (
    Photograph("astronaut.png", "train", "public domain", "NASA, Great Images database, flic.kr/p/r9qvLn", 4),
    Photograph("camera.png", "train", "CC0", "Lav Varshney", 3),
    Photograph("brick.png", "train", "CC0", "cc0textures.com, Bricks25", 3),
    Photograph("grass.png", "train", "CC0", "linolafett, deviantart.com, Grass-01", 4),
    Photograph("gravel.png", "train", "CC0", "cc0textures.com, Gravel04", 4),
    Photograph("rocket.jpg", "train", "public domain", "SpaceX, flickr.com/photos/spacexphotos/16511594820", 3),
    Photograph("ihc.png", "train", "no known copyright restrictions", "Center for Microscopy and Molecular Imaging", 3),
    Photograph("coins.png", "train", "no known copyright restrictions", "Brooklyn Museum Collection, 51611", 2),
    Photograph("text.png", "train", "public domain", "Wikipedia, File:Corner.png", 1),
    Photograph("hubble_deep_field.jpg", "train", "public domain", "NASA, hubblesite.org, 2012/37", 1),
    Photograph("retina.jpg", "train", "CC0", "Mikael Haeggstroem, Wikimedia, Fundus photograph of normal left eye", 1),
    Photograph("chelsea.png", "test", "CC0", "Stefan van der Walt", 1),
    Photograph("coffee.png", "test", "CC0", "Rachel Michetti, Pikolo Espresso Bar", 1),
)


class DemoClip:
    """One rendered clip.

    Args:
        name: such as "train_0007".
        pixels: (t, 3, H, W) uint8.
        owner: (t, H, W) uint8, the layer seen at each pixel.
        matrices: (t, layers, 3, 3), from each layer's plane to the frame, in HR pixels around the centres.

    Attributes:
        pixels: as given; for those who cut first and convert after.
    """

    def __init__(self, name: str, pixels: Tensor, owner: Tensor, matrices: Array) -> None:
        self.name = name
        self.pixels = pixels
        self._owner = owner
        self._matrices = matrices
        self._flows: dict[int, Flows] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """The frames from `start` up to `stop`, each (3, H, W) float32 in [0, 1]."""
        for frame in self.pixels[start:stop]:
            yield frame.float() / 255

    def flows(self, scale: int) -> Flows:
        """The true flow at LR resolution, of the layer seen at each LR pixel's centre. Kept once computed.

        Args:
            scale: HR pixels a LR pixel.

        Returns:
            backward and forward, each (t-1, 2, H / scale, W / scale) float16 in LR pixels, x then y (half precision
            is off by 0.001 pixels at a motion of 3).

        Raises:
            ValueError: `scale` does not divide the frame.
        """
        height, width = self.pixels.shape[-2:]
        if scale < 1 or height % scale or width % scale:
            raise ValueError(f"scale must divide the frame of {height} x {width} pixels, got {scale}; try 4")
        if scale not in self._flows:
            exact = true_flows(self._matrices, self._owner, scale)
            self._flows[scale] = Flows(backward=exact.backward.half(), forward=exact.forward.half())
        return self._flows[scale]


class DemoClips(Sequence[DemoClip]):
    """Photographs in motion, rendered on first access and kept.

    A clip depends on (seed, split, index), `frames` and `size` only, not on the order of access, nor on `clips`.

    Args:
        split: "train" or "test"; they show different photographs.
        clips: how many.
        frames: length t of each.
        size: (H, W) of the HR frames, multiples of 4.
        seed: other seeds, other clips.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        split: Split = "train",
        clips: int = 256,
        frames: int = 14,
        size: tuple[int, int] = (192, 256),
        seed: int = 0,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if clips < 1 or frames < 1:
            raise ValueError(f"clips and frames must be at least 1, got clips={clips} and frames={frames}")
        if len(size) != 2 or any(side < 16 or side % 4 for side in size):
            raise ValueError(
                f"size must be (height, width), multiples of 4 from 16 up, got {tuple(size)}; try (192, 256)"
            )
        self.split = split
        self.length = frames
        self.size = (int(size[0]), int(size[1]))
        self.seed = seed
        self._clips: list[DemoClip | None] = [None] * clips

    def __len__(self) -> int:
        return len(self._clips)

    @overload
    def __getitem__(self, index: int) -> DemoClip: ...
    @overload
    def __getitem__(self, index: slice) -> list[DemoClip]: ...
    def __getitem__(self, index: int | slice) -> DemoClip | list[DemoClip]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        clip = self._clips[index]
        if clip is None:
            clip = self._clips[index] = self._render(index)
        return clip

    def render_all(self, progress: bool = True) -> DemoClips:
        """Render every clip now, with a progress bar; worker processes forked afterwards share them. Returns itself."""
        for index in track(range(len(self)), f"Rendering the {self.split} clips", disable=not progress):
            self[index]
        return self

    def _render(self, index: int) -> DemoClip:
        rng = np.random.default_rng([self.seed, ("train", "test").index(self.split), index])
        layers = random_scene(rng, photographs(self.split), self.length, self.size)
        shutter = rng.uniform(0.25, 0.6) if rng.random() < 0.25 else 0.0
        pixels, owner = render(layers, self.length, self.size, shutter)
        if rng.random() < 0.25:  # a cloud, or the camera's automatic exposure
            gain, lift = rng.normal(0, 0.12), rng.normal(0, 0.04)
            way = torch.from_numpy(np.sin(np.arange(self.length) * rng.uniform(0.05, 0.5) + rng.uniform(0, 6))).float()
            way = way.view(-1, 1, 1, 1)
            pixels = pixels * (1 + gain * way) + lift * way
        pixels = (pixels.clamp(0, 1) * 255).round().byte()
        times = np.arange(self.length, dtype=np.float64)
        matrices = np.stack([layer.path.matrices(times) for layer in layers], axis=1)
        return DemoClip(f"{self.split}_{index:04d}", pixels, owner, matrices)


def photographs(split: Split) -> tuple[Picture, ...]:
    """The photographs of a split, (h, w, 3) uint8, each as often as its weight says."""
    return tuple(_read(p.file) for p in PHOTOGRAPHS if p.split == split for _ in range(p.weight))


@cache
def _read(file: str) -> Picture:
    import skimage.data

    with Image.open(Path(skimage.data.__file__).parent / file) as image:
        return np.asarray(image.convert("RGB"))
