"""Whole runs in the ring of 16 bits: half the bytes, the same learning and price, and nothing an aggregator can choose.

Rounding is drawn like noise, from the site's generator; with simulation seeds a run is the same every time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from federation_world import CLASSES, World

from fedsecure.aggregator.schedule import Schedule
from fedsecure.client import Client
from fedsecure.config import PolicyConfig, PrivacyConfig, RunSettings
from fedsecure.data.loading import open_dataset
from fedsecure.errors import ConfigError, PrivacyError, ProtocolError
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.features import load_site_features, load_units
from fedsecure.messages import Aggregate, Event, Query, Segment, digest_tensor
from fedsecure.methods.agenda import question
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.contexts import round_context
from fedsecure.methods.registry import load_training_method
from fedsecure.privacy.plan import Privacy
from fedsecure.privacy.policy import check_query
from fedsecure.privacy.ring16 import aligned_units, clip_room, ring16_segment
from fedsecure.site.questions import accept
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb

SEED = 7
NARROW = {"ring_bits": 16}


class Weighing(MemoryTransport):
    """Keeps the size of every masked vector."""

    sizes: list[int]

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        self.sizes.append(len(payload))
        super().upload(header, payload)


class Trial:
    """One run: what each training round summed, and how many bytes a site's vectors had."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        folder.mkdir()
        self.world = World(folder, rounds=3, **options)
        self.world.start()
        self.rounds: list[tuple[dict[str, Any], Aggregate]] = []
        self.sizes: list[int] = []
        absorb = Schedule.absorb

        def spying(schedule: Schedule, progress: Any, aggregate: Aggregate) -> Any:
            if progress.stage == "training":
                self.rounds.append((dict(progress.state.tensors), aggregate))
            return absorb(schedule, progress, aggregate)

        with monkeypatch.context() as patch:
            patch.setattr(Schedule, "absorb", spying)
            self.world.run(*(self._site(name) for name in self.world.names))
        assert not self.world.errors

    def _site(self, name: str) -> Callable[[], None]:
        transport = Weighing(self.world.coordinator, name, self.world.gate)
        transport.sizes = self.sizes
        return self.world.take_part(name, simulation_seed=SEED, transport=transport)

    @property
    def segment(self) -> Segment:
        settings = self.world.settings
        _, cohort = cohort_of(settings, trainers_only=True)
        method: Any = load_training_method(settings.method.name)
        return method.segment(settings, cohort, method.plan(settings, cohort))  # type: ignore[no-any-return]

    def errors(self) -> np.ndarray[Any, Any]:
        """What each round's sum has beyond the exact one, in standard deviations of everybody's noise."""
        world, settings = self.world, self.world.settings
        features = load_site_features(settings.encoder, CLASSES, file=world.features)
        method: Any = load_training_method(settings.method.name)
        task = method.task(settings, features)
        units = []
        for name in world.names:
            section = world.site_config(name).train
            assert section is not None
            records = open_dataset(section, classes=CLASSES)
            units.append(load_units(records, features, cache=None, unit="record", cap=1, max_units=30, key=bytes(32)))
        std = math.sqrt(world.sites * self.segment.noise_variance) * self.segment.grid
        clip = settings.privacy.max_grad_norm
        return np.array(
            [
                (aggregate.values["gradient"] - sum(clipped_sum(task, tensors, u, max_grad_norm=clip) for u in units))
                / std
                for tensors, aggregate in self.rounds
            ]
        )


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [0, 16])
@pytest.mark.parametrize("adapter", ["linear", "facmic"])
def test_a_run_sums_what_it_should_in_half_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, prepared: int
) -> None:
    waits = {"prepared_rounds": prepared}
    narrow = Trial(tmp_path / "16", monkeypatch, adapter=adapter, privacy=NARROW, waits=waits)
    wide = Trial(tmp_path / "32", monkeypatch, adapter=adapter, waits=waits)
    length = narrow.segment.length
    assert narrow.sizes.count(2 * length) == wide.sizes.count(4 * length) == 3 * 3
    assert not narrow.sizes.count(4 * length)
    # Rounding adds at most units/4 to a variance of σ² ≥ 3·256² steps: under 0.02 %. The noise is seeded; with other
    # seeds |mean| < 6/√N and |std − 1| < 6/√(2N) would fail once in 10^8, and a coordinate past 7 once in 10^8 too.
    for trial in (narrow, wide):
        errors = trial.errors()
        assert errors.shape == (3, length)
        assert abs(errors.mean()) < 6 / math.sqrt(errors.size)
        assert abs(errors.std() - 1) < 6 / math.sqrt(2 * errors.size)
        assert np.abs(errors).max() < 7
    # The price is the same, since the noise is scaled to the bound that rounding enlarges.
    prices = [trial.world.reports["site-1"]["budgets"]["train"]["this_run"]["epsilon"] for trial in (narrow, wide)]
    assert prices[0] == pytest.approx(prices[1], rel=1e-12)


