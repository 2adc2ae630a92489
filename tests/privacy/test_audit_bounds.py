"""The audit's statistics: bounds hold at their confidence, find what is there, and know the textbook values."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsecure.messages import Event
from fedsecure.privacy import accounting
from fedsecure.privacy.audit_bounds import (
    clopper_pearson,
    gaussian_epsilon,
    membership_attack,
    one_run_epsilon,
    one_run_p_value,
    rates_epsilon,
)


def groups(mu: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    included = rng.random(count) < 0.5
    return rng.normal(size=count) + mu * included, included


def test_clopper_pearson_is_the_textbooks() -> None:
    for successes, trials in ((5, 10), (0, 20), (20, 20), (3, 1000)):
        found = clopper_pearson(successes, trials, risk=0.025)
        expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="exact")
        assert found == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_one_run_p_value_without_delta_is_a_binomial_tail() -> None:
    right = Fraction(1, 1) / (1 + 1)
    exact = sum(Fraction(math.comb(20, v)) * right**20 for v in range(15, 21))
    assert one_run_p_value(100, 20, 15, eps=0.0, delta=0.0) == pytest.approx(float(exact), rel=1e-12)


@given(
    canaries=st.integers(20, 5000),
    share=st.floats(0.01, 1),
    luck=st.floats(0, 1),
    eps=st.floats(0, 8),
    delta=st.sampled_from([0.0, 1e-6, 1e-3]),
)
@settings(max_examples=80, deadline=None)
def test_one_run_p_value_rises_with_what_is_claimed(
    canaries: int, share: float, luck: float, eps: float, delta: float
) -> None:
    guesses = max(1, int(canaries * share))
    correct = int(guesses * luck)
    value = one_run_p_value(canaries, guesses, correct, eps=eps, delta=delta)
    assert 0 <= value <= 1
    assert value <= one_run_p_value(canaries, guesses, correct, eps=eps + 0.5, delta=delta) + 1e-12
    assert value <= one_run_p_value(canaries, guesses, correct, eps=eps, delta=delta + 1e-4) + 1e-12
    assert value + 1e-12 >= one_run_p_value(canaries, guesses, min(correct + 1, guesses), eps=eps, delta=delta)


def test_bounds_rise_with_the_leak_and_stay_below_the_truth() -> None:
    delta = 1e-5
    found = []
    for mu in (0.0, 0.5, 2.0, 6.0):
        scores, included = groups(mu, 4000, seed=int(10 * mu) + 1)
        truth = accounting.epsilon((Event("train", "x", 1 / mu, 1 / mu),), delta=delta) if mu else 0.0
        # One run alone has little power at a high confidence, for want of a smaller δ.
        values = [one_run_epsilon(scores, included, delta=delta, risk=0.05)]
        values += [f(scores, included, delta=delta, risk=1e-4) for f in (rates_epsilon, gaussian_epsilon)]
        assert max(values) <= truth
        found.append(values)
    assert np.all(np.diff(np.array(found), axis=0) >= 0)
    assert found[0] == [0.0, 0.0, 0.0]
    assert found[1][2] > 0.7
    assert min(found[2]) > 0.8
    assert min(found[3]) > 3.0


def test_the_gaussian_bound_misses_as_often_as_it_says() -> None:
    truth = accounting.epsilon((Event("train", "x", 1.0, 1.0),), delta=1e-5)
    missed = sum(gaussian_epsilon(*groups(1.0, 600, seed), delta=1e-5, risk=0.05) > truth for seed in range(300))
    assert 0 < missed <= 300 * 0.05 + 4.5 * math.sqrt(300 * 0.05 * 0.95)


def test_one_run_bound_misses_less_often_than_it_says_for_pure_dp() -> None:
    """Randomised response is the mechanism for which the theorem is tight."""
    rng = np.random.default_rng(8)
    eps, missed = 1.0, 0
    for _ in range(60):
        included = rng.random(1000) < 0.5
        answer = included ^ (rng.random(1000) < 1 / (1 + math.exp(eps)))
        missed += one_run_epsilon(answer + 1e-3 * rng.random(1000), included, delta=0.0, risk=0.05) > eps
    assert missed <= 60 * 0.05 + 4.5 * math.sqrt(60 * 0.05 * 0.95)


def test_scores_without_spread_or_members_say_nothing_false() -> None:
    included = np.arange(40) % 2 == 0
    assert gaussian_epsilon(np.zeros(40), included, delta=1e-5, risk=0.05) == 0.0
    assert gaussian_epsilon(included.astype(float), included, delta=1e-5, risk=0.05) > 10
    assert gaussian_epsilon(np.zeros(40), np.zeros(40, np.bool_), delta=1e-5, risk=0.05) == 0.0
    assert rates_epsilon(np.zeros(40), np.zeros(40, np.bool_), delta=1e-5, risk=0.05) == 0.0


def test_the_attack_finds_members_and_invents_none() -> None:
    rng = np.random.default_rng(5)
    included = rng.random((60, 200)) < 0.5
    base = rng.normal(size=200) * 3
    quiet = base + rng.normal(size=(60, 200))
    leaky = quiet + 3 * included
    nothing = membership_attack("nothing", quiet, included, targets=20)
    something = membership_attack("something", leaky, included, targets=20)
    assert abs(nothing.auc - 0.5) < 5 / math.sqrt(12 * 1000)
    assert nothing.tpr_at_1 < 0.05
    assert something.auc > 0.95
    assert something.tpr_at_1 > 0.5
    assert something.tpr_at_01 <= something.tpr_at_1
    assert (something.shadows, something.targets, something.decisions) == (40, 20, 4000)
