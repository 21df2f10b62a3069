"""Masks from a cache are those of the frames asked for, however these are cropped, turned or reversed, or an error."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor

from vsrplug.data import TrainingClips, VSRDataModule
from vsrplug.data.datamodule import WholeClips
from vsrplug.degradations import BD, BI, crop_to_multiple
from vsrplug.masks import CachedMasks, DamagedMasksError, MasksError, Superpixels, unpack
from vsrplug.masks.cached import cache_path

from ..data.test_training import PixelClip, clip
from .making import levels_as_masks, make_cache

CLIPS = [clip("a", 6, (302, 330)), clip("00001/0266", 4, (64, 90)), clip("bb", 5, (60, 274), PixelClip)]


def lr_frames(index: int, degradation: Any = None) -> Tensor:
    return (degradation or BI())(crop_to_multiple(CLIPS[index].stored.float() / 255, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("masks"), CLIPS, BI())


@pytest.mark.parametrize("mirror", [False, True])
def test_masks_follow_the_frame_through_crops_flips_turns_and_time(folder: Path, mirror: bool) -> None:
    samples = TrainingClips(CLIPS, BI(), frames=3, patch=13, masks=CachedMasks(folder), mirror=mirror)
    poses = set()
    for k in range(120):
        sample = samples[k]
        assert sample["mask_words"].shape == (6 if mirror else 3, 13, 13)
        assert torch.equal(unpack(sample["mask_words"], 64).float(), levels_as_masks(sample["lr"]))
        poses.add(sample["name"])
    assert poses == {c.name for c in CLIPS}


def test_a_patch_of_the_whole_frame_and_one_of_a_pixel(folder: Path) -> None:
    for patch in (1, 15):
        sample = TrainingClips(CLIPS, BI(), frames=4, patch=patch, masks=CachedMasks(folder))[0]
        assert torch.equal(unpack(sample["mask_words"], 64).float(), levels_as_masks(sample["lr"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_masks_not_words(folder: Path, workers: int) -> None:
    cache = CachedMasks(folder, count=40)
    module = VSRDataModule(CLIPS, BI(), masks=cache, frames=2, patch=8, batch_size=3, workers=workers)
    for batch in itertools.islice(module.train_dataloader(), 2):
        moved = module.on_after_batch_transfer(batch, 0)
        assert "mask_words" not in moved
        assert moved["masks"].dtype == torch.float32
        assert torch.equal(moved["masks"], levels_as_masks(moved["lr"])[:, :, :40])


@pytest.mark.parametrize("count", [1, 8, 63, 64])
def test_whole_clips_are_found_by_their_content(folder: Path, count: int) -> None:
    cache = CachedMasks(folder, count)
    for index in (2, 0, 1):
        lr = lr_frames(index)
        assert torch.equal(cache(lr), levels_as_masks(lr)[:, :count])
    mixed = lr_frames(0)[[5, 0, 0, 3]]
    assert torch.equal(cache(mixed), levels_as_masks(mixed)[:, :count])
    assert cache(mixed).dtype == torch.float32
    sample = WholeClips(CLIPS, BI(), cache)[1]
    assert torch.equal(sample["masks"], levels_as_masks(sample["lr"])[:, :count])
    assert torch.equal(pickle.loads(pickle.dumps(cache))(mixed), cache(mixed))


def test_only_as_many_files_are_read_as_needed(folder: Path) -> None:
    cache = CachedMasks(folder)
    cache(lr_frames(1))  # its name comes first
    assert len(cache._files) == 1


def test_masks_that_are_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MasksError, match=r"there is no folder of masks .*nowhere; `vsrplug masks` makes them"):
        CachedMasks(tmp_path / "nowhere")
    cache, more = CachedMasks(folder), [*CLIPS, clip("ccc", 5), clip("dddd", 5)]
    with pytest.raises(MasksError, match=r"has no masks of clip 'ccc' and 1 more; `vsrplug masks` makes them"):
        TrainingClips(more, BI(), frames=2, patch=8, masks=cache)
    cache(lr_frames(0))
    frames = torch.cat([lr_frames(0)[:2], torch.zeros(1, 3, 75, 82)])
    with pytest.raises(MasksError, match=r"no masks of frame 2 of these 75x82 low-resolution frames; `vsrplug masks`"):
        cache(frames)
    with pytest.raises(MasksError, match=r"of frame 0 of these 7x9 .* \(those of .*0266\.masks are 16x22\)"):
        CachedMasks(folder)(torch.zeros(1, 3, 7, 9))


def test_masks_of_other_frames_are_refused(tmp_path: Path) -> None:
    folder = make_cache(tmp_path, [clip("a", 6, (100, 90)), clip("cc", 6), clip("e", 6)], BI())

    def attempt(name: str, t: int, size: tuple[int, int], message: str, degradation: Any = None) -> None:
        other = clip("x" * len(name), t, size)
        other.name = name
        with pytest.raises(MasksError, match=message):
            TrainingClips([other], degradation or BI(), frames=2, patch=8, masks=CachedMasks(folder))

    attempt(
        "a", 6, (50, 70), r"a\.masks holds masks of 6 frames of 25x22, but the clip has 6 low-resolution frames of 12x"
    )
    attempt(
        "a", 5, (100, 90), r"a\.masks holds masks of 6 frames of 25x22, but the clip has 5 low-resolution frames of 25"
    )
    attempt("cc", 6, (50, 70), r"cc\.masks holds masks of other frames than the clip's: of another clip, or ano", BD())
    clips = [clip("cc", 6), clip("e", 6)]
    clips[1].stored = 255 - clips[1].stored
    samples = TrainingClips(clips, BI(), frames=2, patch=8, masks=CachedMasks(folder))
    with pytest.raises(MasksError, match=r"e\.masks holds masks of other frames"):  # found when it is first used
        [samples[k] for k in range(20)]


def test_a_cache_made_with_other_settings_or_fewer_masks_is_refused(tmp_path: Path) -> None:
    make_cache(tmp_path, CLIPS[:1], BI(), lambda lr: levels_as_masks(lr)[:, :16], 16, {"source": "x", "points": 8})
    with pytest.raises(
        ValueError, match=r"a\.masks holds 16 masks a frame, but count=64 .* masks\.count=16, or make more"
    ):
        CachedMasks(tmp_path)(lr_frames(0))
    make_cache(tmp_path, CLIPS[2:], BI(), settings={"source": "x", "points": 16})
    cache = CachedMasks(tmp_path, 16)
    cache(lr_frames(0))
    with pytest.raises(
        ValueError, match=r"bb\.masks was made with other settings than .*a\.masks: points 16 instead of 8; keep one"
    ):
        cache(lr_frames(2))
    with pytest.raises(ValueError, match="1 to 64 masks, got count=0"):
        CachedMasks(tmp_path, 0)


def test_a_damaged_file_is_named_and_a_file_made_anew_is_noticed(tmp_path: Path) -> None:
    path = cache_path(make_cache(tmp_path, CLIPS[:1], BI()), "a")
    cache, lr, whole = CachedMasks(tmp_path), lr_frames(0), path.read_bytes()
    assert torch.equal(cache(lr), levels_as_masks(lr))
    path.write_bytes(whole[: len(whole) // 2] + b"\0\0\0\0" + whole[len(whole) // 2 + 4 :])
    with pytest.raises(DamagedMasksError, match=rf"{path} is damaged, .*; `vsrplug masks` makes it anew"):
        cache(lr)
    path.write_bytes(whole[:-9])
    with pytest.raises(DamagedMasksError, match=rf"{path} is damaged"):
        cache(lr)
    path.unlink()
    make_cache(tmp_path, CLIPS[:1], BI(), lambda frames: 1 - levels_as_masks(frames))
    assert torch.equal(cache(lr), 1 - levels_as_masks(lr))


@pytest.mark.parametrize("name", ["../a", "a/../../b", "", "/etc/a", "a//b", "."])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file; rename it"):
        cache_path(tmp_path, name)


def test_the_header_of_a_thousand_files_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vsrplug.masks.cached._OPEN", 1)
    cache = CachedMasks(make_cache(tmp_path, CLIPS, BI()))
    for index in (0, 1, 2, 0):
        assert torch.equal(cache(lr_frames(index)), levels_as_masks(lr_frames(index)))
        assert len(cache._files) == 1


def test_the_configuration(folder: Path) -> None:
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        cfg = compose("train", ["masks=cached", f"paths.masks={folder}", "plugins=seem"])
    assert instantiate(cfg.masks).count == CachedMasks(folder).count == cfg.plugins.seem.masks == 64


def test_training_without_a_degradation_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="training needs a degradation, which makes the low resolution"):
        TrainingClips(CLIPS, None, frames=2, patch=8)  # type: ignore[arg-type]


@pytest.mark.realdata
def test_real_clips_are_a_few_percent_of_their_words(tmp_path: Path, real_data: Path) -> None:
    from vsrplug.data import folder as clips_of

    found = clips_of(real_data / "clips")[:2]
    make_cache(tmp_path, found, BI(), Superpixels(64))
    words = sum(8 * len(c) * (c.size[0] // 4) * (c.size[1] // 4) for c in found)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < words / 10
    cache = CachedMasks(tmp_path)
    for k, c in enumerate(found):
        sample = WholeClips(found, BI(), cache)[k]
        assert torch.equal(sample["masks"], Superpixels(64)(sample["lr"]))
        assert sample["masks"].sum(1).max() == 1  # superpixels do not overlap
        assert sample["masks"].shape == (len(c), 64, c.size[0] // 4, c.size[1] // 4)
