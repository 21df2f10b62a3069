"""`vsrplug evaluate`: a backbone, with or without plug-ins, under a named protocol."""

from __future__ import annotations

from lightning import seed_everything
from omegaconf import DictConfig
from rich.console import Console

from vsrplug.commands import build
from vsrplug.commands.application import command
from vsrplug.commands.outcome import report


def main() -> None:
    """Entry point of `vsrplug evaluate`."""
    command("evaluate", run)


def run(cfg: DictConfig) -> float:
    """Measure, and leave `metrics.json` and `comparison.png` in the run's folder; returns the PSNR."""
    seed_everything(cfg.seed, verbose=False)
    model = build.make_model(cfg)
    model.requires_grad_(False)
    before = model.backbone if model.plugins else None
    return report(cfg, model, before, build.make(cfg.protocol), build.output_dir(), Console(stderr=True))
