"""Bicubic against MATLAB's definition, written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vsrplug.backbones import Bicubic


def imresize_matrix(size: int, scale: int) -> np.ndarray:
    """(scale * size, size): MATLAB's weights for enlarging, cubic with a = -0.5, half-sample symmetric border."""

    def cubic(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    mirror = [*range(size), *range(size - 1, -1, -1)]
    matrix = np.zeros((scale * size, size))
    for out in range(scale * size):
        centre = (out + 0.5) / scale - 0.5
        for tap in range(int(np.floor(centre)) - 2, int(np.floor(centre)) + 4):
            matrix[out, mirror[tap % (2 * size)]] += cubic(centre - tap)
    return matrix


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize(("h", "w"), [(11, 8), (1, 1), (1, 5)])
def test_equals_imresize(scale: int, h: int, w: int) -> None:
    frames = torch.rand(2, 3, 3, h, w, dtype=torch.float64)
    rows, columns = imresize_matrix(h, scale), imresize_matrix(w, scale)
    expected = np.einsum("oh,btchw,pw->btcop", rows, frames.numpy(), columns)
    assert np.abs(Bicubic(scale)(frames).numpy() - expected).max() < 1e-12
    assert np.abs(Bicubic(scale)(frames.float()).numpy() - expected).max() < 3e-6


def test_half_precision_and_compilation() -> None:
    net, frames = Bicubic(), torch.rand(1, 2, 3, 6, 5)
    half = net(frames.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, net(frames.bfloat16().float()).bfloat16())
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(frames), net(frames))


def test_frames_in_between_are_blends() -> None:
    frames = torch.rand(1, 3, 3, 5, 6, dtype=torch.float64)
    times, enlarged = (0.25, 0.9), Bicubic(2)(frames)[0]
    result = Bicubic(2)(frames, times=times)[0]
    assert len(result) == 9
    for i in range(3):
        following = enlarged[min(i + 1, 2)]
        for k, time in enumerate((0, *times)):
            expected = (1 - time) * enlarged[i] + time * following
            torch.testing.assert_close(result[3 * i + k], expected)
    with pytest.raises(ValueError, match="times lie between the centre frame, 0, and the next, 1, got 1"):
        Bicubic(2)(frames, times=(1,))


def test_refuses_shrinking() -> None:
    with pytest.raises(ValueError, match="scale is 0; expected 1 or more"):
        Bicubic(0)
