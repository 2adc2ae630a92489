"""The audit on shared noise and on both rings: sums of several sites' discrete noise, and records rounded one by one.

Every generator is seeded; z-tests fail at 4.5 as in an audit, so a sound mechanism with fresh randomness would fail
about once in 30,000 runs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedsecure.messages import Event, Segment
from fedsecure.privacy import accounting
from fedsecure.privacy.audit import CanaryClaim, audit_canaries, check_noise, check_sensitivity
from fedsecure.privacy.grid import distributed_segment, round_to_grid
from fedsecure.privacy.noise import PrivacyRng, SeededRng
from fedsecure.privacy.ring16 import ring16_segment, round_records, sum_records

LENGTH, HONEST, SITES, Z, STEPS, DELTA = 2048, 2, 3, 3.0, 4, 1e-5
SEED = bytes(range(32))


def wide() -> Segment:
    return distributed_segment("v", LENGTH, clip_norm=1.0, noise_multiplier=Z, honest=HONEST, sites=SITES, units=LENGTH)


def narrow() -> Segment:
    return ring16_segment(
        "v", LENGTH, clip_norm=1.0, noise_multiplier=Z, honest=HONEST, sites=SITES, units=1,
        rotation_seed=SEED, rounding="record",
    )  # fmt: skip


def shares(segment: Segment, rngs: list[PrivacyRng]) -> Any:
    return sum(rng.discrete_gaussian(segment.length, segment.noise_variance) for rng in rngs)


def sites(seed: int, count: int) -> list[PrivacyRng]:
    return [SeededRng(f"site {seed}/{index}".encode()) for index in range(count)]


@pytest.mark.parametrize("make", [wide, narrow], ids=["32 bits", "16 bits"])
@pytest.mark.parametrize(("count", "sound"), [(HONEST, True), (HONEST - 1, False)])
def test_the_honest_sites_noise_is_what_is_claimed_and_that_of_fewer_is_not(make: Any, count: int, sound: bool) -> None:
    segment = make()
    rngs = {client: sites(client, count) for client in (0, 1)}
    checks = check_noise(
        lambda client, step: shares(segment, rngs[client]).astype(np.float64) / segment.bound, std=Z, values=1 << 17
    )
    failed = {check.name for check in checks if not check.passed}
    assert failed == set() if sound else "noise: standard deviation, z" in failed


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("count", "sound"), [(HONEST, True), (HONEST - 1, False)])
def test_canaries_in_a_sum_of_sites(seed: int, count: int, sound: bool) -> None:
    """Each canary is a unit of the first site along a coordinate of its own; the others send noise alone."""
    segment = wide()
    claim = CanaryClaim(
        accounting.epsilon((Event("train", "audit", Z, Z, 1.0, STEPS),), delta=DELTA), DELTA,
        Z * segment.bound * segment.grid, 1.0, STEPS,
    )  # fmt: skip
    rngs = sites(seed, count)

    def observe(included: Any) -> Any:
        steps = round_to_grid(included.astype(np.float64), segment)
        return np.stack([(steps + shares(segment, rngs)) * segment.grid for _ in range(STEPS)])

    checks, bounds = audit_canaries(observe, count=LENGTH, claim=claim, rng=SeededRng(seed))
    assert all(check.passed for check in checks) == sound
    assert all(bound.passed for bound in bounds) or not sound


def unit_rows(count: int, length: int, seed: int) -> Any:
    rows = np.random.default_rng(seed).normal(size=(count, length))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_record_moves_the_sum_of_rounded_records_by_no_more_than_the_bound() -> None:
    """Noise frozen: each record is rounded on a stream of its own, so leaving one out changes nothing else."""
    segment = narrow()
    rows = unit_rows(12, LENGTH, 0)
    rows[0] = 0.0
    rows[0, 7] = 1.0
    rows[1] = 1 / math.sqrt(LENGTH)
    rows[2] = -rows[3]

    def total(present: Any, scale: float = 1.0) -> Any:
        parts = [
            round_to_grid(sum_records(scale * rows[[i]], segment, rng=SeededRng(i)), segment)
            for i in np.flatnonzero(present)
        ]
        return np.sum([np.zeros(LENGTH, np.int64), *parts], axis=0).astype(np.float64)

    check = check_sensitivity(total, 12, bound=segment.bound, name="records")
    assert check.passed
    assert check.found > 0.95 * segment.bound, "rows that never reach the bound would prove nothing"
    # A record longer than its clip norm is cut to the bound; a plain rounded sum would let it through.
    assert check_sensitivity(lambda p: total(p, 3.0), 12, bound=segment.bound, name="too long").passed
    careless = check_sensitivity(
        lambda p: np.rint(3.0 * rows[p].sum(axis=0) / segment.grid), 12, bound=segment.bound, name="careless"
    )
    assert not careless.passed


@pytest.mark.parametrize(("rounding", "sound"), [("stochastic", True), ("downwards", False)])
def test_rounding_of_records_adds_no_bias(rounding: str, sound: bool) -> None:
    """20,000 copies of one record: each coordinate's mean is the record's own, within 6 standard errors."""
    record = unit_rows(1, 64, 3)[0] * 400
    copies = np.tile(record, (20_000, 1))
    rounded = round_records(copies, bound=500, rng=SeededRng(1)) if sound else np.floor(copies)
    below = record - np.floor(record)
    error = np.sqrt(np.maximum(below * (1 - below), 1e-12) / len(copies))
    # Rounded rows within the bound are kept as drawn, so there is no bias from drawing again.
    assert int((rounded.astype(np.int64) ** 2).sum(axis=1).max()) <= 500**2
    assert bool((np.abs(rounded.mean(axis=0) - record) < 6 * error + 1e-9).all()) == sound
