"""What a recurrent network gains or loses with the length of a clip. Run: python benchmarks/propagation_length.py

    python benchmarks/propagation_length.py --help
    python benchmarks/propagation_length.py backbone.path=weights/clips_basicvsr_tiny.safetensors protocol=vid4_bi_y

Takes what `vsrplug evaluate` takes: backbone, plugins, plugins_file, protocol. Every sixth frame of a clip is restored
from windows of 5, 7 and 11 frames around it, and from the whole clip; PSNR is the mean over these frames. A network
that was trained on short windows may lose with long ones: what it propagates has never been so old.
"""

from __future__ import annotations

import sys
from statistics import fmean

import torch
from hydra import compose, initialize_config_module
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from vsrplug.commands import build
from vsrplug.evaluation import score

WINDOWS = (5, 7, 11)
EVERY = 6


@torch.inference_mode()
def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        cfg = compose("evaluate", sys.argv[1:])
    network, protocol = build.make_model(cfg).eval(), build.make(cfg.protocol)
    table = Table(title=f"{protocol.name}, PSNR in dB")
    for column in ("clip", "frames", *(f"windows of {n}" for n in WINDOWS), "the whole clip"):
        table.add_column(column, justify="right")
    rows = []
    for clip in track(protocol.clips, "Clips", console=Console(stderr=True)):
        hr = torch.stack(list(clip.frames()))
        h, w = (side - side % protocol.degradation.scale for side in hr.shape[-2:])
        hr = hr[..., :h, :w]
        lr = protocol.degradation(hr)
        places = range(WINDOWS[0] // 2 + 1, len(hr) - WINDOWS[0] // 2 - 1, EVERY)
        whole = network(lr[None])[0]

        def mean(restored: list[Tensor], hr: Tensor = hr, places: range = places) -> float:
            pairs = zip(restored, places, strict=True)
            return fmean(score(sr[None].clamp(0, 1), hr[[t]], protocol)["psnr"] for sr, t in pairs)

        found = [mean([within(network, lr, t, n) for t in places]) for n in WINDOWS]
        rows.append([*found, mean([whole[t] for t in places])])
        table.add_row(clip.name, str(len(hr)), *(f"{value:.3f}" for value in rows[-1]))
    table.add_row("mean", "", *(f"{fmean(column):.3f}" for column in zip(*rows, strict=True)))
    Console().print(table)


def within(network: nn.Module, lr: Tensor, t: int, count: int) -> Tensor:
    """Frame t, (3, s h, s w), from `count` frames around it; at the ends of the clip the window is moved in."""
    first = max(0, min(t - count // 2, len(lr) - count))
    restored: Tensor = network(lr[None, first : first + count])[0, t - first]
    return restored


if __name__ == "__main__":
    main()
