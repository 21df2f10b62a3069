"""`vsrplug upscale`: super-resolve a video file or a folder of frames."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import nn

from vsrplug import __version__
from vsrplug.commands import build
from vsrplug.commands.application import command
from vsrplug.data.frame_folder import FrameFolder
from vsrplug.data.frame_writer import FrameWriter
from vsrplug.data.video_file import VideoFile
from vsrplug.data.video_properties import VideoProperties, read_properties
from vsrplug.data.video_writer import FORMATS, VideoWriter
from vsrplug.plugged import digests
from vsrplug.space_time import check_interpolates
from vsrplug.upscaling import Upscaler

INPUT = "a video file or a folder of frames, for instance: vsrplug upscale input=clip.mp4 output=out.mp4"
RATE = Fraction(25)  # of a folder of frames
MULTIPLE = r"x(\d+)"


def main() -> None:
    """Entry point of `vsrplug upscale`."""
    command("upscale", run)


def run(cfg: DictConfig) -> None:
    """Restore the input chunk by chunk into the output, which is whole at the end, or, after an error, not there.

    A folder of frames that was not finished is continued by the same command; a video starts again.
    """
    clip, target = open_input(cfg), check_output(cfg)
    model = build.make_model(cfg)
    count = multiple(cfg.fps)
    if count > 1:
        check_interpolates(model, f"fps={cfg.fps}")
    total = count * len(clip)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    upscaler = Upscaler(
        model,
        chunk=cfg.chunk,
        overlap=cfg.overlap,
        between=count - 1,
        tile=cfg.tile,
        tile_overlap=cfg.tile_overlap,
        cut=cfg.cut,
        masks=build.make(cfg.masks),
        device=device,
    )
    start = time.perf_counter()
    computed = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate())
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not build.interactive(),
        speed_estimate_period=600,  # frames come in chunks, which may take minutes
    )
    properties = read_properties(clip.path) if isinstance(clip, VideoFile) else VideoProperties(rate(cfg.fps))
    properties = properties.more_frames(count)
    with open_output(cfg, clip, target, model, properties) as writer, bar:
        task = bar.add_task(clip.name, total=total)
        for number, frame in upscaler.frames(clip, writer.missing):
            writer.write(number, torch.rot90(frame, properties.rotation // 90, dims=(-2, -1)))
            computed += 1
            bar.update(task, completed=number + 1)
    seconds = time.perf_counter() - start
    kept = f" ({total - computed} were there already)" if computed < total else ""
    print(f"{computed} frames{kept} in {seconds:.1f} s, {computed / seconds:.2f} frames a second: {target}")


class Rate(ProgressColumn):
    """Frames a second."""

    def render(self, task: Task) -> Text:
        """The speed so far, nothing before it is known."""
        return Text("" if task.speed is None else f"{task.speed:.2f} fps")


def open_input(cfg: DictConfig) -> FrameFolder | VideoFile:
    """The clip that `input` names.

    Raises:
        ValueError: `input` is not given, has no frames, or is a video though `fps` is a rate.
        FileNotFoundError: there is nothing of that name.
    """
    if OmegaConf.is_missing(cfg, "input"):
        raise ValueError(f"input=... is missing: {INPUT}")
    path = Path(str(cfg.input)).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no input {path}; expected {INPUT}")
    clip = FrameFolder(path) if path.is_dir() else VideoFile(path)
    if isinstance(clip, VideoFile) and cfg.fps is not None and not re.fullmatch(MULTIPLE, str(cfg.fps)):
        raise ValueError(
            f"fps={cfg.fps} is for folders of frames; the video {path} keeps its own rate, or a multiple of it: fps=x2"
        )
    multiple(cfg.fps)
    if not len(clip):
        raise ValueError(f"input {path} has no frames")
    return clip


def check_output(cfg: DictConfig) -> Path:
    """Where `output` is to be.

    Raises:
        ValueError: `output` is not given, is the input, or ends in what cannot be written.
        FileExistsError: it exists, and `overwrite` is false.
    """
    if OmegaConf.is_missing(cfg, "output"):
        raise ValueError("output=... is missing: a video file (out.mp4), or a folder for PNG frames (out)")
    path = Path(str(cfg.output)).expanduser()
    folder = str(cfg.output).endswith(("/", os.sep)) or path.is_dir()
    ending = path.suffix.lower()
    if not folder and (path.is_file() or ending) and ending not in FORMATS:
        raise ValueError(
            f"cannot write {path}: output is a video ending in {', '.join(FORMATS)}, or a folder of PNG frames, whose "
            "name has no ending (or ends in /)"
        )
    if path.exists() and path.samefile(Path(str(cfg.input)).expanduser()):
        raise ValueError(f"output {path} is the input itself; name another")
    if path.is_dir() and any(path.iterdir()) and not cfg.overwrite:
        raise FileExistsError(f"output folder {path} is not empty; name another, or add overwrite=true")
    if path.is_file() and not cfg.overwrite:
        raise FileExistsError(f"output {path} exists; name another, or add overwrite=true")
    return path


def open_output(
    cfg: DictConfig, clip: FrameFolder | VideoFile, target: Path, model: nn.Module, properties: VideoProperties
) -> VideoWriter | FrameWriter:
    """The writer that fits the output's name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir() or target.suffix.lower() not in FORMATS:
        return FrameWriter(target, frame_names(clip, multiple(cfg.fps)), settings(cfg, clip, model))
    scale: Any = model.backbone.scale  # type: ignore[union-attr]
    height, width = (scale * side for side in next(iter(clip.frames(0, 1))).shape[-2:])
    size = (width, height) if properties.rotation % 180 else (height, width)
    sound = clip.path if isinstance(clip, VideoFile) else None
    return VideoWriter(target, size, properties.upright(), cfg.crf, sound)


