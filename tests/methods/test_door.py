"""The door with methods that cheat or fail: what leaves is bounded, noised and paid for, or nothing leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedsecure.config import (
    EncoderConfig,
    MethodConfig,
    PolicyConfig,
    PrivacyConfig,
    RunSettings,
    SiteConfig,
    SiteEntry,
)
from fedsecure.errors import BudgetExceeded, DataError, FedsecureError, PrivacyError, RunError
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Answer, Event, Query, Segment, SiteState
from fedsecure.methods.base import Release
from fedsecure.privacy.grid import distributed_segment, round_to_grid
from fedsecure.privacy.ledger import Ledger
from fedsecure.privacy.noise import SeededRng
from fedsecure.privacy.ring16 import ring16_segment
from fedsecure.release import Door, Source
from fedsecure.secagg.client import MaskedInput

LENGTH, CLIP, UNITS, Z = 4, 0.1, 5, 20.0
Half = Callable[[Release], Any]


def settings_for(noise: str, rate: float) -> RunSettings:
    return RunSettings(
        classes=("a", "b"),
        encoder=EncoderConfig(model="features", pretrained="file", dimension=2, fingerprint="0" * 64),
        method=MethodConfig(local_steps=1 if noise == "distributed" else 3),
        privacy=PrivacyConfig(max_grad_norm=CLIP, noise=noise, unit="record", sampling_rate=rate),
        sites={name: SiteEntry(max_units=UNITS) for name in ("x", "y", "z")},
    )


class Bench:
    """One door with a ledger on disk, and what came out of it."""

    def __init__(
        self, folder: Path, *, noise: str = "distributed", rate: float = 1.0, max_epsilon: float = 8.0
    ) -> None:
        self.ledger = Ledger(folder / "ledger.db")
        self.sent: list[bytes] = []
        self.read: list[int] = []
        self.noise = noise
        self.rate = rate
        config = SiteConfig(
            site="x",
            aggregator="none",
            identity=folder,
            state=folder,
            ledger=folder / "ledger.db",
            policy=PolicyConfig(unit="record", max_epsilon=max_epsilon, methods=("fake",)),
        )
        self.sources = {"train": Source("scans", False, self._load)}
        self.door = Door(
            config=config,
            settings=settings_for(noise, rate),
            features=SimpleNamespace(),  # type: ignore[arg-type]
            ledger=self.ledger,
            sources=self.sources,  # type: ignore[arg-type]
            rng=SeededRng(1),
            device="cpu",
            run=bytes(16),
        )

    def _load(self) -> UnitFeatures:
        self.read.append(len(self.ledger.history()))
        shape = (UNITS, 1)
        return UnitFeatures(np.ones((*shape, 2), np.float32), np.zeros(shape, np.int64), np.ones(shape, np.bool_))

    def query(self, *, events: tuple[Event, ...] | None = None) -> Query:
        if self.noise == "distributed":
            segment = distributed_segment(
                "v", LENGTH, clip_norm=CLIP, noise_multiplier=Z, honest=2, sites=3, units=UNITS
            )
            event = Event("train", "training", Z, Z / np.sqrt(2), sampling_rate=self.rate)
        else:
            segment = Segment("v", LENGTH, 2.0**-24, 0, (1 << 30) // 3)
            event = Event("train", "training", Z, Z, sampling_rate=self.rate, steps=3)
        chosen = (event,) if events is None else events
        return Query(bytes(16), 0, 0, "fake", "1", ("x", "y", "z"), {}, (segment,), chosen)

    def ask(self, half: Half, query: Query | None = None) -> Any:
        def answer(inputs: Any, state: SiteState, release: Release) -> Any:
            result = half(release)
            return result if isinstance(result, tuple) else (result, state)

        asked = query or self.query()
        return self.door.release(
            asked,
            SimpleNamespace(name="fake", version="1", answer=answer),  # type: ignore[arg-type]
            inputs={},
            state=SiteState(),
            seal=lambda vector: MaskedInput(b"header", memoryview(vector.tobytes()), b""),
            send=lambda sealed: self.sent.append(bytes(sealed.payload)),
        )

    def refused(self, half: Half, code: str, kind: type[FedsecureError] = PrivacyError) -> None:
        with pytest.raises(kind) as caught:
            self.ask(half)
        assert caught.value.code == code
        assert not self.sent, "nothing leaves"
        entries = self.ledger.history()
        assert [entry.final for entry in entries] == ["RESERVED"], "charged, and never given back"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Bench(folder, **options))
        return made[-1]

    yield make
    for each in made:
        each.ledger.close()


def honest(release: Release) -> Answer:
    units = release.units("train")
    assert units is not None
    return Answer({"v": np.full(LENGTH, CLIP / 2)}, {"v": len(units)})


def test_an_honest_answer_is_charged_before_it_is_read_noised_committed_and_sent(bench: Any) -> None:
    site = bench()
    contribution, _ = site.ask(honest)
    assert site.read == [1], "the reservation was on disk when the units were read"
    assert len(site.sent) == 1
    (segment,) = site.query().segments
    exact = np.rint(np.full(LENGTH, CLIP / 2) / segment.grid).astype(np.int64)
    assert not np.array_equal(contribution.vector.view(np.int32), exact), "noise is on it"
    assert [entry.state for entry in site.ledger.history()] == ["RESERVED", "COMMITTED"]


def test_the_charge_is_committed_before_the_first_byte_leaves(bench: Any) -> None:
    site = bench()
    states: list[str] = []
    site.sent = SimpleNamespace(append=lambda payload: states.append(site.ledger.history()[-1].state))
    site.ask(honest)
    assert states == ["COMMITTED"]


def test_a_budget_that_is_spent_refuses_before_anything_is_read(bench: Any) -> None:
    site = bench(max_epsilon=0.01)
    with pytest.raises(BudgetExceeded, match="FS-1201"):
        site.ask(honest)
    assert not site.read
    assert not site.ledger.history()


def test_units_that_the_query_does_not_pay_for_are_not_read(bench: Any) -> None:
    site = bench()
    site.door.sources = {**site.sources, "evaluation": Source("test scans", False, site._load)}

    def reads_others(release: Release) -> Answer:
        release.units("evaluation")
        return honest(release)

    site.refused(reads_others, "FS-1240")
    assert not site.read
    public = bench()
    public.door.sources = {**public.sources, "evaluation": Source("atlas", True, public._load)}
    public.ask(reads_others)
    assert len(public.sent) == 1, "a public set may be read without a charge"


BROKEN: dict[str, tuple[Any, dict[str, int], str]] = {
    "no segment": ({}, {"v": 1}, "FS-1243"),
    "NaN": ({"v": np.array([0, 0, 0, np.nan])}, {"v": 1}, "FS-1243"),
    "infinity": ({"v": np.array([0, 0, 0, np.inf])}, {"v": 1}, "FS-1243"),
    "too short": ({"v": np.zeros(LENGTH - 1)}, {"v": 1}, "FS-1243"),
    "a matrix": ({"v": np.zeros((LENGTH, 1))}, {"v": 1}, "FS-1243"),
    "a list": ({"v": [0.0] * LENGTH}, {"v": 1}, "FS-1243"),
    "objects": ({"v": np.array([None] * LENGTH)}, {"v": 1}, "FS-1243"),
    "too long": ({"v": np.full(LENGTH, UNITS * CLIP)}, {"v": UNITS}, "FS-1244"),
    "too long, with units it never had": ({"v": np.full(LENGTH, UNITS * CLIP)}, {"v": 1000}, "FS-1244"),
    "from no units": ({"v": np.full(LENGTH, CLIP / 2)}, {}, "FS-1244"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_answer_out_of_bounds_does_not_leave(bench: Any, case: str) -> None:
    values, units, code = BROKEN[case]

    def half(release: Release) -> Answer:
        release.units("train")
        return Answer(values, units)

    bench().refused(half, code)


def steps(release: Release, count: int, *, norm: float = CLIP, value: float = 0.01, draw: bool = True) -> Answer:
    units = release.units("train")
    assert units is not None
    total = np.zeros(LENGTH)
    for _ in range(count):
        if draw:
            release.sample(len(units))
        total += release.privatise(np.full(LENGTH, value), norm)
    return Answer({"v": total * 1e-3}, {"v": len(units)})


def test_local_noise_leaves_after_exactly_the_declared_steps(bench: Any) -> None:
    site = bench(noise="local")
    site.ask(lambda release: steps(release, 3))
    assert len(site.sent) == 1


@pytest.mark.parametrize(
    ("half", "code"),
    [
        (lambda release: steps(release, 4), "FS-1241"),
        (lambda release: steps(release, 2), "FS-1245"),
        (lambda release: Answer({"v": np.zeros(LENGTH)}, {"v": len(release.units("train"))}), "FS-1245"),
        (lambda release: steps(release, 3, norm=CLIP / 2), "FS-1249"),
        (lambda release: steps(release, 3, value=UNITS * CLIP), "FS-1249"),
        (lambda release: steps(release, 3, value=np.nan), "FS-1249"),
    ],
    ids=["a step too many", "a step too few", "no noise at all", "noise for less", "longer than its units", "NaN"],
)
def test_local_noise_cannot_be_saved(bench: Any, half: Half, code: str) -> None:
    bench(noise="local").refused(half, code)


@pytest.mark.parametrize("trains", [False, True], ids=["evaluation alone", "beside noisy steps"])
def test_the_noise_of_local_steps_does_not_stand_for_that_of_evaluation_units(bench: Any, trains: bool) -> None:
    def half(release: Release) -> Answer:
        units = release.units("evaluation")
        assert units is not None
        if trains:
            steps(release, 3)
        return Answer({"v": np.full(LENGTH, 1e-6 * len(units))}, {"v": len(units)})

    site = bench(noise="local")
    site.door.sources = {**site.sources, "evaluation": Source("test scans", False, site._load)}
    # Another site's set is public, so that segments without noise are no surprise.
    sites = {**site.door.settings.sites, "w": SiteEntry(role="evaluate", evaluation_units=9, evaluation_public=True)}
    site.door.settings = site.door.settings.model_copy(update={"sites": sites})
    (training,) = site.query().events
    paid = Event("evaluation", "evaluation counts", Z, Z)
    with pytest.raises(PrivacyError, match="FS-1245"):
        site.ask(half, site.query(events=(training, paid) if trains else (paid,)))
    assert not site.sent


@pytest.mark.parametrize("draws", [0, 2])
def test_a_price_for_a_sample_needs_the_sample(bench: Any, draws: int) -> None:
    def half(release: Release) -> Answer:
        units = release.units("train")
        assert units is not None
        for _ in range(draws):
            release.sample(len(units))
        return Answer({"v": np.zeros(LENGTH)}, {"v": 0})

    bench(rate=0.5).refused(half, "FS-1231")


def test_a_price_for_a_sample_is_right_with_one(bench: Any) -> None:
    def half(release: Release) -> Answer:
        units = release.units("train")
        assert units is not None
        drawn = units.select(release.sample(len(units)))
        return Answer({"v": np.full(LENGTH, CLIP / 2) * bool(len(drawn))}, {"v": len(drawn)})

    site = bench(rate=0.5)
    site.ask(half)
    assert len(site.sent) == 1
    local = bench(noise="local", rate=0.5)
    local.ask(lambda release: steps(release, 3))
    bench(noise="local", rate=0.5).refused(lambda release: steps(release, 3, draw=False), "FS-1231")


def test_noise_without_a_training_event_is_refused(bench: Any) -> None:
    site = bench()
    site.door.sources = {"evaluation": Source("test scans", False, site._load)}
    query = site.query(events=(Event("evaluation", "evaluation counts", Z, Z),))
    wide = distributed_segment("v", LENGTH, clip_norm=np.sqrt(2), noise_multiplier=Z, honest=1, sites=3, units=UNITS)
    query = replace(query, segments=(wide,))
    with pytest.raises(PrivacyError, match="FS-1242"):
        site.ask(lambda release: release.privatise(np.zeros(LENGTH), CLIP), query)
    with pytest.raises(PrivacyError, match="FS-1257"):
        site.ask(honest, query)


@pytest.mark.parametrize(
    "use",
    [
        lambda kept: kept.units("train"),
        lambda kept: kept.sample(UNITS),
        lambda kept: kept.privatise(np.zeros(LENGTH), CLIP),
    ],
    ids=["units", "sample", "privatise"],
)
def test_a_capability_is_dead_after_the_answer(bench: Any, use: Callable[[Release], Any]) -> None:
    site = bench()
    kept: list[Release] = []

    def half(release: Release) -> Answer:
        kept.append(release)
        return honest(release)

    site.ask(half)
    with pytest.raises(PrivacyError, match="FS-1247"):
        use(kept[0])


@pytest.mark.parametrize("error", [AssertionError("secret"), ZeroDivisionError("secret"), MemoryError("secret")])
def test_a_method_that_fails_is_one_typed_error_and_stays_charged(bench: Any, error: Exception) -> None:
    def half(release: Release) -> Answer:
        release.units("train")
        raise error

    site = bench()
    with pytest.raises(RunError, match="FS-1719") as caught:
        site.ask(half)
    assert "secret" not in str(caught.value)
    assert [entry.final for entry in site.ledger.history()] == ["RESERVED"]


def test_errors_made_on_purpose_pass_as_they_are(bench: Any) -> None:
    def half(release: Release) -> Answer:
        raise DataError("FS-1110", "a row", expected="finite", cure="none")

    bench().refused(half, "FS-1110", DataError)


def test_a_second_population_that_cannot_pay_gives_the_first_its_charge_back(bench: Any) -> None:
    site = bench()
    site.door.sources = {**site.sources, "evaluation": Source("test scans", False, site._load)}
    (event,) = site.query().events
    expensive = Event("evaluation", "evaluation counts", 0.2, 0.2)
    with pytest.raises(BudgetExceeded):
        site.door._reserve(site.query(), (event, *(expensive,)))
    assert not site.read
    assert [entry.state for entry in site.ledger.history()] == ["RESERVED", "VOID"]
    assert not site.ledger.spent("scans", "train")


def test_a_site_without_such_units_adds_neither_noise_nor_charge(bench: Any) -> None:
    site = bench()
    site.door.sources = {}
    contribution, _ = site.ask(lambda release: Answer({"v": np.zeros(LENGTH)}, {"v": 0}))
    assert not contribution.vector.any()
    assert not site.ledger.history()
    assert Fraction(site.query().segments[0].noise_variance) > 0


# --- the ring of 16 bits: every unit rounded by itself, by the door ---


def narrow(site: Bench) -> Query:
    """The bench's question in the ring of 16 bits; units move the sum by C each."""
    segment = ring16_segment(
        "v",
        LENGTH,
        clip_norm=CLIP,
        noise_multiplier=Z,
        honest=2,
        sites=3,
        units=1,
        rotation_seed=bytes(32),
        rounding="record",
    )
    return replace(site.query(), segments=(segment,), ring_bits=16)


