"""Gaussian cross-frame attention: ours against the way that makes every matrix. Run: python benchmarks/attention.py

Every contender runs in a process of its own, which is how its peak of memory is known, and all compute the same module
(C channels, T frames, the same weights and input). Errors are against float64, at 64 pixels, in the size of the result.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vsrplug.plugins import GaussianCrossFrameAttention, _gaussian_blocks, gaussian_cross_frame_attention

CONTENDERS = {  # name -> weighting, and the attention in the place of ours
    "materialised": ("gaussian_of_softmax", "by_frame"),
    "materialised, all frames at once": ("gaussian_of_softmax", "at_once"),
    "ours": ("gaussian_of_softmax", None),
    "ours, product": ("product", None),
    "ours, softmax_of_gaussian": ("softmax_of_gaussian", None),
}
MATRICES = {"by_frame": 4, "at_once": 18}  # of h w x h w that exist at a time at least; with 7 frames in the second


@functools.cache
def squared_distances(h: int, w: int) -> Tensor:
    """Made once for a size, as in the authors' code."""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    return (y[:, None] - y).float().square_().add_((x[:, None] - x).float().square_())


def gaussian(h: int, w: int, sigma: Tensor) -> Tensor:
    return torch.exp(squared_distances(h, w) * (-0.5 / sigma**2))


def by_frame(query: Tensor, key: Tensor, value: Tensor, sigma: Tensor, *_: object) -> Tensor:
    """As in the authors' code: all pairs of pixels of the query and one frame at a time."""
    h, w = query.shape[-2:]
    q, g = query.flatten(2).mT, gaussian(h, w, sigma)
    frames = [
        ((q @ k.flatten(2)).softmax(-1) * g) @ v.flatten(2).mT
        for k, v in zip(key.unbind(1), value.unbind(1), strict=True)
    ]
    return torch.stack(frames, 1).mT.unflatten(3, (h, w))


def at_once(query: Tensor, key: Tensor, value: Tensor, sigma: Tensor, *_: object) -> Tensor:
    h, w = query.shape[-2:]
    scores = query.flatten(2).mT.unsqueeze(1) @ key.flatten(3)
    return ((scores.softmax(-1) * gaussian(h, w, sigma)) @ value.flatten(3).mT).mT.unflatten(3, (h, w))


def prepared(name: str, arguments: argparse.Namespace) -> tuple[GaussianCrossFrameAttention, Tensor]:
    torch.manual_seed(0)
    weighting, other = CONTENDERS[name]
    if other:
        gaussian_cross_frame_attention.gaussian_attention = globals()[other]
    module = GaussianCrossFrameAttention(
        arguments.channels, arguments.frames, sigma=arguments.sigma, weighting=weighting, zero_init=False
    )
    h, w = arguments.sizes[0]
    return module, torch.randn(1, arguments.frames, arguments.channels, h, w)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """What one contender does at one size, in this process."""
    torch.set_num_threads(arguments.threads)
    module, clip = prepared(name, arguments)
    centre = arguments.frames // 2

    def once(clip: Tensor) -> Tensor:
        if not arguments.training:
            with torch.inference_mode():
                return module(clip[:, centre], clip)
        refined = module(clip[:, centre], clip)
        refined.square().mean().backward()
        return refined.detach()

    once(clip[..., :16, :16].contiguous())  # libraries are loaded by now
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, seconds = memory("VmRSS"), []
    for _ in range(arguments.repeats):
        start = clock()
        refined = once(clip)
        seconds.append(clock() - start)
    peak = memory("VmHWM") - before
    return {"seconds": statistics.median(seconds), "mb": peak / 1e6, "error": error(module, clip, refined)}


