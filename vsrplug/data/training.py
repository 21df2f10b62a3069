"""`TrainingClips`: short low- and high-resolution windows cut from clips, each a function of (seed, k) alone."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vsrplug.data.clip import Clip
from vsrplug.data.mask_cache import MaskCache
from vsrplug.data.transforms import Box, Pose, Sample, crop, mirror_time
from vsrplug.degradations import crop_to_multiple
from vsrplug.masks.cached import CachedMasks, ClipMasks

_MARGIN = 16  # HR pixels around a crop that are degraded with it and then cut off: more than any kernel reaches


class Degradation(Protocol):
    """HR frames (t, 3, s h, s w) in [0, 1] -> LR frames (t, 3, h, w) in [0, 1]."""

    @property
    def scale(self) -> int:
        """`s`."""
        ...

    def __call__(self, hr: Tensor, /) -> Tensor:
        """Degrade the frames."""
        ...


@runtime_checkable
class RandomDegradation(Degradation, Protocol):
    """One that is different each time: called, it draws from the content; training gives it a generator."""

    def degrade(self, hr: Tensor, generator: torch.Generator) -> Tensor:
        """Degrade the frames as the generator says."""
        ...


class TrainingClips(Dataset[Sample]):
    """An endless map: sample k depends on (seed, k) and nothing else, so a run resumes at any k exactly.

    Each sample is a window of `frames` consecutive frames, every window of every clip being equally likely, cut at a
    random place, and (with `augment`) flipped, turned and reversed in time. The high-resolution window is brought into
    its pose before it is degraded: the grid of LR pixels then lies as in evaluation, which matters for degradations
    that are not symmetric (`bd_duf`). It is degraded with a margin, so that away from the frame's border no LR pixel
    knows of the crop. A random degradation draws from the sample's own generator, and is given what is mirrored in
    time already: the way back is degraded in another way.

    Args:
        clips: where windows are cut.
        degradation: HR -> LR; its `.scale` is `s`.
        frames: `t`.
        patch: side of the crop in LR pixels.
        masks: mask source, LR frames (t, 3, h, w) -> (t, m, h, w); it sees whole LR frames of whole clips, once each.
            `CachedMasks` is read from its files, the crop only.
        augment: flip, turn and reverse at random.
        mirror: give every window followed by itself in reverse, 2 t frames (BasicSR's `flip_sequence`, with which
            recurrent networks are trained on Vimeo-90K's seven frames).
        between: frames left out of `lr` and `hr` between each two of a window, which then spans
            `(frames - 1) * (between + 1) + 1` frames of a clip. Those after the middle one are given by themselves.
        seed: another seed is another sequence of samples.

    Returns (of `[k]`):
        `"lr"` (t, 3, patch, patch), `"hr"` (t, 3, s patch, s patch), float32 in [0, 1]; `"name"`, the clip's;
        `"masks"` (t, m, patch, patch) where a mask source is given, or, from `CachedMasks`, `"mask_words"`
        (t, patch, patch) int64, for `vsrplug.masks.unpack`; `"flow_backward"` and `"flow_forward"`
        (t-1, 2, patch, patch) in LR pixels where the clip knows its flows. With `mirror`, t is 2 `frames`. With
        `between`, there are no flows, but `"lr_between"` (between, 3, patch, patch) and `"hr_between"` (between, 3,
        s patch, s patch), what lies between the middle frame of `hr` and the next.

    Raises:
        ValueError: there are no clips, a clip is shorter than a window, or `patch` is larger than a clip's frames;
            `between` without a middle frame, or with `mirror`.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        degradation: Degradation,
        *,
        frames: int = 7,
        patch: int = 64,
        masks: Callable[[Tensor], Tensor] | None = None,
        augment: bool = True,
        mirror: bool = False,
        between: int = 0,
        seed: int = 0,
    ) -> None:
        if not len(clips):
            raise ValueError("there are no clips to train on: the data source is empty")
        if degradation is None:
            raise ValueError(
                "training needs a degradation, which makes the low resolution: degradation=bi, for instance"
            )
        if frames < 1 or patch < 1:
            raise ValueError(f"frames and patch are counts of at least 1, got frames={frames}, patch={patch}")
        if between < 0 or (between and (frames < 3 or frames % 2 == 0 or mirror)):
            raise ValueError(
                f"between={between} takes windows with a middle frame and one after it: frames=3, 5 or more, odd, and "
                f"mirror=false; got frames={frames}, mirror={str(mirror).lower()}"
            )
        self.clips = clips
        self.degradation = degradation
        self.frames = frames
        self.between = between
        self.span = (frames - 1) * (between + 1) + 1  # frames of the clip that a window covers
        self.patch = patch
        self.augment = augment
        self.mirror = mirror
        self.seed = seed
        self._masks: MaskCache | ClipMasks | None = None
        if isinstance(masks, CachedMasks):
            self._masks = ClipMasks(masks, clips, lambda clip: self._low_resolution(clip, 1)[0])
        elif masks is not None:
            self._masks = MaskCache(clips, masks, self._low_resolution)
        self._sizes = [self._size(clip) for clip in clips]
        self._ends = list(accumulate(len(clip) - self.span + 1 for clip in clips))  # running count of windows

    def __getitem__(self, k: int) -> Sample:
        digest = hashlib.blake2b(f"{self.seed} {k}".encode(), digest_size=4).digest()  # seed + k would repeat samples
        generator = torch.Generator().manual_seed(int.from_bytes(digest))

        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        window = draw(self._ends[-1])
        index = bisect_right(self._ends, window)
        start = window - (self._ends[index - 1] if index else 0)
        height, width = self._sizes[index]
        inner = Box(draw(height - self.patch + 1), draw(width - self.patch + 1), self.patch, self.patch)
        outer = inner.grown(max(2, -(-_MARGIN // self.degradation.scale)), height, width)
        pose = Pose(*(bool(draw(2)) for _ in range(4))) if self.augment else Pose()

        sample = pose.move(self._cut(index, start, outer))
        if sample["hr"].dtype == torch.uint8:  # bytes are moved faster than floats
            sample["hr"] = sample["hr"].float().div_(255)
        sample = self._degraded(sample, generator)
        relative = inner._replace(top=inner.top - outer.top, left=inner.left - outer.left)
        return crop(sample, pose.move_box(relative, outer.height, outer.width), self.degradation.scale)

    def _degraded(self, sample: Sample, generator: torch.Generator) -> Sample:
        """With `lr`, and mirrored; what lies in between is taken out of all."""
        random = isinstance(self.degradation, RandomDegradation)

        def degrade(hr: Tensor) -> Tensor:
            if isinstance(self.degradation, RandomDegradation):
                return self.degradation.degrade(hr, generator)
            return self.degradation(hr)

        if not self.between:
            sample = mirror_time(sample) if self.mirror and random else sample
            sample |= {"lr": degrade(sample["hr"])}
            return mirror_time(sample) if self.mirror and not random else sample
        step, first = self.between + 1, self.frames // 2 + 1  # frames up to the middle one
        middle = (first - 1) * step
        wanted = [*range(0, middle, step), *range(middle, middle + step), *range(middle + step, self.span, step)]
        hr = sample["hr"][wanted]
        lr = degrade(hr)  # in one go: there are degradations that change in the course of a clip
        after = slice(first, first + self.between)
        for key, clip in (("hr", hr), ("lr", lr)):
            sample |= {key: torch.cat([clip[: after.start], clip[after.stop :]]), f"{key}_between": clip[after]}
        if self._masks is not None:
            sample[self._masks.key] = sample[self._masks.key][::step]
        return sample

    def _cut(self, index: int, start: int, box: Box) -> Sample:
        """The window of a clip that starts at frame `start`, all but `lr`; `hr` as uint8 where the clip holds that."""
        clip = self.clips[index]
        stop, scale = start + self.span, self.degradation.scale
        pixels = getattr(clip, "pixels", None)
        if pixels is not None:
            hr = box.scaled(scale).cut(pixels[start:stop])
        else:
            hr = torch.stack([box.scaled(scale).cut(frame) for frame in clip.frames(start, stop)])
        sample: Sample = {"hr": hr, "name": clip.name}
        if self._masks is not None:
            sample[self._masks.key] = self._masks.window(index, start, stop, box)
        if hasattr(clip, "flows") and not self.between:
            flows = clip.flows(scale)
            sample["flow_backward"] = box.cut(flows.backward[start : stop - 1]).float()
            sample["flow_forward"] = box.cut(flows.forward[start : stop - 1]).float()
        return sample

    def _size(self, clip: Clip) -> tuple[int, int]:
        """Height and width of the clip's LR frames, once it is known that windows can be cut from it."""
        if len(clip) < self.span:
            apart = f" with between={self.between}, which takes {self.span}" if self.between else ""
            raise ValueError(
                f"clip {clip.name!r} has {len(clip)} frames, but training windows have frames={self.frames}{apart}; "
                "leave the clip out or train on shorter windows"
            )
        pixels, size = getattr(clip, "pixels", None), getattr(clip, "size", None)
        height, width = size or (next(clip.frames(0, 1)) if pixels is None else pixels).shape[-2:]
        scale = self.degradation.scale
        if min(height, width) // scale < self.patch:
            raise ValueError(
                f"clip {clip.name!r} has frames of {height}x{width}, that is {height // scale}x{width // scale} "
                f"low-resolution pixels at scale {scale}, but patch={self.patch}; take a smaller patch"
            )
        return height // scale, width // scale

    def _low_resolution(self, clip: Clip, stop: int | None = None) -> Tensor:
        """LR frames [0, stop), (t, 3, h, w), degraded one by one to hold a single HR frame at a time."""
        scale = self.degradation.scale
        return torch.cat([self.degradation(crop_to_multiple(frame[None], scale)) for frame in clip.frames(0, stop)])
