"""Counts are bounded per unit, accuracies survive noisy counts, predictions are proper distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.evaluation import COUNT_SENSITIVITY, accuracy, balanced_accuracy, counts, predict
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures


def identity_task(k: int) -> HeadTask:
    """Predicts the largest coordinate."""
    return HeadTask(AdapterSpec("linear", k, k), np.eye(k, dtype=np.float32), np.zeros(k, np.float32), 10.0)


@given(
    units=st.integers(1, 6),
    records=st.integers(1, 5),
    k=st.integers(2, 5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_one_unit_moves_the_counts_by_at_most_root_two(units: int, records: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    task = identity_task(k)
    mask = rng.random((units, records)) < 0.6
    rows = UnitFeatures(
        rng.normal(size=(units, records, k)).astype(np.float32), rng.integers(0, k, (units, records)), mask
    )
    start = task.spec.initial(b"")

    def both(which: UnitFeatures) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.concatenate(counts(task, start, which, device="cpu"))

    whole = both(rows)
    hits, totals = np.split(whole, 2)
    assert (hits <= totals + 1e-12).all()
    assert totals.sum() == pytest.approx(mask.any(1).sum())
    for row in range(units):
        moved = np.linalg.norm(whole - both(rows.select(np.arange(units) != row)))
        assert moved <= COUNT_SENSITIVITY + 1e-12


def test_the_bound_is_reached_and_fractions_are_right() -> None:
    task = identity_task(3)
    features = np.array([[[9, 0, 0], [9, 0, 0]], [[9, 0, 0], [0, 9, 0]]], np.float32)
    labels = np.array([[0, 0], [0, 0]])
    rows = UnitFeatures(features, labels, np.ones((2, 2), np.bool_))
    hits, totals = counts(task, task.spec.initial(b""), rows, device="cpu")
    assert hits.tolist() == [1.5, 0, 0]
    assert totals.tolist() == [2, 0, 0]
    first = np.concatenate(counts(task, task.spec.initial(b""), rows.select(slice(0, 1)), device="cpu"))
    assert np.linalg.norm(first) == pytest.approx(COUNT_SENSITIVITY)


def test_no_units_give_zero_counts() -> None:
    task = identity_task(3)
    none = UnitFeatures(np.zeros((0, 2, 3), np.float32), np.zeros((0, 2), np.int64), np.zeros((0, 2), np.bool_))
    hits, totals = counts(task, task.spec.initial(b""), none, device="cpu")
    assert not hits.any()
    assert not totals.any()
    assert hits.shape == totals.shape == (3,)


def test_accuracies_from_exact_and_noisy_counts() -> None:
    assert accuracy([8, 0], [10, 2]) == pytest.approx(8 / 12)
    assert balanced_accuracy([8, 0], [10, 2]) == pytest.approx(0.4)
    assert accuracy([12.5, 0], [10, 2]) == 1
    assert accuracy([-3, 0], [10, 2]) == 0
    assert balanced_accuracy([12, -1], [10, 2]) == pytest.approx(0.5)
    # a class drowned in noise is left out rather than divided by
    assert balanced_accuracy([8, 40], [10, 0.01]) == pytest.approx(0.8)
    assert balanced_accuracy([8, 1], [10, 4], floor=5) == pytest.approx(0.8)
    assert math.isnan(accuracy([0, 0], [0, -2]))
    assert math.isnan(balanced_accuracy([1, 1], [0.5, -1]))


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=9))
def test_accuracies_never_leave_their_range(pairs: list[tuple[float, float]]) -> None:
    hits, totals = zip(*pairs, strict=True)
    for value in (accuracy(hits, totals), balanced_accuracy(hits, totals)):
        assert math.isnan(value) or 0 <= value <= 1


@pytest.mark.parametrize("kind", ["linear", "facmic"])
def test_predictions_are_distributions_and_do_not_depend_on_the_scale(kind: str) -> None:
    rng = np.random.default_rng(0)
    spec = AdapterSpec(kind, 8, 3)  # type: ignore[arg-type]
    task = HeadTask(spec, rng.normal(size=(3, 8)).astype(np.float32), np.zeros(8, np.float32), 5.0)
    tensors = {n: v + rng.normal(size=v.shape).astype(np.float32) for n, v in spec.initial(b"").items()}
    features = rng.normal(size=(2500, 8))
    features[7] = np.nan
    labels, probabilities = predict(task, tensors, features, device="cpu")
    assert labels.dtype == np.int64
    assert np.allclose(probabilities.sum(1), 1)
    assert np.array_equal(labels, probabilities.argmax(1))
    assert np.allclose(probabilities[7], 1 / 3)
    again, _ = predict(task, tensors, features * 1e4, device="cpu")
    assert np.array_equal(labels, again)
    assert predict(task, tensors, features[:0], device="cpu")[1].shape == (0, 3)
    with pytest.raises(ModelError, match="FS-1638"):
        predict(task, tensors, features[:, :5], device="cpu")
