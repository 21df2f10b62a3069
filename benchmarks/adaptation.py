"""What adapting a frozen backbone gained, cost and lost. Run: python benchmarks/adaptation.py SWEEP [SWEEP ...]

Each SWEEP is the folder of a `vsrplug train -m experiment=clips/adapt/...` (docs/results.md has the commands). Of each
job, from its files: parameters and seconds of training, the gain over the frozen backbone, and that gain as a share of
the largest among the jobs of its seed that trained the whole backbone. Seeds of a job are one row: the mean, and the
deviation between them; intervals are over clips. Measured here: what autograd keeps for the backward pass of a training
step, each storage once, parameters left out; PSNR under the protocol that the backbone was trained for; and whether the
backbone computes what it always did, bit for bit, once plug-ins and low-rank layers are taken off.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vsrplug import Context, PluggedModel, load_plugins
from vsrplug.commands import build
from vsrplug.cost import example
from vsrplug.evaluation import evaluate
from vsrplug.lora import LoRA
from vsrplug.module import clip_network
from vsrplug.protocols import Protocol
from vsrplug.reporting.intervals import Resampling

HOME = "clips_bi_y"  # what the backbone was trained for


class Job(NamedTuple):
    """A job that is done."""

    folder: Path
    cfg: DictConfig
    figures: dict[str, Any]

    @property
    def gain(self) -> float:
        psnr: float = self.figures["psnr"]
        return psnr - float(self.figures["compared"]["backbone"]["psnr"])

    @property
    def full(self) -> bool:
        return not self.cfg.plugins and self.figures["choices"]["tuning"] == "full"

    @property
    def name(self) -> str:
        return ", ".join(self.cfg.plugins) or str(self.figures["choices"]["tuning"])

    @property
    def rate(self) -> float:
        rate: float = self.cfg.optim.optimizer.lr
        return rate

    @property
    def learned(self) -> int:
        count: int = self.figures["parameters"]["trainable"]
        return count

    @property
    def seed(self) -> int:
        seed: int = self.figures["seed"]
        return seed

    def model(self) -> PluggedModel:
        """As it was trained."""
        if self.full:
            cfg = OmegaConf.masked_copy(self.cfg, ["paths", "backbone"])
            cfg.backbone.path = str(self.folder / "backbone.safetensors")
            return build.make_model(cfg)
        return load_plugins(self.backbone(), self.folder / "plugins.safetensors")

    def backbone(self) -> nn.Module:
        """As it was before."""
        network: nn.Module = build.make(self.cfg.backbone)
        return network


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 1:
        print("Nothing measured: name the folder of a sweep; docs/results.md has the commands")
    for folder in map(Path, sys.argv[1:]):
        Console(width=180).print(compare(folder))


def compare(sweep: Path) -> Table:
    """One row for the seeds of a job, the best first."""
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        home: Protocol = build.make(compose("evaluate", [f"protocol={HOME}"]).protocol)
    jobs = [read(file.parent) for file in sorted(sweep.glob("*/metrics.json"))]
    rows: dict[tuple[str, int, float], list[Job]] = {}
    most: dict[int, float] = {}
    for job in jobs:
        rows.setdefault((job.name, job.learned, job.rate), []).append(job)
        if job.full:
            most[job.seed] = max(job.gain, most.get(job.seed, job.gain))
    first = jobs[0]
    at_home = evaluate(clip_network(first.backbone()), home, progress=False).psnr
    size = sum(p.numel() for p in first.backbone().parameters())
    protocol = first.figures["protocol"]
    table = Table(
        title=f"{protocol}: frozen {first.figures['psnr'] - first.gain:.3f} dB; under {HOME} {at_home:.3f} dB"
    )
    table.add_column("what learns")
    columns = ["rate", "seeds", "parameters", "of all", "s", "kept, MB", "gain, dB", "of full", f"{HOME}, dB"]
    for column in [*columns, "taken off"]:
        table.add_column(column, justify="right")
    for (name, learned, rate), seeds in sorted(rows.items(), key=lambda row: -fmean(job.gain for job in row[1])):
        table.add_row(
            name,
            f"{rate:g}",
            str(len(seeds)),
            f"{learned:,}",
            f"{learned / size:.1%}",
            f"{fmean(job.figures['training_seconds'] or float('nan') for job in seeds):.0f}",
            f"{kept(seeds[0]) / 1e6:.1f}",
            f"{spread([job.gain for job in seeds])} {interval(seeds)}",
            f"{fmean(job.gain / most.get(job.seed, float('nan')) for job in seeds):.0%}",
            spread([evaluated(job, home) - at_home for job in seeds]),
            "equal" if all(equal_again(job) for job in seeds) else "reload",
        )
    return table


def spread(values: list[float]) -> str:
    """The mean, and the deviation between seeds."""
    mean = f"{fmean(values):+.3f}"
    return mean if len(values) == 1 else f"{mean} +- {stdev(values):.3f}"


def interval(seeds: list[Job]) -> str:
    """95 % interval of the gain, over clips, each the mean over seeds."""
    gains = [
        fmean(job.figures["clips"][clip]["psnr"] - psnr["psnr"] for job in seeds)
        for clip, psnr in seeds[0].figures["compared"]["backbone"]["clips"].items()
    ]
    ends = Resampling().interval(gains)
    return f"[{ends[0]:+.3f}, {ends[1]:+.3f}]" if ends else ""


def evaluated(job: Job, protocol: Protocol) -> float:
    """PSNR of the job's model."""
    masks = build.make(job.cfg.masks)
    return evaluate(clip_network(job.model()), protocol, masks=masks, progress=False).psnr


def read(folder: Path) -> Job:
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert isinstance(cfg, DictConfig)
    return Job(folder, cfg, json.loads((folder / "metrics.json").read_text()))


def kept(job: Job) -> int:
    """Bytes kept for the backward pass of one training step of the job."""
    model = build.make_model(OmegaConf.masked_copy(job.cfg, ["paths", "masks", "backbone", "plugins"]))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # as VSRModule does
    build.make(job.cfg.tuning).apply(model)
    data = job.cfg.datamodule
    empty = example(model, data.frames, (data.patch, data.patch))
    given = {
        key: None if value is None else torch.rand(data.batch_size, *value.shape[1:])
        for key, value in (("masks", empty.masks), ("target", empty.target))
    }
    frames = torch.rand(data.batch_size, *empty.frames.shape[1:])
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Tensor] = {}  # with the tensors, so that no address is given away again

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()  # the tensor itself would hold the node that holds it, for good

    context = Context(frames, **given)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sr = model(frames, context)
        sum(context.losses.values(), (sr - 0.5).square().mean())
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@torch.inference_mode()
def equal_again(job: Job) -> bool:
    """Whether the job's model, with all that was attached taken off, is the backbone from before."""
    frames = torch.rand(1, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    model = job.model()
    for name in list(model.plugins):
        model.detach(name)
    LoRA.remove(model.backbone)
    return torch.equal(model(frames), job.backbone()(frames))


if __name__ == "__main__":
    main()
