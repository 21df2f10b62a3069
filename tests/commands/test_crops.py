"""Crops and maps that a job leaves: of one place for all networks, of the pass that is measured, where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vsrplug import attach
from vsrplug.backbones import Bicubic
from vsrplug.commands import crops
from vsrplug.commands.crops import CLIPS, SIDE, Onlooker, crop_place, middle_frame
from vsrplug.degradations import BI, imresize
from vsrplug.evaluation import evaluate
from vsrplug.metrics import to_uint8
from vsrplug.plugins import SEEMPlugin
from vsrplug.protocols import Protocol


class Clip:
    """Frames in memory."""

    def __init__(self, name: str, pixels: Tensor) -> None:
        self.name, self.pixels = name, pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        return iter(self.pixels[start:stop])


class Times(nn.Module):
    """Bicubic enlargement, darker by the number of the frame."""

    def forward(self, frames: Tensor) -> Tensor:
        dark = torch.arange(frames.shape[1]).view(-1, 1, 1, 1)
        return imresize(frames[0], 4)[None] - dark / 20


def protocol(*clips: Clip, **arguments: Any) -> Protocol:
    return Protocol("test", clips, BI(4), "rgb", **arguments)


def flat_but(top: int, left: int, height: int = 144, width: int = 200, frames: int = 5) -> Tensor:
    """A grey clip with a fine texture, which bicubic enlargement cannot give back, in 24 x 24 pixels."""
    pixels = torch.full((frames, 3, height, width), 0.5)
    pixels[..., top : top + 24, left : left + 24] = torch.randint(0, 2, (24, 24)).float()
    return pixels


def test_the_crop_holds_what_bicubic_enlargement_loses() -> None:
    clip = flat_but(10, 170)[0]
    top, left, height, width = crop_place(BI(4)(clip[None])[0], clip, 4)
    assert (height, width) == (SIDE, SIDE)
    assert 0 <= top <= 10
    assert left + SIDE >= 194
    small = clip[:, :64, 100:140]
    assert crop_place(BI(4)(small[None])[0], small, 4)[2:] == (40, 40)


def test_every_network_is_seen_at_the_same_place_in_the_frame_that_is_measured() -> None:
    measured = protocol(Clip("a/b", flat_but(100, 20)))
    pixels = measured.clips[0].pixels  # type: ignore[attr-defined]
    lr = BI(4)(pixels)
    top, left, height, width = crop_place(lr[2], pixels[2], 4)
    place = (slice(None), slice(top, top + height), slice(left, left + width))
    seen = {}
    for name, network in (("bicubic", Bicubic(4)), ("times", Times())):
        look = Onlooker(network, measured)
        report = evaluate(network, measured, progress=False, around=look)
        assert report.clips == evaluate(network, measured, progress=False).clips
        assert look.pictures.keys() == {"a/b/low resolution", "a/b/result", "a/b/ground truth"}
        assert torch.equal(look.pictures["a/b/ground truth"], to_uint8(pixels[2])[place])
        nearest = lr[2].repeat_interleave(4, 1).repeat_interleave(4, 2)
        assert torch.equal(look.pictures["a/b/low resolution"], to_uint8(nearest)[place])
        seen[name] = look.pictures["a/b/result"]
    assert torch.equal(seen["bicubic"], to_uint8(Bicubic(4)(lr[None])[0, 2])[place])
    assert torch.equal(seen["times"], to_uint8(imresize(lr[2:3], 4)[0] - 0.1)[place])


def test_clips_are_spread_over_the_protocol() -> None:
    for count, expected in ((3, [0, 1, 2]), (8, [*range(8)]), (50, [0, 7, 14, 21, 28, 35, 42, 49])):
        clips = [Clip(f"{i:02d}", torch.rand(2, 3, 16, 16)) for i in range(count)]
        look = Onlooker(Bicubic(4), protocol(*clips))
        assert sorted(look.clips) == [f"{i:02d}" for i in expected]
    evaluate(Bicubic(4), protocol(*clips), progress=False, around=look)
    assert {path.partition("/")[0] for path in look.pictures} == look.clips
    assert len(look.clips) == CLIPS


def test_the_middle_frame_is_one_that_counts() -> None:
    clip = Clip("a", torch.rand(9, 3, 16, 16))
    assert middle_frame(protocol(clip), 9) == 4
    assert middle_frame(protocol(clip), 1) == 0
    assert middle_frame(protocol(clip, between=1), 9) == 5  # 4 is seen
    assert middle_frame(protocol(clip, between=3), 9) == 5


def test_maps_are_of_the_pass_that_is_measured_and_of_the_frame_of_the_crops() -> None:
    clip = Clip("a", flat_but(100, 20))
    masks = torch.rand(5, 2, 36, 50) > 0.5
    model = attach(Bicubic(4), seem=SEEMPlugin(3, sites=("input",), masks=2)).eval()
    look = Onlooker(model, protocol(clip))
    asked: list[Any] = []
    drawn = crops.map_picture

    def spy(*given: Any) -> Image.Image:
        asked.append(given)
        return drawn(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crops, "map_picture", spy)
        evaluate(model, protocol(clip), masks=lambda lr: masks, progress=False, around=look)
    ((frame, planes, box, pixel),) = asked
    lr = BI(4)(clip.pixels)
    assert torch.equal(frame, lr[2])
    assert torch.equal(planes["the frame's masks"], masks[2])
    top, left, *_ = crop_place(lr[2], clip.pixels[2], 4)
    assert box == (top // 4, left // 4, 32, 32)
    assert pixel == ((top + 64) // 4, (left + 64) // 4)
    picture = look.pictures["a/maps/seem, masks"].permute(1, 2, 0).numpy()
    assert np.array_equal(picture, np.asarray(drawn(frame, planes, box, pixel)))


def test_a_wrong_shape_is_left_to_evaluate() -> None:
    measured = protocol(Clip("a", torch.rand(3, 3, 16, 16)))
    with pytest.raises(ValueError, match="clip 'a': the model returned"):
        evaluate(nn.Identity(), measured, progress=False, around=Onlooker(nn.Identity(), measured))


def test_files_lie_where_the_report_looks_and_old_maps_go(tmp_path: Path) -> None:
    def colours(**named: int) -> dict[str, Tensor]:
        return {
            path.replace("__", "/"): torch.full((3, 2, 2), value, dtype=torch.uint8) for path, value in named.items()
        }

    old = tmp_path / "pictures" / "deep" / "a" / "maps" / "bank.png"
    old.parent.mkdir(parents=True)
    old.touch()
    (tmp_path / "pictures" / "mine.png").touch()
    first = colours(deep__a__result=1, deep__a__truth=2, deep__a__maps__other=3)
    last = colours(deep__a__result=4, deep__a__truth=2, deep__a__maps__seem=5)
    crops.write({"backbone": first, "tuned": last}, tmp_path)
    found = {
        path.relative_to(tmp_path / "pictures" / "deep" / "a").as_posix(): np.asarray(Image.open(path))[0, 0, 0]
        for path in (tmp_path / "pictures" / "deep").rglob("*.png")
    }
    assert found == {"backbone.png": 1, "result.png": 4, "truth.png": 2, "maps/seem.png": 5}
    assert (tmp_path / "pictures" / "mine.png").exists()


def test_in_a_sweep_what_is_measured_once_is_shown_by_every_job(
    vsrplug: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, list[str]]
) -> None:
    monkeypatch.setenv("VSRPLUG_RUNS", str(tmp_path))
    vsrplug("train", "-m", "plugins=none,memory_bank", "trainer.max_steps=1", *tiny["train"])
    folders = [path.parent / "pictures" for path in sorted(tmp_path.glob("sweeps/*/*/metrics.json"))]
    tuned, frozen = (
        {path.relative_to(folder / "test_0000").as_posix(): path.read_bytes() for path in folder.rglob("*.png")}
        for folder in folders
    )
    sites = ("backward_output", "forward_output", "fused")
    maps = {f"maps/memory_bank, recall at {site}.png" for site in sites}
    shared = {"bicubic.png", "ground truth.png", "low resolution.png"}
    assert frozen.keys() == shared | {"result.png"}
    assert tuned.keys() == shared | {"backbone.png", "result.png"} | maps
    for name in shared:
        assert tuned[name] == frozen[name]
    assert tuned["backbone.png"] == frozen["result.png"] != tuned["result.png"]
    assert not list(tmp_path.rglob("*.tmp"))
