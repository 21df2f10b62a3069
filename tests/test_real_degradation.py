"""The degradation `real`: operations against other libraries and loops, walks within bounds, exact repeats."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kornia.filters import filter2d, get_gaussian_kernel2d
from omegaconf import OmegaConf
from PIL import Image
from scipy import fft, ndimage, special
from torch import Tensor

from vsrplug import VSRDataModule, conf
from vsrplug._corruption import (
    blur,
    blur_kernel,
    compress_video,
    gaussian_noise,
    jpeg,
    poisson_noise,
    resize,
)
from vsrplug._degradation_order import KERNELS, Parameters
from vsrplug.commands import build
from vsrplug.data import DemoClips, TrainingClips
from vsrplug.data.datamodule import WholeClips
from vsrplug.real_degradation import Order, Real, Walk, sharpen

REAL = Real()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def clips() -> DemoClips:
    return DemoClips(clips=2, frames=5, size=(96, 128))


@pytest.fixture(scope="module")
def hr(clips: DemoClips) -> Tensor:
    return torch.stack(list(clips[0].frames()))


# The operations


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("size", [7, 21])
def test_kernels_are_those_of_the_formulas(kind: Any, size: int) -> None:
    sigma, angle, beta, omega = (2.5, 0.8), 0.6, 1.7, 1.3
    expected = np.zeros((size, size))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    sigma = sigma if kind.endswith("_anisotropic") or kind == "anisotropic" else (sigma[0], sigma[0])
    inverse = np.linalg.inv(turn @ np.diag(np.square(sigma)) @ turn.T)
    for i, j in np.ndindex(size, size):
        place = np.array([j - size // 2, i - size // 2])  # x, y
        q, r = place @ inverse @ place, np.hypot(*place)
        if kind == "sinc":
            expected[i, j] = omega * special.j1(omega * r) / (2 * math.pi * r) if r else omega**2 / (4 * math.pi)
        elif kind.startswith("plateau"):
            expected[i, j] = 1 / (1 + q**beta)
        else:
            expected[i, j] = math.exp(-0.5 * (q**beta if kind.startswith("generalised") else q))
    kernel = blur_kernel(kind, size, sigma=(2.5, 0.8), angle=angle, beta=beta, omega=omega)
    assert np.abs(kernel.numpy() - expected / expected.sum()).max() < 1e-7
    assert torch.allclose(kernel, kernel.flip(0, 1))  # what `blur` relies on


def test_the_isotropic_gaussian_is_kornias() -> None:
    given = blur_kernel("isotropic", 9, sigma=(1.4, 9.0), angle=1.0)
    assert torch.allclose(given, get_gaussian_kernel2d(9, (1.4, 1.4))[0], atol=1e-7)


@pytest.mark.parametrize("shape", [(40, 53), (8, 11), (10, 31), (5, 4)])
def test_blur_by_fft_is_the_sum(shape: tuple[int, int]) -> None:
    frame = torch.rand(3, *shape)
    kernel = blur_kernel("sinc", 21, omega=1.9)
    border = "reflect" if min(shape) > 10 else "replicate"  # kornia and torch cannot reflect more than there is
    assert torch.allclose(blur(frame, kernel), filter2d(frame[None], kernel[None], border)[0], atol=2e-6)


def test_sharpening_is_unsharp_masking_with_a_soft_threshold(hr: Tensor) -> None:
    frame = hr[0].double().numpy()
    kernel = np.exp(-((np.arange(51) - 25) ** 2) / (2 * 8.0**2))  # OpenCV's sigma of 51 taps

    def smooth(plane: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            plane = ndimage.correlate1d(plane, kernel / kernel.sum(), axis, mode="mirror")
        return plane

    expected = np.empty_like(frame)
    for c, plane in enumerate(frame):
        difference = plane - smooth(plane)
        share = smooth((np.abs(difference) * 255 > 10).astype(float))
        expected[c] = share * np.clip(plane + 0.5 * difference, 0, 1) + (1 - share) * plane
    # A pixel whose difference is the threshold but for rounding may fall on either side.
    assert np.abs(sharpen(hr)[0].numpy() - expected).mean() < 1e-5
    assert torch.equal(sharpen(hr[None]), sharpen(hr)[None])
    assert sharpen(hr).sub(hr).abs().max() > 0.05
    assert sharpen(torch.rand(3, 8, 8)).shape == (3, 8, 8)


def test_resizing_by_area_is_pillows_box() -> None:
    frame = torch.rand(3, 12, 20)
    for plane, found in zip(frame, resize(frame, (4, 5), "area"), strict=True):
        expected = np.asarray(Image.fromarray(plane.numpy()).resize((5, 4), Image.Resampling.BOX))
        assert np.abs(expected - found.numpy()).max() < 1e-6
    assert resize(frame, (12, 20), "area") is frame


def test_resizing_by_cubics_is_keys_kernel_with_a_of_three_quarters() -> None:
    """OpenCV's; enlarged twice, a sample is a quarter of a pixel off, at the weights of that place."""
    row = torch.rand(12)
    a = -0.75
    near = [(a + 2) * d**3 - (a + 3) * d**2 + 1 for d in (0.25, 0.75)]
    far = [a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a for d in (1.25, 1.75)]
    expected = far[1] * row[3] + near[1] * row[4] + near[0] * row[5] + far[0] * row[6]  # sample 10, at 4.75
    found = resize(row.expand(3, 12, 12), (24, 24), "bicubic")[0, 12, 10]
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_downsizing_does_not_smooth() -> None:
    """What the paper's cv2 does: at a quarter, bilinear sees 2 x 2 of 4 x 4 pixels."""
    frame = torch.rand(3, 16, 16)
    middle = frame.unfold(1, 4, 4).unfold(2, 4, 4)[..., 1:3, 1:3].mean((-2, -1))
    assert torch.allclose(resize(frame, (4, 4), "bilinear"), middle, atol=1e-6)


