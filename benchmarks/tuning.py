"""What is frozen costs little: training plug-ins alone against training everything. Run: python benchmarks/tuning.py

BasicVSR (64 channels, 30 blocks), one clip, Adam. A step is forward, backward and update; steps of the ways take turns,
and the best of each counts: whatever else the machine does hits all. `kept` is what autograd keeps for the backward
pass, each storage once, parameters left out. `GFLOP` are the matrix products and convolutions that are carried out:
where a forward pass is 1, so is the gradient of its inputs, and that of its weights; their ratio is what the ratio of
times could be at best. `peak` is the resident memory of a process of its own, above its model. The rate is zero, so
that each way must find the same gradients of the plug-ins at every step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vsrplug import Context, PluggedModel, attach
from vsrplug.backbones import BasicVSR
from vsrplug.frozen import LeanConv2d
from vsrplug.plugins import SEEMPlugin
from vsrplug.tuning import Tuning

MASKS = 64
TOLERANCE = 1e-5  # of the gradients' norms
CASES = {"SEEM at its default sites": None, "SEEM at fused": ("fused",)}


class Way(NamedTuple):
    train: str
    lean: bool = True
    checkpointing: bool = False


WAYS = {
    "full": Way("*"),
    "full, checkpointing": Way("*", checkpointing=True),
    "plugins_only, plain": Way("plugins.*", lean=False),
    "plugins_only": Way("plugins.*"),
    "plugins_only, checkpointing": Way("plugins.*", checkpointing=True),
}


class Trainee:
    """A model set up for one way, and its optimizer."""

    def __init__(self, case: str, way: Way, frames: int, size: int) -> None:
        torch.manual_seed(0)
        backbone = BasicVSR(checkpointing=way.checkpointing)
        self.model: PluggedModel = attach(backbone, seem=SEEMPlugin(64, masks=MASKS, sites=CASES[case]))
        for parameter in self.model.plugins.parameters():  # fresh ones end in zeros, through which no gradient goes
            parameter.data.add_(0.01 * torch.randn_like(parameter))
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # as VSRModule does
        tuning = Tuning([way.train])
        tuning.apply(self.model)
        for module in self.model.modules():
            if isinstance(module, LeanConv2d) and not way.lean:
                module.__class__ = nn.Conv2d
        self.optimizer = torch.optim.Adam(tuning.groups(self.model, lr=0.0))
        self.size = frames, size

    def loss(self, frames: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        clip = torch.rand(1, frames, 3, size, size, generator=generator)
        masks = torch.rand(1, frames, MASKS, size, size, generator=generator).round()
        return (self.model(clip, Context(clip, masks=masks)) - 0.5).square().mean()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(*self.size).backward()
        self.optimizer.step()

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.plugins.parameters() if parameter.grad is not None]

    def kept(self) -> int:
        """Bytes kept for the backward pass."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        storages: dict[int, Tensor] = {}  # with the tensors, so that no address is given away again

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                storages[tensor.untyped_storage().data_ptr()] = tensor.detach()
            return tensor.detach()  # the tensor itself would hold the node that holds it, for good

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.loss(*self.size)
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    def operations(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.loss(*self.size).backward()
        return counter.get_total_flops()

    def state(self) -> int:
        """Bytes of the optimizer's state, after a step."""
        entries = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in entries if isinstance(value, Tensor))

    def peak(self) -> int:
        """Bytes of memory that a step takes in this process, above the model."""
        self.loss(2, 16).backward()  # libraries are loaded by now
        self.optimizer.zero_grad()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory("VmRSS")
        self.step()
        return memory("VmHWM") - before


def memory(which: str) -> int:
    """Bytes that /proc knows of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def compare(case: str, arguments: argparse.Namespace) -> Table:
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    trainees = {name: Trainee(case, WAYS[name], arguments.frames, arguments.size) for name in arguments.ways}
    peaks = {name: peak(case, name, arguments) for name in trainees}
    best = dict.fromkeys(trainees, float("inf"))
    expected: list[Tensor] = []
    for turn in range(arguments.repeats):
        for name, trainee in list(trainees.items())[:: -1 if turn % 2 else 1]:
            best[name] = min(best[name], _seconds(trainee.step, clock))
            expected = expected or [gradient.clone() for gradient in trainee.gradients()]
            off = max(_difference(*pair) for pair in zip(trainee.gradients(), expected, strict=True))
            if off > TOLERANCE:
                raise SystemExit(f"{case}, {name}: gradients differ by {off:.1e}, more than {TOLERANCE:.0e}")
            trainee.model.zero_grad()  # it waits without them
    table = Table(title=f"{case}: {arguments.frames} frames of {arguments.size}x{arguments.size}", title_justify="left")
    columns: dict[str, Callable[[str], float]] = {
        "s a step": best.__getitem__,
        "GFLOP": lambda name: trainees[name].operations() / 1e9,
        "kept MB": lambda name: trainees[name].kept() / 1e6,
        "peak MB": lambda name: peaks[name] / 1e6,
        "optimizer MB": lambda name: trainees[name].state() / 1e6,
    }
    table.add_column("what learns")
    cells = []
    for column, value in columns.items():
        table.add_column(f"{column} (ratio)", justify="right")
        values = [value(name) for name in trainees]
        digits = 2 if column == "s a step" else 0
        cells.append([f"{value:.{digits}f} ({value / values[0]:.3f})" for value in values])
    for name, *row in zip(trainees, *cells, strict=True):
        table.add_row(name, *row)
    return table


def _seconds(step: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def peak(case: str, name: str, arguments: argparse.Namespace) -> int:
    """What `Trainee.peak` finds in a process of its own."""
    options = {"--frames": arguments.frames, "--size": arguments.size, "--threads": arguments.threads}
    command = [sys.executable, __file__, "--one", case, name, *(str(part) for pair in options.items() for part in pair)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}, {name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=7)
    parser.add_argument("--size", type=int, default=64, help="height and width of the frames")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for one thread on a busy machine")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="ratios are to the first")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # this process measures its peak
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        case, name = arguments.one
        print(json.dumps(Trainee(case, WAYS[name], arguments.frames, arguments.size).peak()))
        return
    console = Console(width=max(120, Console().width))
    clock = "process time" if arguments.cpu_time else "wall time"
    console.print(f"BasicVSR, batch 1, float32, cpu, {arguments.threads} threads, {clock}, best of {arguments.repeats}")
    for case in arguments.cases:
        console.print(compare(case, arguments))
    console.print("plain: with torch's own convolutions; kept: for the backward pass; peak: resident, of one step")


if __name__ == "__main__":
    main()
