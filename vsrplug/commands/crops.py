"""What the report shows of a job: crops of the middle frame of some clips, and maps of what the plug-ins did there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vsrplug.maps import recorded
from vsrplug.metrics import to_uint8
from vsrplug.pictures import largest_differences, map_picture, save_picture
from vsrplug.protocols import Protocol
from vsrplug.reporting.pictures import FIRST, FOLDER, LAST, MAPS, RESULT

CLIPS = 8  # of a protocol, at most
SIDE = 128  # HR pixels of a crop: letters and textures are whole in it, and four times as large it fits the page


class Onlooker:
    """Takes pictures while `evaluate(network, protocol, around=self)` restores clips, spread evenly over the protocol.

    Crops of different jobs are laid over each other, so their place depends on what all jobs under a protocol have in
    common: it is where bicubic enlargement misses the truth most, which is what a network has to be better in. Pixels
    are kept as they are, and enlarged by the page. Maps are of the pass that is measured.

    Args:
        network: what is evaluated.
        protocol: under which.

    Attributes:
        pictures: `"CLIP/low resolution"`, `"CLIP/result"`, `"CLIP/ground truth"` and `"CLIP/maps/NAME"`, each
            (3, h, w) uint8.
    """

    def __init__(self, network: nn.Module, protocol: Protocol) -> None:
        self.network = network
        self.protocol = protocol
        last = len(protocol.clips) - 1
        self.clips = {protocol.clips[i * last // (CLIPS - 1)].name for i in range(CLIPS)}
        self.pictures: dict[str, Tensor] = {}

    def __call__(self, name: str, lr: Tensor, hr: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """sr (t, 3, H, W) of a clip, as `run` makes it."""
        if name not in self.clips:
            return run()
        middle, step = middle_frame(self.protocol, len(hr)), self.protocol.between + 1
        scale = self.protocol.degradation.scale
        top, left, height, width = crop_place(lr[middle], hr[middle], scale)
        pixel = (top + height // 2) // scale, (left + width // 2) // scale
        with recorded(self.network, middle // step, pixel) as maps:
            sr = run()
        if sr.shape != hr.shape:  # evaluate says so
            return sr
        shown = {FIRST[0]: _enlarged(lr[middle], scale), RESULT: sr[middle], LAST: hr[middle]}
        for what, frame in shown.items():
            crop = to_uint8(frame[:, top : top + height, left : left + width])
            self.pictures[f"{name}/{what}"] = crop.cpu().contiguous()
        box = (top // scale, left // scale, -(-height // scale), -(-width // scale))
        for what, planes in maps.items():
            drawn = np.array(map_picture(lr[middle // step * step], planes, box, pixel))
            what = re.sub(r"[^\w ,.+-]", "_", what)  # a plug-in may call it anything
            self.pictures[f"{name}/{MAPS}/{what}"] = torch.from_numpy(drawn).permute(2, 0, 1).contiguous()
        return sr


def middle_frame(protocol: Protocol, count: int) -> int:
    """The middle of the frames covered, `count` of them; where the protocol has frames in between, one of those."""
    step = protocol.between + 1
    return next(i for i in range(count // 2, count) if step == 1 or i % step)


def crop_place(low: Tensor, truth: Tensor, scale: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the square where bicubic enlargement misses the truth most.

    Args:
        low: (3, h, w) in [0, 1].
        truth: (3, s h, s w) in [0, 1]; where it is smaller than the square, all of it is taken.
        scale: s.
    """
    from vsrplug.backbones import Bicubic

    bicubic = Bicubic(scale)(low[None, None])[0, 0]
    ((top, left),) = largest_differences(bicubic.clamp(0, 1), truth, SIDE, count=1)
    size = min(SIDE, *truth.shape[-2:])
    return top, left, size, size


def write(pictures: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Write what the onlookers saw as PNGs, where the report looks for it.

    Args:
        pictures: name of a network -> its onlooker's; those of the last, which the job is about, in full, of the
            others the result alone, under the network's name.
        folder: the job's.
    """
    *others, last = pictures
    files = dict(pictures[last])
    for name in others:
        results = {path: picture for path, picture in pictures[name].items() if path.endswith(f"/{RESULT}")}
        files |= {path.removesuffix(RESULT) + name: picture for path, picture in results.items()}
    for clip in {path.partition(f"/{MAPS}/")[0].rpartition("/")[0] for path in files}:
        for old in (folder / FOLDER / clip / MAPS).glob("*.png"):  # of another run in this folder
            old.unlink()
    for path, picture in files.items():
        save_picture(Image.fromarray(picture.permute(1, 2, 0).numpy()), folder / FOLDER / f"{path}.png")


def _enlarged(low: Tensor, scale: int) -> Tensor:
    return interpolate(low[None], scale_factor=scale, mode="nearest")[0]
