"""What a run leaves behind: one table, `metrics.json`, a picture of the crops where results differ most, and crops and
maps for the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vsrplug.commands import build, crops, jobs, sweep
from vsrplug.degradations import crop_to_multiple
from vsrplug.evaluation import Report, eval_mode, evaluate, restore
from vsrplug.json_files import write_json
from vsrplug.metrics import psnr
from vsrplug.module import clip_network
from vsrplug.pictures import comparison, save_picture
from vsrplug.plugged import PluggedModel
from vsrplug.protocols import Protocol

PICTURE_FRAMES = 7  # that the networks see


def report(
    cfg: DictConfig,
    model: PluggedModel,
    before: nn.Module | None,
    protocol: Protocol,
    folder: Path,
    console: Console,
    **more: Any,
) -> float:
    """Measure bicubic, the backbone before and the model; write `metrics.json`, `comparison.png` and `pictures/`; print
    a table.

    Args:
        cfg: the job's configuration; `masks` is used.
        model: what the run is about.
        before: the backbone as it was, or None where that is the model itself.
        protocol: how they are measured.
        folder: where the files go.
        console: where the table goes.
        more: for `metrics.json`, as it is; `parameters` are counted unless given.

    Returns:
        The model's PSNR under the protocol.
    """
    from vsrplug.backbones import Bicubic

    masks = build.make(cfg.masks)
    networks: dict[str, tuple[nn.Module, Any]] = {"bicubic": (Bicubic(protocol.degradation.scale), None)}
    if before is not None:
        networks["backbone"] = (before, None)
        networks["with plug-ins" if model.plugins else "tuned"] = (model, masks)
    elif model.plugins or not isinstance(model.backbone, Bicubic):
        networks["with plug-ins" if model.plugins else "backbone"] = (model, masks)
    reports: dict[str, Report] = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    for name, (network, source) in networks.items():

        def measure(network: nn.Module = network, source: Any = source) -> tuple[Report, dict[str, Tensor]]:
            whole, bar = clip_network(network), console.is_terminal
            look = crops.Onlooker(whole, protocol)
            one = evaluate(whole, protocol, masks=source, device=build.device(), progress=bar, around=look)
            return one, look.pictures

        trained = network is model and any(p.requires_grad for p in model.parameters())
        key = sweep.key_of(cfg, masks=source is not None)
        if name != "bicubic":
            key |= sweep.made_with(cfg, plugins=network is model)
        reports[name], pictures[name] = measure() if trained else sweep.measured_once(key, network, measure)
    final = list(reports.values())[-1]
    figures = final.to_dict() | {
        "seed": cfg.seed,
        "job": jobs.digest(cfg),
        "parameters": build.count_parameters(model),
        "versions": build.versions(),
        "choices": build.choices() | {"plugins": ",".join(model.plugins) or "none"},
        "compared": {
            name: {key: one.to_dict()[key] for key in ("psnr", "ssim", "clips")}
            for name, one in list(reports.items())[:-1]
        },
    }
    crops.write(pictures, folder)
    write_json(figures | more, folder / "metrics.json")
    picture(networks, reports, protocol, folder / "comparison.png")
    console.print(table(reports))
    console.print(f"Results are in {folder}", soft_wrap=True)
    return final.psnr


def table(reports: Mapping[str, Report]) -> Table:
    """One row a network: the protocol's means, and the gain over the row before."""
    protocol = next(iter(reports.values())).protocol
    rows = Table(title=f"protocol {protocol}")
    rows.add_column("network")
    for column in ("PSNR dB", "SSIM", "gain dB", "seconds"):
        rows.add_column(column, justify="right")
    last: float | None = None
    for name, one in reports.items():
        gain = "" if last is None else f"{one.psnr - last:+.3f}"
        rows.add_row(name, f"{one.psnr:.3f}", f"{one.ssim:.4f}", gain, f"{one.seconds:.1f}")
        last = one.psnr
    return rows


def picture(
    networks: Mapping[str, tuple[nn.Module, Any]], reports: Mapping[str, Report], protocol: Protocol, path: Path
) -> None:
    """LR, every network and the truth, on the clip where the last network gained most, in the middle of that clip."""
    compared = list(reports.values())[-2:]
    gains = {clip: figures["psnr"] - compared[0].clips[clip]["psnr"] for clip, figures in compared[-1].clips.items()}
    chosen = next(clip for clip in protocol.clips if clip.name == max(gains, key=lambda name: gains[name]))
    span = (PICTURE_FRAMES - 1) * (protocol.between + 1) + 1
    start = max(0, (len(chosen) - span) // 2)
    scale = protocol.degradation.scale
    hr = torch.stack([crop_to_multiple(f, scale) for f in chosen.frames()])
    lr = protocol.degradation(hr)[start : start + span]  # of the whole clip: a video codec looks at all of it
    hr = hr[start : start + span]
    middle = crops.middle_frame(protocol, protocol.covered(len(hr)))
    frames = {"low resolution": nn.functional.interpolate(lr, scale_factor=scale, mode="nearest")[middle]}
    with torch.inference_mode():
        for name, (network, masks) in networks.items():
            frames[name] = _restore(network, lr, masks, protocol)[middle]
    frames["ground truth"] = hr[middle]
    captions = {
        name: f"{psnr(frames[name][None], hr[middle][None], protocol.colour).item():.2f} dB" for name in networks
    }
    save_picture(comparison(frames, captions), path)


def _restore(network: nn.Module, lr: Tensor, masks: Any, protocol: Protocol) -> Tensor:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    given = None if masks is None else masks(lr)
    with eval_mode(network):
        mirror, between = protocol.mirror, protocol.between
        sr = restore(clip_network(network), lr, given, mirror=mirror, between=between, device=device)
    return sr.clamp(0, 1).cpu()
