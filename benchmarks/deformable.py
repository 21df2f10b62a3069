"""Deformable convolution: ours against `torchvision.ops.deform_conv2d`. Run: python benchmarks/deformable.py"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.ops import deform_conv2d

from vsrplug.plugins._deformable import deformable_convolution

CASES = {  # what it is -> b, channels, deformable groups, h, w
    "EDVR-M, training patch": (4, 64, 8, 64, 64),
    "EDVR-M, 320 x 180": (1, 64, 8, 180, 320),
    "EDVR-L, training patch": (1, 128, 8, 64, 64),
    "BasicVSR++, 320 x 180": (1, 64, 16, 180, 320),
}
# Mean difference over mean size. Single gradients of offsets may differ: they jump where a sample crosses a pixel.
TOLERANCE = 1e-4


def main() -> None:
    console = Console()
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        table = Table(title=f"3x3 deformable convolution on {device}, float32, {torch.get_num_threads()} threads")
        for column in ("case", "pass", "torchvision ms", "ours ms", "times faster", "difference"):
            table.add_column(column, justify="left" if column in ("case", "pass") else "right")
        for case, (b, c, groups, h, w) in CASES.items():
            x, offset, mask, weight, bias = inputs = _inputs(b, c, groups, h, w, device)
            ways: tuple[Callable[[], Tensor], ...] = (
                lambda x=x, o=offset, m=mask, w=weight, b=bias: deform_conv2d(x, o, w, b, padding=1, mask=m),
                lambda inputs=inputs: deformable_convolution(*inputs),
            )
            with torch.no_grad():
                difference = _difference([way() for way in ways])
                _row(table, case, "forward", _times(ways, device), difference)
            passes = [lambda way=way, inputs=inputs: torch.autograd.grad(way().square().mean(), inputs) for way in ways]
            difference = max(_difference(pair) for pair in zip(*(way() for way in passes), strict=True))
            _row(table, case, "and backward", _times(passes, device), difference)
        console.print(table)


def _inputs(b: int, c: int, groups: int, h: int, w: int, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    values = [
        torch.randn(b, c, h, w),
        torch.randn(b, 18 * groups, h, w) * 2,
        torch.rand(b, 9 * groups, h, w),
        torch.randn(c, c, 3, 3) / (9 * c) ** 0.5,
        torch.zeros(c),
    ]
    return [value.to(device).requires_grad_() for value in values]


def _difference(results: list[Tensor] | tuple[Tensor, ...]) -> float:
    """Mean absolute difference of two results, as a part of their mean size."""
    return ((results[0] - results[1]).abs().mean() / results[0].abs().mean()).item()


def _times(ways: list[Callable[[], object]] | tuple[Callable[[], object], ...], device: str) -> list[float]:
    """Milliseconds of each way, the best of runs that take turns: whatever else the machine does hits both."""
    best = [float("inf")] * len(ways)
    for _ in range(3):
        for index, way in enumerate(ways):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            best[index] = min(best[index], 1000 * (time.perf_counter() - start))
    return best


def _row(table: Table, case: str, what: str, times: list[float], difference: float) -> None:
    if difference > TOLERANCE:
        raise SystemExit(f"{case}, {what}: results differ by {difference:.1e}, more than {TOLERANCE:.0e}")
    theirs, ours = times
    table.add_row(case, what, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.1f}", f"{difference:.1e}")


if __name__ == "__main__":
    main()
