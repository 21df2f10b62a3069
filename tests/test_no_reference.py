"""Metrics without reference. pyiqa and its data are not part of the project: a stand-in shows what it is given and what
becomes of its values; where pyiqa is installed, NIQE is computed once more by hand from a model of our own making."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from torch import Tensor, nn

from vsrplug import no_reference as module
from vsrplug.backbones import EDVR, Bicubic
from vsrplug.degradations import imresize
from vsrplug.metrics import luma
from vsrplug.no_reference import (
    DATA,
    METRICS,
    NoReferenceProtocol,
    NoReferenceUnavailableError,
    evaluate_no_reference,
    no_reference,
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the metrics' data, with files of random content."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    module._measure.cache_clear()
    folder = tmp_path / "pyiqa"
    folder.mkdir()
    mean, covariance = np.random.RandomState(0).rand(1, 36), np.diag(np.linspace(0.5, 2, 36))
    scipy.io.savemat(folder / DATA["niqe"], {"mu_prisparam": mean, "cov_prisparam": covariance})
    torch.save((torch.rand(9, 1), torch.rand(9, 36)), folder / DATA["brisque"])
    (folder / DATA["nrqm"]).write_bytes(b"forest")
    return folder


@pytest.fixture
def asked(data: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What a stand-in for pyiqa was asked for. Its NIQE is the mean grey level, its NRQM a tenth of the frame's last
    pixel, its BRISQUE the number of pixels."""
    made: list[tuple[str, dict[str, Any]]] = []
    values = {"niqe": lambda x: 255 * x.mean(), "nrqm": lambda x: 25.5 * x[..., -1, -1].mean()}

    def create_metric(name: str, **options: Any) -> Any:
        made.append((name, options))

        def measure(x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            assert x.shape[:2] == (1, 3)
            return values.get(name, lambda x: torch.tensor(float(x[0, 0].numel())))(x)

        return measure

    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=create_metric))
    return made


class Still:
    """A clip of grey frames, frame t being t / 255 but for its last pixel, which is 20 / 255."""

    def __init__(self, name: str, count: int, size: tuple[int, int] = (24, 48)) -> None:
        self.name = name
        self.clip = (torch.arange(count) / 255).view(-1, 1, 1, 1).expand(count, 3, *size).clone()
        self.clip[..., -1, -1] = 20 / 255

    def __len__(self) -> int:
        return len(self.clip)

    def frames(self, start: int = 0, stop: int | None = None) -> Any:
        return iter(self.clip[start:stop])


def test_values_are_of_each_8_bit_frame_and_pi_is_made_of_two(asked: list[Any], data: Path) -> None:
    frames = torch.rand(2, 3, 100, 200) * 1.2 - 0.1
    bytes_ = (frames.clamp(0, 1) * 255 + 0.5).floor()
    values = no_reference(frames, ("pi", "brisque"))
    nrqm = bytes_[..., -1, -1].mean(1).double() / 10
    torch.testing.assert_close(values["pi"], (10 - nrqm + bytes_.double().mean((1, 2, 3))) / 2, rtol=1e-5, atol=0)
    assert list(values) == ["pi", "brisque"]
    assert values["brisque"].tolist() == [20000, 20000]
    assert values["brisque"].dtype == torch.float64
    assert torch.equal(no_reference(bytes_.byte(), ("pi",))["pi"], values["pi"])
    files = {name: str(data / file) for name, file in DATA.items()}
    y = {"color_space": "ycbcr"}
    assert sorted(asked) == [
        (name, {"device": torch.device("cpu"), "pretrained_model_path": files[name], **options})
        for name, options in (("brisque", {}), ("niqe", y), ("nrqm", y))
    ]


def test_border(asked: list[Any]) -> None:
    frames = torch.zeros(1, 3, 104, 200)
    frames[..., :4, :] = 1
    assert no_reference(frames, ("niqe", "brisque"), border=4) == {"niqe": 0, "brisque": 96 * 192}
    assert no_reference(frames, ("niqe",))["niqe"].item() == pytest.approx(255 * 4 / 104)


@pytest.mark.parametrize(("frames", "counted"), [("all", range(7)), ("first_middle_last", (0, 3, 6))])
def test_a_model_sees_whole_clips_and_the_protocols_frames_are_measured(
    asked: list[Any], frames: Any, counted: Any
) -> None:
    protocol = NoReferenceProtocol("still", [Still("a", 7), Still("b", 7)], ("brisque", "niqe"), frames)
    model = Bicubic(4).train()
    report = evaluate_no_reference(model, protocol)
    assert model.training
    enlarged = (imresize(Still("a", 7).clip[list(counted)], 4).clamp(0, 1) * 255 + 0.5).floor()
    assert report.means == pytest.approx({"brisque": 96 * 192, "niqe": enlarged.mean().item()}, rel=1e-5)
    assert report.clips == {"a": report.means, "b": report.means}
    assert report.to_dict() == {
        "protocol": "still", **report.means, "clips": report.clips, "seconds": report.seconds
    }  # fmt: skip
    assert protocol.counted(100) == (list(range(100)) if frames == "all" else [0, 50, 99])
    assert NoReferenceProtocol("one", protocol.clips, frames="first_middle_last").counted(1) == [0]


def test_masks_come_in_a_context(asked: list[Any]) -> None:
    class Masked(nn.Module):
        def forward(self, frames: Tensor, context: Any) -> Tensor:
            assert torch.equal(context.masks, frames[:, :, :1])
            return frames

    protocol = NoReferenceProtocol("masked", [Still("a", 2, (96, 192))], ("brisque",))
    report = evaluate_no_reference(Masked(), protocol, masks=lambda lr: lr[:, :1])
    assert report.means == {"brisque": 96 * 192}