ROWS = [row * CLIP for row in np.eye(UNITS, LENGTH)]


def summed(release: Release, vectors: Any = ROWS) -> Any:
    release.units("train")
    return release.sum_units("v", iter(vectors))


def test_units_rounded_by_the_door_leave_in_two_bytes_a_coordinate(bench: Any) -> None:
    site = bench()
    site.ask(lambda release: Answer({"v": summed(release)}, {"v": UNITS}), narrow(site))
    assert [len(payload) for payload in site.sent] == [2 * LENGTH]


def test_a_unit_longer_than_its_clip_norm_moves_the_sum_by_no_more_than_the_bound(bench: Any) -> None:
    site = bench()
    query = narrow(site)
    found: list[Any] = []

    def half(release: Release) -> Answer:
        found.append(summed(release, [np.full(LENGTH, 1e6)]))
        return Answer({"v": found[0]}, {"v": 1})

    site.ask(half, query)
    steps = round_to_grid(found[0], replace(query.segments[0], clamp=1 << 40))
    assert 0 < int(steps @ steps) <= query.segments[0].bound ** 2


PLAIN: dict[str, Half] = {
    "a plain sum": lambda release: sum(ROWS[:1], np.zeros(LENGTH)),
    "a copy": lambda release: summed(release).copy(),
    "a multiple": lambda release: 0.5 * summed(release),
    "a part of it": lambda release: np.where(np.arange(LENGTH) < 2, summed(release), 0.0),
}


