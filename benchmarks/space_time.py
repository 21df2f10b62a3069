"""Frames in between: PSNR at each time of a trained STVUN, of repeating the frame before, and of blending both.

    python benchmarks/space_time.py --picture docs/pictures/space_time.png

trains it first (`vsrplug train experiment=stvun/demo hydra.run.dir=runs/stvun_demo`), where that is not done. Measured
under the run's own protocol, on its held-back clips, RGB. Repeated and blended frames are enlarged by MATLAB's bicubic,
as is the row of time 0 for both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from vsrplug.backbones import Bicubic
from vsrplug.commands import build
from vsrplug.evaluation import restore
from vsrplug.metrics import psnr, to_uint8
from vsrplug.module import clip_network
from vsrplug.pictures import comparison, save_picture
from vsrplug.space_time import times_between


@torch.inference_mode()
def main() -> None:
    """Print the table; draw the picture half-way between two frames of the clip where STVUN gains most on blending."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/stvun_demo"), help="folder of the training run")
    parser.add_argument("--picture", type=Path, help="where to write one")
    arguments = parser.parse_args()
    if not (arguments.run / "backbone.safetensors").exists():
        train = [sys.executable, "-c", "from vsrplug.commands.train import main; main()", "experiment=stvun/demo"]
        subprocess.run([*train, f"hydra.run.dir={arguments.run}"], check=True)
    cfg = OmegaConf.load(arguments.run / ".hydra" / "config.yaml")
    protocol, network = build.make(cfg.protocol), build.make(cfg.backbone)
    network.load_state_dict(load_file(arguments.run / "backbone.safetensors"))
    model, step = clip_network(network.eval()), protocol.between + 1
    figures: dict[str, list[list[float]]] = {}
    best: tuple[float, dict[str, Tensor], dict[str, str]] = (-1.0, {}, {})
    for clip in protocol.clips:
        hr = torch.stack(list(clip.frames()))[: protocol.covered(len(clip))]
        lr = protocol.degradation(hr)
        blended = restore(Bicubic(protocol.degradation.scale), lr, between=protocol.between)
        seen = [i - i % step for i in range(len(hr))]
        results = {"repeated": blended[seen], "blended": blended, "STVUN": restore(model, lr, between=protocol.between)}
        scores = {name: psnr(to_uint8(sr), to_uint8(hr), protocol.colour) for name, sr in results.items()}
        for name, values in scores.items():
            at = [[i for i in range(len(hr)) if i % step == k] for k in range(step)]
            figures.setdefault(name, []).append([values[frames].mean().item() for frames in at])
        middle = len(hr) // 2 // step * step + step // 2
        gain = (scores["STVUN"] - scores["blended"])[middle].item()
        if gain > best[0]:
            frames = {name: sr[middle] for name, sr in results.items()} | {"ground truth": hr[middle]}
            best = (gain, frames, {name: f"{values[middle]:.2f} dB" for name, values in scores.items()})
    print("| T | " + " | ".join(figures) + " |\n|" + "---|" * (len(figures) + 1))
    for k, time in enumerate((0.0, *times_between(protocol.between))):
        means = [sum(clip[k] for clip in clips) / len(clips) for clips in figures.values()]
        print(f"| {time:g} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    if arguments.picture:
        save_picture(comparison(best[1], best[2]), arguments.picture)


if __name__ == "__main__":
    main()
