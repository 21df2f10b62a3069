"""`vsrplug describe`: what a combination is made of, what of it learns, and what it costs, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.tree import Tree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vsrplug.commands import build
from vsrplug.commands.application import command
from vsrplug.context import Context
from vsrplug.cost import Flops, count_flops, dry_step, example, state_bytes
from vsrplug.plugged import PluggedModel
from vsrplug.tuning import Staged, Tuning

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def main() -> None:
    """Entry point of `vsrplug describe`."""
    command("describe", run)


def run(cfg: DictConfig) -> None:
    """Print the model that `vsrplug train` would train with the same choices."""
    model = build.make_model(cfg)
    tuning = build.make(cfg.tuning)
    tuning.apply(model)
    context = partial(example, model, cfg.frames, cfg.size)
    with FakeTensorMode():  # only its shapes are read
        given = context()
    flops = count_flops(model, context)
    learning = schedule(model, tuning, build.make(cfg.optim.optimizer))
    names = tuning.trained(model)  # in one phase or another
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    tree = summary(model, flops)
    for line in one_pass(given, flops):
        tree.children[-1].add(line)
    tree.children.append(learning)
    Console().print(tree)


def summary(model: PluggedModel, flops: Flops | None = None) -> Tree:
    """Backbone with its sites and who serves them, and what learns of each part; with `flops`, its operations too."""
    counts = build.count_parameters(model)
    share = counts["trainable"] / max(counts["total"], 1)
    tree = Tree(f"[bold]{counts['trainable']:,}[/] of {counts['total']:,} parameters learn ({share:.1%})")
    backbone = model.backbone
    branch = tree.add(f"backbone [bold]{type(backbone).__name__}[/] x{getattr(backbone, 'scale', '?')}")
    width = max(map(len, model.sites))
    for site, spec in model.sites.items():
        served = [name for name, plugin in model.plugins.items() if site in plugin.sites]  # type: ignore[operator]
        at = f"  [bold green]<- {', '.join(served)}[/]" if served else ""
        stride = f", stride {spec.stride}" if spec.stride != 1 else ""
        branch.add(f"{site:<{width}}  {spec.kind}, {spec.channels} channels{stride}{at}")
    parts: dict[str, tuple[str, nn.Module]] = {"backbone": ("backbone", backbone)}
    for name, plugin in model.plugins.items():
        parts[f"plugins.{name}"] = (f"[bold green]{name}[/] {type(plugin).__name__}", plugin)
    if model.plugins:
        parts["total"] = ("together", model)
    operations = {**flops.counted, "total": flops.total} if flops else {}
    table = Table(Column("parts", overflow="fold"), box=None, padding=(0, 3, 0, 0), header_style="", pad_edge=False)
    for title in ("parameters", "learn", *(["GFLOP"] if flops else [])):
        table.add_column(title, justify="right", no_wrap=True, header_style="dim")
    for part, (title, module) in parts.items():
        counts = build.count_parameters(module)
        figures = [f"{counts['total']:,}", f"{counts['trainable']:,}"]
        if flops:
            counted = operations.get(part)
            figures.append("not counted" if counted is None else f"{counted / 1e9:,.2f}")
        table.add_row(title, *figures)
    tree.add(table)
    return tree


def one_pass(given: Context, flops: Flops) -> list[str]:
    """Which pass was counted, what it comes to for each frame it restores, and what could not be counted."""
    t, _, h, w = given.frames.shape[1:]
    clip = [f"{_several(t, 'frame')} of {h}x{w}"]
    if given.masks is not None:
        clip.append(_several(given.masks.shape[2], "mask"))
    if given.keys is not None:
        clip.append(_several(given.keys.shape[1], "key frame"))
    line = f"forward: {', '.join(clip)}"
    if flops.restored:
        line += f" -> {_several(flops.restored, 'frame')}"
        line += f", {flops.total / flops.restored / 1e9:,.2f} GFLOP each" if flops.total else ""
    missing = [f"{part.removeprefix('plugins.')}: {escape(reason)}" for part, reason in flops.uncounted.items()]
    return [line, *(f"[yellow]not counted[/], {line}" for line in missing)]


def schedule(model: PluggedModel, tuning: Tuning | Staged, make: MakeOptimizer) -> Tree:
    """What learns in each phase, in which groups of the optimizer, and the memory that takes besides activations."""
    tree = Tree("tuning; memory is without activations")
    lr = getattr(make, "keywords", {}).get("lr", 1e-3)
    for name, phase in tuning.phases.items():
        phase.apply(model)
        lr = phase.lr or lr  # a phase without one goes on with the last
        length = f"{phase.steps:,} steps" if phase.steps else "to the end"
        title = f"[bold]{escape(name)}[/], {length}: " if name else ""
        without = f" without {', '.join(phase.freeze)}" if phase.freeze else ""
        branch = tree.add(f"{title}trains {escape(', '.join(phase.train) + without)}")
        groups = phase.groups(model, lr)
        if groups:
            for line in _groups(model, groups, make):
                branch.add(line)
        else:
            branch.add("nothing learns: the model is measured as it is")
    return tree


def _groups(model: PluggedModel, groups: list[dict[str, Any]], make: MakeOptimizer) -> list[str]:
    """A line for each group, and one for memory."""
    learning = [parameter for group in groups for parameter in group["params"]]
    try:
        optimizer = dry_step(make, groups)
    except Exception as error:  # whatever an optimizer of somebody else's says
        first = (str(error).splitlines() or [""])[0]
        return [f"[yellow]optimizer unknown[/]: {escape(first) or type(error).__name__}"]
    lines = []
    for group, made in zip(groups, optimizer.param_groups, strict=True):
        size = sum(parameter.numel() for parameter in group["params"])
        rates = f"lr {float(made['lr']):g}, weight decay {float(made.get('weight_decay', 0)):g}"
        lines.append(f"group [bold]{group['name']}[/]: {size:,} parameters, {rates}")
    frozen = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in learning)
    if frozen:
        lines.append(f"frozen: {frozen:,} parameters")
    held = {
        "parameters": sum(parameter.nbytes for parameter in model.parameters()),
        "gradients": sum(parameter.nbytes for parameter in learning),
        type(optimizer).__name__: state_bytes(optimizer),
    }
    each = ", ".join(f"{name} {size / 1e6:,.2f}" for name, size in held.items())
    return [*lines, f"memory [bold]{sum(held.values()) / 1e6:,.2f} MB[/]: {each}"]


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)
