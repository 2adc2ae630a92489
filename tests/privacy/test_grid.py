"""Grid, bound, noise share, clamp and rounding."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.errors import PrivacyError
from fedsecure.messages import Segment
from fedsecure.privacy import grid
from fedsecure.privacy.noise import PrivacyRng, SeededRng


def segment(**changes: object) -> Segment:
    base = {"clip_norm": 0.1, "noise_multiplier": 2.0, "honest": 2, "sites": 3, "units": 200}
    return grid.distributed_segment("gradient", 5120, **(base | changes))  # type: ignore[arg-type]


def test_default_grid_is_a_millionth_of_the_clip_norm() -> None:
    chosen = segment()
    assert chosen.grid == 0.1 / 2**20
    assert chosen.bound == math.ceil(2**20 * (1 + 1e-5) + math.sqrt(5120) + 64)
    assert chosen.bound / 2**20 - 1 < 2e-4
    assert chosen.clamp == 2**30 // 3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1_000_000), st.floats(1e-4, 100), st.floats(0.05, 30), st.integers(3, 100), st.integers(1, 5000))
def test_honest_sites_together_give_the_whole_noise(length: int, clip: float, z: float, sites: int, units: int) -> None:
    honest = max(1, sites // 2)
    made = grid.distributed_segment(
        "s", length, clip_norm=clip, noise_multiplier=z, honest=honest, sites=sites, units=units
    )
    assert made.noise_variance * honest >= (Fraction(z) * made.bound) ** 2
    assert float(made.noise_variance) * honest <= (z * made.bound) ** 2 * (1 + 1e-3)
    assert grid.wrap_probability_log2(made, sites) <= -40
    # A unit's clipped vector with its float32 slack, and every coordinate's rounding, fit the bound.
    assert made.bound >= clip * (1 + 1e-5) / made.grid + math.sqrt(length)
    assert grid.segment_clip_norm(made) >= clip


def test_the_grid_coarsens_until_all_units_fit_the_clamp() -> None:
    counts = grid.distributed_segment(
        "counts", 8, clip_norm=math.sqrt(2), noise_multiplier=3.0, honest=1, sites=3, units=5000
    )
    everyone_right = np.full(8, 5000.0)
    restored = grid.from_grid(grid.round_to_grid(everyone_right, counts), counts)
    assert np.abs(restored - 5000).max() < 1e-3
    finest = replace(counts, grid=math.sqrt(2) / 2**20)
    assert grid.from_grid(grid.round_to_grid(everyone_right, finest), finest).max() < 1000


def test_noise_too_large_for_the_ring_is_refused() -> None:
    assert segment(noise_multiplier=200.0).grid > segment().grid
    with pytest.raises(PrivacyError, match="FS-1206"):
        segment(noise_multiplier=1e5)


def test_wrap_bound_holds_for_what_it_allows() -> None:
    narrow = Segment("s", 10, 1.0, 100, 2**29, Fraction(2**52))
    assert grid.wrap_probability_log2(narrow, 3) == pytest.approx(
        math.log2(20) - (2**29 - 1) ** 2 / 6 / 2**52 / math.log(2)
    )
    assert grid.wrap_probability_log2(narrow, 4) == 0.0
    with pytest.raises(PrivacyError, match="FS-1206"):
        grid.check_segment(narrow, 3)


@pytest.mark.parametrize(
    "changes", [{"clip_norm": 0.0}, {"clip_norm": math.inf}, {"noise_multiplier": 0.0}, {"honest": 0}, {"honest": 4}]
)
def test_impossible_numbers_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(PrivacyError, match="FS-1211"):
        segment(**changes)


def test_noise_that_is_too_fine_or_rotated_is_refused() -> None:
    with pytest.raises(PrivacyError, match="FS-1211"):
        grid.check_segment(Segment("s", 3, 1.0, 2, 100, Fraction(99)), 3)
    with pytest.raises(PrivacyError, match="FS-1212"):
        grid.check_segment(replace(segment(), rotation_seed=bytes(32)), 3)


def test_exact_segment() -> None:
    made = grid.exact_segment("change", 7, grid=2.0**-24, sites=3)
    assert (made.bound, made.noise_variance, made.clamp) == (0, 0, 2**30 // 3)
    assert grid.exact_segment("c", 7, grid=1.0, sites=3, clamp=50).clamp == 50
    with pytest.raises(PrivacyError, match="FS-1206"):
        grid.exact_segment("c", 7, grid=1.0, sites=3, clamp=2**30)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=30))
def test_rounding_is_to_nearest_and_clamped(values: list[float]) -> None:
    made = grid.exact_segment("s", len(values), grid=2.0**-10, sites=3, clamp=1000)
    steps = grid.round_to_grid(np.array(values), made)
    assert np.abs(steps).max() <= 1000
    back = grid.from_grid(steps, made)
    inside = np.abs(values) < 1000 * made.grid
    assert (np.abs(back - values)[inside] <= made.grid / 2).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(2, 400))
def test_one_unit_moves_the_rounded_sum_by_at_most_the_bound(seed: int, length: int, units: int) -> None:
    """The sensitivity itself, on adversarial float32 contributions of norm up to C·(1 + 1e-5)."""
    made = grid.distributed_segment("s", length, clip_norm=0.1, noise_multiplier=1.0, honest=2, sites=3, units=units)
    rng = SeededRng(seed)
    vectors = rng.gaussian(units * length).reshape(units, length)
    vectors *= 0.1 * (1 + 1e-5) / np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[1] = np.sign(vectors[0]) * 0.1 / math.sqrt(length)
    with_unit = grid.round_to_grid(vectors.sum(axis=0), made)
    without = grid.round_to_grid(vectors[1:].sum(axis=0), made)
    moved = with_unit - without
    assert int((moved.astype(object) ** 2).sum()) <= made.bound**2


def test_bad_values_are_refused() -> None:
    made = grid.exact_segment("s", 3, grid=1.0, sites=3)
    with pytest.raises(PrivacyError, match="FS-1208"):
        grid.round_to_grid(np.zeros(4), made)
    for bad in (math.nan, math.inf):
        with pytest.raises(PrivacyError, match="FS-1207"):
            grid.round_to_grid(np.array([0.0, bad, 0.0]), made)
        with pytest.raises(PrivacyError, match="FS-1207"):
            grid.privatise_on_grid(np.array([bad]), clip_norm=1.0, noise_multiplier=1.0, rng=PrivacyRng())


def test_local_noise_has_its_width_and_a_data_independent_support() -> None:
    n = 200_000
    values = SeededRng(3).gaussian(n) * 0.05
    private = grid.privatise_on_grid(values, clip_norm=0.1, noise_multiplier=1.5, rng=PrivacyRng())
    steps = private / (0.1 / 2**24)
    assert np.abs(steps - np.rint(steps)).max() < 1e-6
    noise = private - values
    assert abs(noise.std() / 0.15 - 1) < 5.5 / math.sqrt(2 * n) + 1e-4
    assert abs(noise.mean()) < 5.5 * 0.15 / math.sqrt(n)


def test_distributed_noise_adds_up_to_the_promised_multiplier() -> None:
    made = grid.distributed_segment("s", 100_000, clip_norm=1.0, noise_multiplier=2.0, honest=2, sites=3, units=10)
    two = sum(PrivacyRng().discrete_gaussian(made.length, made.noise_variance) for _ in range(2))
    assert np.std(two) / made.bound == pytest.approx(2.0, rel=5.5 / math.sqrt(2 * made.length))
