"""What a run measured: `metrics.json`, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Figures:
    """One finished run.

    Args:
        protocol: its name.
        clips: clip -> PSNR, dB.
        ssim: mean over the clips.
        total, trainable: parameters of the model, and those of them that learned.
        backbone_psnr: PSNR of the backbone before, dB; None where that is the model itself.
        backbone_clips: the same, by clip; None where it was not written down.
        gflop: of one forward pass; None where it was not counted.
        training_seconds: wall time of training; None where nothing was trained or it was not measured.
        plugins: names of what was attached, `"none"` without any; None where it was not written down.
        versions: of libraries and machine.
    """

    protocol: str
    clips: Mapping[str, float]
    ssim: float
    total: int
    trainable: int
    backbone_psnr: float | None = None
    backbone_clips: Mapping[str, float] | None = None
    gflop: float | None = None
    training_seconds: float | None = None
    plugins: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def psnr(self) -> float:
        """Mean over the clips, dB."""
        return fmean(self.clips.values())


def read_figures(path: Path) -> Figures:
    """Read a `metrics.json`.

    Raises:
        ValueError: it is no JSON, lacks a figure, or has one that is no number.
    """
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        before = written.get("compared", {}).get("backbone", {})
        figures = Figures(
            protocol=written["protocol"],
            clips=_psnr(written["clips"]),
            ssim=_number(written["ssim"]),
            total=int(written["parameters"]["total"]),
            trainable=int(written["parameters"]["trainable"]),
            backbone_psnr=_maybe(before.get("psnr")),
            backbone_clips=_psnr(before["clips"]) if "clips" in before else None,
            gflop=_maybe(written.get("gflop")),
            training_seconds=_maybe(written.get("training_seconds")),
            plugins=written.get("choices", {}).get("plugins"),
            versions=written.get("versions", {}),
        )
    except KeyError as error:
        raise ValueError(f"metrics.json has no {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"metrics.json cannot be read: {error}") from None
    if not figures.clips:
        raise ValueError("metrics.json has no clips")
    return figures


def _psnr(clips: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: _number(figures["psnr"]) for name, figures in clips.items()}


def _maybe(value: Any) -> float | None:
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    """Infinity is one: equal frames have it, written as the string "inf"."""
    number = float(value)
    if math.isnan(number):
        raise ValueError("a figure is NaN")
    return number
