"""`evaluate`: run a model on the clips of a protocol and report what the protocol measures."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from vsrplug.context import Context
from vsrplug.degradations import crop_to_multiple
from vsrplug.metrics import LPIPSUnavailableError, lpips, psnr, ssim, to_uint8
from vsrplug.protocols import Protocol
from vsrplug.space_time import check_interpolates, times_between

if TYPE_CHECKING:
    from vsrplug.data.clip import Clip

MaskSource = Callable[[Tensor], Tensor]  # lr (t, 3, h, w) -> (t, m, h, w)
Around = Callable[[str, Tensor, Tensor, Callable[[], Tensor]], Tensor]  # name, lr, hr, call that makes sr -> sr


@dataclass(frozen=True)
class Report:
    """What a model reached under a protocol.

    Args:
        protocol: its name; a figure is never given without it.
        clips: clip name -> `{"psnr": dB, "ssim": ...}`, means over the frames; also `"lpips"` where it was measured;
            where these are frames in between, `"psnr_seen"` and `"ssim_seen"` of those that the model saw.
        lpips_reason: why LPIPS is missing, None where it was measured.
        seconds: wall time of the evaluation, reading and measuring included.
    """

    protocol: str
    clips: dict[str, dict[str, float]]
    lpips_reason: str | None
    seconds: float

    @property
    def psnr(self) -> float:
        """Mean over the clips, dB."""
        return self._mean("psnr")

    @property
    def ssim(self) -> float:
        """Mean over the clips."""
        return self._mean("ssim")

    @property
    def lpips(self) -> float | None:
        """Mean over the clips, None where it was not measured (`lpips_reason` says why)."""
        return None if self.lpips_reason else self._mean("lpips")

    def table(self) -> Table:
        """One row a clip and one for their mean, to print with rich."""
        metrics = {"psnr": "{:.3f}", "ssim": "{:.4f}"} | ({} if self.lpips_reason else {"lpips": "{:.4f}"})
        metrics |= {"psnr_seen": "{:.3f}", "ssim_seen": "{:.4f}"} if self._seen else {}
        table = Table(title=f"protocol {self.protocol}")
        table.add_column("clip")
        for metric in metrics:
            table.add_column(metric.upper().replace("_", " "), justify="right")
        for name, figures in self.clips.items():
            table.add_row(name, *(style.format(figures[metric]) for metric, style in metrics.items()))
        table.add_section()
        table.add_row("mean", *(style.format(self._mean(metric)) for metric, style in metrics.items()))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `metrics.json`. The PSNR of equal frames is infinite, which JSON has no number for: it is
        written as the string `"inf"`, which `float()` reads."""
        return {
            "protocol": self.protocol,
            "psnr": _for_json(self.psnr),
            "ssim": self.ssim,
            "lpips": self.lpips,
            "lpips_reason": self.lpips_reason,
            **{key: _for_json(self._mean(key)) for key in self._seen},
            "clips": {name: {k: _for_json(v) for k, v in figures.items()} for name, figures in self.clips.items()},
            "seconds": self.seconds,
        }

    @property
    def _seen(self) -> list[str]:
        """Metrics of the frames seen, where they are reported."""
        return [metric for metric in next(iter(self.clips.values())) if metric.endswith("_seen")]

    def _mean(self, metric: str) -> float:
        return fmean(figures[metric] for figures in self.clips.values())


def evaluate(
    model: nn.Module,
    protocol: Protocol,
    *,
    masks: MaskSource | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    around: Around | None = None,
) -> Report:
    """Measure a model under a protocol. Frames are cut at the bottom and right to a multiple of the scale.

    The model runs in eval mode and gets its training flags back. It is given one whole clip at a time: a window network
    is wrapped in `vsrplug.backbones.SlidingWindow` first. Memory grows with the longest clip, about 8 bytes a
    high-resolution sample besides what the model itself needs.

    Args:
        model: lr (1, t, 3, h, w) in [0, 1] -> sr (1, t, 3, s h, s w).
        protocol: clips, degradation, colour, border, skipped frames, mirror.
        masks: makes object masks, lr (t, 3, h, w) -> (t, m, h, w). Where given, the model is called with a `Context`.
        device: where to run; the model is moved there. None: where its parameters are.
        progress: show a bar on stderr.
        around: called in the place of every clip's restoration, to look at its frames or at what happens within: with
            the clip's name, lr (t, 3, h, w), the frames hr (t, 3, H, W) that are measured, and a call that makes sr
            (t, 3, H, W), which it returns.

    Returns:
        The figures of each clip and their means.

    Raises:
        ValueError: the output has the wrong shape or is not finite, a clip has no frames, or two have one name; the
            message names the clip. The protocol has frames in between, which the model does not make or a clip is too
            short for.
    """
    start = time.perf_counter()
    if protocol.between:
        check_interpolates(model, f"protocol {protocol.name!r}, which has frames in between,")
    names = Counter(clip.name for clip in protocol.clips)
    if names.total() > len(names):
        twice = [name for name, count in names.items() if count > 1]
        raise ValueError(
            f"protocol {protocol.name!r}: several clips are named {twice}; figures go by name, rename them"
        )
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    else:
        model.to(device)
    clips: dict[str, dict[str, float]] = {}
    reason: str | None = None
    bar = Progress(
        *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("frames")),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not progress,
    )
    with bar, eval_mode(model), torch.inference_mode():
        task = bar.add_task(protocol.name, total=sum(len(clip) for clip in protocol.clips))
        for clip in protocol.clips:
            bar.update(task, description=f"{protocol.name}: {clip.name}")
            _check_length(clip, protocol)
            hr = _read(clip, protocol.degradation.scale)
            lr = protocol.degradation(hr)
            hr = hr[: protocol.covered(len(hr))]
            given = None if masks is None else masks(lr)
            run = partial(restore, model, lr, given, mirror=protocol.mirror, between=protocol.between, device=device)
            sr = run() if around is None else around(clip.name, lr, hr, run)
            _check_output(sr, hr, clip.name)
            sr, hr = to_uint8(sr), to_uint8(hr.to(device))
            clips[clip.name] = score(sr, hr, protocol)
            if reason is None:
                try:
                    counted = protocol.counted(len(hr))
                    distance = lpips(sr[counted], hr[counted], protocol.border)
                    clips[clip.name]["lpips"] = distance.mean().item()
                except LPIPSUnavailableError as error:
                    reason = str(error)
            bar.advance(task, len(clip))
    if reason is not None:  # a mean over some of the clips would be another protocol's
        clips = {name: {k: v for k, v in figures.items() if k != "lpips"} for name, figures in clips.items()}
    return Report(protocol.name, clips, reason, time.perf_counter() - start)