def memory(which: str) -> int:
    """Bytes that /proc knows of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


@torch.no_grad()
def error(module: GaussianCrossFrameAttention, clip: Tensor, refined: Tensor) -> float:
    """The largest difference from float64, which skips nothing, at 64 pixels."""
    h, w = clip.shape[-2:]
    pixels = torch.randperm(h * w)[:64]
    squared = (pixels[:, None] // w - torch.arange(h * w) // w) ** 2 + (
        pixels[:, None] % w - torch.arange(h * w) % w
    ) ** 2
    module, centre = module.double(), clip.shape[1] // 2
    log, attended = -squared / (2 * module.sigma**2), []
    query = module.query(module.norm(clip[:, centre].double()))[0].flatten(1)[:, pixels]
    for frame in clip.unbind(1):
        normalised = module.norm(frame.double())
        scores = query.mT @ module.key(normalised)[0].flatten(1)
        weights = {
            "gaussian_of_softmax": lambda s: s.softmax(-1) * log.exp(),
            "product": lambda s: s * log.exp(),
            "softmax_of_gaussian": lambda s: (s + log).softmax(-1),
        }[module.weighting](scores)
        attended.append(weights @ module.value(normalised)[0].flatten(1).mT)
    wanted = module.output(torch.cat(attended, 1).mT[None, ..., None])[0, ..., 0]
    found = (refined - clip[:, centre])[0].flatten(1)[:, pixels]
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def operations(name: str, arguments: argparse.Namespace, size: tuple[int, int]) -> float:
    """Multiplications and additions of matrix products that are carried out, forward and if asked backward."""
    weighting, other = CONTENDERS[name]
    (h, w), t, c = size, arguments.frames, arguments.channels
    everything, near = (h * w) ** 2, (h * w) ** 2
    if not other:
        module = GaussianCrossFrameAttention(c, t, sigma=arguments.sigma, weighting=weighting)
        image = torch.empty(1, 1, h, w, 1)
        near = sum(
            tile.squared.numel()
            for _, columns, reach in _gaussian_blocks._strips(image, module.sigma, weighting, module.eps)
            for tile in _gaussian_blocks._tiles(image, columns, reach, module.sigma, weighting, module.eps)
        )
        everything = (h * w) ** 2 if weighting == "gaussian_of_softmax" else near
    projections = 2 * h * w * c * (c // 2) * (1 + 3 * t)
    forward = 2 * (c // 2) * t * (everything + near) + projections
    if not arguments.training:
        return forward
    # Ours computes the scores again; then two products for query and key, two near ones for value and weights.
    backward = 2 * (c // 2) * t * ((2 if other else 3) * everything + 2 * near) + 2 * projections
    return forward + backward


def ceiling(threads: int) -> float:
    """Operations a second of the machine's matrix product, the best of a few."""
    torch.set_num_threads(threads)
    a, b, best = torch.randn(1024, 1024), torch.randn(1024, 1024), float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def size(text: str) -> tuple[int, int]:
    h, w = text.split("x")
    return int(h), int(w)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sizes = [(64, 64), (64, 112), (180, 320)]
    parser.add_argument("--sizes", type=size, nargs="+", metavar="HxW", default=sizes, help="heights and widths")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--training", action="store_true", help="forward and backward, instead of inference")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--frames", type=int, default=7)
    parser.add_argument("--sigma", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for one thread on a busy machine")
    parser.add_argument("--one", choices=list(CONTENDERS), help=argparse.SUPPRESS)  # this process measures
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    console, best = Console(), ceiling(arguments.threads)
    what = "forward and backward" if arguments.training else "inference"
    table = Table(
        title=f"{what}, C = {arguments.channels}, T = {arguments.frames}, sigma {arguments.sigma:g}, float32, "
        f"{arguments.threads} threads, a matrix product at {best / 1e9:.0f} GFLOP/s"
    )
    for column in ("h x w", "attention", "s", "times faster", "GFLOP done", "of the ceiling", "peak MB", "error"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for h, w in arguments.sizes:
        first = None
        for name in arguments.contenders:
            row = [f"{h}x{w}", name]
            needed = 4 * MATRICES.get(CONTENDERS[name][1] or "", 0) * (h * w) ** 2
            if needed > available():
                table.add_row(*row, f"needs {needed / 1e9:.0f} GB")
                continue
            found = one(name, arguments, h, w)
            first = first or found["seconds"]
            done = operations(name, arguments, (h, w))
            table.add_row(
                *row,
                f"{found['seconds']:.3f}",
                f"{first / found['seconds']:.2f}",
                f"{done / 1e9:.1f}",
                f"{done / found['seconds'] / best:.0%}",
                f"{found['mb']:.0f}",
                f"{found['error']:.1e}",
            )
        table.add_section()
    console.print(table)
    console.print("times faster: than the first of its size in the table; peak: above module and input")


def one(name: str, arguments: argparse.Namespace, h: int, w: int) -> dict[str, float]:
    """The measurements of a contender, made by a process of its own."""
    options = {key: value for key, value in vars(arguments).items() if key not in ("sizes", "contenders", "one")}
    flags = [f"--{key.replace('_', '-')}" for key in ("training", "cpu_time") if options.pop(key)]
    flags += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, __file__, "--one", name, "--sizes", f"{h}x{w}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} at {h}x{w} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def available() -> int:
    """Bytes of memory that are free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    main()
