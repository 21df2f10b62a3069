"""Metrics against scikit-image, torchmetrics and the formulas in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import structural_similarity
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from vsrplug.metrics import Colour, LPIPSUnavailableError, lpips, luma, psnr, ssim, to_uint8


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """A smooth clip and a noisy copy of it, (3, 3, 32, 40) uint8; later frames are noisier."""
    coarse = torch.rand(3, 3, 5, 6)
    hr = torch.nn.functional.interpolate(coarse, (32, 40), mode="bicubic").clamp(0, 1)
    noise = torch.randn_like(hr) * torch.tensor([0.01, 0.05, 0.2]).view(3, 1, 1, 1)
    return to_uint8(hr + noise), to_uint8(hr)


def skimage_ssim(a: np.ndarray, b: np.ndarray) -> float:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return float(structural_similarity(a, b, full=True, **options)[1][5:-5, 5:-5].mean())


def planes(frame: Tensor, colour: Colour) -> np.ndarray:
    """scikit-image's Y is not rounded, and is BT.601."""
    if colour == "y":
        return rgb2ycbcr(frame.permute(1, 2, 0).numpy())[None, ..., 0]
    return frame.double().numpy()


@pytest.mark.parametrize("colour", ["rgb", "y"])
@pytest.mark.parametrize("border", [0, 3])
def test_psnr_and_ssim_are_scikit_images(pair: tuple[Tensor, Tensor], colour: Colour, border: int) -> None:
    inner = slice(border, -border or None)
    for t, (a, b) in enumerate(zip(*pair, strict=True)):
        x, y = planes(a, colour)[:, inner, inner], planes(b, colour)[:, inner, inner]
        expected = 10 * np.log10(255**2 / ((x - y) ** 2).mean())
        assert psnr(*pair, colour, border)[t].item() == pytest.approx(expected, abs=1e-10)
        expected = np.mean([skimage_ssim(*channel) for channel in zip(x, y, strict=True)])
        assert ssim(*pair, colour, border)[t].item() == pytest.approx(expected, abs=1e-10)


def test_psnr_and_ssim_are_torchmetrics_read_the_right_way(pair: tuple[Tensor, Tensor]) -> None:
    sr, hr = (frames.double() for frames in pair)
    per_frame = peak_signal_noise_ratio(sr, hr, 255.0, dim=(1, 2, 3), reduction="none")
    assert torch.allclose(psnr(*pair), per_frame, atol=1e-5, rtol=0)
    whole = structural_similarity_index_measure(sr, hr, data_range=255.0, return_full_image=True)[1]
    assert torch.allclose(ssim(*pair), whole[..., 5:-5, 5:-5].mean((1, 2, 3)), atol=1e-10, rtol=0)


def test_metrics_are_per_frame_and_double(pair: tuple[Tensor, Tensor]) -> None:
    for metric in (psnr, ssim):
        values = metric(*pair)
        assert values.shape == (3,)
        assert values.dtype == torch.float64
        assert (values.diff() < 0).all()  # noisier and noisier


def test_frames_are_clipped_and_rounded_half_up_first(pair: tuple[Tensor, Tensor]) -> None:
    sr, hr = pair
    floats = sr / 255 + (torch.rand(sr.shape) - 0.5) * 0.9 / 255
    floats[0, 0, :2] = torch.where(sr[0, 0, :2] < 128, -0.3, 1.3)
    bytes_ = sr.clone()
    bytes_[0, 0, :2] = torch.where(sr[0, 0, :2] < 128, 0, 255).byte()
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(psnr(floats.to(dtype), hr / 255), psnr(bytes_, hr))
        assert torch.equal(ssim(floats.to(dtype), hr / 255), ssim(bytes_, hr))
    halves = torch.tensor([0.5, 1.5, 2.5, 254.5], dtype=torch.float64) / 255
    assert to_uint8(halves).tolist() == [1, 2, 3, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every / 255), every)
    assert torch.equal(to_uint8((every / 255).half()), every)


def test_luma_is_bt601_studio_range_and_not_rounded() -> None:
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    y = luma(colours.view(5, 3, 1, 1)).flatten()
    assert torch.allclose(y, torch.tensor([16, 235, 81.481, 144.553, 40.966], dtype=torch.float64), atol=1e-12)


def test_equal_frames_have_infinite_psnr(pair: tuple[Tensor, Tensor]) -> None:
    _, hr = pair
    assert psnr(hr, hr).tolist() == [float("inf")] * 3
    assert torch.allclose(ssim(hr, hr), torch.ones(3, dtype=torch.float64))


def test_bad_arguments_are_named(pair: tuple[Tensor, Tensor]) -> None:
    sr, hr = pair
    with pytest.raises(ValueError, match="colour must be one of 'rgb', 'y', got 'ycbcr'"):
        psnr(sr, hr, "ycbcr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"border is a number of pixels .* 0 or more, got -1"):
        ssim(sr, hr, border=-1)
    with pytest.raises(ValueError, match=r"must both be \(t, 3, H, W\), got \(2, 3, 32, 40\) and \(3, 3, 32, 40\)"):
        psnr(sr[:2], hr)
    with pytest.raises(ValueError, match=r"must both be \(t, 3, H, W\), got \(3, 1, 32, 40\)"):
        psnr(sr[:, :1], hr[:, :1])
    with pytest.raises(ValueError, match=r"\(32, 40\) less a border of 16 are too small, at least 1 x 1"):
        psnr(sr, hr, border=16)
    with pytest.raises(ValueError, match=r"\(32, 40\) less a border of 11 are too small, at least 11 x 11"):
        ssim(sr, hr, border=11)


def test_lpips_says_which_weights_are_missing(
    pair: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        LPIPSUnavailableError, match=f"AlexNet's weights in {tmp_path}.*alexnet.*download them from https"
    ):
        lpips(*pair)
    with pytest.raises(LPIPSUnavailableError, match=r"31 x 31 and more, these are \(32, 40\) less a border of 1"):
        lpips(*pair, border=1)


def test_lpips_is_the_weighted_distance_of_normalised_features(
    pair: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zhang et al. equation 1, on an AlexNet of random weights in the place where torch.hub keeps the real one."""
    import torchmetrics.functional.image as home
    from torchvision.models import alexnet

    network = alexnet(weights=None)
    state = network.features.state_dict(prefix="features.")
    blank = {f"classifier.{k}": torch.zeros(()).expand(v.shape) for k, v in network.classifier.state_dict().items()}
    (tmp_path / "checkpoints").mkdir()
    torch.save(state | blank, tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    linear = torch.load(Path(home.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((frames / 255 * 2 - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for frames in pair)
    expected = torch.zeros(3)
    with torch.no_grad():
        for i, layer in enumerate(network.features[:12]):
            x, y = layer(x), layer(y)
            if i in (1, 4, 7, 9, 11):
                difference = [f / (f.square().sum(1, keepdim=True) + 1e-8).sqrt() for f in (x, y)]
                weights = linear[f"lin{(1, 4, 7, 9, 11).index(i)}.model.1.weight"]
                expected += ((difference[0] - difference[1]).square() * weights).sum(1).mean((1, 2))
    for _ in range(2):  # nothing is accumulated between calls
        assert torch.allclose(lpips(*pair), expected.double(), rtol=1e-4, atol=1e-7)
