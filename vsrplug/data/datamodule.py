"""`VSRDataModule`: the endless, exactly resumable stream of training samples, and a protocol's clips for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vsrplug.data.clip import Clip
from vsrplug.data.mask_cache import MaskCache
from vsrplug.data.training import Degradation, TrainingClips
from vsrplug.data.transforms import Box, Sample
from vsrplug.degradations import crop_to_multiple
from vsrplug.masks.cached import CachedMasks
from vsrplug.masks.words import unpack

if TYPE_CHECKING:
    from vsrplug.protocols import Protocol


class VSRDataModule(LightningDataModule):
    """Training samples by number, validation by protocol.

    The training loader has no end: give the trainer `max_steps`, `check_val_every_n_epoch=None` and a whole number as
    `val_check_interval`, and on several devices `use_distributed_sampler=False` (each rank takes its own numbers here,
    and validates every clip, so that averages are exact).

    The number of samples used is part of the checkpoint. It is counted in optimizer steps, so what loader workers had
    fetched ahead when a run was killed is fetched again, and a resumed run sees the samples it would have seen.

    Args:
        clips: where training windows are cut.
        degradation: HR (t, 3, s h, s w) -> LR (t, 3, h, w), with `.scale`.
        masks: mask source, LR frames (t, 3, h, w) -> (t, m, h, w), or None. Those of `CachedMasks` travel as one word a
            pixel and are unpacked on the device.
        frames: frames of a training window.
        patch: side of the training crops, in LR pixels.
        batch_size: samples of a training batch, on each device.
        workers: loader processes; the samples do not depend on it.
        augment: flip, turn and reverse training windows at random.
        mirror: give every training window followed by itself in reverse, twice its frames.
        between: frames of a clip left out between each two of a training window; networks that make frames in between
            learn from those after the middle one (`TrainingClips`).
        seed: which sequence of training samples.
        validation: whose clips and degradation `val_dataloader` gives, one whole clip at a time, or None.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        degradation: Degradation,
        *,
        masks: Callable[[Tensor], Tensor] | None = None,
        frames: int = 7,
        patch: int = 64,
        batch_size: int = 4,
        workers: int = 0,
        augment: bool = True,
        mirror: bool = False,
        between: int = 0,
        seed: int = 0,
        validation: Protocol | None = None,
    ) -> None:
        super().__init__()
        self.samples = TrainingClips(
            clips,
            degradation,
            frames=frames,
            patch=patch,
            masks=masks,
            augment=augment,
            mirror=mirror,
            between=between,
            seed=seed,
        )
        self.validation = None if validation is None else WholeClips(validation.clips, validation.degradation, masks)
        self.masks = masks
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self._used = 0  # samples used up to step `_step`
        self._step = 0

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches of `TrainingClips`, from the first sample not used yet, without end."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self._loader(
            self.samples,
            batch_size=self.batch_size,
            sampler=_Numbers(self.state_dict()["samples"] + rank, ranks),
            num_workers=self.workers,
        )

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Whole clips of the validation protocol, batch 1: `lr`, `hr`, `name` and, with a mask source, `masks`."""
        return [] if self.validation is None else self._loader(self.validation, batch_size=1)

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Unpack words of masks, (b, t, h, w), on the device: `masks` (b, t, m, h, w), float32, 0 or 1."""
        if isinstance(self.masks, CachedMasks) and "mask_words" in batch:
            batch["masks"] = unpack(batch.pop("mask_words"), self.masks.count).float()
        return batch

    def state_dict(self) -> dict[str, int]:
        """`samples`: how many were used on all devices together; `step`: the optimizer step at which that was so."""
        if self.trainer is None:
            return {"samples": self._used, "step": self._step}
        step = self.trainer.global_step
        a_step = self.trainer.accumulate_grad_batches * self.batch_size * self.trainer.world_size
        return {"samples": self._used + (step - self._step) * a_step, "step": step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the samples that the checkpoint's run had used."""
        self._used, self._step = state_dict["samples"], state_dict["step"]

    def _loader(self, dataset: Dataset[Sample], **arguments: Any) -> DataLoader[Sample]:
        # A generator of its own: a loader otherwise takes a number from the global one each time it is started.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(dataset, generator=generator, pin_memory=torch.cuda.is_available(), **arguments)


class WholeClips(Dataset[Sample]):
    """Whole clips and their degraded versions; HR is cut at the bottom and right to a multiple of the scale.

    Args:
        clips: the clips.
        degradation: HR -> LR.
        masks: mask source, or None.

    Returns (of `[index]`):
        `"lr"` (t, 3, h, w), `"hr"` (t, 3, s h, s w), `"name"`, and `"masks"` (t, m, h, w) where a source is given.
    """

    def __init__(
        self, clips: Sequence[Clip], degradation: Degradation, masks: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.clips = clips
        self.degradation = degradation
        self._masks: MaskCache | CachedMasks | None = None
        if isinstance(masks, CachedMasks):
            self._masks = masks
        elif masks is not None:
            self._masks = MaskCache(clips, masks, lambda clip: self._pair(clip)[0])

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Sample:
        clip = self.clips[index]
        lr, hr = self._pair(clip)
        sample: Sample = {"lr": lr, "hr": hr, "name": clip.name}
        if isinstance(self._masks, CachedMasks):
            sample["masks"] = self._masks(lr)
        elif self._masks is not None:
            sample["masks"] = self._masks.window(index, 0, len(clip), Box(0, 0, *lr.shape[-2:]))
        return sample

    def _pair(self, clip: Clip) -> tuple[Tensor, Tensor]:
        hr = crop_to_multiple(torch.stack(list(clip.frames())), self.degradation.scale)
        return self.degradation(hr), hr


class _Numbers(Sampler[int]):
    """start, start + step, ... It has no length on purpose: an epoch of random windows does not end."""

    def __init__(self, start: int, step: int) -> None:
        self.start = start
        self.step = step

    def __iter__(self) -> Iterator[int]:
        k = self.start
        while True:
            yield k
            k += self.step
