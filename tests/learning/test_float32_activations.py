"""Activations in float32: as good as Opacus in float64, and as strictly one record's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsecure.learning import closed_form
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures


def case(seed: int, *, units: int, records: int, d: int, k: int) -> tuple[HeadTask, dict[str, Any], UnitFeatures]:
    rng = np.random.default_rng(seed)
    spec = AdapterSpec("facmic", d, k)
    centre = (0.1 / np.sqrt(d) * rng.normal(size=d) * rng.integers(2)).astype(np.float32)
    task = HeadTask(spec, rng.normal(size=(k, d)).astype(np.float32), centre, float(rng.uniform(1, 30)))
    start = {n: v + 0.3 / np.sqrt(d) * rng.normal(size=v.shape) for n, v in spec.initial(b"start").items()}
    mask = rng.random((units, records)) < 0.7
    features = rng.normal(size=(units, records, d)).astype(np.float32)
    return task, start, UnitFeatures(features, rng.integers(0, k, (units, records)), mask)


def single(task: HeadTask, start: dict[str, Any], units: UnitFeatures, clip: float) -> Any:
    return clipped_sum(task, start, units, max_grad_norm=clip, device="cpu", precision="float32")


@pytest.mark.slow
def test_two_hundred_random_cases_agree_with_opacus() -> None:
    worst = 0.0
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        sizes = {"units": int(rng.integers(0, 40)), "records": int(rng.integers(1, 4)), "d": int(rng.integers(8, 48))}
        task, start, units = case(seed, k=int(rng.integers(2, 9)), **sizes)
        clip = float(rng.choice([0.01, 0.1, 1.0]))
        ours = single(task, start, units, clip)
        opacus = clipped_sum(task, start, units, max_grad_norm=clip, engine="opacus", device="cpu")
        worst = max(worst, float(np.linalg.norm(ours - opacus)) / max(float(np.linalg.norm(opacus)), 1e-12))
    assert 1e-9 < worst <= 1e-5, "not float32 at all, or too far off"


@pytest.mark.parametrize("records", [1, 3])
def test_one_unit_moves_the_sum_by_at_most_c_even_where_rounding_is_blown_up(records: int) -> None:
    """Beside such a bias, another unit's gradient would turn about if its last bits followed the batch's shape."""
    task, start, units = case(4, units=150, records=records, d=32, k=5)
    start["b1"] = np.full(32, 1e7)
    units.mask[:, 0] = True
    clip = 0.01
    whole = single(task, start, units, clip)
    double = clipped_sum(task, start, units, max_grad_norm=clip, device="cpu")
    assert np.linalg.norm(whole - double) > clip, "the control: rounding alone moves this sum by more than C"
    moved = []
    for row in range(12):
        without = single(task, start, units.select(np.arange(150) != row), clip)
        moved.append(float(np.linalg.norm(whole - without)))
    assert max(moved) <= clip
    assert max(moved) >= clip * (1 - 2e-5)


def test_float32_without_onednn_is_float32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    task, start, units = case(5, units=20, records=2, d=16, k=3)
    double = clipped_sum(task, start, units, max_grad_norm=0.1, device="cpu")
    found = []
    for available in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda available=available: available)
        found.append(single(task, start, units, 0.1))
    for total in found:
        assert 0 < np.linalg.norm(total - double) <= 1e-5 * np.linalg.norm(double)


def test_where_rows_do_not_stand_alone_activations_are_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    task, start, units = case(7, units=20, records=1, d=16, k=3)
    double = clipped_sum(task, start, units, max_grad_norm=0.1, device="cpu")
    assert not np.array_equal(single(task, start, units, 0.1), double)
    monkeypatch.setattr(closed_form, "_rows_stand_alone", lambda *_: False)
    assert np.array_equal(single(task, start, units, 0.1), double)


def test_rows_that_lean_on_their_neighbours_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, device = AdapterSpec("facmic", 24, 3), torch.device("cpu")
    check = closed_form._rows_stand_alone.__wrapped__
    sound = closed_form.BACKWARD["facmic"]

    def leaning(inputs: torch.Tensor, *rest: Any) -> Any:
        return sound(inputs + 1e-7 * inputs.mean(0), *rest)

    def by_place(inputs: torch.Tensor, *rest: Any) -> Any:
        return sound(torch.cat([inputs[:64], inputs[64:] * (1 + 2**-22)]), *rest)

    for faulty in (leaning, by_place):
        monkeypatch.setitem(closed_form.BACKWARD, "facmic", faulty)
        assert not check(spec, 256, device, 1)
