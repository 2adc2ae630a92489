"""Discrete noise against the continuous Gaussian it is charged as: exact sums over the lattice, no simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedsecure.messages import FloatArray
from fedsecure.privacy import accounting, renyi


def lattice(std: float, reach: int) -> FloatArray:
    """Probabilities of a discrete Gaussian at −reach … reach."""
    points = np.arange(-reach, reach + 1)
    weights = np.exp(-(points**2) / (2 * std**2))
    return np.asarray(weights / math.fsum(weights))


def exact_divergence(order: float, p: FloatArray, q: FloatArray) -> float:
    inside = (p > 0) & (q > 0)
    terms = np.exp(order * np.log(p[inside]) + (1 - order) * np.log(q[inside]))
    return math.log(math.fsum(terms)) / (order - 1)


@pytest.mark.parametrize("rate", [1.0, 0.3, 0.02])
@pytest.mark.parametrize("sites", [1, 3])
def test_a_sum_of_discrete_gaussians_diverges_no_more_than_the_bound(rate: float, sites: int) -> None:
    std, shift = 4.0, 5
    alone = lattice(std, 60)
    total = alone
    for _ in range(sites - 1):
        total = np.convolve(total, alone)
    absent = np.concatenate([total, np.zeros(shift)])
    present = (1 - rate) * absent + rate * np.concatenate([np.zeros(shift), total])
    z = std * math.sqrt(sites) / shift
    bounds = dict(zip(renyi.ORDERS, renyi.divergence([(z, rate, 1)]), strict=True))
    slack = 10.0 ** renyi.sum_slack_log10(std, sites=sites, length=1)
    assert slack < 1e-60
    for order in (2, 3, 5):
        one, other = exact_divergence(order, present, absent), exact_divergence(order, absent, present)
        # The support is cut at 15 standard deviations; what is lost there is below 1e-13 at these orders.
        assert max(one, other) <= bounds[order] * (1 + 1e-12)
        assert one >= bounds[order] * (1 - 1e-6), "the bound is tight for one unit in one coordinate"


def test_noise_that_is_too_fine_is_found_out() -> None:
    """Positive control: a lattice of two steps a standard deviation has a sum that is no discrete Gaussian."""
    assert renyi.sum_slack_log10(0.4, sites=3, length=526_336) > 0
    assert renyi.sum_slack_log10(256.0, sites=1000, length=10**9) < -280_000


def test_a_discrete_gaussian_is_a_rounded_continuous_one() -> None:
    """Noise of variance σ² − 4, rounded by a discrete Gaussian of standard deviation 2, is the discrete Gaussian."""
    std, fine = 12.0, 2.0
    points = np.arange(-150, 151)
    grid = np.linspace(-150, 150, 300 * 16 + 1)
    wide = math.sqrt(std**2 - fine**2)
    density = np.exp(-(grid**2) / (2 * wide**2)) / (wide * math.sqrt(2 * math.pi)) * (grid[1] - grid[0])
    kernel = np.exp(-((points[:, None] - grid[None, :]) ** 2) / (2 * fine**2))
    rounded = (kernel / kernel.sum(axis=0)) @ density
    inner = np.abs(points) <= 90
    ratio = rounded[inner] / lattice(std, 150)[inner]
    # e^±τ is 1 to the last bit; what is left is the rounding of sums of a few hundred terms.
    assert np.abs(ratio - 1).max() < 1e-12


@pytest.mark.parametrize("z", [0.7, 1.5, 4.0])
def test_the_exact_gaussian_bounds_the_lattice_with_the_stated_slack(z: float) -> None:
    std = 256
    shift = round(std / z)
    points = np.arange(-20 * std, 20 * std + 1)
    noise = lattice(std, 20 * std)
    moved = np.exp(-((points - shift) ** 2) / (2 * std**2)) / math.fsum(np.exp(-(points**2) / (2 * std**2)))
    mu = shift / std
    assert accounting.LATTICE_SLACK < 3.1e-5
    for eps in (0.1, 0.5, 1.0, 2.0, 4.0):
        exact = math.fsum(np.maximum(moved - math.exp(eps) * noise, 0.0))
        bound = accounting.gaussian_delta(mu * (1 + accounting.LATTICE_SLACK), eps)
        if bound > 1e-12:
            assert exact <= bound * (1 + 1e-9)
            assert exact >= bound * 0.98