def test_the_noise_pays_for_the_rounding(tmp_path: Path) -> None:
    world = World(tmp_path, privacy=NARROW)
    _, cohort = cohort_of(world.settings, trainers_only=True)
    method: Any = load_training_method("linear")
    plan = method.plan(world.settings, cohort)
    segment = method.segment(world.settings, cohort, plan)
    norm = world.settings.privacy.max_grad_norm
    room = clip_room(segment.bound, segment.length, rounding="record")
    assert room * segment.grid == pytest.approx(norm, rel=1e-12)
    assert segment.bound > room, "rounding needs room of its own"
    assert segment.noise_variance * cohort.honest >= (Fraction(plan.noise_multiplier) * segment.bound) ** 2
    (event,) = plan.round_events
    assert event.noise_multiplier == plan.noise_multiplier


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    world = World(tmp_path_factory.mktemp("narrow"), privacy=NARROW)
    world.start()
    with world.client("site-1") as joined:
        yield joined


def honest(client: Client, round: int) -> Query:
    member = client._member
    ask = question(member.settings, round, start=member.start)
    assert ask is not None
    return Query(
        run=member.run,
        round=round,
        attempt=0,
        method=ask.method,
        version=ask.version,
        cohort=cohort_of(member.settings, trainers_only=True)[0],
        inputs={name: digest_tensor(name, value) for name, value in ask.inputs.items()},
        segments=ask.segments,
        events=ask.events,
        ring_bits=ask.ring_bits,
    )


def wrapped(client: Client, query: Query) -> pb.Ask:
    member = client._member
    descriptor = round_context(member.settings, query, roster=member.identity.roster, trainers_only=True)
    return pb.Ask(query_json=query.to_json(), descriptor=descriptor.canonical())


def changed(query: Query, **changes: Any) -> Query:
    return replace(query, segments=(replace(query.segments[0], **changes),))


