"""A head from noisy statistics: zero-shot where noise rules, the data's own where it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsecure.learning.adapters import AdapterSpec, Vector
from fedsecure.learning.moments import Moments, Statistics, moment_sum, read_moments
from fedsecure.learning.shrinkage import (
    class_signal,
    prototype_directions,
    ridge_directions,
    weight,
    zero_shot_error,
)
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures
from fedsecure.privacy.accounting import mu_for_epsilon

SHARES = [0.0, 0.09]


def head(statistics: Statistics, layout: Moments, *, units: int, noise: float) -> Vector:
    directions = prototype_directions(statistics, units=units)
    if statistics.gram is not None:
        directions = ridge_directions(directions, statistics, units=units)
    far = weight(class_signal(layout, units=units, noise=noise), zero_shot_error(statistics, units=units))
    return far * directions


def test_the_weight_grows_with_the_signal_and_with_the_priors_error() -> None:
    signals, errors = np.geomspace(1e-3, 1e3, 60), np.linspace(0, 1, 21)
    table = np.array([[weight(s, e) for e in errors] for s in signals])
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.diff(table, axis=1) >= 0).all()
    assert not table[:, 0].any(), "nothing to learn where zero-shot never errs"
    # What reaches a logit is η/s of noise beside cosines: it must vanish with the signal.
    assert max(weight(s, 1.0) / s for s in signals[signals < 0.1]) < 1e-4
    assert weight(0.0, 1.0) == 0.0


def test_noise_in_doubt_takes_zero_shot_for_right() -> None:
    def error(misses: float, noise: float) -> float:
        statistics = Statistics(np.zeros((2, 4)), None, 100 - misses, misses, noise, np.inf, noise)
        return zero_shot_error(statistics, units=100)

    assert error(40, 0.0) == pytest.approx(0.4)
    assert error(40, 1.0) < 0.4
    assert error(40, 100.0) == 0.0
    assert error(-5, 1.0) == 0.0
    assert 0 <= error(400, 1.0) <= 1


@pytest.mark.parametrize("share", SHARES)
def test_directions_have_length_one_without_noise_and_finite_length_with_it(share: float) -> None:
    layout = Moments(10, 32, share)
    rng = np.random.default_rng(0)
    for noise in (1e-6, 1.0, 1e6):
        values = 20 * rng.normal(size=layout.length) + noise * rng.normal(size=layout.length)
        statistics = read_moments(values, layout, noise=noise)
        assert np.isfinite(head(statistics, layout, units=1000, noise=noise)).all()
    silent = read_moments(np.zeros(layout.length), layout, noise=1.0)
    assert not head(silent, layout, units=1000, noise=1.0).any()


def test_the_ridge_matrix_is_positive_and_tends_to_the_identity() -> None:
    """Negative eigenvalues of a noisy Gram would turn directions round; λ(G⁺ + λI)⁻¹ only shrinks."""
    rng = np.random.default_rng(3)
    directions = rng.normal(size=(5, 12))
    half = rng.normal(size=(12, 12))
    for gram in (half @ half.T, half + half.T, -half @ half.T):
        statistics = Statistics(directions, gram, 0, 0, 1.0, 0.1, 1.0)
        turned = ridge_directions(directions, statistics, units=100)
        assert (np.einsum("kd,kd->k", turned, directions) > 0).all()
        assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(directions))
    noisy = Statistics(directions, half @ half.T, 0, 0, 1.0, 1e9, 1.0)
    np.testing.assert_allclose(ridge_directions(directions, noisy, units=100), directions, rtol=1e-6)
    negative = Statistics(directions, -half @ half.T, 0, 0, 1.0, 0.1, 1.0)
    np.testing.assert_allclose(ridge_directions(directions, negative, units=100), directions, rtol=1e-9)


def unit(rows: Vector) -> Vector:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def real(file: Path) -> tuple[HeadTask, Vector, np.ndarray, Vector, np.ndarray]:
    """A task without centring, training and validation records as one set, and test records."""
    with np.load(file, allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    inputs = unit(np.concatenate([arrays["train_x"], arrays["val_x"]]).astype(np.float64))
    labels = np.concatenate([arrays["train_y"], arrays["val_y"]])
    classes, dimension = arrays["text"].shape
    text = unit(arrays["text"].astype(np.float64)).astype(np.float32)
    task = HeadTask(AdapterSpec("linear", dimension, classes), text, np.zeros(dimension, np.float32), 25.0)
    return task, inputs, labels, unit(arrays["test_x"].astype(np.float64)), arrays["test_y"]


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["caltech", "ucf101"])
def test_never_below_zero_shot_by_more_than_a_standard_error(shared_data: Path, name: str, share: float) -> None:
    """Genuine CLIP features with a strong and a weak prior, ε from next to nothing to 8, seeded noise."""
    task, inputs, labels, test, truth = real(shared_data / f"{name}_clip_vitb32.npz")
    layout = Moments(task.spec.classes, task.spec.dimension, share)
    n = len(labels)
    units = UnitFeatures(inputs[:, None].astype(np.float32), labels[:, None], np.ones((n, 1), np.bool_))
    clean = moment_sum(task, units, layout)
    zero = task.scale / task.temperature * test @ task.prior.T
    before = float((zero.argmax(axis=1) == truth).mean())
    error = np.sqrt(before * (1 - before) / len(truth))
    rng = np.random.default_rng(17)
    for epsilon in (0.01, 0.1, 0.5, 1, 2, 4, 8):
        noise = 1 / mu_for_epsilon(epsilon, 1e-5)
        reached = []
        for _ in range(3):
            values = clean + noise * rng.normal(size=layout.length)
            added = head(read_moments(values, layout, noise=noise), layout, units=n, noise=noise)
            reached.append(float(((zero + test @ added.T).argmax(axis=1) == truth).mean()))
        assert np.mean(reached) >= before - error, f"ε = {epsilon}"
        if epsilon <= 0.01:
            assert max(abs(value - before) for value in reached) <= error
