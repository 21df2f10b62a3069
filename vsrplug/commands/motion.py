"""`vsrplug motion`: list the clips of a set that move most."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor

from vsrplug.commands import build
from vsrplug.commands.application import command
from vsrplug.data.clip import Clip

Flow = Callable[[Tensor, Tensor], Tensor]  # (b, 3, h, w), (b, 3, h, w) -> (b, 2, h, w) in pixels


def main() -> None:
    """Entry point of `vsrplug motion`."""
    command("motion", run)


def run(cfg: DictConfig) -> None:
    """Measure every clip, and write the names of the share that moves most; measured ones are not measured again.

    Raises:
        ValueError: the share is not above 0 and at most 1.
        FileExistsError: there is a list already.
    """
    if not 0 < cfg.share <= 1:
        raise ValueError(f"share={cfg.share} is a share of the clips, above 0 and at most 1; try 0.06")
    output = Path(str(cfg.output)).expanduser()
    if output.exists():
        raise FileExistsError(f"there is a list {output}; move it away to make it anew")
    clips: list[Clip] = list(build.make(cfg.data))
    flow = build.make(cfg.flow)
    device = torch.device(cfg.device) if cfg.device else build.device()
    flow = flow.to(device).eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    measured = output.with_name(f"{output.name}.partial")
    known = _known(measured)
    with measured.open("a") as journal:
        for clip in track(clips, "Measuring motion", disable=not build.interactive()):
            if clip.name not in known:
                known[clip.name] = mean_motion(clip, flow, device)
                print(clip.name, f"{known[clip.name]:.6f}", file=journal, flush=True)
    ranked = sorted(clips, key=lambda clip: (-known[clip.name], clip.name))
    chosen = ranked[: max(1, round(cfg.share * len(ranked)))]
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text("".join(f"{clip.name} {known[clip.name]:.6f}\n" for clip in chosen))
    os.replace(temporary, output)
    measured.unlink()
    print(f"{len(chosen)} of {len(clips)} clips, mean flow of {known[chosen[-1].name]:.2f} pixels and more: {output}")


@torch.inference_mode()
def mean_motion(clip: Clip, flow: Flow, device: torch.device) -> float:
    """The mean length of the flow vectors from each frame to the next, in pixels, over pixels and frames."""
    frames = torch.stack(list(clip.frames())).to(device)
    return flow(frames[:-1], frames[1:]).norm(dim=1).mean().item()


def _known(journal: Path) -> dict[str, float]:
    """What an earlier run measured; a line that was cut short is measured again."""
    lines = journal.read_text().splitlines(keepends=True) if journal.is_file() else []
    if lines and not lines[-1].endswith("\n"):
        journal.write_text("".join(lines[:-1]))
        lines = lines[:-1]
    return {name: float(length) for name, length in (line.rsplit(maxsplit=1) for line in lines)}
