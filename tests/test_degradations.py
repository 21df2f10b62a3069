"""Degradations against the definitions written out in numpy float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vsrplug.degradations import BD, BDDUF, BI, STVUN, crop_to_multiple, imresize

Degradation = Callable[[Tensor], Tensor]


def keys_cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def matlab_matrix(size: int, scale: float) -> np.ndarray:
    """MATLAB's `contributions`: (ceil(scale * size), size), the weights of each output sample."""
    out = math.ceil(round(size * scale, 9))
    stretch = min(scale, 1.0)
    matrix = np.zeros((out, size))
    for i in range(out):
        centre = (i + 1) / scale + 0.5 * (1 - 1 / scale)  # 1-based
        reach = 4 / stretch
        left = math.floor(centre - reach / 2)
        positions = np.arange(left, left + math.ceil(reach) + 2)
        weights = stretch * keys_cubic(stretch * (centre - positions))
        mirror = np.concatenate([np.arange(size), np.arange(size)[::-1]])
        for position, weight in zip(positions, weights / weights.sum(), strict=True):
            matrix[i, mirror[(position - 1) % (2 * size)]] += weight
    return matrix


def matlab_imresize(image: np.ndarray, scale: float) -> np.ndarray:
    return matlab_matrix(image.shape[-2], scale) @ image @ matlab_matrix(image.shape[-1], scale).T


def blur_loop(
    image: np.ndarray, sigma: float, taps: range, samples: range, border: Callable[[int, int], int]
) -> np.ndarray:
    """The 2-D sum of the definition, one sample after the other. `taps` are offsets, `samples` the phase and step."""
    height, width = image.shape
    centre = (taps[0] + taps[-1]) / 2
    kernel = np.array([[np.exp(-((y - centre) ** 2 + (x - centre) ** 2) / (2 * sigma**2)) for x in taps] for y in taps])
    kernel /= kernel.sum()
    rows, columns = range(samples.start, height, samples.step), range(samples.start, width, samples.step)
    result = np.zeros((len(rows), len(columns)))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            ys, xs = [border(row + y, height) for y in taps], [border(column + x, width) for x in taps]
            result[i, j] = (kernel * image[np.ix_(ys, xs)]).sum()
    return result


def replicate(i: int, n: int) -> int:
    return min(max(i, 0), n - 1)


def reflect(i: int, n: int) -> int:
    return abs(i) if i < n else 2 * (n - 1) - i


def grey_levels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.float64)


def as_bytes(lr: Tensor) -> np.ndarray:
    levels = lr.double().numpy() * 255
    assert np.abs(levels - levels.round()).max() < 1e-4, "not on the 8-bit grid"
    return levels.round()


@pytest.mark.parametrize("scale", [4, 3, 2, 1, 1 / 2, 1 / 3, 1 / 4, 0.6, 1.5])
@pytest.mark.parametrize("size", [(24, 36), (17, 31), (5, 2), (1, 7)])
def test_imresize_is_matlabs(scale: float, size: tuple[int, int]) -> None:
    image = grey_levels(2, 3, *size)
    expected = matlab_imresize(image, scale)
    exact = imresize(torch.from_numpy(image), scale).numpy()
    assert exact.shape == expected.shape
    assert np.abs(exact - expected).max() < 1e-10
    single = imresize(torch.from_numpy(image).float(), scale)
    assert single.dtype == torch.float32
    assert np.abs(single.numpy() - expected).max() < 1e-4


def test_imresize_stays_exact_over_a_wide_frame_at_three() -> None:
    """`F.interpolate` in float32 drifts by 0.03 grey levels here."""
    image = grey_levels(2, 1500)
    assert np.abs(imresize(torch.from_numpy(image).float(), 3).numpy() - matlab_imresize(image, 3)).max() < 1e-4


def test_imresize_has_gradients() -> None:
    image = torch.rand(1, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: imresize(x, 2), (image,))


@pytest.mark.parametrize("scale", [0, -2, math.pi / 3])
def test_imresize_refuses_other_scale_factors(scale: float) -> None:
    with pytest.raises(ValueError, match=r"positive ratio of whole numbers \(such as 4, 0.25, 1 / 3\), got"):
        imresize(torch.rand(3, 8, 8), scale)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_bi_is_matlab_imresize_rounded(scale: int) -> None:
    hr = grey_levels(2, 3, 24, 36)
    expected = np.floor(matlab_imresize(hr, 1 / scale) + 0.5).clip(0, 255)
    assert np.array_equal(as_bytes(BI(scale)(torch.from_numpy(hr / 255))), expected)