@pytest.mark.parametrize("case", PLAIN)
def test_what_was_not_rounded_unit_by_unit_does_not_leave(bench: Any, case: str) -> None:
    site = bench()

    def half(release: Release) -> Answer:
        release.units("train")
        return Answer({"v": PLAIN[case](release)}, {"v": UNITS})

    with pytest.raises(PrivacyError, match="FS-1217"):
        site.ask(half, narrow(site))
    assert not site.sent


def test_the_sum_of_rounded_units_cannot_be_changed_in_place(bench: Any) -> None:
    site = bench()

    def half(release: Release) -> Answer:
        total = summed(release)
        total[0] = 1.0
        return Answer({"v": total}, {"v": UNITS})

    with pytest.raises(RunError, match="FS-1719"):
        site.ask(half, narrow(site))
    assert not site.sent


@pytest.mark.parametrize("case", ["twice", "another segment", "the wide ring"])
def test_units_are_rounded_for_a_narrow_segment_once(bench: Any, case: str) -> None:
    site = bench()

    def half(release: Release) -> Answer:
        release.units("train")
        total = release.sum_units("w" if case == "another segment" else "v", iter(ROWS))
        if case == "twice":
            total = release.sum_units("v", iter(ROWS))
        return Answer({"v": total}, {"v": UNITS})

    with pytest.raises(PrivacyError, match="FS-1215"):
        site.ask(half, site.query() if case == "the wide ring" else narrow(site))
    assert not site.sent
