"""ε, μ, calibration and attack power against three other accountants."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.errors import PrivacyError
from fedsecure.messages import Event
from fedsecure.privacy import accounting, renyi


def event(z: float, *, q: float = 1.0, steps: int = 1, local: float | None = None) -> Event:
    return Event("train", "training", z, z if local is None else local, q, steps)


@pytest.mark.parametrize("z", [0.3, 0.7, 1.0, 2.5, 10.0, 80.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_full_batch_equals_the_exact_gaussian(z: float, delta: float) -> None:
    ours = accounting.epsilon([event(z)], delta=delta)
    assert ours == pytest.approx(dp_accounting.get_epsilon_gaussian(z, delta), abs=1e-6)


def test_composition_is_a_sum_of_squares_in_any_order() -> None:
    events = [event(2.0, steps=3), event(5.0), event(2.0)]
    assert accounting.mu(events) == pytest.approx(math.sqrt(4 / 4 + 1 / 25))
    merged = [event(1 / math.sqrt(4 / 4 + 1 / 25))]
    assert accounting.epsilon(events, delta=1e-5) == pytest.approx(accounting.epsilon(merged, delta=1e-5), abs=1e-9)
    assert accounting.epsilon(events[::-1], delta=1e-5) == accounting.epsilon(events, delta=1e-5)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize("steps", [1, 30, 1000])
def test_full_batch_composition_equals_the_exact_gaussian(delta: float, steps: int) -> None:
    for z in (0.9, 4.0, 60.0):
        ours = accounting.epsilon([event(z, steps=steps)], delta=delta)
        theirs = dp_accounting.get_epsilon_gaussian(z / math.sqrt(steps), delta)
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("z", [0.8, 1.1, 2.5])
@pytest.mark.parametrize("q", [0.01, 0.1, 0.5])
def test_sampling_on_a_grid_against_two_other_accountants(z: float, q: float) -> None:
    eps_error = 0.01
    for steps, delta in ((10, 1e-5), (100, 1e-7)):
        own = [event(z, q=q, steps=steps)]
        shared = [event(z, q=q, steps=steps, local=z / 2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.accountants import PRVAccountant

            prv = PRVAccountant()
            prv.history = [(z, q, steps)]
            opacus = prv.get_epsilon(delta, eps_error=eps_error)
        pld = accounting.epsilon(own, delta=delta)
        # Opacus tells the upper end of an interval that holds ε, eps_error to either side.
        assert opacus - 2 * eps_error <= pld <= opacus
        rdp = RdpAccountant(
            orders=renyi.ORDERS.astype(int).tolist(),
            neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
        )
        rdp.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)), steps)
        ours = accounting.epsilon(shared, delta=delta)
        assert ours == pytest.approx(rdp.get_epsilon(delta), rel=1e-9)
        assert ours >= pld


def test_the_accountant_follows_the_events() -> None:
    full, own, shared = event(3.0, local=1.0), event(1.0, q=0.1), event(1.0, q=0.1, local=0.5)
    assert accounting.accountant([]) == accounting.accountant([full]) == "gdp"
    assert accounting.accountant([full, own]) == "pld"
    assert accounting.accountant([full, own, shared]) == "rdp"
    assert accounting.mu([shared]) is None
    # Each site's own share of a sum is in the ring too: by Rényi divergence against every adversary.
    assert accounting.epsilon([shared], delta=1e-5, adversary="beyond") == accounting.epsilon(
        [event(0.5, q=0.1, local=0.25)], delta=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1.0, 3.0]), st.sampled_from([0.1, 1.0]), st.booleans(), st.integers(1, 3)),
        min_size=1,
        max_size=5,
    )
)
def test_no_order_of_full_sampled_and_shared_releases_lowers_epsilon(
    parts: list[tuple[float, float, bool, int]],
) -> None:
    events = [event(z, q=q, steps=steps, local=z / 2 if shared else z) for z, q, shared, steps in parts]
    spent = [accounting.epsilon(events[:count], delta=1e-5) for count in range(len(events) + 1)]
    assert spent == sorted(spent)
    assert accounting.epsilon(events[::-1], delta=1e-5) == spent[-1]


def test_shared_noise_is_calibrated_by_its_own_accountant() -> None:
    z = accounting.calibrate(3.0, 1e-5, steps=40, sampling_rate=0.1, shared=True)
    assert accounting.epsilon([event(z, q=0.1, steps=40, local=z / 2)], delta=1e-5) <= 3.0
    assert accounting.epsilon([event(z * 0.999, q=0.1, steps=40, local=z / 2)], delta=1e-5) > 3.0
    assert z > accounting.calibrate(3.0, 1e-5, steps=40, sampling_rate=0.1)
    assert accounting.calibrate(3.0, 1e-5, steps=40, shared=True) == accounting.calibrate(3.0, 1e-5, steps=40)
    bound = accounting.attack_bound([event(z, q=0.1, steps=40, local=z / 2)], 0.01)
    assert accounting.attack_bound([event(z, q=0.1, steps=40)], 0.01) <= bound < 1


def test_mixed_events_cost_more_than_either_part() -> None:
    full, sampled = event(3.0, steps=4), event(1.0, q=0.1, steps=20)
    parts = [accounting.epsilon([part], delta=1e-5) for part in (full, sampled)]
    both = accounting.epsilon([sampled, full], delta=1e-5)
    assert max(parts) < both < sum(parts)
    assert accounting.mu([full, sampled]) is None
    split = [event(1.0, q=0.1, steps=8), full, event(1.0, q=0.1, steps=12)]
    assert accounting.epsilon(split, delta=1e-5) == both


def test_beyond_the_colluders_only_the_local_noise_counts() -> None:
    shared = [event(3.0, local=3.0 / math.sqrt(2))]
    assert accounting.epsilon(shared, delta=1e-5, adversary="beyond") == pytest.approx(
        dp_accounting.get_epsilon_gaussian(3.0 / math.sqrt(2), 1e-5), abs=1e-6
    )
    assert accounting.mu(shared, adversary="beyond") == pytest.approx(math.sqrt(2) / 3)


def test_nothing_released_costs_nothing() -> None:
    assert accounting.epsilon([], delta=1e-5) == 0.0
    assert accounting.mu([]) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.3, 50), st.integers(1, 40)), min_size=1, max_size=6),
    st.floats(0.3, 50),
    st.sampled_from([1e-3, 1e-5, 1e-8]),
)
def test_a_further_release_never_lowers_epsilon(parts: list[tuple[float, int]], z: float, delta: float) -> None:
    events = [event(noise, steps=steps) for noise, steps in parts]
    assert accounting.epsilon([*events, event(z)], delta=delta) > accounting.epsilon(events, delta=delta)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 40), st.sampled_from([1e-3, 1e-5, 1e-10]), st.integers(1, 5000))
def test_calibration_spends_the_budget_and_not_more(target: float, delta: float, steps: int) -> None:
    z = accounting.calibrate(target, delta, steps=steps)
    assert accounting.epsilon([event(z, steps=steps)], delta=delta) <= target
    assert accounting.epsilon([event(z * (1 - 1e-6), steps=steps)], delta=delta) > target
    assert accounting.mu_for_epsilon(target, delta) == pytest.approx(math.sqrt(steps) / z, rel=1e-9)


def test_poisson_calibration_spends_the_budget_and_not_more() -> None:
    z = accounting.calibrate(2.0, 1e-5, steps=50, sampling_rate=0.1)
    assert accounting.epsilon([event(z, q=0.1, steps=50)], delta=1e-5) <= 2.0
    assert accounting.epsilon([event(z * 0.999, q=0.1, steps=50)], delta=1e-5) > 2.0
    assert z < accounting.calibrate(2.0, 1e-5, steps=50)


@pytest.mark.parametrize(("epsilon", "mu"), [(0.5, 0.1422), (1, 0.2681), (2, 0.5016), (4, 0.9249), (8, 1.6660)])
def test_mu_of_the_usual_targets(epsilon: float, mu: float) -> None:
    assert accounting.mu_for_epsilon(epsilon, 1e-5) == pytest.approx(mu, abs=6e-5)


def test_attack_power() -> None:
    assert accounting.attack_power(0.0, 0.01) == pytest.approx(0.01)
    assert accounting.attack_power(1.0, 0.5) == pytest.approx(0.8413447, abs=1e-6)
    assert accounting.attack_bound([event(0.5)], 0.01) == accounting.attack_power(2.0, 0.01)
    # The bound by an ε(δ) curve must not be below the exact power, and for a mixed run not above the full batch's.
    nearly = [event(1.0, q=0.999999, steps=1)]
    exact = accounting.attack_power(1.0, 0.01)
    assert exact * 0.99 <= accounting.attack_bound(nearly, 0.01) <= exact * 1.1


def test_large_and_small_mu_stay_finite() -> None:
    assert accounting.gaussian_delta(60.0, 100.0) == pytest.approx(1.0)
    assert 0 <= accounting.gaussian_delta(0.01, 5.0) < 1e-300
    assert accounting.epsilon([event(0.02)], delta=1e-5) == pytest.approx(
        dp_accounting.get_epsilon_gaussian(0.02, 1e-5), rel=1e-6
    )


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="FS-1202"):
        accounting.epsilon([event(1.0)], delta=delta)


@pytest.mark.parametrize(
    "arguments", [(0.0, 1e-5, 5, 1.0), (math.inf, 1e-5, 5, 1.0), (1.0, 1e-5, 0, 1.0), (1.0, 1e-5, 5, 0.0)]
)
def test_impossible_calibration_is_refused(arguments: tuple[float, float, int, float]) -> None:
    target, delta, steps, rate = arguments
    with pytest.raises(PrivacyError, match="FS-1202"):
        accounting.calibrate(target, delta, steps=steps, sampling_rate=rate)


def test_full_batch_needs_neither_dp_accounting_nor_torch() -> None:
    script = (
        "import sys; from fedsecure.privacy import accounting, noise, grid, plan, ledger, policy, report, report_html\n"
        "from fedsecure.messages import Event\n"
        "accounting.epsilon([Event('train', 'x', 1.0, 1.0)], delta=1e-5)\n"
        "assert not {'torch', 'grpc', 'dp_accounting', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