def restore(
    model: nn.Module,
    lr: Tensor,
    masks: Tensor | None = None,
    *,
    mirror: bool = False,
    between: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Super-resolve one clip as a protocol has it.

    Args:
        model: lr (1, t, 3, h, w) -> sr (1, t, 3, s h, s w).
        lr: (t, 3, h, w) in [0, 1].
        masks: object masks (t, m, h, w), or None. Where given, the model is called with a `Context`.
        mirror: the model sees 2 t frames, the clip and then the clip in reverse.
        between: frames left out between each two that the model sees, which it makes itself; not with `mirror`.
        device: where the model is; None: where `lr` is.

    Returns:
        sr (t, 3, s h, s w), on that device; with `between`, of the frames up to the last one seen.
    """
    device = lr.device if device is None else device

    def given(clip: Tensor) -> Tensor:
        return (torch.cat([clip, clip.flip(0)]) if mirror else clip)[None].to(device)

    step = between + 1
    frames = given(lr[::step])
    context = () if masks is None else (Context(frames, masks=given(masks[::step])),)
    sr = model(frames, *context, **({"times": times_between(between)} if between else {}))[0]
    if between:  # nothing follows the last frame seen
        return sr[: len(sr) - between]
    return sr[: len(lr)] if mirror else sr


def score(sr: Tensor, hr: Tensor, protocol: Protocol) -> dict[str, float]:
    """PSNR (dB) and SSIM of one clip as the protocol counts them: means over its frames.

    Args:
        sr, hr: all frames of the clip, (t, 3, H, W), float in [0, 1] or uint8; they are rounded to 8 bits. Where the
            protocol has frames in between, `hr` may go on beyond the last one that the model saw.
        protocol: colour, border, skipped frames, frames in between.

    Returns:
        `{"psnr": ..., "ssim": ...}`; where the protocol has frames in between, theirs, and `"psnr_seen"` and
        `"ssim_seen"` of the others.

    Raises:
        ValueError: shapes that differ or are not frames, or nothing left of them.
    """
    hr = hr[: protocol.covered(len(hr))]
    figures = {}
    for name, which in (("", protocol.counted(len(hr))), ("_seen", protocol.seen(len(hr)))):
        if which or not name:
            for metric, measure in (("psnr", psnr), ("ssim", ssim)):
                value = measure(sr[which], hr[which], protocol.colour, protocol.border).mean().item()
                figures[f"{metric}{name}"] = value
    return figures


def _read(clip: Clip, scale: int) -> Tensor:
    """The whole clip, (t, 3, H, W), cut to a multiple of the scale."""
    frames = [crop_to_multiple(frame, scale) for frame in clip.frames()]
    if not frames:
        raise ValueError(f"clip {clip.name!r} has no frames")
    return torch.stack(frames)


def _check_length(clip: Clip, protocol: Protocol) -> None:
    count = protocol.covered(len(clip))
    if protocol.between and not (protocol.counted(count) and protocol.seen(count)):
        raise ValueError(
            f"clip {clip.name!r} has {len(clip)} frames, of which between={protocol.between} and "
            f"skip_frames={protocol.skip_frames} of protocol {protocol.name!r} leave none to measure"
        )


def _check_output(sr: Tensor, hr: Tensor, name: str) -> None:
    if sr.shape != hr.shape:
        raise ValueError(
            f"clip {name!r}: the model returned {tuple(sr.shape)}, the ground truth is {tuple(hr.shape)}. Has the "
            "model the protocol's scale? A window network gives one frame a window: wrap it in SlidingWindow"
        )
    if not sr.isfinite().all():
        raise ValueError(f"clip {name!r}: the model's output has values that are NaN or infinite")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Each module keeps its own flag: `model.train(True)` would wake the frozen parts that someone set to eval."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def _for_json(figure: float) -> float | str:
    return figure if math.isfinite(figure) else str(figure)
