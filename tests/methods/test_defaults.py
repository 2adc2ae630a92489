"""What a run that names no δ and no rounds takes, from what is public about its sites and its method."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedsecure.config import MethodConfig, RunSettings, default_delta, default_rounds


def settings(units: int, *, evaluation: int = 0, public: bool = False, **sections: Any) -> RunSettings:
    site = {"max_units": 40, "evaluation_units": evaluation, "evaluation_public": public}
    return RunSettings.model_validate(
        {
            "classes": ["a", "b"],
            "encoder": {"model": "features", "pretrained": "file", "dimension": 8, "fingerprint": "0" * 64},
            "sites": {"x": site, "y": site, "z": {"max_units": units}},
            **sections,
        }
    )


@given(st.integers(1, 500_000))
def test_delta_is_the_largest_power_of_ten_below_a_tenth_of_one_over_the_units(units: int) -> None:
    delta = Fraction(f"{default_delta(units):e}")
    assert delta <= Fraction(1, 10 * units)
    assert delta <= Fraction(1, 100_000)
    assert delta == Fraction(1, 100_000) or 10 * delta > Fraction(1, 10 * units)
    assert delta.numerator == 1
    assert set(str(delta.denominator)) == {"1", "0"}


@pytest.mark.parametrize(("units", "delta"), [(1, 1e-5), (10_000, 1e-5), (10_001, 1e-6), (500_000, 1e-7)])
def test_a_run_takes_it_where_none_is_named(units: int, delta: float) -> None:
    made = settings(units, privacy={"target_epsilon": 2.0})
    assert made.privacy.delta == delta
    again = RunSettings.parse(made.canonical())
    assert (again, again.canonical()) == (made, made.canonical()), "every site reads the number, and chooses none"
    assert settings(units, privacy={"delta": 1e-4}).privacy.delta == 1e-4
    assert settings(40, evaluation=units).privacy.delta == delta
    assert settings(40, evaluation=units, public=True).privacy.delta == 1e-5


def test_a_delta_that_gives_evaluation_units_away_is_refused() -> None:
    with pytest.raises(ValidationError, match="50000 private evaluation units at 'x'"):
        settings(40, evaluation=50_000, privacy={"delta": 2e-5})
    settings(40, evaluation=50_000, public=True, privacy={"delta": 2e-5})


@pytest.mark.parametrize(
    ("name", "rounds"), [("linear", 20), ("facmic", 60), ("fedclip", 60), ("ridge", 1), ("prototypes", 1)]
)
def test_a_method_has_its_own_number_of_rounds(name: str, rounds: int) -> None:
    assert MethodConfig(name=name).rounds == default_rounds(name) == rounds
    assert MethodConfig(name=name, rounds=7).rounds == 7
    assert MethodConfig.model_validate_json(MethodConfig(name=name).model_dump_json()).rounds == rounds
