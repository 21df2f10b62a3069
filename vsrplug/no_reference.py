"""NIQE, BRISQUE, NRQM and PI: how restored frames look where there is no truth to compare them with.

Everything is computed by pyiqa (`pip install "vsrplug[noreference]"`); here stands what has to be said for a figure to
mean something: luma, 8 bits, border, frames. The data of the metrics are read from where pyiqa keeps them and never
downloaded from here.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from vsrplug.evaluation import MaskSource, eval_mode, restore
from vsrplug.metrics import check_colour_and_border, to_uint8
from vsrplug.site import unknown_name

if TYPE_CHECKING:
    from vsrplug.data.clip import Clip

Metric = Literal["niqe", "brisque", "nrqm", "pi"]
Frames = Literal["all", "first_middle_last"]

METRICS: tuple[Metric, ...] = get_args(Metric)
DATA = {"niqe": "niqe_modelparameters.mat", "brisque": "brisque_svm_weights.pth", "nrqm": "NRQM_model.mat"}
SOURCE = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"
_BLOCK = 96  # pixels; NIQE takes the covariance of features of such blocks, so of two at least


class NoReferenceUnavailableError(RuntimeError):
    """A metric cannot be computed here; the message says why and what to do."""


def no_reference(frames: Tensor, metrics: Sequence[Metric] = METRICS, border: int = 0) -> dict[str, Tensor]:
    """Metrics of single frames that know no truth, as RealBasicVSR's table counts them.

    NIQE (Mittal et al. 2013, lower is better) and NRQM (Ma et al. 2017, "Ma's score", higher is better) are taken on
    BT.601 Y rounded to 8 bits, BRISQUE (Mittal et al. 2012, lower is better; LIVE's release, not MATLAB's own) on the
    luma of YIQ. PI (Blau et al. 2018, lower is better) is (10 - NRQM + NIQE) / 2 of these two.

    Args:
        frames: (t, 3, H, W), float in [0, 1] or uint8; they are rounded to 8 bits.
        metrics: which; PI brings no cost beside the two it is made of.
        border: pixels left out on each side; PIRM2018's PI has 4.

    Returns:
        Metric -> one value a frame, (t,) float64; NaN where a metric is not defined, as for a frame of one colour.

    Raises:
        NoReferenceUnavailableError: pyiqa or a metric's data are not on this machine, or the data would run code.
        ValueError: no such metric, no frames, or frames too small.
    """
    _check(frames, metrics, border)
    measures = _measures(metrics)
    height, width = frames.shape[-2:]
    inner = to_uint8(frames)[..., border : height - border, border : width - border].cpu()
    values = {name: torch.stack([_of_frame(measure, frame) for frame in inner]) for name, measure in measures.items()}
    if "pi" in metrics:
        values["pi"] = (10 - values["nrqm"] + values["niqe"]) / 2
    return {metric: values[metric] for metric in metrics}


@dataclass(frozen=True)
class NoReferenceProtocol:
    """How clips without ground truth are measured. A model sees every frame of a clip, as it is.

    The published figures on VideoLQ are of each clip's first, middle and last frame (of 100 frames 0, 50 and 99), and
    of the input after bicubic enlargement: these metrics depend on the resolution, so compare with `Bicubic`, not with
    the clip itself.

    Args:
        name: what tables and files call it.
        clips: low-resolution clips.
        metrics: which are measured.
        frames: `"all"`, or `"first_middle_last"` of each clip.
        border: pixels left out on each side.

    Raises:
        ValueError: no clips, two of one name, or an argument that is none of those it may be.
    """

    name: str
    clips: Sequence[Clip]
    metrics: Sequence[Metric] = METRICS
    frames: Frames = "all"
    border: int = 0

    def __post_init__(self) -> None:
        try:
            _check_metrics(self.metrics, self.border)
        except ValueError as error:
            raise ValueError(f"protocol {self.name!r}: {error}") from None
        if self.frames not in get_args(Frames):
            options = ", ".join(map(repr, get_args(Frames)))
            raise ValueError(f"protocol {self.name!r}: frames is {self.frames!r}; expected one of {options}")
        if not len(self.clips):
            raise ValueError(f"protocol {self.name!r} has no clips: the data source is empty")
        twice = [name for name, count in Counter(clip.name for clip in self.clips).items() if count > 1]
        if twice:
            raise ValueError(
                f"protocol {self.name!r}: several clips are named {twice}; figures go by name, rename them"
            )

    def counted(self, count: int) -> list[int]:
        """Which of a clip's `count` frames the figures are of."""
        return list(range(count)) if self.frames == "all" else sorted({0, count // 2, count - 1})


@dataclass(frozen=True)
class NoReferenceReport:
    """What a model reached under a protocol without ground truth.

    Args:
        protocol: its name; a figure is never given without it.
        clips: clip name -> metric -> mean over the frames counted.
        seconds: wall time of the evaluation, reading and measuring included.
    """

    protocol: str
    clips: dict[str, dict[str, float]]
    seconds: float

    @property
    def means(self) -> dict[str, float]:
        """Metric -> mean over the clips."""
        return {metric: fmean(one[metric] for one in self.clips.values()) for metric in next(iter(self.clips.values()))}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file; NaN, which JSON has no number for, as the string `"nan"`."""
        clips = {name: _for_json(figures) for name, figures in self.clips.items()}
        return {"protocol": self.protocol, **_for_json(self.means), "clips": clips, "seconds": self.seconds}


def evaluate_no_reference(
    model: nn.Module,
    protocol: NoReferenceProtocol,
    *,
    masks: MaskSource | None = None,
    device: torch.device | str | None = None,
) -> NoReferenceReport:
    """Measure a model on clips without ground truth. It runs in eval mode and gets its training flags back.

    Args:
        model: lr (1, t, 3, h, w) in [0, 1] -> sr (1, t, 3, s h, s w); a window network in a `SlidingWindow`.
        protocol: clips, metrics, frames.
        masks: makes object masks, lr (t, 3, h, w) -> (t, m, h, w). Where given, the model is called with a `Context`.
        device: where to run; the model is moved there. None: where its parameters are.

    Raises:
        NoReferenceUnavailableError: as `no_reference`, before anything is computed.
        ValueError: a clip has no frames, or the model's output is not finite, of other frames, or too small; the
            message names the clip.
    """
    start = time.perf_counter()
    _measures(protocol.metrics)
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    else:
        model.to(device)
    clips: dict[str, dict[str, float]] = {}
    with eval_mode(model), torch.inference_mode():
        for clip in protocol.clips:
            frames = list(clip.frames())
            if not frames:
                raise ValueError(f"clip {clip.name!r} has no frames")
            lr = torch.stack(frames)
            sr = restore(model, lr, None if masks is None else masks(lr), device=device)
            if len(sr) != len(lr) or not sr.isfinite().all():
                raise ValueError(
                    f"clip {clip.name!r}: for {len(lr)} frames the model returned {tuple(sr.shape)}, or values that "
                    "are NaN or infinite. A window network gives one frame a window: wrap it in SlidingWindow"
                )
            try:
                values = no_reference(sr[protocol.counted(len(sr))], protocol.metrics, protocol.border)
            except ValueError as error:
                raise ValueError(f"clip {clip.name!r}: {error}") from None
            clips[clip.name] = {metric: value.mean().item() for metric, value in values.items()}
    return NoReferenceReport(protocol.name, clips, time.perf_counter() - start)


def _measures(metrics: Iterable[Metric]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Those of pyiqa that the metrics are made of: (1, 3, H, W) in [0, 1] -> one value."""
    needed = {part for metric in metrics for part in (("niqe", "nrqm") if metric == "pi" else (metric,))}
    folder = Path(torch.hub.get_dir()) / "pyiqa"
    return {name: _measure(name, folder / file) for name, file in DATA.items() if name in needed}


@lru_cache(maxsize=len(DATA))
def _measure(name: str, file: Path) -> Callable[[Tensor], Tensor]:
    if not file.exists():
        raise NoReferenceUnavailableError(
            f"{name.upper()} needs its data in {file}; download them from {SOURCE}/{file.name}"
        )
    try:
        from pyiqa import create_metric
    except ImportError as error:
        raise NoReferenceUnavailableError(
            f"{name.upper()} is computed by pyiqa, which cannot be imported here ({error}); "
            'pip install "vsrplug[noreference]"'
        ) from error
    options = {} if name == "brisque" else {"color_space": "ycbcr"}
    if file.suffix == ".pth":
        try:  # pyiqa would run what a pickle asks for
            torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged pickle may raise anything
            raise NoReferenceUnavailableError(
                f"{file} was refused: it is damaged, or reading it would run code; download it again from "
                f"{SOURCE}/{file.name}"
            ) from error
    return create_metric(name, device=torch.device("cpu"), pretrained_model_path=str(file), **options)


def _of_frame(measure: Callable[[Tensor], Tensor], frame: Tensor) -> Tensor:
    """(3, H, W) uint8 -> a float64 scalar."""
    try:
        return measure(frame[None].float() / 255).double().reshape(())
    except torch.linalg.LinAlgError:  # a frame of one colour has no statistics to compare
        return torch.tensor(math.nan, dtype=torch.float64)


def _check(frames: Tensor, metrics: Sequence[str], border: int) -> None:
    _check_metrics(metrics, border)
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(f"frames must be (t, 3, H, W), t at least 1, got {tuple(frames.shape)}")
    height, width = (size - 2 * border for size in frames.shape[-2:])
    if max(height // _BLOCK, 0) * max(width // _BLOCK, 0) < 2 and {"niqe", "pi"} & set(metrics):
        raise ValueError(
            f"NIQE needs two blocks of {_BLOCK} x {_BLOCK} pixels, so frames of {_BLOCK} x {2 * _BLOCK} at least, got "
            f"{tuple(frames.shape[-2:])} less a border of {border}"
        )


def _check_metrics(metrics: Sequence[str], border: int) -> None:
    check_colour_and_border("rgb", border)
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ValueError(unknown_name("metric without reference", unknown[0], METRICS))
    if not metrics:
        raise ValueError(f"no metrics are given; there are {', '.join(METRICS)}")


def _for_json(figures: dict[str, float]) -> dict[str, float | str]:
    return {metric: value if math.isfinite(value) else str(value) for metric, value in figures.items()}
