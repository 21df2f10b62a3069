"""`evaluate` against metrics computed by hand, and against the published numbers on Vid4."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from rich.console import Console
from torch import Tensor, nn

from vsrplug.backbones import EDVR, STVUN, Bicubic, LucasKanade, SlidingWindow
from vsrplug.context import Context
from vsrplug.degradations import BD, BI, imresize
from vsrplug.evaluation import Report, evaluate, score
from vsrplug.metrics import psnr, ssim
from vsrplug.protocols import Protocol


class Clip:
    """Frames in memory."""

    def __init__(self, name: str, pixels: Tensor) -> None:
        self.name, self.pixels = name, pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        return iter(self.pixels[start:stop])


class Enlarge(nn.Module):
    """Bicubic, with a record of how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.frozen = nn.BatchNorm2d(1)
        self.calls: list[dict[str, Any]] = []

    def forward(self, frames: Tensor, context: Context | None = None) -> Tensor:
        grad = torch.is_grad_enabled()
        self.calls.append({"frames": frames, "context": context, "training": self.training, "grad": grad})
        return imresize(frames, 4) * self.gain


@pytest.fixture(autouse=True)
def _no_lpips_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def protocol() -> Protocol:
    """Two clips of unlike length and size, the second not a multiple of four."""
    first, second = (torch.randint(0, 256, shape) / 255 for shape in ((2, 3, 48, 64), (5, 3, 51, 46)))
    return Protocol("test_bi_y", [Clip("a", first), Clip("b", second)], BI(4), "y")


@pytest.mark.parametrize("change", [{}, {"border": 4, "colour": "rgb"}, {"degradation": BD(4)}])
def test_evaluate_is_the_metrics_of_the_rounded_output(protocol: Protocol, change: dict[str, Any]) -> None:
    protocol = replace(protocol, **change)
    report = evaluate(Enlarge(), protocol, progress=False)
    means = []
    for clip, (height, width) in zip(protocol.clips, [(48, 64), (48, 44)], strict=True):
        hr = clip.pixels[..., :height, :width]  # type: ignore[attr-defined]
        sr = (imresize(protocol.degradation(hr), 4) * 255 + 0.5).floor().clamp(0, 255).byte()
        measured = [metric(sr, hr, protocol.colour, protocol.border) for metric in (psnr, ssim)]
        means.append([values.mean().item() for values in measured])
        assert [report.clips[clip.name][k] for k in ("psnr", "ssim")] == pytest.approx(means[-1], abs=1e-9)
    # Two frames and five weigh alike: clips are averaged, not frames.
    assert [report.psnr, report.ssim] == pytest.approx(np.mean(means, axis=0), abs=1e-9)
    assert report.protocol == "test_bi_y"
    assert report.seconds > 0


def test_skipped_frames_are_restored_but_not_measured(protocol: Protocol) -> None:
    skipping = replace(protocol, clips=protocol.clips[1:], skip_frames=2)
    model = Enlarge()
    middle = evaluate(model, skipping, progress=False)
    assert model.calls[0]["frames"].shape == (1, 5, 3, 12, 11)
    only = Clip("b", protocol.clips[1].pixels[2:3])  # type: ignore[attr-defined]
    assert middle.clips == evaluate(model, replace(protocol, clips=[only]), progress=False).clips


@pytest.mark.parametrize(("length", "between", "skip"), [(5, 1, 0), (6, 1, 0), (9, 3, 0), (12, 3, 0), (11, 1, 2)])
def test_frames_in_between_are_measured_apart_from_those_seen(length: int, between: int, skip: int) -> None:
    clip = Clip("a", torch.randint(0, 256, (length, 3, 48, 64)) / 255)
    protocol = Protocol("test_time_bi_y", [clip], BI(4), "y", skip_frames=skip, between=between)
    report = evaluate(Bicubic(4), protocol, progress=False)
    step, frames = between + 1, {True: [], False: []}
    covered = max(i for i in range(length) if i % step == 0) + 1
    for i in range(skip, covered - skip):
        before, after = (BI()(clip.pixels[j]) for j in (i - i % step, min(i - i % step + step, covered - 1)))
        low = before + (after - before) * (i % step) / step
        sr = (imresize(low, 4)[None] * 255 + 0.5).floor().clamp(0, 255).byte()
        frames[i % step == 0].append([metric(sr, clip.pixels[[i]], "y").item() for metric in (psnr, ssim)])
    expected = dict(zip(("psnr", "ssim"), np.mean(frames[False], axis=0), strict=True))
    expected |= dict(zip(("psnr_seen", "ssim_seen"), np.mean(frames[True], axis=0), strict=True))
    assert report.clips["a"] == pytest.approx(expected, abs=1e-3)  # a value on the edge of rounding
    figures = report.to_dict()
    assert {key: figures[key] for key in expected} == pytest.approx(report.clips["a"])
    console = Console(width=120, record=True)
    console.print(report.table())
    assert "PSNR SEEN" in (printed := console.export_text())
    assert f"{report.clips['a']['psnr_seen']:.3f}" in printed