def multiple(fps: Any) -> int:
    """How many frames there are to be for each: 2 for "x2", 1 where `fps` is a rate or not given.

    Raises:
        ValueError: none, "x0".
    """
    found = re.fullmatch(MULTIPLE, str(fps))
    if found and not int(found[1]):
        raise ValueError(f"fps={fps} leaves no frame; expected x2, x3 and so on")
    return int(found[1]) if found else 1


def rate(fps: Any) -> Fraction:
    """Frames a second of a folder's frames, from a number or a fraction such as 30000/1001; 25 for a multiple.

    Raises:
        ValueError: it is neither, or not positive.
    """
    try:
        frames = RATE if fps is None or re.fullmatch(MULTIPLE, str(fps)) else Fraction(str(fps))
    except (ValueError, ZeroDivisionError):
        frames = Fraction(0)
    if frames <= 0:
        raise ValueError(
            f"fps={fps} must be a positive number, a fraction such as 30000/1001, or a multiple such as x2"
        )
    return frames


def frame_names(clip: FrameFolder | VideoFile, count: int = 1) -> list[str]:
    """The names of the input's frames where they have some, else, and with `count` frames for each, their numbers."""
    stems = [file.stem for file in clip.files] if isinstance(clip, FrameFolder) and count == 1 else []
    if not stems or max(Counter(stems).values()) > 1:
        stems = [f"{number:08d}" for number in range(count * len(clip))]
    return [f"{stem}.png" for stem in stems]


def settings(cfg: DictConfig, clip: FrameFolder | VideoFile, model: nn.Module) -> dict[str, Any]:
    """What the frames depend on: another model, input, or way to cut it up gives others."""
    files = clip.files if isinstance(clip, FrameFolder) else [clip.path]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    keys = ("backbone", "plugins", "masks", "chunk", "overlap", "tile", "tile_overlap", "cut")
    return {key: value for key, value in build.as_plain(cfg).items() if key in keys} | {
        "frames": multiple(cfg.fps) * len(clip),
        "input": hashlib.sha256(repr(stats).encode()).hexdigest(),
        "weights": hashlib.sha256(repr(sorted(digests(model.state_dict()).items())).encode()).hexdigest(),
        "vsrplug": __version__,
    }
