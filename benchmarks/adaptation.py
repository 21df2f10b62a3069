"""What adapting a frozen backbone gained, cost and lost. Run: python benchmarks/adaptation.py SWEEP [SWEEP ...]

Each SWEEP is the folder of a `vsrplug train -m experiment=clips/adapt/...` (docs/results.md has the commands). Of each
job, from its files: parameters and seconds of training, the gain over the frozen backbone, and that gain as a share of
the largest among the jobs that trained the whole backbone. Measured here: what autograd keeps for the backward pass of
a training step, each storage once, parameters left out; PSNR under the protocol that the backbone was trained for; and
whether the backbone computes what it always did, bit for bit, once plug-ins and low-rank layers are taken off.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
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
        Console(width=140).print(compare(folder))


def compare(sweep: Path) -> Table:
    """One row a job, the best first."""
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        home: Protocol = build.make(compose("evaluate", [f"protocol={HOME}"]).protocol)
    jobs = sorted((read(file.parent) for file in sweep.glob("*/metrics.json")), key=lambda job: -job.gain)
    first = jobs[0]
    most = max(job.gain for job in jobs if job.full)
    at_home = evaluate(clip_network(first.backbone()), home, progress=False).psnr
    protocol = first.figures["protocol"]
    table = Table(
        title=f"{protocol}: frozen {first.figures['psnr'] - first.gain:.3f} dB; under {HOME} {at_home:.3f} dB"
    )
    table.add_column("what learns")
    for column in ("parameters", "of all", "s", "kept, MB", "gain, dB", "of full", f"{HOME}, dB", "taken off"):
        table.add_column(column, justify="right")
    for job in jobs:
        learned, size = job.figures["parameters"]["trainable"], sum(p.numel() for p in job.backbone().parameters())
        name = ", ".join(job.cfg.plugins) or job.figures["choices"]["tuning"]
        if job.full:
            name += f", rate {job.cfg.optim.optimizer.lr:g}"
        masks = build.make(job.cfg.masks)
        after = evaluate(clip_network(job.model()), home, masks=masks, progress=False).psnr
        table.add_row(
            name,
            f"{learned:,}",
            f"{learned / size:.1%}",
            f"{job.figures['training_seconds'] or float('nan'):.0f}",
            f"{kept(job) / 1e6:.1f}",
            f"{job.gain:+.3f}",
            f"{job.gain / most:.0%}",
            f"{after - at_home:+.3f}",
            "equal" if equal_again(job) else "reload",
        )
    return table


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