def test_a_window_network_is_measured_in_between_with_its_masks() -> None:
    clip = Clip("a", torch.randint(0, 256, (7, 3, 32, 32)) / 255)
    network = STVUN(4, frames=3, flow=LucasKanade()).eval()
    protocol = Protocol("test_time2_bi_rgb", [clip], BI(4), "rgb", between=1)
    masks = lambda lr: (lr[:, :1] > 0.5).float()  # noqa: E731
    lr = BI()(clip.pixels)[None, ::2]
    with torch.no_grad():
        sr = SlidingWindow(network)(lr, times=(0.5,))[0, :7]
    assert evaluate(SlidingWindow(network), protocol, masks=masks, progress=False).clips["a"] == pytest.approx(
        score(sr, clip.pixels, protocol), abs=1e-3
    )


def test_frames_in_between_take_a_network_that_makes_them_and_a_clip_long_enough() -> None:
    clip = Clip("a", torch.zeros(4, 3, 32, 32))
    protocol = Protocol("test_time4_bi_y", [clip], BI(4), "y", between=3)
    message = r"protocol 'test_time4_bi_y', which has frames in between, needs a network that makes .*, which EDVR does"
    with pytest.raises(ValueError, match=message):
        evaluate(SlidingWindow(EDVR(8, extract_blocks=1, reconstruct_blocks=1, deform_groups=2)), protocol)
    with pytest.raises(
        ValueError, match=r"clip 'a' has 4 frames, of which between=3 and skip_frames=0 .* leave none to"
    ):
        evaluate(Bicubic(4), protocol, progress=False)
    for bad in ({"between": -1}, {"mirror": True}):
        with pytest.raises(
            ValueError, match=r"protocol 'test_time4_bi_y': between is 0 or more, and 0 with mirror=true"
        ):
            replace(protocol, **bad)


def test_score_is_what_evaluate_reports_of_a_clip(protocol: Protocol) -> None:
    hr = protocol.clips[0].pixels  # type: ignore[attr-defined]
    assert score(imresize(BI()(hr), 4), hr, protocol) == evaluate(Enlarge(), protocol, progress=False).clips["a"]


def test_the_model_runs_in_eval_mode_and_gets_every_flag_back(protocol: Protocol) -> None:
    model = Enlarge().train()
    model.frozen.eval()
    evaluate(model, protocol, progress=False)
    assert [(call["training"], call["grad"], call["context"]) for call in model.calls] == [(False, False, None)] * 2
    assert model.training
    assert not model.frozen.training
    model.gain.data.fill_(math.nan)
    with pytest.raises(ValueError, match="clip 'a': the model's output has values that are NaN or infinite"):
        evaluate(model, protocol, progress=False)
    assert model.training


def test_masks_reach_the_model_in_a_context(protocol: Protocol) -> None:
    model = Enlarge()
    evaluate(model, protocol, masks=lambda lr: (lr[:, :1] > 0.5).float(), progress=False)
    for call, clip in zip(model.calls, protocol.clips, strict=True):
        assert call["context"].frames is call["frames"]
        assert call["context"].masks.shape == (1, len(clip), 1, *call["frames"].shape[-2:])
        assert torch.equal(call["context"].masks, (call["frames"][:, :, :1] > 0.5).float())