@pytest.mark.parametrize("grey", [False, True])
def test_noise_has_the_moments_it_should(grey: bool) -> None:
    level = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1).expand(3, 200, 200)
    added = gaussian_noise(level, 20.0, grey, seeded(0)) - level
    assert added.std((1, 2)).mul(255).sub(20).abs().max() < 0.3  # 0.07 expected
    assert added.mean((1, 2)).mul(255).abs().max() < 0.5
    same = torch.allclose(added[0], added[1], atol=1e-6)
    assert same == grey
    added = poisson_noise(level, 2.0, grey, seeded(0)) - level
    light = (level[:, 0, 0] * 255).round() / 255
    photons = 4.0  # three levels: two bits
    if grey:
        light = torch.tensor([0.299, 0.587, 0.114]).mul(light).sum().expand(3)
        photons = 1.0  # one
    assert torch.allclose(added.std((1, 2)), 2 * (light / photons).sqrt(), rtol=0.02)
    assert added.mean((1, 2)).abs().max() < 0.03
    assert torch.allclose(added[0], added[1], atol=1e-6) == grey


LUMA = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]


@pytest.mark.parametrize("quality", [30, 50, 77, 95])
def test_jpeg_rounds_cosine_coefficients_by_the_standards_table(quality: int) -> None:
    plane = torch.randint(60, 200, (16, 16), dtype=torch.uint8, generator=seeded(0))  # grey: no chroma to smooth
    table = (np.array(LUMA) * (5000 // quality if quality < 50 else 200 - 2 * quality) + 50) // 100
    expected = np.empty((16, 16))
    for i, j in np.ndindex(2, 2):
        block = np.s_[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
        coefficients = fft.dctn(plane[block].double().numpy() - 128, norm="ortho")
        expected[block] = fft.idctn(np.round(coefficients / table) * table, norm="ortho") + 128
    found = jpeg(plane.expand(3, 16, 16), quality).double().numpy()
    assert np.abs(found - expected.clip(0, 255)).mean() < 0.7  # rounded, and a coefficient may fall on either side
    assert np.abs(found - plane.numpy()).mean() > 0.8


@pytest.mark.parametrize("codec", ["libx264", "h264", "mpeg4", "mpeg2video"])
def test_video_compression_keeps_order_and_size_and_costs_what_bits_say(codec: str, hr: Tensor) -> None:
    frames = [*(hr[:, :, :61, :77] * 255).round().byte()]  # odd
    marked = [frame // 8 + 50 * t for t, frame in enumerate(frames)]
    coded = compress_video(marked, codec, 30_000)
    assert [round(frame.float().mean().item() / 50) for frame in coded] == [
        round(frame.float().mean().item() / 50) for frame in marked
    ]
    assert {frame.shape for frame in coded} == {(3, 61, 77)}
    frames *= 5  # rate control takes some
    fine, coarse = (torch.stack(compress_video(frames, codec, bits)).float() for bits in (60_000, 2_000))
    truth = torch.stack(frames).float()
    assert (fine - truth).square().mean() * 1.02 < (coarse - truth).square().mean()
    assert (coarse - truth).abs().mean() < 25


@pytest.mark.parametrize("width", [64, 96, 128])
def test_video_compression_repeats_itself(width: int, hr: Tensor) -> None:
    """libx264's macroblock tree does not, at widths that are no multiple of 128: it reads what the heap held before."""
    frames = [*(hr[..., :64, :width] * 255).round().byte()] * 3
    first = torch.stack(compress_video(frames, "libx264", 15_000))
    for seed in range(4):
        rubbish = [torch.randint(256, (int(n),)) for n in np.random.default_rng(seed).integers(1e3, 1e5, 30)]
        del rubbish
        assert torch.equal(torch.stack(compress_video(frames, "libx264", 15_000)), first)


# What is drawn


def walks(order: Order, drawn: Parameters) -> list[tuple[str, list[float], Walk]]:
    """Each list of parameters with its bounds; of those that this draw uses."""
    wide = (math.pi / 3 if drawn.size < 13 else math.pi / 5, math.pi, order.omega_step)
    plateau = (drawn.kernel or "").startswith("plateau")
    beta = [order.beta_plateau] if plateau else [order.beta_gaussian]
    if drawn.kernel is None:
        beta = [(0.5, 4.0, 0.1)]
    return [
        ("sigma x", [first for first, _ in drawn.sigma], order.sigma),
        ("sigma y", [second for _, second in drawn.sigma], order.sigma),
        ("angle", drawn.angle, order.angle),
        ("beta", drawn.beta, beta[0]),
        ("omega", drawn.omega, wide),
        ("factor", drawn.factor, order.factor),
        ("strength", drawn.strength, order.gaussian if drawn.noise == "gaussian" else order.poisson),
        ("quality", [float(q) for q in drawn.quality], (*order.quality[:2], order.quality[2] + 1)),  # rounded
    ]


def test_parameters_walk_step_by_step_within_their_bounds() -> None:
    moved: dict[str, set[float]] = {}
    for seed in range(60):
        first, second, last = REAL.draw(30, seeded(seed))
        all_walks = [*walks(REAL.first, first), *walks(REAL.second, second), ("last omega", last.omega, REAL.omega)]
        for name, values, (low, high, step) in all_walks:
            assert len(values) == 30
            assert low - 1e-9 <= min(values), name
            assert max(values) <= high + 1e-9, name
            steps = [abs(b - a) for a, b in pairwise(values)]
            assert max(steps) <= step + 1e-9, name
            moved.setdefault(name, set()).update([max(steps) / step])
    assert {name for name, shares in moved.items() if max(shares) < 0.7} == set()  # and they do walk


def test_without_walk_a_clip_keeps_its_parameters() -> None:
    first, second, last = Real(walk=False).draw(9, seeded(3))
    walked = REAL.draw(9, seeded(3))
    for order, drawn, other in ((REAL.first, first, walked[0]), (REAL.second, second, walked[1])):
        for name, values, _ in walks(order, drawn):
            assert len(set(values)) == 1, name
        assert drawn.kernel in (*KERNELS, None)
        assert other.codec in REAL.codecs
    assert len(set(last.omega)) == 1


def test_choices_are_as_frequent_as_they_should_be() -> None:
    n = 2000
    drawn = [REAL.draw(1, seeded(seed)) for seed in range(n)]

    def share(hits: Any) -> float:
        return sum(map(bool, hits)) / n

    expected = {
        "isotropic": share(first.kernel == "isotropic" for first, _, _ in drawn) - 0.405,
        "sinc kernel": share(first.kernel == "sinc" for first, _, _ in drawn) - 0.1,
        "blurred": share(second.kernel for _, second, _ in drawn) - 0.8,
        "larger": share(first.factor[0] > 1 for first, _, _ in drawn) - 0.2,
        "smaller": share(first.factor[0] < 1 for first, _, _ in drawn) - 0.7,
        "as large": share(second.factor[0] == 1 for _, second, _ in drawn) - 0.3,
        "gaussian": share(first.noise == "gaussian" for first, _, _ in drawn) - 0.5,
        "grey": share(first.grey for first, _, _ in drawn) - 0.4,
        "mpeg4": share(first.codec == "mpeg4" for first, _, _ in drawn) - 1 / 3,
        "area": share(first.mode == "area" for first, _, _ in drawn) - 1 / 3,
        "before": share(last.before_codec for _, _, last in drawn) - 0.5,
        "last sinc": share(last.sinc for _, _, last in drawn) - 0.8,
    }
    assert {name: off for name, off in expected.items() if abs(off) > 0.04} == {}  # 3.6 standard deviations


# Whole clips


def test_the_same_seed_is_the_same_clip_and_the_same_content_is_too(hr: Tensor) -> None:
    for seed in range(3):
        assert torch.equal(REAL.degrade(hr, seeded(seed)), REAL.degrade(hr, seeded(seed)))
    assert not torch.equal(REAL.degrade(hr, seeded(0)), REAL.degrade(hr, seeded(1)))
    assert torch.equal(REAL(hr), REAL(hr.clone()))
    assert torch.equal(REAL(hr), REAL((hr * 255).round() / 255))  # the content in 8 bits
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = REAL(hr)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(REAL(hr), first)
    other = hr.clone()
    other[0, 0, 0, 0] += 1 / 255
    assert not torch.equal(REAL(other), first)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 3, 8, 12), (2, 3, 4, 4), (2, 3, 36, 20)])
def test_any_size_and_length(shape: tuple[int, ...]) -> None:
    for seed in range(6):
        lr = REAL.degrade(torch.rand(shape, dtype=torch.float64), seeded(seed))
        assert lr.shape == (*shape[:2], shape[2] // 4, shape[3] // 4)
        assert lr.dtype == torch.float64
        levels = lr * 255
        assert (levels - levels.round()).abs().max() < 1e-4
        assert 0 <= levels.min() <= levels.max() <= 255.0001


def test_other_scales(hr: Tensor) -> None:
    for scale in (1, 2, 3):
        lr = Real(scale)(hr[:2, :, :90, :126])
        assert lr.shape == (2, 3, 90 // scale, 126 // scale)


def test_with_nothing_to_spoil_it_is_the_reduced_clip(hr: Tensor) -> None:
    """The mildest of everything, so that nothing else than blur, grids or codecs can be out of place."""
    mild = Order(
        blur=0, enlarge=0, shrink=0, factor=(1, 1, 0), gaussian=(0, 0, 0), gaussian_noise=1, quality=(100, 100, 0)
    )
    gentle = Real(4, mild, mild, ["mpeg4"], (40.0, 40.0), sinc=0.0)
    for seed in range(4):
        lr = gentle.degrade(hr, seeded(seed))
        mode = gentle.draw(len(hr), seeded(seed))[2].mode
        expected = torch.stack([resize(frame, (24, 32), mode) for frame in hr])
        assert (lr - expected).abs().mean() < 0.025  # from 4:2:0 and the codec
        for shifted in (expected.flip(0), expected.roll(1, -1), expected.roll(1, -2)):
            assert (lr - shifted).abs().mean() > 1.5 * (lr - expected).abs().mean()


def test_sharpening_comes_first(hr: Tensor) -> None:
    assert torch.equal(Real(sharpen=True).degrade(hr, seeded(1)), REAL.degrade(sharpen(hr), seeded(1)))


# In training and evaluation


def test_a_sample_depends_on_seed_and_number_whatever_the_workers(clips: DemoClips) -> None:
    def batches(workers: int, used: int) -> list[dict[str, Any]]:
        module = VSRDataModule(clips, REAL, frames=3, patch=16, batch_size=2, workers=workers, seed=5)
        module.load_state_dict({"samples": used, "step": 0})
        loader = iter(module.train_dataloader())
        return [next(loader) for _ in range(3)]

    straight = batches(0, 0)
    parallel = batches(2, 0)
    for one, other in zip(straight, parallel, strict=True):
        assert torch.equal(one["lr"], other["lr"])
        assert torch.equal(one["hr"], other["hr"])
    assert torch.equal(batches(0, 4)[0]["lr"], straight[2]["lr"])  # resumed after four samples


def test_the_number_of_threads_does_not_matter(hr: Tensor) -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append([REAL.degrade(hr[:3], seeded(seed)) for seed in range(5)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_every_sample_is_degraded_in_its_own_way(clips: DemoClips) -> None:
    samples = TrainingClips([clips[0]], REAL, frames=5, patch=24, augment=False)  # one window, all of the height
    assert torch.equal(samples[0]["lr"], samples[0]["lr"])
    differ = [not torch.equal(samples[0]["lr"], samples[k]["lr"]) for k in range(1, 5)]
    assert all(differ)


def test_a_mirrored_window_is_degraded_in_another_way_on_its_way_back(clips: DemoClips) -> None:
    sample = TrainingClips(clips, REAL, frames=3, patch=16, mirror=True)[0]
    assert sample["lr"].shape == (6, 3, 16, 16)
    assert torch.equal(sample["hr"][:3], sample["hr"][3:].flip(0))
    assert not torch.equal(sample["lr"][:3], sample["lr"][3:].flip(0))


def test_evaluation_sees_one_low_resolution_clip(clips: DemoClips) -> None:
    first, again = (WholeClips(clips, Real())[0]["lr"] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, REAL(torch.stack(list(clips[0].frames()))))


def test_the_yaml_says_what_the_constructor_says() -> None:
    path = Path(conf.__file__).with_name("degradation") / "real.yaml"
    assert build.make(OmegaConf.load(path)) == REAL


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"blur": 1.5}, r"blur=1\.5 is a probability, between 0 and 1"),
        ({"enlarge": 0.6, "shrink": 0.6}, r"enlarge=0\.6 and shrink=0\.6 are more than 1 together"),
        ({"sigma": (3.0, 0.2, 0.1)}, r"sigma=\(3\.0, 0\.2, 0\.1\): expected lowest, highest and step"),
        ({"sigma": (0.0, 0.2, 0.1)}, r"sigma=.*of at least 0\.01 and 0"),
        ({"poisson": (0.1, 0.2)}, r"poisson=\(0\.1, 0\.2\): expected lowest, highest and step"),
        ({"gaussian": (1.0, 2.0, -0.1)}, r"gaussian=\(1\.0, 2\.0, -0\.1\)"),
        ({"factor": (0.2, 0.8, 0.1)}, r"factor=\(0\.2, 0\.8, 0\.1\) has to include 1, the size as it is"),
        ({"quality": (30.0, 101.0, 1.0)}, r"quality=\(30\.0, 101\.0, 1\.0\) ends at 100 at most"),
        ({"kernels": (1.0, 0.0)}, r"kernels=\(1\.0, 0\.0\): expected 7 weights, of isotropic, anisotropic"),
    ],
)
def test_an_order_out_of_range(order: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Order(**order)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "scale is a whole number of at least 1, got 0"),
        ({"sinc": -0.1}, r"sinc=-0\.1 is a probability"),
        ({"omega": (1.0, 0.5, 0.1)}, r"omega=\(1\.0, 0\.5, 0\.1\): expected lowest, highest and step"),
        ({"bits_per_pixel": (2.0, 1.0)}, r"bits_per_pixel=\(2\.0, 1\.0\): expected the lowest, above 0, and the"),
        ({"codecs": ["mpeg5"]}, r"this PyAV's FFmpeg has no video encoder 'mpeg5'; try libx264, mpeg4 or mpeg2video"),
        ({"codecs": ["aac"]}, "no video encoder 'aac'"),
        ({"codecs": []}, "codecs: name one encoder or more"),
    ],
)
def test_real_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Real(**arguments)


def test_frames_it_cannot_take(hr: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Real degrades clips \(t, 3, H, W\), t at least 1, got \(3, 96, 128\)"):
        REAL(hr[0])
    with pytest.raises(ValueError, match=r"got \(0, 3, 96, 128\)"):
        REAL(hr[:0])
    with pytest.raises(ValueError, match=r"a frame of 126 x 96 \(w x h\) does not divide by the scale 4; crop"):
        REAL(hr[..., :126])
    with pytest.raises(TypeError, match=r"float tensor in \[0, 1\], got torch.uint8; divide 8-bit frames by 255"):
        REAL(hr.byte())


def test_a_decoder_that_loses_frames_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import vsrplug._corruption as corruption

    class Losing:
        thread_count = 0

        def decode(self, packet: Any) -> list[Any]:
            return []

    create = corruption.av.CodecContext.create
    context = type("Context", (), {"create": lambda name, mode: Losing() if mode == "r" else create(name, mode)})
    monkeypatch.setattr(corruption.av, "CodecContext", context)
    with pytest.raises(RuntimeError, match="mpeg4 gave 0 frames back for 2; take another of the codecs"):
        compress_video([torch.zeros(3, 16, 16, dtype=torch.uint8)] * 2, "mpeg4", 1e4)
