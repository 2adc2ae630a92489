"""Further releases in the last rounds: within the same target, their share of it, and counted by whoever counts."""

from __future__ import annotations

import math

import pytest

from fedsecure.methods.base import Cohort
from fedsecure.privacy import accounting
from fedsecure.privacy.plan import LastReleases, Privacy, PrivacyPlan

COHORT = Cohort(sites=5, colluders=1, min_survivors=4)
UNITS = {f"s{i}": 400 for i in range(5)}


def plan(*, last: LastReleases | None, rounds: int = 10, local_steps: int = 1, **privacy: object) -> PrivacyPlan:
    chosen = Privacy(**{"target_epsilon": 4.0, "max_grad_norm": 1.0, **privacy})  # type: ignore[arg-type]
    return chosen.plan(
        parameters=100, units=UNITS, rounds=rounds, cohort=COHORT, local_steps=local_steps, last=last
    )  # fmt: skip


def test_everything_together_keeps_to_the_target_and_the_share_is_the_share():
    found = plan(last=LastReleases("class gradients", rounds=3, share=0.25))
    attempts = found.round_events * 11 + found.last_events * 4
    assert accounting.epsilon(attempts, delta=1e-5) == found.epsilon
    assert 4.0 * (1 - 1e-6) < found.epsilon <= 4.0
    squares = [event.noise_multiplier**-2 for event in attempts]
    assert math.fsum(squares[11:]) / math.fsum(squares) == pytest.approx(0.25)
    without = accounting.epsilon(found.round_events * 11, delta=1e-5)
    assert without < 0.95 * found.epsilon  # ignoring the releases would report too little
    assert found.epsilon_expected == accounting.epsilon(found.events_of(10), delta=1e-5)
    assert found.epsilon_after(10) == found.epsilon_expected
    assert found.epsilon_beyond > found.epsilon
    assert "class gradients, last 3 round(s)" in found.summary()


def test_only_the_last_rounds_charge_for_them_and_any_spare_attempt_may():
    found = plan(last=LastReleases("class gradients", rounds=2, share=0.5), rounds=5)
    assert [len(found.events_at(step)) for step in range(5)] == [1, 1, 1, 2, 2]
    run = [event for step in range(5) for event in found.events_at(step)]
    assert sorted(run, key=str) == sorted(found.events_of(5), key=str)
    assert len(found.events_of(1)) == 2
    assert len(found.events_of(7)) == 7 + 4


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [{"noise": "local"}, {"noise": "local", "sampling_rate": 0.1}])
def test_beside_noisy_local_steps_too(privacy: dict[str, object]):
    found = plan(last=LastReleases("class gradients", rounds=1, share=0.3), rounds=3, local_steps=2, **privacy)
    assert found.epsilon <= 4.0
    assert found.epsilon > 3.9
    (release,) = found.last_events
    assert release.sampling_rate == 1
    assert release.local_noise_multiplier == pytest.approx(release.noise_multiplier / math.sqrt(3))


def test_a_given_noise_multiplier_and_no_privacy():
    found = plan(last=LastReleases("class gradients", rounds=1, share=0.5), noise_multiplier=7.0, spare_attempts=0)
    (release,) = found.last_events
    assert found.noise_multiplier == 7.0
    assert release.noise_multiplier == pytest.approx(7.0 / math.sqrt(10))
    bare = plan(last=LastReleases("class gradients", rounds=1, share=0.5), no_privacy="a test")
    assert bare.last_events[0].noise_multiplier == bare.noise_multiplier


def test_without_them_nothing_changes():
    found = plan(last=None)
    assert found.last_events == ()
    assert found.events_of(10) == found.round_events * 10
    assert found.noise_multiplier == accounting.calibrate(4.0, 1e-5, steps=11)
