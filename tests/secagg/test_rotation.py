"""The public rotation: orthogonal and invertible at every length, the same everywhere, and it spreads a spike."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.privacy.rotation import BLOCK, Rotation, rotation

SEED = bytes(range(32))


@settings(max_examples=150, deadline=None)
@given(length=st.integers(1, 5000), seed=st.binary(min_size=32, max_size=32), scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_norms_stay_and_the_inverse_undoes_it(length: int, seed: bytes, scale: float) -> None:
    turn = Rotation(seed, length)
    values = np.random.default_rng(length).normal(size=length) * scale
    kept = values.copy()
    turned = turn.forward(values)
    assert turned.shape == values.shape
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(values), rel=1e-12)
    np.testing.assert_allclose(turn.inverse(turned), values, rtol=0, atol=1e-12 * scale * np.sqrt(length))
    np.testing.assert_allclose(turn.forward(turn.inverse(values)), values, rtol=0, atol=1e-12 * scale * np.sqrt(length))
    np.testing.assert_array_equal(values, kept)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100, 1023, 1024, 1025, 1500])
def test_the_whole_matrix_is_orthogonal(length: int) -> None:
    matrix = Rotation(SEED, length).forward(np.eye(length))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(length), atol=1e-12)


def test_rows_are_turned_as_they_would_be_alone() -> None:
    turn = Rotation(SEED, 1500)
    rows = np.random.default_rng(0).normal(size=(3, 2, 1500))
    np.testing.assert_array_equal(turn.forward(rows)[1, 1], turn.forward(rows[1, 1].copy()))
    np.testing.assert_array_equal(turn.inverse(rows)[2, 0], turn.inverse(rows[2, 0].copy()))


def test_the_map_is_frozen() -> None:
    """Order and signs as first released: an aggregator and a site of different versions must agree."""
    values = np.arange(1.0, 2501.0)
    # Whole numbers times 32 are exact in float64 whatever the order of summation.
    exact = np.rint(Rotation(SEED, 1024).forward(np.arange(1.0, 1025.0)) * 32).astype("<i8")
    assert hashlib.sha256(exact.tobytes()).hexdigest() == DIGEST_1024
    exact = np.rint(Rotation(SEED, 2500).forward(values) * 1024).astype("<i8")
    assert hashlib.sha256(exact.tobytes()).hexdigest() == DIGEST_2500


DIGEST_1024 = "9241b0ef99260fe8e55906c851e7e8b0a2c203d8cabc4d476e3950c19c798788"
DIGEST_2500 = "8286306e1bb4b43618f6cc4196e9cf11e13259688ce8f3508125baa459f082ed"


def test_another_seed_is_another_rotation() -> None:
    values = np.ones(3000)
    one, other = (Rotation(hashlib.sha256(bytes([k])).digest(), 3000).forward(values) for k in (0, 1))
    assert abs(one @ other) / 3000 < 0.2
    assert rotation(SEED, 3000) is rotation(SEED, 3000)


@pytest.mark.parametrize("length", [1024, 4096, 10_000])
def test_a_spike_and_a_constant_are_spread(length: int) -> None:
    """What the ring of 16 bits needs: no coordinate far above the average."""
    turn = Rotation(SEED, length)
    spike = np.zeros(length)
    spike[17] = 1.0
    assert np.abs(turn.forward(spike)).max() <= 2.0 / np.sqrt(BLOCK)
    constant = np.full(length, 1 / np.sqrt(length))
    # Without signs the constant would stand in one coordinate of each block; with them it looks Gaussian.
    assert np.abs(turn.forward(constant)).max() < 6 / np.sqrt(length)


def test_order_mixes_neighbours_over_all_blocks() -> None:
    """A run of 1,024 large neighbours is spread over the blocks evenly, not left in one."""
    length = 64 * BLOCK
    values = np.zeros(length)
    values[:BLOCK] = 1.0
    energy = (Rotation(SEED, length).forward(values).reshape(64, BLOCK) ** 2).sum(axis=1)
    assert energy.sum() == pytest.approx(BLOCK)
    assert energy.max() < 3 * BLOCK / 64
