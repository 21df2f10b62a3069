"""`vsrplug masks`: make the object masks of clips once, for training, evaluation and upscaling to read."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from vsrplug.commands import build
from vsrplug.commands.application import command
from vsrplug.commands.upscale import Rate
from vsrplug.data.clip import Clip
from vsrplug.degradations import crop_to_multiple
from vsrplug.masks.cache_file import SUFFIX, CacheFile, check_whole
from vsrplug.masks.cached import cache_path, check_frames, differences
from vsrplug.masks.errors import DamagedMasksError, MasksError
from vsrplug.masks.journal import partial_path
from vsrplug.masks.making import MaskSource, clear_partial, make_clip
from vsrplug.masks.precomputed import Precomputed
from vsrplug.masks.preview import preview
from vsrplug.masks.words import Words, frame_hash
from vsrplug.pictures import save_picture

PREVIEWED = 6  # clips


def main() -> None:
    """Entry point of `vsrplug masks`."""
    command("masks", run)


def run(cfg: DictConfig) -> None:
    """Make the masks that are missing, or, with `check`, look whether those there are the frames' own."""
    job = MasksJob(cfg)
    if cfg.check:
        job.check()
    else:
        job.make()
    if cfg.preview:
        path = job.folder / "preview.png"
        save_picture(preview([job.sample(clip) for clip in islice(job.clips, PREVIEWED)]), path)
        print(f"a picture of them: {path}")


class MasksJob:
    """Clips, what makes their low-resolution frames, a mask source, and the folder.

    Args:
        cfg: the command's configuration.

    Raises:
        ValueError: the folder's masks were made with other settings, and `overwrite` is false.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.folder = Path(str(cfg.out)).expanduser()
        self.overwrite = cfg.overwrite
        self.degradation = build.make(cfg.get("degradation"))
        self.source: MaskSource | Precomputed = build.make(cfg.source)
        self.settings = json.loads(json.dumps(self.source.settings))  # as it will be read back
        any_file = next(self.folder.rglob(f"*{SUFFIX}"), None)
        if any_file is not None and not (self.overwrite or cfg.check):
            self._check_settings(any_file)
        self.clips: Sequence[Clip] = build.make(cfg.data)
        if not len(self.clips):
            raise ValueError("there are no clips to make masks of: the data source is empty")
        self.bar = Progress(
            *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate()),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not build.interactive(),
            speed_estimate_period=600,
        )

    def path(self, clip: Clip) -> Path:
        """The file of a clip's masks."""
        return cache_path(self.folder, clip.name)

    def frames(self, clip: Clip, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Its LR frames (3, h, w), one at a time."""
        for frame in clip.frames(start, stop):
            if self.degradation is None:
                yield frame
            else:
                yield self.degradation(crop_to_multiple(frame[None], self.degradation.scale))[0]

    def sample(self, clip: Clip) -> tuple[str, list[Tensor], Words]:
        """Its name, and first, middle and last frame, (3, h, w), with their words (t, h, w)."""
        numbers = sorted({0, len(clip) // 2, len(clip) - 1})
        frames = [next(self.frames(clip, number, number + 1)) for number in numbers]
        return clip.name, frames, CacheFile(self.path(clip)).read(numbers, 0, 0, *frames[0].shape[-2:])

    def make(self) -> None:
        """Make what is missing, and say so."""
        start = time.perf_counter()
        counts: Counter[str] = Counter()

        def made(words: Words) -> None:
            counts.update(frames=1, without=int(not words.any()))
            self.bar.advance(task)

        with self.bar:
            total = sum(len(clip) for clip in self.clips)
            task = self.bar.add_task("masks", total=total)
            for clip in self.clips:
                self.bar.update(task, description=clip.name)
                if self._is_there(clip):
                    counts.update(kept=1)
                elif not self._make(clip, made):
                    counts.update(elsewhere=1)
                else:
                    continue
                self.bar.update(task, total=(total := total - len(clip)))  # or the time left would be wrong
        seconds = time.perf_counter() - start
        finished = len(self.clips) - counts["kept"] - counts["elsewhere"]
        notes = [
            f"{counts['kept']} clips were there already" if counts["kept"] else "",
            f"{counts['elsewhere']} are in the hands of other workers" if counts["elsewhere"] else "",
            f"{counts['without']} frames have no mask" if counts["without"] else "",
        ]
        print(
            f"masks of {counts['frames']} frames, {finished} clips, in {seconds:.1f} s, "
            f"{counts['frames'] / seconds:.2f} frames a second: {self.folder}"
            + "".join(f"; {note}" for note in notes if note)
        )

    def check(self) -> None:
        """Compare every file with every frame.

        Raises:
            ValueError: masks are missing, damaged, or of other frames or settings; the first three are named.
        """
        wrong = []
        with self.bar:
            task = self.bar.add_task("masks", total=sum(len(clip) for clip in self.clips))
            for clip in self.clips:
                self.bar.update(task, description=clip.name)
                try:
                    self._compare(clip)
                except FileNotFoundError:
                    begun = ", but begun" if partial_path(self.path(clip)).exists() else ""
                    wrong.append(f"{self.path(clip)} is not there{begun}")
                except ValueError as error:
                    wrong.append(str(error).partition(";")[0])
                self.bar.advance(task, len(clip))
        if wrong:
            others = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                f"{len(wrong)} of {len(self.clips)} clips: {'; '.join(wrong[:3])}{others}; the same command without "
                "check=true makes what is missing or damaged, and with overwrite=true what does not fit"
            )
        print(f"the masks of all {len(self.clips)} clips in {self.folder} are whole, and those of their frames")

    def _make(self, clip: Clip, made: Any) -> bool:
        def masks(start: int, frames: Tensor) -> Tensor:
            if isinstance(self.source, Precomputed):  # knows frames by clip and number, others by what they show
                return self.source.of_clip(clip, start, frames)
            return self.source(frames)

        batch = getattr(self.source, "batch", 1)
        return make_clip(
            self.path(clip), self.frames(clip), masks, self.settings, self.source.count, batch=batch, made=made
        )

    def _is_there(self, clip: Clip) -> bool:
        """Whether the clip's masks are whole; those that are damaged are made anew."""
        path = self.path(clip)
        if not path.exists():
            return False
        try:
            check_whole(path)
            check_frames(path, CacheFile(path).header, len(clip), next(self.frames(clip, 0, 1)))
            self._check_settings(path)
        except DamagedMasksError as error:
            self.bar.console.print(f"{error}, now", soft_wrap=True, highlight=False)
            return False
        except ValueError as error:
            if self.overwrite:
                return False
            raise ValueError(
                f"{str(error).partition(';')[0]}; name another folder with out=..., or add overwrite=true"
            ) from None
        clear_partial(path)
        return True

    def _check_settings(self, path: Path) -> None:
        try:
            found = CacheFile(path).header.settings
        except DamagedMasksError:
            return  # made anew when its turn comes
        if found != self.settings:
            raise ValueError(
                f"{path} was made with other settings: {differences(found, self.settings)}; name another folder with "
                "out=..., or add overwrite=true"
            )

    def _compare(self, clip: Clip) -> None:
        path = self.path(clip)
        file = CacheFile(path)
        check_whole(path)
        self._check_settings(path)
        number = -1
        for number, frame in enumerate(self.frames(clip)):
            if number == 0:
                check_frames(path, file.header, len(clip), frame)
            if file.header.hashes[number] != frame_hash(frame):
                raise MasksError(f"{path} holds masks of another frame than the clip's number {number}")
