"""How many clips a minute the degradation `real` makes, and where the time goes.

Run: python benchmarks/real_degradation.py [loader processes, 2 unless given]
LR patches of 64 x 64, windows of 15 frames, and the margin that training degrades with them: 288 x 288 HR pixels.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

import vsrplug.real_degradation as real
from vsrplug.data import DemoClips, TrainingClips

CLIPS, TIMED, FRAMES, PATCH = 60, 24, 15, 64
STAGES = ("sharpen", "blur_kernel", "blur", "resize", "gaussian_noise", "poisson_noise", "jpeg", "compress_video")


def main() -> None:
    torch.set_num_threads(1)
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    source = DemoClips(clips=2, frames=FRAMES, size=(384, 512))
    for clip in source:
        clip.pixels  # noqa: B018 - rendered now, in this process, and not on the clock
    table = Table(title=f"{FRAMES} frames, LR {PATCH} x {PATCH}; milliseconds of processor time a clip")
    for column in ("", *STAGES, "rest", "all"):
        table.add_column(column, justify="right")
    lines = []
    for title, degradation in (("real", real.Real()), ("real, sharpened", real.Real(sharpen=True))):
        samples = TrainingClips(source, degradation, frames=FRAMES, patch=PATCH)
        spent = stages(samples)
        table.add_row(title, *(f"{1000 * spent[name]:.0f}" for name in (*STAGES, "rest", "all")))
        ideal = 60 * workers / spent["all"]
        lines.append(f"{title}: {rate(samples, workers):.0f} clips a minute ({workers} processes); {ideal:.0f} if each "
                     "had a core to itself")  # fmt: skip
    console = Console(width=140)
    console.print(table)
    for line in lines:
        console.print(line)


def stages(samples: TrainingClips) -> Counter[str]:
    """Seconds of processor time a clip, by what `real` calls."""
    spent: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.process_time()
            result = function(*arguments, **keywords)
            spent[name] += (time.process_time() - start) / TIMED  # type: ignore[assignment]
            return result

        return call

    with ExitStack() as stack:
        for name in STAGES:
            stack.enter_context(patch.object(real, name, timed(name, getattr(real, name))))
        start = time.process_time()
        for k in range(TIMED):
            samples[k]
    spent["all"] = (time.process_time() - start) / TIMED  # type: ignore[assignment]
    spent["rest"] = spent["all"] - sum(spent[name] for name in STAGES)
    return spent


def rate(samples: TrainingClips, workers: int) -> float:
    """Clips a minute of a data loader, by the clock, once its processes run."""
    numbers = range(CLIPS + workers)
    loader = iter(DataLoader(samples, batch_size=1, sampler=numbers, num_workers=workers, prefetch_factor=1))
    for _ in range(workers):
        next(loader)
    start = time.perf_counter()
    for _ in range(CLIPS):
        next(loader)
    return 60 * CLIPS / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