def test_an_output_of_the_wrong_shape_names_the_clip_and_a_way_out(protocol: Protocol) -> None:
    class OneFrame(nn.Module):
        def forward(self, frames: Tensor) -> Tensor:
            return imresize(frames[:, :1], 4)

    message = (
        r"clip 'a': the model returned \(1, 3, 48, 64\), the ground truth is \(2, 3, 48, 64\)\. .* in SlidingWindow"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(OneFrame(), protocol, progress=False)
    with pytest.raises(ValueError, match=r"returned \(2, 3, 12, 16\), .*Has the model the protocol's scale\?"):
        evaluate(nn.Identity(), protocol, progress=False)


def test_a_clip_without_frames_is_named(protocol: Protocol) -> None:
    empty = replace(protocol, clips=[Clip("nothing", torch.zeros(0, 3, 16, 16))])
    with pytest.raises(ValueError, match="clip 'nothing' has no frames"):
        evaluate(Enlarge(), empty, progress=False)


def test_clips_of_one_name_are_refused_before_anything_runs(protocol: Protocol) -> None:
    model = Enlarge()
    with pytest.raises(
        ValueError, match=r"'test_bi_y': several clips are named \['a'\]; figures go by name, rename them"
    ):
        evaluate(model, replace(protocol, clips=[*protocol.clips, protocol.clips[0]]), progress=False)
    assert not model.calls


def test_a_report_without_lpips_says_why(protocol: Protocol) -> None:
    figures = evaluate(Enlarge(), protocol, progress=False).to_dict()
    assert figures["lpips"] is None
    assert "AlexNet's weights" in figures["lpips_reason"]
    assert all("lpips" not in clip for clip in figures["clips"].values())


def test_lpips_is_reported_where_its_weights_are(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vsrplug.evaluation.lpips", lambda sr, hr, border: torch.arange(len(sr)).double())
    report = evaluate(Enlarge(), protocol, progress=False)
    assert [clip["lpips"] for clip in report.clips.values()] == [0.5, 2.0]
    assert report.to_dict()["lpips"] == 1.25
    assert report.to_dict()["lpips_reason"] is None


def test_perfect_frames_leave_valid_json() -> None:
    """A flat clip comes back exactly; JSON knows no infinity."""
    flat = Protocol("flat", [Clip("grey", torch.full((1, 3, 16, 16), 7 / 255))], BI(), "rgb")
    text = json.dumps(evaluate(Enlarge(), flat, progress=False).to_dict(), allow_nan=False)
    figures = json.loads(text)
    assert (figures["psnr"], figures["clips"]["grey"]["psnr"]) == ("inf", "inf")
    assert math.isinf(float(figures["psnr"]))


def test_the_table_carries_the_protocols_name() -> None:
    clips = {"a": {"psnr": 20.0, "ssim": 0.5}, "b": {"psnr": 30.0, "ssim": 0.75}}
    console = Console(width=60)
    with console.capture() as capture:
        console.print(Report("vid4_bi_y", clips, "no weights", 1.0).table())
    lines = capture.get().splitlines()
    assert lines[0].strip() == "protocol vid4_bi_y"
    assert [line.split()[1::2] for line in lines if line.startswith("│")] == [
        ["a", "20.000", "0.5000"],
        ["b", "30.000", "0.7500"],
        ["mean", "25.000", "0.6250"],
    ]


def test_the_bar_keeps_off_stdout_and_can_be_silenced(protocol: Protocol, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(Enlarge(), protocol, progress=True)
    assert capsys.readouterr().out == ""
    evaluate(Enlarge(), protocol, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "published", "only"),
    [
        ("vid4_bi_y", "bicubic_BI_Y", (23.784, 0.6347), None),
        ("vid4_bi_rgb", "bicubic_BI_RGB", (22.369, 0.6098), None),
        # Of these two the clips with most and least detail are measured here, to save time.
        ("vid4_bd_y", "bicubic_BD_BasicVSR_Y_all", None, ("calendar", "city")),
        ("vid4_bd_duf_y", "bicubic_BD_DUFphase_Y_skip2", None, ("calendar", "city")),
    ],
)
def test_vid4_gives_the_published_numbers(
    real_data: Path, name: str, key: str, published: tuple[float, float] | None, only: tuple[str, ...] | None
) -> None:
    expected = json.loads((real_data / "vid4" / "expected.json").read_text())[key]["result"]
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        cfg = compose(overrides=[f"+protocol={name}", "+paths=default", f"paths.data={real_data}"])
    protocol = instantiate(cfg.protocol)
    if only:
        protocol = replace(protocol, clips=[clip for clip in protocol.clips if clip.name in only])
    report = evaluate(Enlarge(), protocol, progress=False)
    assert len(report.clips) == len(only or expected.keys() - {"average_of_clips", "average_of_frames"})
    for clip, figures in report.clips.items():
        assert figures["psnr"] == pytest.approx(expected[clip]["psnr"], abs=0.5001e-4)
        assert figures["ssim"] == pytest.approx(expected[clip]["ssim"], abs=0.5001e-5)
    if published:
        assert (round(report.psnr, 3), round(report.ssim, 4)) == published


def test_around_sees_every_clip_and_decides_what_is_measured(protocol: Protocol) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def around(name: str, lr: Tensor, hr: Tensor, run: Callable[[], Tensor]) -> Tensor:
        seen[name] = lr, hr
        sr = run()
        assert torch.equal(sr, imresize(lr, 4))
        return sr if name == "a" else hr

    report = evaluate(Enlarge(), protocol, progress=False, around=around)
    assert list(seen) == ["a", "b"]
    for clip, (lr, hr) in zip(protocol.clips, seen.values(), strict=True):
        h, w = hr.shape[-2:]
        assert torch.equal(hr, clip.pixels[..., :h, :w])  # type: ignore[attr-defined]
        assert torch.equal(lr, BI(4)(hr))
    assert report.clips["a"] == evaluate(Enlarge(), protocol, progress=False).clips["a"]
    assert report.clips["b"]["psnr"] == math.inf
