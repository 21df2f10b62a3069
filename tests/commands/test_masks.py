"""`vsrplug masks`: once made, never again; killed and shared among workers it leaves the same; its readers find it."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf, open_dict
from PIL import Image

from vsrplug import conf
from vsrplug.commands import main, masks
from vsrplug.commands.keys import check_keys
from vsrplug.data import FrameFolder
from vsrplug.masks import CachedMasks, Superpixels
from vsrplug.masks.cache_file import CacheFile

Vsrplug = Callable[..., Any]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three clips of low resolution, of six frames each."""
    rng = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "clips" / name).mkdir(parents=True)
        for t in range(6):
            small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
            small.resize((70, 40), Image.Resampling.BICUBIC).save(tmp_path / "clips" / name / f"{t}.png")
    return tmp_path / "clips"


def arguments(clips: Path, out: Path, *more: str) -> list[str]:
    return ["masks", "data=folder", f"data.root={clips}", "degradation=none", "source.count=24", f"out={out}", *more]


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child(line: list[str], dies_at: int | None = None) -> int:
    """The command in a process of its own, which a kill ends when it begins with so many masks done; its id."""
    process = os.fork()
    if process:
        return process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import sys

    sys.argv = ["vsrplug", *line]
    status, made = 1, itertools.count()
    make = Superpixels.__call__

    def dying(source: Superpixels, frames: Any) -> Any:
        if next(made) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(source, frames)

    try:
        Superpixels.__call__ = dying  # type: ignore[method-assign]
        main()
        status = 0
    finally:
        os._exit(status)


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_masks_are_the_sources_own_and_are_made_once(
    clips: Path, tmp_path: Path, vsrplug: Vsrplug, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "masks"
    vsrplug(*arguments(clips, out))
    assert re.fullmatch(
        rf"masks of 18 frames, 3 clips, in [\d.]+ s, [\d.]+ frames a second: {out}\n", capsys.readouterr().out
    )
    lr = torch.stack(list(FrameFolder(clips / "b").frames()))
    assert torch.equal(CachedMasks(out, 24)(lr), Superpixels(24)(lr))
    first, times = held(out), [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    monkeypatch.setattr(Superpixels, "__call__", None)  # whoever calls it fails
    vsrplug(*arguments(clips, out))
    assert "masks of 0 frames, 0 clips, in " in (line := capsys.readouterr().out)
    assert line.endswith(f"{out}; 3 clips were there already\n")
    assert held(out) == first
    assert [path.stat().st_mtime_ns for path in sorted(out.iterdir())] == times


def test_a_new_clip_is_added(clips: Path, tmp_path: Path, vsrplug: Vsrplug, capsys: pytest.CaptureFixture[str]) -> None:
    (clips / "b").rename(tmp_path / "b")
    vsrplug(*arguments(clips, tmp_path / "masks"))
    (tmp_path / "b").rename(clips / "b")
    vsrplug(*arguments(clips, tmp_path / "masks"))
    assert "masks of 6 frames, 1 clips" in (line := capsys.readouterr().out)
    assert "2 clips were there already" in line
    assert sorted(held(tmp_path / "masks")) == ["a.masks", "b.masks", "c.masks"]


def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(clips: Path, tmp_path: Path) -> None:
    """Before the first mask, within a clip, and after a whole one: each kill leaves other files."""
    whole, out = tmp_path / "whole", tmp_path / "masks"
    assert status_of(child(arguments(clips, whole))) == 0
    left = []
    for dies_at in (0, 2, 5, 1, 4):
        assert status_of(child(arguments(clips, out), dies_at)) == -signal.SIGKILL
        left.append({name: len(content) for name, content in held(out).items()})
    assert all(one != other for one, other in itertools.pairwise(left))
    assert status_of(child(arguments(clips, out))) == 0
    assert held(out) == held(whole)  # nothing more, too: no temporary file


def test_workers_share_a_folder(clips: Path, tmp_path: Path) -> None:
    assert status_of(child(arguments(clips, tmp_path / "alone"))) == 0
    workers = [child(arguments(clips, tmp_path / "together")) for _ in range(3)]
    assert [status_of(worker) for worker in workers] == [0, 0, 0]
    assert held(tmp_path / "together") == held(tmp_path / "alone")


def test_check_and_one_command_that_mends(
    clips: Path, tmp_path: Path, vsrplug: Vsrplug, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "masks"
    vsrplug(*arguments(clips, out))
    whole = held(out)
    vsrplug(*arguments(clips, out, "check=true"))
    assert f"the masks of all 3 clips in {out} are whole, and those of their frames" in capsys.readouterr().out
    damaged = bytearray(whole["a.masks"])
    damaged[len(damaged) // 2] ^= 4
    (out / "a.masks").write_bytes(damaged)
    (out / "b.masks").unlink()
    with pytest.raises(SystemExit) as caught:
        vsrplug(*arguments(clips, out, "check=true"))
    message = str(caught.value)
    assert message.startswith(
        f"vsrplug masks: 2 of 3 clips: {out}/a.masks is damaged, or is no file of masks (its checksum"
    )
    assert f"; {out}/b.masks is not there; the same command without check=true makes" in message
    assert held(out) == {"a.masks": bytes(damaged), "c.masks": whole["c.masks"]}
    vsrplug(*arguments(clips, out))
    assert held(out) == whole
    assert f"{out}/a.masks is damaged" in capsys.readouterr().err


def test_check_compares_every_frame(clips: Path, tmp_path: Path, vsrplug: Vsrplug) -> None:
    out = tmp_path / "masks"
    vsrplug(*arguments(clips, out))
    Image.new("RGB", (70, 40)).save(clips / "b" / "4.png")
    with pytest.raises(
        SystemExit, match=r"1 of 3 clips: .*b\.masks holds masks of another frame than the clip's number 4;"
    ):
        vsrplug(*arguments(clips, out, "check=true"))


def test_what_does_not_fit_is_refused_until_told_otherwise(clips: Path, tmp_path: Path, vsrplug: Vsrplug) -> None:
    out = tmp_path / "masks"
    vsrplug(*arguments(clips, out))
    whole = held(out)
    with pytest.raises(
        SystemExit,
        match=r"\.masks was made with other settings: compactness 10\.0 instead of 2; name another folder with "
        r"out=\.\.\., or add overwrite=true$",
    ):
        vsrplug(*arguments(clips, out, "source.compactness=2"))
    Image.new("RGB", (70, 40)).save(clips / "a" / "0.png")
    with pytest.raises(
        SystemExit, match=r"a\.masks holds masks of other frames .*; name another folder with out=\.\.\., or"
    ):
        vsrplug(*arguments(clips, out))
    assert held(out) == whole
    vsrplug(*arguments(clips, out, "overwrite=true"))
    assert {name for name, content in held(out).items() if content != whole[name]} == {"a.masks"}
    vsrplug(*arguments(clips, out, "source.compactness=2", "overwrite=true"))
    assert CacheFile(out / "b.masks").header.settings["compactness"] == 2


def test_other_errors_are_one_line(clips: Path, tmp_path: Path, vsrplug: Vsrplug) -> None:
    def attempt(*line: str) -> str:
        with pytest.raises(SystemExit) as caught:
            vsrplug(*arguments(clips, tmp_path / "masks", *line))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert attempt("source=segment_anything") == "vsrplug masks: checkpoint has to be given: checkpoint=..."
    assert "there is no checkpoint nowhere.pth" in attempt("source=segment_anything", "checkpoint=nowhere.pth")
    assert "holds up to 64 masks, the source makes count=65; take count=64" in attempt("source.count=65")
    assert "there is no folder nowhere" in attempt("data.root=nowhere")
    assert "source.root has to be given" in attempt("source=precomputed")
    assert not (tmp_path / "masks").exists() or not held(tmp_path / "masks")


def test_precomputed_masks(clips: Path, tmp_path: Path, vsrplug: Vsrplug) -> None:
    made, out = tmp_path / "labels", tmp_path / "masks"
    for name in "abc":
        (made / name).mkdir(parents=True)
        for t in range(6):
            labels = np.zeros((40, 70), np.uint8)
            labels[: 10 + t] = ord(name)
            Image.fromarray(labels).save(made / name / f"{t}.png")
    vsrplug(*arguments(clips, out, "source=precomputed", f"source.root={made}"))
    lr = torch.stack(list(FrameFolder(clips / "c").frames()))
    assert CachedMasks(out, 24)(lr).sum((1, 2, 3)).tolist() == [70 * (10 + t) for t in range(6)]
    with pytest.raises(SystemExit, match=r"source .*precomputed"):  # another source's folder
        vsrplug(*arguments(clips, out))


def test_a_picture(clips: Path, tmp_path: Path, vsrplug: Vsrplug) -> None:
    vsrplug(*arguments(clips, tmp_path / "masks", "preview=true"))
    with Image.open(tmp_path / "masks" / "preview.png") as picture:
        assert picture.width > 6 * 256
    assert sorted(held(tmp_path / "masks")) == ["a.masks", "b.masks", "c.masks", "preview.png"]


def test_train_and_evaluate_read_what_it_made_with_the_commands_they_print(
    tmp_path: Path, vsrplug: Vsrplug, tiny: dict[str, list[str]]
) -> None:
    folder, run = tmp_path / "my masks", f"hydra.run.dir={tmp_path / 'run'}"
    chosen = ["plugins=seem", "masks=cached", f'masks.folder="{folder}"', "masks.count=9", run]
    training = [*tiny["train"], "trainer.max_steps=2", *chosen]
    measuring = [*tiny["evaluate"], *chosen]

    def printed(*line: str) -> list[list[str]]:
        with pytest.raises(SystemExit) as caught:
            vsrplug(*line)
        message = str(caught.value)
        assert "\n" not in message
        assert "`vsrplug masks` makes them: vsrplug masks source=" in message
        return [shlex.split(command)[1:] for command in message.partition("makes them: ")[2].split(" && ")]

    (measured,) = printed("evaluate", *measuring)
    assert measured == [
        "masks", "source=segment_anything", "checkpoint=sam_vit_h_4b8939.pth", "source.count=9", "data=demo",
        "data.split=test", "data.clips=1", "data.frames=4", "data.size=[64,96]", "degradation=bd", f'out="{folder}"',
    ]  # fmt: skip
    assert len(printed("train", *training)) == 2
    vsrplug(*["source=superpixels" if part == "source=segment_anything" else part for part in measured])
    vsrplug("evaluate", *measuring)
    first, second = printed("train", *training)
    assert first[1:3] == ["source=superpixels", "source.count=9"]  # of those that are there
    vsrplug(*first)
    vsrplug(*second)
    vsrplug("train", *training)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["choices"]["masks"] == "cached"
    assert sorted(held(folder)) == ["test_0000.masks", "train_0000.masks", "train_0001.masks"]


def test_upscale_prints_the_command_for_its_input(clips: Path, tmp_path: Path, vsrplug: Vsrplug) -> None:
    given = ["plugins=seem", "masks=cached", f"masks.folder={tmp_path}/m", "masks.count=5", "backbone=basicvsr_tiny"]
    line = ["upscale", f"input={clips / 'a'}", f"output={tmp_path / 'large'}", *given]
    with pytest.raises(SystemExit) as caught:
        vsrplug(*line)
    command = str(caught.value).partition("makes them: ")[2]
    assert command == (
        f"vsrplug masks source=segment_anything checkpoint=sam_vit_h_4b8939.pth source.count=5 data=folder "
        f"data.root={clips}/a degradation=none out={tmp_path}/m"
    )
    vsrplug(*shlex.split(command.replace("segment_anything", "superpixels"))[1:])
    vsrplug(*line)
    assert len(FrameFolder(tmp_path / "large")) == 6


def test_progress_says_speed_and_time_left(clips: Path, tmp_path: Path) -> None:
    with hydra.initialize_config_module("vsrplug.conf", version_base="1.3"):
        cfg = hydra.compose("masks", arguments(clips, tmp_path / "masks")[1:])
    columns = [type(column).__name__ for column in masks.MasksJob(cfg).bar.columns]
    assert columns[-2:] == ["Rate", "TimeRemainingColumn"]


@pytest.mark.parametrize("source", ["precomputed", "segment_anything", "superpixels"])
def test_every_source_is_a_call_with_the_constructors_names_and_defaults(source: str) -> None:
    given = OmegaConf.load(Path(conf.__file__).parent / "source" / f"{source}.yaml")
    target = hydra.utils.get_method(given.pop("_target_"))
    parameters = inspect.signature(target).parameters
    assert given.keys() == parameters.keys()
    for name, value in OmegaConf.to_container(given, resolve=False).items():
        default = parameters[name].default
        otherwise = {"${checkpoint}", "${device}", "???"} | ({64} if target is Superpixels else set())
        assert value == default or value in otherwise, name
    with hydra.initialize_config_module("vsrplug.conf", version_base="1.3"):
        cfg = hydra.compose("masks", [f"source={source}", "checkpoint=sam.pth"])
    check_keys(cfg, "masks")
    with open_dict(cfg):
        cfg.source.points = 8
    with pytest.raises(ValueError, match="there is no argument 'points'"):
        check_keys(cfg, "masks")
