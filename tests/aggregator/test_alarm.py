"""The alarm on a sum: silent for anything honest sites can do, loud for a site that sends anything."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import World
from hypothesis import given
from hypothesis import strategies as st

from fedsecure.aggregator.alarm import check_sum, measure
from fedsecure.config import RunSettings
from fedsecure.messages import Event, Query, Segment
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.registry import load_training_method
from fedsecure.privacy.grid import distributed_segment, exact_segment, round_to_grid
from fedsecure.privacy.noise import SeededRng
from fedsecure.release import Door
from fedsecure.secagg.server import SecAggResult


@st.composite
def federations(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "length": draw(st.integers(1, 60)),
        "sites": draw(st.integers(3, 9)),
        "units": draw(st.integers(1, 300)),
        "z": draw(st.floats(0.5, 20)),
        "seed": draw(st.binary(min_size=4, max_size=4)),
    }


@given(federations())
def test_an_honest_sum_never_trips_the_alarm(given: dict[str, Any]) -> None:
    # The worst that honest sites can do: every unit of every site pulls the same way, as far as it may.
    sites, units, length = given["sites"], given["units"], given["length"]
    segment = distributed_segment(
        "gradient", length, clip_norm=1.0, noise_multiplier=given["z"], honest=2, sites=sites, units=units
    )
    rng = SeededRng(given["seed"])
    direction = rng.gaussian(length)
    direction /= max(float(np.linalg.norm(direction)), 1e-9)
    total = np.zeros(length, np.int64)
    for _ in range(sites):
        total += round_to_grid(units * direction, segment) + rng.discrete_gaussian(length, segment.noise_variance)
    norm, limit = measure(total.astype(np.float64), segment, units=sites * units, survivors=sites)
    assert norm <= limit
    # And it is no empty bound: the same sum with three times the units in it is out of range, where units weigh at all.
    if units * segment.bound * sites > 10 * segment.noise_std * math.sqrt(sites * (length + 60)):
        assert measure(3.0 * total, segment, units=sites * units, survivors=sites)[0] > limit


@pytest.mark.parametrize("length", [1, 10, 1000])
def test_the_tail_is_that_of_the_noise_and_not_much_more(length: int) -> None:
    segment = Segment("g", length, 1.0, 1000, 1 << 20, Fraction(10**6))
    rng = SeededRng(b"tail")
    sums = [sum(rng.discrete_gaussian(length, Fraction(10**6)) for _ in range(3)) for _ in range(200)]
    norms = [measure(np.asarray(s, np.float64), segment, units=0, survivors=3) for s in sums]
    limit = norms[0][1]
    assert max(norm for norm, _ in norms) <= limit
    # 2^-40 costs a factor that falls with the length: 9 standard deviations of one number, a quarter of a thousand's.
    assert limit <= math.sqrt(3e6 * (length + 2 * math.sqrt(28 * length) + 56))
    assert limit >= math.sqrt(3e6 * length)


def test_a_segment_without_noise_has_its_clamp_and_no_more() -> None:
    segment = exact_segment("change", 4, grid=1.0, sites=4)
    at_most = np.full(4, 3.0 * segment.clamp)
    assert measure(at_most, segment, units=0, survivors=3) == (3.0 * segment.clamp, 3.0 * segment.clamp)
    norm, limit = measure(at_most + 1, segment, units=0, survivors=3)
    assert norm > limit


def test_units_are_those_of_the_survivors_and_of_the_population() -> None:
    settings = RunSettings.model_validate(
        {
            "classes": ["a", "b"],
            "encoder": {"model": "features", "dimension": 4, "fingerprint": "0" * 64},
            "sites": {f"site-{i}": {"max_units": 10 * i, "evaluation_units": i} for i in (1, 2, 3)},
        }
    )
    segment = Segment("g", 1, 1.0, 1000, 1 << 29, Fraction(300**2))

    def asks(population: Any) -> Query:
        event = Event(population, "x", 1.0, 1.0)
        return Query(b"r" * 16, 0, 0, "m", "1", ("site-1", "site-2", "site-3"), {}, (segment,), (event,))

    def trips(population: Any, value: int, *survivors: str) -> bool:
        result = SecAggResult(np.array([value]), survivors, b"", (), {})
        return check_sum(asks(population), result, settings=settings) is not None

    assert not trips("train", 30_000, "site-1", "site-2")
    assert trips("train", 40_000, "site-1", "site-2")
    assert not trips("train", 40_000, "site-1", "site-3")
    assert not trips("evaluation", 3_000, "site-1", "site-2")
    assert trips("evaluation", 30_000, "site-1", "site-2")


@pytest.mark.parametrize("answer", ["continue", "stop"])
def test_a_site_that_sends_anything_is_noticed(tmp_path: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, rounds=2, waits={"on_alarm": answer})
    world.start()
    encode = Door._encode

    def broken(self: Door, query: Query, *arguments: Any, **options: Any) -> Any:
        vector = encode(self, query, *arguments, **options)
        wrong = self.config.site == "site-2" and query.round == 1
        return np.random.default_rng(5).integers(0, 1 << 32, vector.shape, dtype=np.uint32) if wrong else vector

    monkeypatch.setattr(Door, "_encode", broken)
    world.run(*(world.take_part(name) for name in world.names))
    core = world.coordinator
    assert [alarm["code"] for alarm in core.status(0.0)["alarms"]] == ["FS-1364"]
    assert [h.facts["code"] for h in world.happened if h.kind == "alarm"] == ["FS-1364"]
    # An evaluation, the round, and, where the run goes on, one more round and an evaluation.
    marked = [False, True, False, False] if answer == "continue" else [False, False]
    assert ["alarm" in attempt for attempt in core._store.attempts()] == marked
    outcome = core.outcome
    assert outcome is not None
    assert outcome["complete"] == (answer == "continue")
    if answer == "stop":
        assert "FS-1364" in outcome["error"]
        assert outcome["rounds"] == 0, "the sum was not used"
        assert len(world.errors) == 3
    else:
        assert not world.errors
    # Who may be broken is for the operator: the summary that sites get says nothing of it.
    assert not any("alarm" in attempt for attempt in outcome["attempts"])


def test_an_honest_run_is_silent(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2, public_evaluation=False)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    assert world.coordinator.status(0.0)["alarms"] == []
    _, cohort = cohort_of(world.settings, trainers_only=True)
    method: Any = load_training_method("linear")
    assert method.segment(world.settings, cohort, method.plan(world.settings, cohort)).noise_variance > 0
