"""As ε goes to 0, training ends where it began: accuracy within one standard error of zero-shot, in every mode.

Generated features with a fixed prior of middling accuracy; the noise is seeded, so each case passes always or never.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.evaluation import accuracy, counts
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import suggest, train_locally
from fedsecure.learning.units import UnitFeatures
from fedsecure.privacy import accounting
from fedsecure.privacy.grid import distributed_segment, from_grid, privatise_on_grid, round_to_grid
from fedsecure.privacy.noise import SeededRng

K, D, SITES, HONEST, UNITS, TESTS, STEPS, CLIP = 4, 32, 3, 2, 100, 2000, 10, 0.1
TRUTH = np.linalg.qr(np.random.default_rng(9).normal(size=(D, D)))[0][:K]
PRIOR = (TRUTH + 0.9 * np.roll(TRUTH, 1, axis=0)).astype(np.float32)


def records(count: int, seed: int) -> UnitFeatures:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, (count, 1))
    features = (TRUTH[labels] + 0.2 * rng.normal(size=(count, 1, D))).astype(np.float32)
    return UnitFeatures(features, labels, np.ones((count, 1), np.bool_))


def federate(kind: Any, noise: str, epsilon: float, seed: int, *, rate: float | None = None) -> tuple[float, float]:
    """Accuracy before and after: the sites' sums on the grid with everybody's share, or their own noisy steps."""
    z = accounting.calibrate(epsilon, 1e-5, steps=STEPS)
    everybody = z * math.sqrt(SITES / HONEST) if noise == "distributed" else z * math.sqrt(SITES)
    chosen, temperature = suggest(
        kind, mu_total=math.sqrt(STEPS) / everybody, units=SITES * UNITS, classes=K, dimension=D, steps=STEPS
    )
    rate = chosen if rate is None else rate
    task = HeadTask(AdapterSpec(kind, D, K), PRIOR, np.zeros(D, np.float32), temperature)
    start = task.spec.initial(b"public")
    sites = [(records(UNITS, index), SeededRng(f"{seed}/{index}".encode())) for index in range(SITES)]
    current = task.spec.flatten(start)
    if noise == "distributed":
        segment = distributed_segment(
            "gradient", len(current), clip_norm=CLIP, noise_multiplier=z, honest=HONEST, sites=SITES, units=UNITS
        )
        for _ in range(STEPS):
            tensors = task.spec.unflatten(current)
            total = np.zeros(len(current), np.int64)
            for units, rng in sites:
                exact = clipped_sum(task, tensors, units, max_grad_norm=CLIP, device="cpu")
                total += round_to_grid(exact, segment) + rng.discrete_gaussian(len(current), segment.noise_variance)
            current = current - rate / (SITES * UNITS) * from_grid(total, segment)
    else:
        changes = [
            train_locally(
                task, start, units, steps=STEPS, learning_rate=rate, max_grad_norm=CLIP, normaliser=UNITS,
                privatise=lambda t, c, rng=rng: privatise_on_grid(t, clip_norm=c, noise_multiplier=z, rng=rng),
                sample=lambda n: np.ones(n, np.bool_), device="cpu",
            )
            for units, rng in sites
        ]  # fmt: skip
        current = current + np.mean([task.spec.flatten(change) for change in changes], axis=0)
    held_out = records(TESTS, 99)
    before, after = (
        accuracy(*counts(task, tensors, held_out, device="cpu")) for tensors in (start, task.spec.unflatten(current))
    )
    return before, after


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["distributed", "local"])
@pytest.mark.parametrize("kind", ["linear", "facmic"])
def test_without_budget_accuracy_stays_at_zero_shot(kind: Any, noise: str) -> None:
    for epsilon in (1e-3, 1e-2, 0.05):
        for seed in range(3):
            before, after = federate(kind, noise, epsilon, seed)
            assert 0.5 < before < 0.95, "room to fall, and room to rise"
            assert abs(after - before) <= math.sqrt(before * (1 - before) / TESTS), (epsilon, seed)


@pytest.mark.parametrize("noise", ["distributed", "local"])
def test_a_rate_that_ignores_the_signal_would_have_fallen(noise: str) -> None:
    before, after = federate("linear", noise, 1e-2, 0, rate=100.0)
    assert after < before - 0.1


@pytest.mark.parametrize("noise", ["distributed", "local"])
def test_with_budget_the_same_federation_learns(noise: str) -> None:
    before, after = federate("linear", noise, 8.0, 0)
    assert after > before + 0.05
