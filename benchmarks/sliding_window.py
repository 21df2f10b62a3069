"""EDVR on a clip: features extracted once against window by window. Run: python benchmarks/sliding_window.py"""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vsrplug.backbones.edvr import EDVR
from vsrplug.backbones.sliding_window import SlidingWindow, window_indices

CASES = {  # what it is -> constructor's arguments
    "EDVR-M, 5 frames": {},
    "EDVR-M, 7 frames": {"frames": 7},
    "EDVR-M, 5 frames, pre-deblur": {"predeblur": True},
}
TOLERANCE = 1e-6
SIZE = 8, 48, 48  # t, h, w


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    t, h, w = SIZE
    table = Table(title=f"{t} frames of {w} x {h} on {device}, float32, {torch.get_num_threads()} threads")
    for column in ("network", "window by window s", "shared features s", "times faster", "largest difference"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, arguments in CASES.items():
        torch.manual_seed(0)
        network = EDVR(**arguments).to(device).eval()
        for parameter in network.parameters():  # fresh offsets are zero, and would be equal whatever happens
            parameter.data.add_(0.01 * torch.randn_like(parameter))
        frames, sliding = torch.rand(1, t, 3, h, w, device=device), SlidingWindow(network)
        with torch.no_grad():
            ways = (lambda n=network, f=frames: window_by_window(n, f), lambda s=sliding, f=frames: s(f))
            difference = (ways[0]() - ways[1]()).abs().max().item()
            if difference > TOLERANCE:
                raise SystemExit(f"{name}: results differ by {difference:.1e}, more than {TOLERANCE:.0e}")
            alone, shared = _seconds(ways, device)
        table.add_row(name, f"{alone:.2f}", f"{shared:.2f}", f"{alone / shared:.2f}", f"{difference:.1e}")
    Console().print(table)


def window_by_window(network: nn.Module, frames: Tensor) -> Tensor:
    windows = window_indices(frames.shape[1], int(network.window), "reflection_circle")
    return torch.cat([network(frames[:, window]) for window in windows], dim=1)


def _seconds(ways: tuple, device: str) -> list[float]:
    """Seconds of each way, the best of runs that take turns: whatever else the machine does hits both."""
    best = [float("inf")] * len(ways)
    for _ in range(2):
        for index, way in enumerate(ways):
            start = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
