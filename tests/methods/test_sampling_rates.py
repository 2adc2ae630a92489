"""Sites with sampling rates of their own: one noise for all, a price for each, a sum divided by what is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import World

from fedsecure.config import RunSettings
from fedsecure.errors import ConfigError
from fedsecure.messages import Aggregate, Event
from fedsecure.methods.base import Cohort
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.registry import load_training_method
from fedsecure.privacy import accounting
from fedsecure.privacy.ledger import Ledger
from fedsecure.privacy.plan import Privacy, paid_by
from fedsecure.privacy.report import network_report
from fedsecure.privacy.report_html import render_html
from fedsecure.privacy.report_verify import verify_report

RATES = {"site-1": 0.2, "site-2": 0.5, "site-3": 1.0}


def world_of(folder: Path, rates: dict[str, float], **options: Any) -> World:
    world = World(folder, rounds=2, **options)
    raw = world.settings.model_dump()
    for site, rate in rates.items():
        raw["sites"][site]["sampling_rate"] = rate
    world.settings = RunSettings.model_validate(raw)
    return world


@pytest.mark.slow
@pytest.mark.parametrize(
    # Calibration by privacy-loss distributions takes long; the multiplier given is enough for ε = 8.
    "options",
    [
        {"noise": "distributed"},
        pytest.param({"noise": "local", "privacy": {"noise_multiplier": 2.0}}, marks=pytest.mark.slow),
    ],
    ids=["distributed", "local"],
)
def test_each_site_is_charged_for_its_own_rate(tmp_path: Path, options: dict[str, Any]) -> None:
    world = world_of(tmp_path, RATES, **options)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    for site, rate in RATES.items():
        with Ledger(tmp_path / site / "ledger.db") as ledger:
            paid = [e for entry in ledger.history(f"{site}-train") if entry.state == "RESERVED" for e in entry.events]
            ledger.verify()
        assert len(paid) == 2
        assert {event.sampling_rate for event in paid} == {rate}
        assert world.reports[site]["epsilon"] == accounting.epsilon(paid, delta=1e-5)
        assert world.reports[site]["mechanism"]["sampling_rates"] == RATES
    spent = [world.reports[site]["epsilon"] for site in RATES]
    assert spent[0] < spent[1] < spent[2] == max(spent)
    assert max(spent) <= world.settings.privacy.target_epsilon
    report = network_report(list(world.reports.values()))
    assert report["epsilon"] == max(spent)
    assert verify_report(report).consistent
    assert "0.2 at site-1, 0.5 at site-2, 1 at site-3" in render_html(report)


def test_the_noise_is_enough_for_every_rate_and_not_for_the_largest_alone() -> None:
    """A rate just below 1 is accounted by a looser bound than full batch: its site needs the more noise."""
    cohort = Cohort(sites=3, colluders=1, min_survivors=3)
    privacy = Privacy(target_epsilon=4.0, noise="distributed", unit="record")
    units = dict.fromkeys("abc", 500)
    numbers: dict[str, Any] = {"parameters": 10, "units": units, "rounds": 3, "cohort": cohort}
    alone = privacy.plan(**numbers)
    mixed = privacy.plan(**numbers, sampling_rates={"a": 1.0, "b": 0.95, "c": 0.1})
    assert mixed.noise_multiplier > alone.noise_multiplier * 1.001
    (event,) = mixed.round_events
    assert event.sampling_rate == 1.0
    for rate in (1.0, 0.95, 0.1):
        paid = [Event("train", "", event.noise_multiplier, event.local_noise_multiplier, rate)] * mixed.attempts
        assert accounting.epsilon(paid, delta=1e-5) <= mixed.epsilon <= 4.0
    assert mixed.signal_to_noise == pytest.approx(
        (500 + 475 + 50) / (mixed.sum_noise_multiplier * np.sqrt(10)), rel=1e-12
    )
    assert "a 1, b 0.95, c 0.1" in mixed.summary()


def test_the_sum_is_divided_by_the_units_that_are_expected_in_it(tmp_path: Path) -> None:
    world = world_of(tmp_path, RATES)
    method = load_training_method("linear")
    _, cohort = cohort_of(world.settings, trainers_only=True)
    state = method.start(world.settings, cohort)
    parameters = sum(value.size for value in state.tensors.values())
    total = Aggregate({"gradient": np.ones(parameters)}, survivors=3)
    after = method.absorb(world.settings, cohort, state, total)
    rate, _ = method.rate(world.settings, cohort)  # type: ignore[attr-defined]
    (moved,) = {
        float(round(d, 12)) for n in state.tensors for d in np.ravel(after.tensors[n] - state.tensors[n]).tolist()
    }
    assert moved == pytest.approx(-rate / (30 * (0.2 + 0.5 + 1.0)), rel=1e-6)


def test_only_an_event_at_the_runs_largest_rate_is_made_cheaper(tmp_path: Path) -> None:
    settings = world_of(tmp_path, {"site-1": 0.2, "site-2": 0.5, "site-3": 0.5}).settings
    half, full = Event("train", "training", 2.0, 1.0, 0.5), Event("train", "training", 2.0, 1.0, 1.0)
    counts = Event("evaluation", "", 2.0, 2.0, 0.5)
    (found,) = paid_by("site-1", [half], settings)
    assert found.sampling_rate == 0.2
    # A method that says it takes everybody pays for everybody.
    assert paid_by("site-1", [full, counts], settings) == (full, counts)
    # So does one that releases something else beside its training, be the rates equal or not.
    beside = Event("train", "class gradients", 2.0, 1.0, 0.5)
    assert paid_by("site-1", [beside], settings) == (beside,)


def test_rates_that_cannot_be_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    raw = world.settings.model_dump()

    def settings(**entry: Any) -> RunSettings:
        sites = {**raw["sites"], "site-4": {"max_units": 30, **entry}}
        return RunSettings.model_validate({**raw, "sites": sites})

    assert settings(sampling_rate=0.5).sampling_rates()["site-4"] == 0.5
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="sampling_rate"):
            settings(sampling_rate=wrong)
    with pytest.raises(ValueError, match="only evaluates"):
        settings(sampling_rate=0.5, role="evaluate")
    raw["privacy"]["no_privacy"] = "public data"
    with pytest.raises(ValueError, match="no_privacy goes with"):
        settings(sampling_rate=0.5)


def test_a_method_of_one_release_takes_everybody_everywhere(tmp_path: Path) -> None:
    world = world_of(tmp_path, {"site-2": 0.5}, adapter="ridge")
    settings = world.settings.model_copy(update={"method": world.settings.method.model_copy(update={"rounds": 1})})
    _, cohort = cohort_of(settings, trainers_only=True)
    with pytest.raises(ConfigError, match="FS-1014") as caught:
        load_training_method("ridge").plan(settings, cohort)
    assert "0.5" in caught.value.found
