"""Plans: price, promise, refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from fedsecure.config import PrivacyConfig
from fedsecure.errors import ConfigError, PrivacyError
from fedsecure.methods.base import Cohort
from fedsecure.privacy import accounting
from fedsecure.privacy.plan import Privacy, PrivacyPlan, evaluation_noise_multiplier

UNITS = {"north": 800, "south": 900, "west": 300}
COHORT = Cohort(sites=3, colluders=1, min_survivors=3)


def plan(privacy: Privacy, **changes: object) -> PrivacyPlan:
    asked = {"parameters": 2048, "units": UNITS, "rounds": 20, "cohort": COHORT} | changes
    return privacy.plan(**asked)  # type: ignore[arg-type]


def test_defaults_are_the_configuration_s() -> None:
    assert Privacy().model_dump() == PrivacyConfig().model_dump()


def test_calibrated_plan_fits_rounds_and_spare_attempts() -> None:
    made = plan(Privacy(target_epsilon=4.0, spare_attempts=2))
    (event,) = made.round_events
    assert (event.population, event.sampling_rate, event.steps) == ("train", 1.0, 1)
    assert accounting.epsilon((event,) * 22, delta=1e-5) == made.epsilon <= 4.0
    assert accounting.epsilon((event,) * 23, delta=1e-5) > 4.0
    assert made.epsilon_expected < made.epsilon < made.epsilon_beyond
    assert event.local_noise_multiplier == pytest.approx(event.noise_multiplier / math.sqrt(2))
    assert made.mu == pytest.approx(math.sqrt(22) / made.noise_multiplier)


def test_local_noise_pays_for_every_local_step_and_holds_against_anybody() -> None:
    made = plan(Privacy(noise="local"), local_steps=5)
    (event,) = made.round_events
    assert event.steps == 5
    assert event.noise_multiplier == event.local_noise_multiplier
    assert made.epsilon == made.epsilon_beyond <= 8.0
    assert accounting.epsilon((event,) * 22, delta=1e-5) > 8.0


def test_signal_to_noise_is_total_units_over_the_noise_norm_of_the_sum() -> None:
    shared = plan(Privacy(noise_multiplier=3.0))
    assert shared.sum_noise_multiplier == pytest.approx(3.0 * math.sqrt(3 / 2))
    assert shared.signal_to_noise == pytest.approx(2000 / (shared.sum_noise_multiplier * math.sqrt(2048)))
    assert shared.sum_mu == pytest.approx(math.sqrt(20) / shared.sum_noise_multiplier)
    local = plan(Privacy(noise_multiplier=3.0, noise="local"))
    assert local.signal_to_noise == pytest.approx(2000 / (3.0 * math.sqrt(3) * math.sqrt(2048)))


def test_poisson_plan_uses_the_sampled_accountant() -> None:
    made = plan(Privacy(sampling_rate=0.2, target_epsilon=3.0))
    assert made.mu is None
    assert 2.9 < made.epsilon <= 3.0
    assert made.noise_multiplier < plan(Privacy(target_epsilon=3.0)).noise_multiplier


def test_given_noise_multiplier_is_taken_as_it_is() -> None:
    assert plan(Privacy(noise_multiplier=1.25)).noise_multiplier == 1.25


def test_too_little_signal_is_refused_with_the_numbers() -> None:
    small = {"north": 8, "south": 9, "west": 3}
    with pytest.raises(PrivacyError, match=r"FS-1204.*'west', has 3.*525,312 parameters") as caught:
        plan(Privacy(target_epsilon=0.5, noise="local"), units=small, parameters=525_312)
    for word in ("larger ε", "distributed", "smaller adapter", "more records"):
        assert word in caught.value.cure
    plan(Privacy(target_epsilon=0.5, noise="local", minimum_signal_to_noise=0), units=small, parameters=525_312)


def test_delta_must_be_below_one_over_every_site_s_units() -> None:
    with pytest.raises(PrivacyError, match=r"FS-1203.*'south'"):
        plan(Privacy(delta=1 / 900))
    plan(Privacy(delta=1 / 901))


def test_distributed_noise_takes_one_step_a_round() -> None:
    with pytest.raises(PrivacyError, match="FS-1205"):
        plan(Privacy(), local_steps=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": 0},
        {"rounds": 0},
        {"units": {}},
        {"units": {"north": 0, "south": 1, "west": 1}},
        {"cohort": SimpleNamespace(sites=3, colluders=3, min_survivors=3, honest=0)},
    ],
)
def test_impossible_numbers_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(PrivacyError, match="FS-1211"):
        plan(Privacy(), **changes)


@pytest.mark.parametrize("values", [{"target_epsilon": 0}, {"delta": 1.0}, {"epsilon": 3}, {"unit": "image"}])
def test_bad_parameters_are_one_clear_error(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="FS-1003") as caught:
        Privacy(**values)  # type: ignore[arg-type]
    assert next(iter(values)) in caught.value.found


def test_summary_shows_price_and_promise() -> None:
    made = plan(Privacy(target_epsilon=4.0))
    text = made.summary()
    assert f"{made.epsilon:.3f}" in text
    assert f"{made.epsilon_beyond:.3f}" in text
    assert "north 800" in text
    assert len(text.splitlines()) == len(made.table())


def test_evaluation_noise_spends_its_own_budget() -> None:
    z = evaluation_noise_multiplier(2.0, 1e-5, releases=3)
    assert z == accounting.calibrate(2.0, 1e-5, steps=3)


def test_what_the_rounds_so_far_cost() -> None:
    made = plan(Privacy(target_epsilon=3.0), rounds=5)
    costs = [made.epsilon_after(rounds) for rounds in range(6)]
    assert costs == [accounting.epsilon(made.round_events * rounds, delta=made.delta) for rounds in range(6)]
    assert (costs[0], costs[-1]) == (0.0, made.epsilon_expected)
    drawn = plan(Privacy(target_epsilon=3.0), rounds=5, asked=2)
    assert drawn.epsilon_after(1) < drawn.epsilon_after(2) == drawn.epsilon_after(5) == drawn.epsilon_expected
    assert plan(Privacy(target_epsilon=3.0, sampling_rate=0.2), rounds=5).epsilon_after(0) is None
