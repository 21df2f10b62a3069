"""`vsrplug train`: tune what a tuning names, then measure bicubic, the untouched backbone and the result."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console

from vsrplug.adversarial import AdversarialModule
from vsrplug.commands import build, jobs, sweep
from vsrplug.commands.application import command
from vsrplug.commands.describe import summary
from vsrplug.commands.outcome import report
from vsrplug.cost import count_flops, example
from vsrplug.lora import LoRA, base_state
from vsrplug.module import VSRModule
from vsrplug.official import SHIPPED
from vsrplug.plugged import PluggedModel, fingerprint
from vsrplug.plugin_files import save_plugins, write_safetensors
from vsrplug.protocols import Protocol
from vsrplug.pruning import Pruning


def main() -> None:
    """Entry point of `vsrplug train`."""
    command("train", run)


def run(cfg: DictConfig) -> float:
    """Train, save, measure; returns the PSNR, which is what a search maximises.

    A run that was killed goes on from its last checkpoint when the same folder is given again
    (`hydra.run.dir=...`), with the weights, samples and noise it would have had. A sweep's folder is named after its
    choices: the same command again skips the jobs that were finished, and goes on with the others. A run that a
    search stopped leaves the PSNR of its last validation, marked `pruned`.
    """
    console = Console(stderr=True, quiet=rank_zero_only.rank > 0)
    folder = build.output_dir()
    if sweep.in_sweep() and (done := jobs.finished(cfg, folder)) is not None:
        console.print(f"Done before: {folder}", soft_wrap=True)
        return done
    if differ := jobs.start(cfg, folder, afresh=sweep.in_sweep()):
        how = "Starts afresh in" if sweep.in_sweep() else "Goes on with the checkpoint of"
        console.print(f"{how} {folder}, which was begun with other choices: {', '.join(differ)}", soft_wrap=True)
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = build.make_model(cfg)
    first = deepcopy(model.backbone)
    protocol = build.make(cfg.protocol)
    module = make_module(cfg, model, protocol)
    console.print(summary(model))
    learns = build.make(cfg.tuning).trained(model)  # in one phase or another
    given = cfg.backbone.get("path", "") is not None or cfg.backbone.name in SHIPPED or not model.fingerprint
    if not given and not any(name.startswith("backbone.") for name in learns):
        console.print("The backbone has no weights and does not learn: give backbone.path=FILE, or another tuning.")
    more: dict[str, Any] = {}
    more["parameters"] = build.count_parameters(model) | {"trainable": module.trainable}  # in one phase or another
    if sweep.in_sweep():  # for the report
        operations = count_flops(model, partial(example, model)).total
        more |= {"gflop": operations and operations / 1e9}
    if module.trainable:
        more["training_seconds"], pruning = fit(cfg, module, folder, console)
        if rank_zero_only.rank > 0:  # one process saves and measures
            return float("nan")
        if pruning:
            console.print(f"Stopped at step {max(pruning.curve)}: behind the runs of this search that are done")
            return jobs.mark_pruned(cfg, folder, pruning.curve, **more)
        save(model, folder)
    else:
        console.print("Nothing to train: the model is measured as it is.")
    before = first if module.trainable or model.plugins else None
    return report(cfg, model, before, protocol, folder, console, **more)


def make_module(cfg: DictConfig, model: PluggedModel, protocol: Protocol) -> VSRModule:
    """What is trained, and how; against a discriminator where the losses have one."""
    losses = cfg.losses
    arguments: dict[str, Any] = {
        "optimizer": build.make(cfg.optim.optimizer),
        "schedule": build.make(cfg.optim.schedule),
        "losses": build.as_plain(losses.weights),
        "pixel": build.make(losses.pixel),
        "target": build.make(losses.get("target")),
        "validation": protocol,
        "seed": cfg.seed,
    }
    if not losses.get("discriminator"):
        return VSRModule(model, build.make(cfg.tuning), **arguments)
    discriminator, perceptual = build.make(losses.discriminator), build.make(losses.get("perceptual"))
    arguments |= {"discriminator": discriminator, "perceptual": perceptual}
    return AdversarialModule(
        model, build.make(cfg.tuning), discriminator_lr=losses.get("discriminator_lr", 1e-4), **arguments
    )


def fit(cfg: DictConfig, module: VSRModule, folder: Path, console: Console) -> tuple[float, Pruning | None]:
    """Run the trainer, from the last checkpoint where this folder has one.

    Returns:
        Seconds of training, with those of the parts before (a killed part counts up to its last checkpoint), and what
        stopped the run before its last step, where something did.

    Raises:
        InterruptedError: interrupted from the keyboard.
        ValueError: the checkpoint is damaged, or of another model.
    """
    data = build.make(cfg.datamodule)(validation=module.validation)
    callbacks = [*build.make_each(cfg.callbacks).values()]
    timer = next((one for one in callbacks if isinstance(one, Timer)), None)
    if timer is None:  # Lightning takes one only
        callbacks.append(timer := Timer())
    loggers = [*build.make_each(cfg.logger).values()]
    trainer: Trainer = build.make({**build.as_plain(cfg.trainer), "callbacks": callbacks, "logger": loggers})
    checkpoint = folder / jobs.CHECKPOINT
    if checkpoint.exists():
        console.print(f"Going on from {checkpoint}", soft_wrap=True)
    try:
        # weights_only: a checkpoint is data, whoever gave it to us.
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    except (RuntimeError, ValueError) as error:
        other = {"loading state_dict": "backbone or plug-ins", "loaded state dict": "tuning or optimizer"}
        for said, what in other.items():
            if said in str(error):
                raise ValueError(
                    f"{checkpoint} is of a run with another {what}; give what it had, or another hydra.run.dir"
                ) from error
        raise
    except SystemExit:  # Lightning's answer to Ctrl-C
        raise InterruptedError(f"interrupted; go on with the same command and hydra.run.dir={folder}") from None
    return timer.time_elapsed(), next((one for one in callbacks if isinstance(one, Pruning) and one.stopped), None)


def save(model: PluggedModel, folder: Path) -> None:
    """What learned: `plugins.safetensors` (plug-ins, low-rank layers and single entries of the backbone, such as its
    biases), and the whole `backbone.safetensors` where something of the backbone itself learned."""
    now = fingerprint(model.backbone)
    changed = [key for key in now if now[key] != model.fingerprint[key]]
    if model.plugins or LoRA.of(model.backbone) or 0 < len(changed) < len(now):
        save_plugins(model, folder / "plugins.safetensors")
    if changed:
        state = {key: value.detach().cpu().contiguous() for key, value in base_state(model.backbone).items()}
        write_safetensors(state, folder / "backbone.safetensors")
