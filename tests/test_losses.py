"""Losses against float64 loops, and their gradients where two clips agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vsrplug.context import Flows
from vsrplug.losses import charbonnier, end_point_error, l1


def test_charbonnier_and_l1_are_the_means_of_the_definitions() -> None:
    sr, hr = torch.rand(2, 3, 3, 5, 4), torch.rand(2, 3, 3, 5, 4)
    difference = sr.double().numpy() - hr.double().numpy()
    for epsilon in (1e-6, 0.1):
        expected = np.mean(np.sqrt(difference**2 + epsilon**2))
        assert charbonnier(sr, hr, epsilon).item() == pytest.approx(expected, rel=1e-6)
    assert l1(sr, hr).item() == pytest.approx(np.mean(np.abs(difference)), rel=1e-6)


def test_charbonnier_of_equal_clips_is_epsilon_and_has_no_gradient() -> None:
    sr = torch.rand(1, 2, 3, 4, 4, requires_grad=True)
    loss = charbonnier(sr, sr.detach().clone())
    loss.backward()
    assert loss.item() == pytest.approx(1e-6)
    assert sr.grad is not None
    assert not sr.grad.any()  # and not NaN


def test_end_point_error_is_the_mean_distance_of_both_ways() -> None:
    shape = (2, 3, 2, 4, 5)
    estimated, true = (Flows(torch.randn(shape), torch.randn(shape)) for _ in range(2))
    distances = []
    for way in range(2):
        e, t = estimated[way].double().numpy(), true[way].double().numpy()
        for b, i, y, x in np.ndindex(2, 3, 4, 5):
            distances.append(math.hypot(*(e[b, i, :, y, x] - t[b, i, :, y, x])))
    assert end_point_error(estimated, true).item() == pytest.approx(np.mean(distances), rel=1e-5)


def test_end_point_error_of_known_flows() -> None:
    zero = torch.zeros(1, 1, 2, 3, 3)
    off = zero + torch.tensor([3.0, -4.0]).view(2, 1, 1)
    assert end_point_error(Flows(off, off), Flows(zero, zero)).item() == pytest.approx(5.0)
    assert end_point_error(Flows(off, zero), Flows(zero, zero)).item() == pytest.approx(2.5, abs=1e-3)
    exact = zero.clone().requires_grad_()
    end_point_error(Flows(exact, exact), Flows(zero, zero)).backward()
    assert exact.grad is not None
    assert not exact.grad.any()  # and not NaN


def test_end_point_error_leaves_out_what_a_network_padded() -> None:
    true = Flows(torch.randn(1, 2, 2, 5, 6), torch.randn(1, 2, 2, 5, 6))
    inside = Flows(*(way + 0.5 for way in true))
    padded = Flows(*(torch.nn.functional.pad(way, (0, 2, 0, 3), value=100.0) for way in inside))
    assert torch.equal(end_point_error(padded, true), end_point_error(inside, true))


def test_end_point_error_takes_half_precision() -> None:
    """The embedded clips keep their flows as float16."""
    true = Flows(*torch.full((2, 1, 1, 2, 2, 2), 300.0).half().unbind(0))
    estimated = Flows(*(way.float() + 0.25 for way in true))
    assert end_point_error(estimated, true).item() == pytest.approx(0.25 * math.sqrt(2), rel=1e-4)
