"""The protocols in `conf/protocol` say what they are called, and bad ones say what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor

import vsrplug.conf
from vsrplug.degradations import BD, BDDUF, BI, imresize
from vsrplug.evaluation import evaluate
from vsrplug.protocols import Protocol

NAMES = sorted(file.stem for file in (Path(vsrplug.conf.__path__[0]) / "protocol").glob("*.yaml"))


class Clip:
    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        return iter(torch.zeros(self.length, 3, 8, 8)[start:stop])


def clips(*lengths: int) -> Sequence[Clip]:
    return [Clip(f"clip{i}", length) for i, length in enumerate(lengths)]


def compose_protocol(name: str, *overrides: str) -> Any:
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        return compose(overrides=[f"+protocol={name}", "+paths=default", *overrides]).protocol


def write_clip(folder: Path, frames: int = 6, size: tuple[int, int] = (16, 12)) -> None:
    folder.mkdir(parents=True)
    for t in range(frames):
        Image.new("RGB", size, (t, t, t)).save(folder / f"{t:08d}.png")


def test_the_named_protocols_are_there() -> None:
    vid4 = {"vid4_bi_y", "vid4_bi_rgb", "vid4_bd_y", "vid4_bd_duf_y"}
    assert vid4 | {"demo_bi_y", "demo_bd_y", "folder_bi_y", "folder_bi_rgb"} <= set(NAMES)


SOURCES = {"clips": "folder", "demo": "DemoClips", "reds4": "reds"}


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_is_called_what_its_file_is_called(name: str) -> None:
    """The name says data, degradation and colour; the yaml must say the same."""
    cfg = compose_protocol(name)
    source, *middle, colour = name.split("_")
    assert cfg.name == name
    assert cfg.colour == colour
    assert cfg._target_ == "vsrplug.protocols.Protocol"
    names = {"BI": "bi", "BD": "bd", "BDDUF": "bd_duf", "STVUN": "stvun", "Real": "real"}
    names |= {"BINoise": "bi_noise", "BICompression": "bi_compression"}
    short = names[cfg.degradation._target_.rsplit(".")[-1]]
    motion = cfg.clips.get("motion", "all")
    part = "" if motion == "all" else f"{motion}_"
    part += f"time{cfg.between + 1}_" if cfg.between else ""
    latent = middle[0] == "latent"  # as VSRnet: fewer frames and pixels
    part += "latent_" if latent else ""
    assert "_".join(middle) == part + short
    assert cfg.clips._target_.rsplit(".")[-1] == SOURCES.get(source, source)
    assert cfg.clips.get("split", "test") == "test"
    septuplets = source == "vimeo90k"  # the fourth frame of seven, which the model sees with their mirror image
    assert cfg.border == (8 if latent else 0)
    assert cfg.skip_frames == (3 if septuplets else 2 if latent or short == "bd_duf" else 0)
    assert cfg.mirror == septuplets


@pytest.mark.parametrize(("name", "degradation"), [("vid4_bd_y", BD(4)), ("vid4_bd_duf_y", BDDUF(4))])
def test_vid4_protocols_are_built_from_the_data_folder(name: str, degradation: object, tmp_path: Path) -> None:
    for clip, frames in {"calendar": 41, "city": 34, "foliage": 49, "walk": 47}.items():
        write_clip(tmp_path / "vid4" / "GT" / clip, frames)
    protocol = instantiate(compose_protocol(name, f"paths.data={tmp_path}"))
    assert isinstance(protocol, Protocol)
    assert [clip.name for clip in protocol.clips] == ["calendar", "city", "foliage", "walk"]
    assert protocol.degradation == degradation


def test_a_septuplet_is_measured_on_its_fourth_frame_seen_with_its_mirror_image(tmp_path: Path) -> None:
    write_clip(tmp_path / "vimeo90k" / "sequences" / "00001" / "0001", 7)
    (tmp_path / "vimeo90k" / "sep_testlist.txt").write_text("00001/0001\n")
    protocol = instantiate(compose_protocol("vimeo90k_bi_y", f"paths.data={tmp_path}"))
    assert [clip.name for clip in protocol.clips] == ["00001/0001"]
    seen: list[Tensor] = []

    class OnlyTheFourth(torch.nn.Module):
        def forward(self, frames: Tensor) -> Tensor:
            seen.append(frames)
            sr = imresize(frames, 4)
            sr[:, [0, 1, 2, *range(4, 14)]] = 0  # none of these may count
            return sr

    assert evaluate(OnlyTheFourth(), protocol, progress=False).psnr > 50
    assert seen[0].shape == (1, 14, 3, 3, 4)
    assert torch.equal(seen[0], seen[0].flip(1))


def test_folder_protocols_take_a_root(tmp_path: Path) -> None:
    write_clip(tmp_path / "mine")
    protocol = instantiate(compose_protocol("folder_bi_rgb", f"protocol.clips.root={tmp_path}"))
    assert [(clip.name, len(clip)) for clip in protocol.clips] == [("mine", 6)]
    assert protocol.degradation == BI(4)


def test_demo_protocols_measure_held_back_clips() -> None:
    cfg = compose_protocol("demo_bd_y")
    assert cfg.clips.split == "test"
    assert cfg.clips.clips < 20, "rendered whenever the protocol is built: keep them few"


def test_a_misspelt_key_fails_before_anything_runs() -> None:
    cfg = compose_protocol("demo_bi_y", "+protocol.colours=y", "protocol.clips.clips=1")
    with pytest.raises(Exception, match="unexpected keyword argument 'colours'"):
        instantiate(cfg)


def test_a_protocol_does_not_change() -> None:
    protocol = Protocol("p", clips(1), BI(), "y")
    with pytest.raises(FrozenInstanceError):
        protocol.border = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"colour": "ycbcr"}, "protocol 'p': colour must be one of 'rgb', 'y', got 'ycbcr'"),
        ({"border": -8}, "protocol 'p': border is a number of pixels to leave out on each side, 0 or more, got -8"),
        ({"skip_frames": -1}, "protocol 'p': skip_frames is 0 or more, got -1"),
        ({"skip_frames": 2}, "skips the first and the last 2 frames, but clip 'clip1' has only 4 frames"),
        ({"clips": []}, "protocol 'p' has no clips: the data source is empty"),
    ],
)
def test_bad_protocols_say_what_is_wrong(given: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"name": "p", "clips": clips(5, 4), "degradation": BI(), "colour": "y"}
    with pytest.raises(ValueError, match=message):
        Protocol(**arguments | given)