def test_a_frame_without_statistics_is_no_number(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("non-finite values")

    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=lambda *_, **__: fails))
    assert no_reference(torch.zeros(2, 3, 96, 192), ("niqe",))["niqe"].isnan().tolist() == [True, True]
    report = evaluate_no_reference(Bicubic(4), NoReferenceProtocol("black", [Still("a", 1)], ("niqe",)))
    assert report.to_dict()["niqe"] == report.to_dict()["clips"]["a"]["niqe"] == "nan"


def test_pyiqas_niqe_by_hand(data: Path) -> None:
    """Eq. 10 of the paper, with the features that pyiqa finds in blocks of the rounded Y."""
    pytest.importorskip("pyiqa")
    from pyiqa.archs.niqe_arch import blockproc, compute_feature, imresize, normalize_img_with_gauss

    frames = torch.rand(1, 3, 100, 300)
    y = luma(frames).round()[..., :96, :288]
    found = []
    for size in (96, 48):
        found.append(blockproc(normalize_img_with_gauss(y, padding="replicate"), [size] * 2, fun=compute_feature))
        y = 255 * imresize(y / 255, scale=0.5, antialiasing=True)
    features = torch.cat(found, -1)[0].numpy()
    model = scipy.io.loadmat(data / DATA["niqe"])
    difference = model["mu_prisparam"][0] - features.mean(0)
    between = (model["cov_prisparam"] + np.cov(features.T)) / 2
    expected = np.sqrt(difference @ np.linalg.inv(between) @ difference)
    assert no_reference(frames, ("niqe",))["niqe"].item() == pytest.approx(expected, rel=1e-6)
    assert no_reference(torch.zeros_like(frames), ("niqe",))["niqe"].isnan()


@pytest.mark.parametrize("metric", ["niqe", "brisque", "nrqm", "pi"])
def test_missing_data_are_named(asked: list[Any], data: Path, metric: Any) -> None:
    file = DATA["niqe" if metric == "pi" else metric]
    (data / file).unlink()
    where = rf"needs its data in {data / file}; download them from https://\S+/IQA-PyTorch-Weights/\S+/{file}"
    with pytest.raises(NoReferenceUnavailableError, match=where):
        no_reference(torch.rand(1, 3, 96, 192), (metric,))
    seen: list[Tensor] = []

    class Slow(nn.Module):
        def forward(self, frames: Tensor) -> Tensor:
            seen.append(frames)
            return frames

    with pytest.raises(NoReferenceUnavailableError, match=where):
        evaluate_no_reference(Slow(), NoReferenceProtocol("late", [Still("a", 1)], (metric,)))
    assert not seen


def test_pyiqa_is_named_where_it_is_not_installed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(
        NoReferenceUnavailableError, match=r'NIQE is computed by pyiqa.*install "vsrplug\[noreference\]"'
    ):
        no_reference(torch.rand(1, 3, 96, 192), ("niqe",))


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_data_that_would_run_code(asked: list[Any], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    torch.save((Harmful(),), data / DATA["brisque"])
    with pytest.raises(
        NoReferenceUnavailableError, match=r"svm_weights.pth was refused: .*would run code; download it"
    ):
        no_reference(torch.rand(1, 3, 8, 8), ("brisque",))
    assert not (data / "ran").exists()
    assert asked == []


def test_bad_arguments_are_named(asked: list[Any]) -> None:
    frames = torch.rand(1, 3, 96, 192)
    with pytest.raises(ValueError, match=r"there is no metric without reference 'nique'; did you mean 'niqe'"):
        no_reference(frames, ("nique",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no metrics are given; there are niqe, brisque, nrqm, pi"):
        no_reference(frames, ())
    with pytest.raises(ValueError, match=r"border is a number of pixels .*, got -1"):
        no_reference(frames, border=-1)
    with pytest.raises(ValueError, match=r"frames must be \(t, 3, H, W\), t at least 1, got \(1, 1, 96, 192\)"):
        no_reference(frames[:, :1])
    with pytest.raises(ValueError, match=r"NIQE needs two blocks .* frames of 96 x 192 at least, got \(96, 192\) less"):
        no_reference(frames, ("pi",), border=1)
    clips = [Still("a", 2)]
    with pytest.raises(ValueError, match=r"protocol 'x': there is no metric without reference 'psnr'"):
        NoReferenceProtocol("x", clips, ("psnr",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"protocol 'x': frames is 'last'; expected one of 'all', 'first_middle_last'"):
        NoReferenceProtocol("x", clips, frames="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"protocol 'x' has no clips: the data source is empty"):
        NoReferenceProtocol("x", [])
    with pytest.raises(ValueError, match=r"protocol 'x': several clips are named \['a'\]; .* rename them"):
        NoReferenceProtocol("x", clips * 2)
    with pytest.raises(ValueError, match=r"clip 'empty' has no frames"):
        evaluate_no_reference(Bicubic(4), NoReferenceProtocol("x", [Still("empty", 0)]))
    with pytest.raises(ValueError, match=r"clip 'a': NIQE needs two blocks"):
        evaluate_no_reference(Bicubic(2), NoReferenceProtocol("x", clips))
    window = EDVR(8, frames=3, extract_blocks=1, reconstruct_blocks=1, deform_groups=2)
    with pytest.raises(ValueError, match=r"clip 'a': for 3 frames the model returned \(1, 3, 96, 192\).*SlidingWindow"):
        evaluate_no_reference(window, NoReferenceProtocol("x", [Still("a", 3)]))
    assert METRICS == ("niqe", "brisque", "nrqm", "pi")
