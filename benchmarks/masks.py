"""Masks from a cache against the words as they are, and against decoding the frame they belong to.

Run: python benchmarks/masks.py [a folder of clips of 448 x 256, such as Vimeo-90K's or DAVIS's]
Without a folder the embedded clips are taken.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vsrplug.data import DemoClips, folder
from vsrplug.data.clip import Clip
from vsrplug.degradations import BI
from vsrplug.masks import Superpixels, pack, unpack
from vsrplug.masks.cache_file import CacheFile
from vsrplug.masks.making import make_clip
from vsrplug.masks.words import as_tensor

PATCH, FRAMES, SECONDS = 64, 7, 2.0


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        clips: Sequence[Clip] = folder(sys.argv[1])[:4]
    else:
        clips = DemoClips(clips=2, frames=8, size=(256, 448))
    table = Table(title=f"64 superpixels a frame, crops of {PATCH} x {PATCH}, one thread")
    for column in (
        "frames",
        "of raw words",
        "crops/s, words",
        "crops/s, 64 planes",
        "7-frame windows/s",
        "decoded frames/s",
    ):
        table.add_column(column, justify="left" if column == "frames" else "right")
    with TemporaryDirectory() as temporary:
        for scale in (4, 1):
            table.add_row(*measure(clips, scale, Path(temporary) / str(scale)))
    Console(width=120).print(table)


def measure(clips: Sequence[Clip], scale: int, out: Path) -> list[str]:
    """One row of the table; the windows are compared with the masks they were cut from."""
    source, files, truth = Superpixels(64), [], []
    for number, clip in enumerate(clips):
        frames = torch.stack(list(clip.frames(0, 8)))
        lr = BI(scale)(frames) if scale > 1 else frames
        masks = source(lr)
        path = out / f"{number}.masks"
        make_clip(path, lr, lambda start, batch, m=masks: m[start : start + len(batch)], source.settings, 64)
        files.append(CacheFile(path))
        truth.append(masks)
    height, width = lr.shape[-2:]
    draw = random.Random(0)

    def window(frames: int, unpacked: bool) -> tuple[int, int, int, int, Tensor]:
        index, start = draw.randrange(len(files)), draw.randrange(9 - frames)
        top, left = draw.randrange(height - PATCH + 1), draw.randrange(width - PATCH + 1)
        words = as_tensor(files[index].read(range(start, start + frames), top, left, PATCH, PATCH))
        return index, start, top, left, unpack(words, 64).float() if unpacked else words

    for _ in range(20):
        index, start, top, left, planes = window(2, True)
        expected = truth[index][start : start + 2, :, top : top + PATCH, left : left + PATCH]
        if not torch.equal(planes, expected):
            raise SystemExit("a crop of the cache is not that of the masks")
    stored = sum(path.stat().st_size for path in out.iterdir())
    raw = sum(pack(masks).nbytes for masks in truth)
    speeds = [rate(lambda: window(1, False)), rate(lambda: window(1, True)), rate(lambda: window(FRAMES, False))]
    decoded = rate(lambda: next(clips[0].frames(3, 4)))
    return [f"{width} x {height}", f"{stored / raw:.2%}", *(f"{speed:.0f}" for speed in (*speeds, decoded))]


def rate(work: Callable[[], object]) -> float:
    """Calls in a second of processor time: whatever else the machine does does not count."""
    start, calls = time.process_time(), 0
    while (spent := time.process_time() - start) < SECONDS:
        work()
        calls += 1
    return calls / spent


if __name__ == "__main__":
    main()
