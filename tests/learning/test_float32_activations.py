"""Activations in float32: as good as Opacus in float64, and as strictly one record's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsecure.learning import closed_form, engines
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.narrow import BLOCK, NARROW
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures


def case(
    seed: int, *, units: int, records: int, d: int, k: int, public: bool = False
) -> tuple[HeadTask, dict[str, Any], UnitFeatures]:
    """FACMIC's module; with ``public`` it is normalised by public images in place of LayerNorm."""
    rng = np.random.default_rng(seed)
    spec = AdapterSpec("facmic_plain" if public else "facmic", d, k)
    centre = (0.1 / np.sqrt(d) * rng.normal(size=d) * rng.integers(2)).astype(np.float32)
    task = HeadTask(spec, rng.normal(size=(k, d)).astype(np.float32), centre, float(rng.uniform(1, 30)))
    start = {n: v + 0.3 / np.sqrt(d) * rng.normal(size=v.shape) for n, v in spec.initial(b"start").items()}
    mask = rng.random((units, records)) < 0.7
    features = rng.normal(size=(units, records, d)).astype(np.float32)
    if public:
        task = replace(task, public=rng.normal(size=(20, d)).astype(np.float32))
    return task, start, UnitFeatures(features, rng.integers(0, k, (units, records)), mask)


def single(task: HeadTask, start: dict[str, Any], units: UnitFeatures, clip: float, **options: Any) -> Any:
    return clipped_sum(task, start, units, max_grad_norm=clip, device="cpu", precision="float32", **options)


def emptied(units: UnitFeatures, row: int) -> UnitFeatures:
    """The same places, one of them empty."""
    mask = units.mask.copy()
    mask[row] = False
    return UnitFeatures(units.features, units.labels, mask)


def movements(
    task: HeadTask, start: dict[str, Any], units: UnitFeatures, clip: float, rows: Iterable[int]
) -> list[float]:
    """How far the sum moves when each of these units is emptied."""
    whole = single(task, start, units, clip)
    return [float(np.linalg.norm(whole - single(task, start, emptied(units, row), clip))) for row in rows]


@pytest.mark.slow
def test_two_hundred_random_cases_agree_with_opacus() -> None:
    worst = 0.0
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        sizes = {"units": int(rng.integers(0, 40)), "records": int(rng.integers(1, 4)), "d": int(rng.integers(8, 48))}
        task, start, units = case(seed, k=int(rng.integers(2, 9)), public=seed % 2 == 1, **sizes)
        clip = float(rng.choice([0.01, 0.1, 1.0]))
        ours = single(task, start, units, clip)
        opacus = single(task, start, units, clip, engine="opacus")
        worst = max(worst, float(np.linalg.norm(ours - opacus)) / max(float(np.linalg.norm(opacus)), 1e-12))
    assert 1e-9 < worst <= 1e-5, "not float32 at all, or too far off"


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("records", [1, 3])
def test_one_unit_moves_the_sum_by_at_most_c_even_where_rounding_is_blown_up(records: int, public: bool) -> None:
    """Beside such a bias, another unit's gradient would turn about if its last bits followed the batch's shape."""
    task, start, units = case(4, units=150, records=records, d=32, k=5, public=public)
    start["b1"] = np.full(32, 1e7)
    units.mask[:, 0] = True
    clip = 0.01
    whole = single(task, start, units, clip)
    double = clipped_sum(task, start, units, max_grad_norm=clip, device="cpu")
    assert np.linalg.norm(whole - double) > clip, "the control: rounding alone moves this sum by more than C"
    moved = movements(task, start, units, clip, range(12))
    assert max(moved) <= clip
    assert max(moved) >= clip * (NARROW if records == 1 else 1) * (1 - 1e-3)


def equal_records(d: int) -> tuple[HeadTask, dict[str, Any], UnitFeatures]:
    """All gradients are one vector, clipped: in float32 each addition rounds in the same direction."""
    task, start, _ = case(11, units=1, records=1, d=d, k=3)
    features = np.broadcast_to(np.random.default_rng(5).normal(size=d).astype(np.float32), (300, 1, d)).copy()
    return task, start, UnitFeatures(features, np.zeros((300, 1), np.int64), np.ones((300, 1), np.bool_))


def uneven_records(d: int) -> tuple[HeadTask, dict[str, Any], UnitFeatures]:
    """Gradients from far below to far above the clip norm, some that cannot be taken at all."""
    task, start, units = case(12, units=300, records=1, d=d, k=3)
    units.mask[:] = True
    units.features[::7] = np.nan
    units.features[3] = np.finfo(np.float32).max
    start["b2"] = np.where(np.arange(d) % 2, 30.0, -30.0)
    return task, start, units


def publicly_normalised(d: int) -> tuple[HeadTask, dict[str, Any], UnitFeatures]:
    """Records beside the public images and far from them."""
    task, start, units = case(14, units=300, records=1, d=d, k=3, public=True)
    units.mask[:] = True
    units.features[::5] *= 1e4
    return task, start, units


