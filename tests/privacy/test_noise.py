"""The privacy generator. Statistics on the operating system's randomness: thresholds give false alarms below 1e-6."""

from __future__ import annotations

import copy
import math
import os
import pickle
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from fedsecure.errors import PrivacyError
from fedsecure.privacy.noise import PrivacyRng, SeededRng

ALARM = 1e-7


def expected_counts(samples: np.ndarray, variance: float) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected counts per integer within ±4σ, with the tails as two more cells."""
    reach = math.ceil(4 * math.sqrt(variance))
    support = np.arange(-40 * reach, 40 * reach + 1)
    mass = np.exp(-(support.astype(np.float64) ** 2) / (2 * variance))
    mass /= mass.sum()
    edges = np.clip(support, -reach, reach) + reach
    expected = np.bincount(edges, weights=mass) * len(samples)
    observed = np.bincount(np.clip(samples, -reach, reach) + reach, minlength=2 * reach + 1)
    return observed, expected


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(1), Fraction(9), Fraction(200, 3), Fraction(2500)])
def test_discrete_gaussian_has_its_probabilities(variance: Fraction) -> None:
    samples = PrivacyRng().discrete_gaussian(400_000, variance)
    observed, expected = expected_counts(samples, float(variance))
    keep = expected > 5
    chi = float((((observed - expected) ** 2) / expected)[keep].sum())
    assert stats.chi2.sf(chi, keep.sum() - 1) > ALARM


def test_the_chi_square_test_notices_three_per_cent_of_noise() -> None:
    samples = PrivacyRng().discrete_gaussian(400_000, Fraction(64) * Fraction(97, 100) ** 2)
    observed, expected = expected_counts(samples, 64.0)
    chi = float(((observed - expected) ** 2 / expected).sum())
    assert stats.chi2.sf(chi, len(expected) - 1) < ALARM


def test_big_number_decisions_give_the_same_distribution() -> None:
    samples = PrivacyRng().discrete_gaussian(4_000, Fraction(9), exact=True)
    observed, expected = expected_counts(samples, 9.0)
    keep = expected > 5
    chi = float((((observed - expected) ** 2) / expected)[keep].sum())
    assert stats.chi2.sf(chi, keep.sum() - 1) > ALARM


@pytest.mark.parametrize("variance", [Fraction(1, 3), Fraction(9), Fraction(7, 2) * 10**5, Fraction(2**42 + 1)])
def test_fast_and_exact_decisions_agree_on_the_same_bits(variance: Fraction) -> None:
    fast = SeededRng(7).discrete_gaussian(1_500, variance)
    exact = SeededRng(7).discrete_gaussian(1_500, variance, exact=True)
    assert np.array_equal(fast, exact)


def test_wide_discrete_gaussian_is_gaussian() -> None:
    n, sigma = 500_000, 2**20
    samples = PrivacyRng().discrete_gaussian(n, Fraction(sigma**2))
    assert stats.kstest(samples / sigma, "norm").pvalue > ALARM
    assert abs(samples.mean()) < 5.5 * sigma / math.sqrt(n)
    assert abs(samples.var() / sigma**2 - 1) < 5.5 * math.sqrt(2 / n)
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 5.5 / math.sqrt(n)


def test_small_top_words_and_zero_take_the_exact_path() -> None:
    """The far tail: words below 2^45 must not be decided from 64 bits alone."""
    rng, t = PrivacyRng(), 8
    for word in (0, 1, 2, 3, 2**20, 2**44):
        magnitude = rng._exact_magnitude(word, t)
        low = -t * math.log((word + 1) / 2**64)
        assert magnitude >= math.floor(low)
        if word:
            assert magnitude <= math.floor(-t * math.log(word / 2**64))
    # U in [0, 2^-64): −t ln U exceeds t·64·ln 2 and, with the next word, spreads geometrically.
    tail = [rng._exact_magnitude(0, t) for _ in range(400)]
    assert min(tail) >= math.floor(t * 64 * math.log(2))
    assert len(set(tail)) > 10


def test_exact_acceptance_follows_the_probability() -> None:
    rng = PrivacyRng()
    assert rng._exact_accept(2**64 - 1, 1, Fraction(1), 1)  # the exponent is 0: always
    chance = math.exp(-((5 - 9 / 4) ** 2) / 18)
    assert rng._exact_accept(int(chance * 2**64) - 2**14, 5, Fraction(9), 4)
    assert not rng._exact_accept(int(chance * 2**64) + 2**14, 5, Fraction(9), 4)


def test_no_noise_and_impossible_noise() -> None:
    assert not PrivacyRng().discrete_gaussian(10, Fraction(0)).any()
    assert PrivacyRng().discrete_gaussian(0, Fraction(4)).shape == (0,)
    for variance in (Fraction(-1), Fraction(2**81)):
        with pytest.raises(PrivacyError, match="FS-1210"):
            PrivacyRng().discrete_gaussian(1, variance)


def test_gaussian_is_standard_normal() -> None:
    n = 500_001
    samples = PrivacyRng().gaussian(n)
    assert samples.shape == (n,)
    assert np.isfinite(samples).all()
    assert stats.kstest(samples, "norm").pvalue > ALARM
    assert abs(samples.std() - 1) < 5.5 / math.sqrt(2 * n)
    half = 1 << 15
    assert abs(np.corrcoef(samples[:half], samples[half : 2 * half])[0, 1]) < 5.5 / math.sqrt(half)


def test_uniform_stays_off_zero() -> None:
    values = PrivacyRng().uniform(100_000)
    assert values.min() > 0
    assert values.max() <= 1
    assert stats.kstest(values, "uniform").pvalue > ALARM


@pytest.mark.parametrize("q", [0.01, 0.3, 0.9])
def test_poisson_batch_sizes_vary_as_binomial(q: float) -> None:
    """Shuffled fixed-size batches would have variance 0."""
    rng, n, draws = PrivacyRng(), 400, 3_000
    sizes = np.array([rng.poisson_mask(n, q).sum() for _ in range(draws)])
    spread = n * q * (1 - q)
    assert abs(sizes.mean() - n * q) < 5.5 * math.sqrt(spread / draws)
    assert abs(sizes.var() / spread - 1) < 6 * math.sqrt(2 / draws) + 0.01


def test_full_batch_takes_everyone_and_bad_rates_are_refused() -> None:
    assert PrivacyRng().poisson_mask(17, 1.0).all()
    for q in (0.0, 1.1, math.nan):
        with pytest.raises(PrivacyError, match="FS-1202"):
            PrivacyRng().poisson_mask(5, q)


def test_streams_differ_and_ignore_every_seed() -> None:
    np.random.seed(0)
    first = PrivacyRng().uniform_words(8)
    np.random.seed(0)
    assert not np.intersect1d(first, PrivacyRng().uniform_words(8)).size
    rng = PrivacyRng()
    assert not np.intersect1d(rng.uniform_words(1000), rng.uniform_words(1000)).size


def test_seeded_stream_is_aes_ctr_and_says_so() -> None:
    rng = SeededRng(b"site-1")
    stream = Cipher(algorithms.AES(rng._key()), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 100_000))
    words = np.concatenate([rng.uniform_words(99_990), rng.uniform_words(10)])
    assert words.tobytes() == stream
    assert SeededRng(1).seeded
    assert not PrivacyRng().seeded
    assert not np.array_equal(SeededRng(1).uniform_words(4), SeededRng(2).uniform_words(4))


@pytest.mark.parametrize("clone", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_generator_cannot_be_copied(clone: object) -> None:
    with pytest.raises(PrivacyError, match="FS-1209"):
        clone(PrivacyRng())  # type: ignore[operator]


def test_a_forked_child_gets_a_stream_of_its_own() -> None:
    rng = PrivacyRng()
    rng.uniform_words(1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, rng.uniform_words(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reader, 32), dtype=np.uint64)
    os.close(reader)
    os.close(writer)
    assert not np.intersect1d(theirs, rng.uniform_words(64)).size
