"""The statistics of one release: what one unit can move, and that they are the sums they say they are."""

from __future__ import annotations

import numpy as np
import pytest

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import AdapterSpec, Vector
from fedsecure.learning.audit_material import adversarial_units
from fedsecure.learning.moments import Moments, moment_sum, read_moments
from fedsecure.learning.task import HeadTask, unit_rows
from fedsecure.learning.units import UnitFeatures
from fedsecure.privacy.audit import check_sensitivity
from fedsecure.privacy.grid import distributed_segment, round_to_grid

D, K = 6, 3


def task(*, centred: bool) -> HeadTask:
    rng = np.random.default_rng(1)
    centre = 0.3 * rng.normal(size=D) if centred else np.zeros(D)
    return HeadTask(
        AdapterSpec("linear", D, K), rng.normal(size=(K, D)).astype(np.float32), centre.astype(np.float32), 25.0
    )


def units_of(count: int, records: int, seed: int = 0) -> UnitFeatures:
    rng = np.random.default_rng(seed)
    mask = np.arange(records) < rng.integers(1, records + 1, size=count)[:, None]
    labels = np.where(mask, rng.integers(0, K, size=(count, records)), 0)
    return UnitFeatures(rng.normal(size=(count, records, D)).astype(np.float32), labels, mask)


@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.09])
@pytest.mark.parametrize("centred", [False, True])
def test_a_whole_unit_moves_the_sum_by_at_most_one(share: float, patients: bool, centred: bool) -> None:
    """Exhaustive replay: every unit left out of all, and added to none, with rows chosen to break a clip."""
    layout = Moments(K, D, share)
    units = adversarial_units(units_of(12, 4), classes=K, patients=patients)

    def total(present: np.ndarray) -> Vector:
        return moment_sum(task(centred=centred), units.select(present), layout)

    check = check_sensitivity(total, len(units), bound=1 + 1e-9, name="moments")
    assert check.passed
    assert check.found > 0.9, "and some unit uses its whole length"

    clip = 0.1
    segment = distributed_segment(
        "statistics", layout.length, clip_norm=clip, noise_multiplier=5.0, honest=2, sites=3, units=len(units)
    )
    grid = check_sensitivity(
        lambda present: round_to_grid(clip * total(present), segment).astype(np.float64),
        len(units),
        bound=segment.bound,
        name="moments on the grid",
    )
    assert grid.passed


def test_without_the_mean_over_a_patients_records_the_replay_would_tell() -> None:
    """Positive control: a patient's records as units of their own break the bound."""
    layout = Moments(K, D)
    patients = units_of(5, 4)

    def summed(present: np.ndarray) -> Vector:
        chosen = patients.select(present)
        flat = UnitFeatures(
            chosen.features[chosen.mask][:, None],
            chosen.labels[chosen.mask][:, None],
            np.ones((int(chosen.mask.sum()), 1), np.bool_),
        )
        return moment_sum(task(centred=False), flat, layout)

    assert not check_sensitivity(summed, len(patients), bound=1 + 1e-9, name="broken").passed


@pytest.mark.parametrize("share", [0.0, 0.09])
def test_the_statistics_are_the_sums_over_records(share: float) -> None:
    head, units, layout = task(centred=True), units_of(40, 1), Moments(K, D, share)
    inputs = unit_rows(unit_rows(units.features[:, 0].astype(np.float64)) - head.centre.astype(np.float64))
    labels = units.labels[:, 0]
    found = read_moments(moment_sum(head, units, layout), layout, noise=0.0)
    np.testing.assert_allclose(found.class_sums, np.eye(K)[labels].T @ inputs, atol=1e-12)
    right = int(((inputs @ head.prior.T).argmax(axis=1) == labels).sum())
    assert found.hits == pytest.approx(right, abs=0.5)
    assert found.hits + found.misses == pytest.approx(len(units))
    if share:
        assert found.gram is not None
        np.testing.assert_allclose(found.gram, inputs.T @ inputs, atol=1e-12)
    else:
        assert found.gram is None


def test_a_unit_counts_as_its_records_mean() -> None:
    head, layout = task(centred=False), Moments(K, D, 0.09)
    one = units_of(1, 4, seed=3)
    records = [
        moment_sum(head, UnitFeatures(one.features[:, [j]], one.labels[:, [j]], one.mask[:, [j]]), layout)
        for j in range(4)
        if one.mask[0, j]
    ]
    assert len(records) > 1
    np.testing.assert_allclose(moment_sum(head, one, layout), np.mean(records, axis=0), atol=1e-12)


def test_the_noise_of_each_statistic_is_what_is_said() -> None:
    """Seeded noise through the unpacking: standard deviations within 5 of their own errors."""
    d, k, sigma = 40, 30, 2.0
    layout = Moments(k, d, 0.09)
    noise = sigma * np.random.default_rng(5).normal(size=layout.length)
    found = read_moments(noise, layout, noise=sigma)
    assert found.class_sums.std() == pytest.approx(found.class_noise, rel=5 / np.sqrt(2 * k * d))
    assert found.gram is not None
    np.testing.assert_array_equal(found.gram, found.gram.T)
    beside = found.gram[np.triu_indices(d, 1)]
    assert beside.std() == pytest.approx(found.gram_noise / np.sqrt(2), rel=5 / np.sqrt(2 * beside.size))


def test_broken_records_say_nothing_and_sites_may_be_empty() -> None:
    head, layout = task(centred=True), Moments(K, D, 0.09)
    units = units_of(4, 1)
    units.features[1, 0, 2] = np.nan
    units.features[2, 0, 0] = np.inf
    total = moment_sum(head, units, layout)
    assert np.isfinite(total).all()
    found = read_moments(total, layout, noise=0.0)
    assert found.gram is not None
    assert np.trace(found.gram) == pytest.approx(2), "two records of length 1 are left"
    np.testing.assert_array_equal(moment_sum(head, units.limit_units(0), layout), np.zeros(layout.length))
    with pytest.raises(ModelError, match="FS-1638"):
        moment_sum(head, UnitFeatures(units.features[..., :4], units.labels, units.mask), layout)


def test_the_last_bit_of_a_cosine_turns_no_count() -> None:
    """Two classes with one text tie for ever; a count of winners would flip with rounding, and with it the bound."""
    rng = np.random.default_rng(4)
    text = rng.normal(size=(K, D))
    text[1] = text[0]
    units, layout = units_of(30, 1), Moments(K, D)

    def hits(scale: float) -> float:
        rows = text.copy()
        rows[1] *= scale  # the same direction, other last bits
        head = HeadTask(AdapterSpec("linear", D, K), rows.astype(np.float32), np.zeros(D, np.float32), 25.0)
        return read_moments(moment_sum(head, units, layout), layout, noise=0.0).hits

    found = [hits(scale) for scale in (1.0, 3.0, 0.1, 7.7)]
    assert max(found) - min(found) < 0.01