def extreme_layers(d: int) -> tuple[HeadTask, dict[str, Any], UnitFeatures]:
    """Activations as large as the aggregator likes, before a layer as small: one factor overflows, another vanishes."""
    task, start, units = case(13, units=300, records=1, d=d, k=3)
    units.mask[:] = True
    start["gamma"], start["W2"] = np.full(d, 1e18), start["W2"] * 1e-20
    return task, start, units


def all_the_same(d: int) -> tuple[HeadTask, dict[str, Any], UnitFeatures]:
    """The same with numbers beyond what float32 holds."""
    task, start, units = extreme_layers(d)
    start["gamma"], start["W2"] = np.full(d, 1e30), start["W2"] * 1e-18
    return task, start, units


MAKERS = (equal_records, uneven_records, publicly_normalised, extreme_layers, all_the_same)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("clip", [1e-3, 1.0])
def test_a_record_moves_a_float32_sum_by_at_most_c(make: Callable[[int], Any], clip: float) -> None:
    task, start, units = make(32)
    assert closed_form.ClippedSums(
        task, units, device=torch.device("cpu"), chunk=512, precision="float32", narrow=True
    ).narrow
    # Of the first block, its border, and the second.
    moved = movements(task, start, units, clip, [0, 1, 3, 7, 100, 254, 255, 256, 257, 299])
    assert max(moved) <= clip


def test_a_clip_without_room_for_rounding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    task, start, units = equal_records(32)
    clip = 1e-3
    assert max(movements(task, start, units, clip, [0, 1])) >= 0.99 * clip
    monkeypatch.setattr(engines, "NARROW", 1.0005)
    assert max(movements(task, start, units, clip, [0, 1])) > clip


def test_a_float32_block_errs_by_less_than_its_room() -> None:
    """‖float32 sum − float64 sum‖ of a whole block stays below γ·K·C′, and is not float64's."""
    task, start, units = equal_records(32)
    block = units.select(slice(0, BLOCK))
    exact = clipped_sum(task, start, block, max_grad_norm=NARROW, device="cpu")
    worst = float(np.linalg.norm(single(task, start, block, 1.0) - exact))
    assert 1e-7 < worst < (1 - NARROW) / 2


@pytest.mark.slow
def test_the_room_depends_on_public_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose rows do not stand alone clips to the same C′, in float64."""
    task, start, units = case(7, units=20, records=1, d=16, k=3)
    units.mask[:] = True
    narrow = single(task, start, units, 1e-3)
    monkeypatch.setattr(closed_form, "_rows_stand_alone", lambda *_: False)
    wide = single(task, start, units, 1e-3)
    assert 0 < np.linalg.norm(wide - narrow) <= 1e-5 * np.linalg.norm(wide)
    assert np.array_equal(wide, clipped_sum(task, start, units, max_grad_norm=1e-3 * NARROW, device="cpu"))
    opacus = single(task, start, units, 1e-3, engine="opacus")
    assert np.linalg.norm(wide - opacus) <= 1e-9 * np.linalg.norm(wide)


def test_a_linear_head_sums_in_float32_too() -> None:
    rng = np.random.default_rng(3)
    spec = AdapterSpec("linear", 24, 4)
    task = HeadTask(spec, rng.normal(size=(4, 24)).astype(np.float32), np.zeros(24, np.float32), 20.0)
    start = {"D": 0.1 * rng.normal(size=(4, 24))}
    features, labels = rng.normal(size=(300, 1, 24)).astype(np.float32), rng.integers(0, 4, (300, 1))
    units = UnitFeatures(features, labels, np.ones((300, 1), np.bool_))
    exact = clipped_sum(task, start, units, max_grad_norm=0.05 * NARROW, device="cpu")
    found = single(task, start, units, 0.05)
    assert 1e-9 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-5
    moved = movements(task, start, units, 0.05, [0, 17, 255, 256])
    assert 0.9 * 0.05 * NARROW < max(moved) <= 0.05


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
    task, start, units = case(7, units=20, records=2, d=16, k=3)
    double = clipped_sum(task, start, units, max_grad_norm=0.1, device="cpu")
    assert not np.array_equal(single(task, start, units, 0.1), double)
    monkeypatch.setattr(closed_form, "_rows_stand_alone", lambda *_: False)
    assert np.array_equal(single(task, start, units, 0.1), double)


@pytest.mark.parametrize("kind", ["facmic", "facmic_plain"])
def test_rows_that_lean_on_their_neighbours_are_noticed(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, device = AdapterSpec(kind, 24, 3), torch.device("cpu")
    check = closed_form._rows_stand_alone.__wrapped__
    sound = closed_form.BACKWARD[kind]

    def leaning(inputs: torch.Tensor, *rest: Any) -> Any:
        return sound(inputs + 1e-7 * inputs.mean(0), *rest)

    def by_place(inputs: torch.Tensor, *rest: Any) -> Any:
        return sound(torch.cat([inputs[:64], inputs[64:] * (1 + 2**-22)]), *rest)

    for faulty in (leaning, by_place):
        monkeypatch.setitem(closed_form.BACKWARD, kind, faulty)
        assert not check(spec, 256, device, 1)