ATTACKS: dict[str, Callable[[Client], Query]] = {
    "a rotation of its own": lambda c: changed(honest(c, 1), rotation_seed=bytes(32)),
    "the rotation of another round": lambda c: replace(honest(c, 1), segments=honest(c, 2).segments),
    "no rotation": lambda c: changed(honest(c, 1), rotation_seed=None),
    "another clamp": lambda c: changed(honest(c, 1), clamp=1),
    "the wide ring": lambda c: replace(honest(c, 1), ring_bits=32),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_aggregator_chooses_neither_ring_nor_rotation(
    client: Client, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = ATTACKS[attack](client)
    with pytest.raises(ProtocolError, match="FS-1373"):
        accept(wrapped(client, query), client._member)
    # The positive control: believed, the same question passes every other check.
    believed = replace(question(client._member.settings, 1, start=client._member.start), segments=query.segments)  # type: ignore[type-var]
    believed = replace(believed, ring_bits=query.ring_bits)  # type: ignore[type-var]
    monkeypatch.setattr("fedsecure.site.questions.question", lambda *_, **__: believed)
    assert accept(wrapped(client, query), client._member).query == query


def test_the_honest_question_is_accepted_and_each_round_has_its_own_rotation(client: Client) -> None:
    queries = [honest(client, round) for round in (1, 2, 3)]
    for query in queries:
        assert query.ring_bits == 16
        assert accept(wrapped(client, query), client._member).query == query
        client._sources.door(None, None).check(query)
    assert len({query.segments[0].rotation_seed for query in queries}) == 3


def test_a_run_that_16_bits_cannot_hold_is_refused_before_anybody_joins(tmp_path: Path) -> None:
    options = {"minimum_signal_to_noise": 0.0, "noise_multiplier": 4000.0}
    world = World(tmp_path, privacy=options)
    world.start().obey("stop", time.monotonic())
    wide = world.settings
    world.settings = wide.model_copy(update={"privacy": wide.privacy.model_copy(update=NARROW)})
    with pytest.raises(PrivacyError, match="FS-1214"):
        world.start()


@pytest.mark.parametrize("ring", [8, 64, "16"])
def test_there_are_two_rings(ring: Any) -> None:
    with pytest.raises(ConfigError, match="FS-1003"):
        Privacy(ring_bits=ring)


def test_local_noise_needs_the_wide_ring() -> None:
    assert PrivacyConfig(noise="local", ring_bits=32)
    with pytest.raises(ConfigError, match=r"FS-1003.*ring_bits"):
        Privacy(noise="local", ring_bits=16)


def test_the_ring_is_part_of_the_settings_hash(tmp_path: Path) -> None:
    wide = World(tmp_path).settings
    narrow = wide.model_copy(update={"privacy": wide.privacy.model_copy(update=NARROW)})
    assert RunSettings.parse(narrow.canonical()) == narrow
    assert narrow.digest() != wide.digest()


def test_a_bound_without_room_for_the_rounding_is_refused() -> None:
    """Δ = C/γ would do for the gradients alone; rounding each of them to integers makes them longer."""
    sizes: dict[str, Any] = {"noise_multiplier": 2.0, "honest": 2, "sites": 3}
    segment = ring16_segment(
        "gradient", 512, clip_norm=0.1, units=10, rotation_seed=bytes(32), rounding="record", **sizes
    )
    event = Event("train", "training", 2.0, math.sqrt(2))
    run = SimpleNamespace(
        privacy=PrivacyConfig(unit="record", **NARROW), rounds=SimpleNamespace(colluders="auto", min_survivors="auto")
    )
    limits = PolicyConfig(unit="record")

    def asked(made: Segment) -> Query:
        return Query(bytes(16), 0, 0, "linear", "1", ("x", "y", "z"), {}, (made,), (event,), ring_bits=16)

    check_query(asked(segment), run, limits)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="FS-1227"):
        check_query(asked(replace(segment, grid=0.1 / segment.bound)), run, limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [48, 5120, 526_336])
@pytest.mark.parametrize("units", [1, 30, 100_000])
def test_room_is_made_for_as_many_aligned_units_as_rounding_allows(length: int, units: int) -> None:
    sizes: dict[str, Any] = {"noise_multiplier": 1.5, "honest": 5, "sites": 10}
    found = aligned_units(length, units=units, rounding="record", **sizes)
    assert 1 <= found <= units

    def inflation(aligned: int) -> float:
        made = ring16_segment(
            "v", length, clip_norm=0.1, units=aligned, rotation_seed=bytes(32), rounding="record", **sizes
        )
        return made.bound / clip_room(made.bound, length, rounding="record")

    assert inflation(found) < 1.03
    if found < units:
        # It is the largest: with a tenth more, rounding costs more than 2 %, or the noise is too coarse.
        try:
            assert inflation(math.ceil(1.1 * found) + 1) > 1.02
        except PrivacyError as error:
            assert error.code == "FS-1211"  # noqa: PT017
