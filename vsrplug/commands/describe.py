"""`vsrplug describe`: sites, plug-ins, trainable and frozen parameters of a combination, before anything runs."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console
from rich.tree import Tree

from vsrplug.commands import build
from vsrplug.plugged import PluggedModel
from vsrplug.plugin import Plugin


def main() -> None:
    """Entry point of `vsrplug describe`."""
    build.command("describe", run)


def run(cfg: DictConfig) -> None:
    """Print the model that `vsrplug train` would train with the same choices."""
    model = build.make_model(cfg)
    build.make(cfg.tuning).apply(model)
    Console().print(summary(model))


def summary(model: PluggedModel) -> Tree:
    """Backbone with its sites, plug-ins with theirs, and what of each learns."""
    counts = build.count_parameters(model)
    backbone = model.backbone
    share = counts["trainable"] / max(counts["total"], 1)
    tree = Tree(f"[bold]{counts['trainable']:,}[/] of {counts['total']:,} parameters learn ({share:.1%})")
    own = build.count_parameters(backbone)
    scale = getattr(backbone, "scale", "?")
    branch = tree.add(f"backbone [bold]{type(backbone).__name__}[/] x{scale}: {_learning(own)}")
    plugins: dict[str, Plugin] = dict(model.plugins.items())  # type: ignore[arg-type]
    served = {site: [name for name, plugin in plugins.items() if site in plugin.sites] for site in model.sites}
    for site, spec in model.sites.items():
        at = f"  [bold green]<- {', '.join(served[site])}[/]" if served[site] else ""
        stride = f", stride {spec.stride}" if spec.stride != 1 else ""
        branch.add(f"{site:<18}{spec.kind}, {spec.channels} channels{stride}{at}")
    for name, plugin in plugins.items():
        counts = build.count_parameters(plugin)
        tree.add(f"plug-in [bold]{name}[/] ({type(plugin).__name__}) at {', '.join(plugin.sites)}: {_learning(counts)}")
    return tree


def _learning(counts: dict[str, int]) -> str:
    if counts["trainable"] == 0:
        return f"{counts['total']:,} parameters, frozen"
    if counts["trainable"] == counts["total"]:
        return f"{counts['total']:,} parameters, all learn"
    return f"{counts['total']:,} parameters, {counts['trainable']:,} learn"
