"""Units' clipped vectors one by one: the terms of the clipped sum, and their rounding in the ring of 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fedsecure.learning import audit_narrow
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.audit_material import CLIP
from fedsecure.learning.audit_narrow import replay_narrow
from fedsecure.learning.engines import EngineName, clipped_sum, clipped_units
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures

CLASSES, DIMENSION, UNITS = 3, 16, 12
ENGINES: tuple[EngineName, ...] = ("closed-form", "opacus")


def task_of(kind: Any) -> HeadTask:
    rng = np.random.default_rng(0)
    text = rng.normal(size=(CLASSES, DIMENSION)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return HeadTask(AdapterSpec(kind, DIMENSION, CLASSES), text, np.zeros(DIMENSION, np.float32), temperature=25.0)


def units_of(records: int) -> UnitFeatures:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(UNITS, records, DIMENSION)).astype(np.float32)
    mask = rng.random((UNITS, records)) < 0.7
    mask[:, 0] = True
    mask[-1] = False  # a unit without records
    return UnitFeatures(features, rng.integers(0, CLASSES, (UNITS, records)), mask)


@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["linear", "facmic"])
def test_they_add_up_to_the_clipped_sum_and_none_is_longer_than_c(kind: str, engine: EngineName, records: int) -> None:
    task, units = task_of(kind), units_of(records)
    start = task.spec.initial(b"x")
    how: Any = {"max_grad_norm": CLIP, "engine": engine, "device": "cpu"}
    rows = np.array(list(clipped_units(task, start, units, **how)))
    assert rows.shape == (UNITS, task.spec.parameters)
    assert (np.linalg.norm(rows, axis=1) <= CLIP).all()
    assert np.linalg.norm(rows, axis=1).max() > 0.99 * CLIP
    assert rows[:-1].any(axis=1).all()
    assert not rows[-1].any()
    np.testing.assert_allclose(rows.sum(axis=0), clipped_sum(task, start, units, **how), atol=1e-6 * CLIP)
    others = UnitFeatures(units.features[::-1].copy(), units.labels[::-1].copy(), units.mask[::-1].copy())
    again = np.array(list(clipped_units(task, start, others, **how)))
    np.testing.assert_array_equal(again[::-1], rows)


def test_nobody_is_nothing() -> None:
    task = task_of("linear")
    assert not list(clipped_units(task, task.spec.initial(b"x"), units_of(1).limit_units(0), max_grad_norm=CLIP))


@pytest.mark.parametrize("records", [1, 3])
def test_the_replay_finds_a_units_share_within_the_bound(records: int) -> None:
    task = task_of("linear")
    checks = list(replay_narrow(task, task.spec.initial(b"x"), units_of(records), sites=3, unit="u"))
    assert [check.name for check in checks] == [f"sensitivity in the ring of 16 bits: u, {e}" for e in ENGINES]
    assert all(check.passed and check.found > 0.9 * check.limit for check in checks)


def test_the_replay_catches_units_that_are_not_cut_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("linear")

    def unclipped(*arguments: Any, max_grad_norm: float, **options: Any) -> Iterator[Any]:
        return clipped_units(*arguments, max_grad_norm=3 * max_grad_norm, **options)

    def uncut(rows: Any, *, bound: int, rng: Any) -> Any:
        return np.rint(rows).astype(np.int64)

    monkeypatch.setattr(audit_narrow, "clipped_units", unclipped)
    # The exact check of every rounded unit still holds the bound where the clip does not.
    assert next(replay_narrow(task, task.spec.initial(b"x"), units_of(1), sites=3, unit="u")).passed
    monkeypatch.setattr("fedsecure.privacy.ring16.round_records", uncut)
    assert not next(replay_narrow(task, task.spec.initial(b"x"), units_of(1), sites=3, unit="u")).passed
