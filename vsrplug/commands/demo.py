"""`vsrplug demo`: attach, tune, compare, save, detach; and the proof that the backbone is what it was."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from rich.console import Console

from vsrplug.commands import build, train
from vsrplug.commands.application import command
from vsrplug.plugged import attach
from vsrplug.plugin_files import load_plugins


def main() -> None:
    """Entry point of `vsrplug demo`."""
    command("demo", run)


def run(cfg: DictConfig) -> float:
    """Run `vsrplug train` with the demo's choices, then load its file, detach and compare bit by bit.

    Raises:
        RuntimeError: the backbone's output with everything detached is not what it was.
    """
    console = Console(stderr=True)
    folder = build.output_dir()
    console.print(
        "A backbone trained for bicubic degradation (bi) meets clips blurred by a Gaussian (bd). It stays frozen;\n"
        f"{' and '.join(cfg.plugins)} learn the difference. Everything is written to {folder}.\n"
    )
    psnr = train.run(cfg)
    backbone = build.make(cfg.backbone).eval()
    frames = torch.stack(list(build.make(cfg.protocol.clips)[0].frames(0, 5)))[None, :, :, ::4, ::4]
    with torch.no_grad():
        before = backbone(frames)
        model = load_plugins(backbone, folder / "plugins.safetensors", force=False)
        for name in list(model.plugins):
            model.detach(name)
        same = torch.equal(model(frames), before) and torch.equal(attach(backbone)(frames), before)
    if not same:
        raise RuntimeError("with the plug-ins detached the backbone gives another output than before")
    size = (folder / "plugins.safetensors").stat().st_size
    console.print(
        f"The plug-in file has {size / 1e6:.2f} MB. Loaded from it and detached again, the backbone gives what it gave "
        "before, bit for bit.\nLook at the picture: " + str(folder / "comparison.png")
    )
    return psnr