@pytest.mark.parametrize("scale", [2, 4])
def test_bd_is_the_sum_of_its_definition(scale: int) -> None:
    hr = grey_levels(16, 24)
    blurred = blur_loop(hr, 1.6, range(-5, 7), range(scale // 2 - 1, 99, scale), replicate)
    lr = BD(scale)(torch.from_numpy(hr / 255).expand(2, 3, -1, -1))
    assert np.array_equal(as_bytes(lr[1, 2]), np.floor(blurred + 0.5))


@pytest.mark.parametrize(
    ("degradation", "sigma"), [(BDDUF(4), 1.6), (BDDUF(2), 1.6), (BDDUF(3), 1.6), (STVUN(4), 1.6), (STVUN(2), 0.8)]
)
def test_duf_and_stvun_are_the_sum_of_their_definition(degradation: BDDUF | STVUN, sigma: float) -> None:
    hr = grey_levels(12, 24)
    radius = int(4 * sigma + 0.5)
    blurred = blur_loop(hr, sigma, range(-radius, radius + 1), range(0, 99, degradation.scale), reflect)
    assert np.array_equal(as_bytes(degradation(torch.from_numpy(hr / 255)[None])[0]), np.floor(blurred + 0.5))


def test_bd_sees_the_middle_of_the_block_and_duf_its_first_pixel() -> None:
    """A ramp tells where a sample lies: BI and BD at 1.5, 5.5, ...; DUF at 0, 4, ..."""
    ramp = (torch.arange(64.0) * 4 / 255).expand(1, 3, 32, 64)
    inner = slice(4, -4)
    at = {name: lr(ramp)[0, 0, 4, inner] * 255 / 4 for name, lr in {"bi": BI(), "bd": BD(), "duf": BDDUF()}.items()}
    grid = torch.arange(16.0)[inner] * 4
    assert torch.allclose(at["bi"], grid + 1.5, atol=1e-3)
    assert torch.allclose(at["bd"], grid + 1.5, atol=1e-3)
    assert torch.allclose(at["duf"], grid, atol=1e-3)


@pytest.mark.parametrize("degradation", [BI(4), BI(3), BD(4), BDDUF(4), STVUN(4)])
def test_single_and_double_precision_give_the_same_bytes(degradation: Degradation) -> None:
    hr = torch.from_numpy(grey_levels(4, 3, 96, 144))
    single, double = degradation((hr / 255).float()), degradation(hr / 255)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert np.array_equal(as_bytes(single), as_bytes(double))
    assert torch.equal(single, (double * 255).round().to(torch.uint8) / 255), "not what a decoded 8-bit file holds"


@pytest.mark.realdata
@pytest.mark.parametrize("degradation", [BI(4), BD(4), BDDUF(4)])
def test_single_and_double_precision_give_the_same_bytes_on_real_frames(
    degradation: Degradation, real_data: Path
) -> None:
    files = sorted((real_data / "vid4" / "GT").glob("*/00000010.png"))
    assert files
    for file in files:
        hr = torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0)
        assert np.array_equal(as_bytes(degradation(hr.float() / 255)), as_bytes(degradation(hr.double() / 255)))


def test_halves_are_rounded_up() -> None:
    """A 2 x 2 block of mean 24.5, on a flat field: torch.round would make it 24."""
    hr = torch.full((1, 3, 32, 32), 24.0)
    hr[..., ::2] = 25.0
    assert as_bytes(BI(2)(hr / 255))[..., 4:-4, 4:-4].min() == 25


def test_a_flat_frame_stays_flat_up_to_the_border() -> None:
    hr = torch.full((1, 3, 16, 16), 101 / 255)
    for degradation in (BI(), BD(), BDDUF(), STVUN()):
        assert torch.equal(degradation(hr), torch.full((1, 3, 4, 4), 101 / 255))


@pytest.mark.parametrize("degradation", [BI(), BD(), BDDUF(), STVUN()])
def test_any_leading_dimensions_and_frames_smaller_than_the_kernel(degradation: Degradation) -> None:
    hr = torch.randint(0, 256, (2, 2, 3, 4, 8)) / 255
    lr = degradation(hr)
    assert lr.shape == (2, 2, 3, 1, 2)
    assert torch.equal(lr[1, 0], degradation(hr[1, 0]))
    assert torch.equal(lr[1, 0, 2], degradation(hr[1, 0, 2]))


@pytest.mark.parametrize("degradation", [BI(), BD(), BDDUF(), STVUN()])
def test_sizes_that_do_not_divide_are_refused(degradation: Degradation) -> None:
    with pytest.raises(ValueError, match=r"30 x 16 \(w x h\) does not divide by the scale 4; crop it first"):
        degradation(torch.rand(1, 3, 16, 30))


def test_8_bit_tensors_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"must be a float tensor in \[0, 1\], got torch.uint8; divide 8-bit frames by 255"
    ):
        BI()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_scales_that_have_no_definition_are_refused() -> None:
    with pytest.raises(ValueError, match=r"defined for even scales .* got scale=3; use BI or BDDUF"):
        BD(3)
    for degradation in (BI, BD, BDDUF, STVUN):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            degradation(0)


def test_crop_to_multiple_keeps_the_top_left() -> None:
    hr = torch.rand(2, 3, 19, 10)
    assert torch.equal(crop_to_multiple(hr, 4), hr[..., :16, :8])
    assert torch.equal(crop_to_multiple(hr, 1), hr)
    with pytest.raises(ValueError, match=r"10 x 3 \(w x h\) is smaller than one low-resolution pixel at scale 4"):
        crop_to_multiple(hr[..., :3, :], 4)
