"""Cohorts smaller than the roster: drawn by all, recomputed by each, paid as planned; and an aggregator that picks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import CLASSES, World

from fedsecure.aggregator.drawing import Drawing
from fedsecure.aggregator.schedule import Schedule
from fedsecure.client import Client
from fedsecure.config import PolicyConfig, RunSettings
from fedsecure.data.loading import open_dataset
from fedsecure.errors import ConfigError, PrivacyError, ProtocolError, RoundAborted
from fedsecure.identity.provision import load_identity
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.features import load_site_features, load_units
from fedsecure.messages import Aggregate, Query
from fedsecure.methods.agenda import asked_at
from fedsecure.methods.cohorts import cohort_of, tossers
from fedsecure.methods.contexts import draw_of, round_context, toss_context
from fedsecure.methods.registry import load_training_method
from fedsecure.privacy.accounting import epsilon
from fedsecure.privacy.grid import from_grid, round_to_grid
from fedsecure.privacy.ledger import Ledger
from fedsecure.privacy.noise import SeededRng
from fedsecure.privacy.plan import paid_by
from fedsecure.privacy.report import network_report
from fedsecure.privacy.report_verify import verify_report
from fedsecure.secagg.coin import CoinServer, CoinSite, Record
from fedsecure.secagg.draw import Draw
from fedsecure.site.questions import accept
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb

DRAWN = {"cohort": 3, "prepared_rounds": 0}
SEED = 11


def kept(world: World) -> dict[str, Any]:
    """What the aggregator keeps of the draw."""
    (file,) = world.folder.glob("aggregator/runs/*/draw.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def again(world: World) -> Drawing:
    """The draw as the aggregator's next process knows it."""
    core = world.coordinator
    return Drawing(
        world.settings,
        run=core.run,
        roster=core._identity.roster,
        folder=core._store.folder,
        sessions=core.sessions,
        alarm=core.engine.account.alarm,
    )


def test_a_run_of_drawn_cohorts_is_the_central_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, sites=5, rounds=6, waits=DRAWN)
    # Sites of different sizes, so that a normaliser of the wrong ones would show.
    entries = {
        name: world.settings.sites[name].model_copy(update={"max_units": 30 + 10 * index})
        for index, name in enumerate(world.names)
    }
    world.settings = RunSettings.model_validate({**world.settings.model_dump(), "sites": entries})
    world.start()
    seen: list[tuple[dict[str, Any], Aggregate]] = []
    absorb = Schedule.absorb

    def spying(self: Schedule, progress: Any, aggregate: Aggregate) -> Any:
        if progress.stage == "training":
            seen.append((dict(progress.state.tensors), aggregate))
        return absorb(self, progress, aggregate)

    monkeypatch.setattr(Schedule, "absorb", spying)
    world.run(*(world.take_part(name, simulation_seed=SEED) for name in world.names))
    assert not world.errors
    assert len(seen) == world.rounds

    settings, draw = world.settings, world.coordinator.engine.draw
    assert draw is not None
    _, cohort = cohort_of(settings, trainers_only=True)
    method: Any = load_training_method(world.adapter)
    segment = method.segment(settings, cohort, method.plan(settings, cohort))
    rate, _ = method.rate(settings, cohort)
    features = load_site_features(settings.encoder, CLASSES, file=world.features)
    task = method.task(settings, features)
    generators = {name: SeededRng(f"{SEED}/{name}".encode()) for name in world.names}
    units = {}
    for name in world.names:
        section = world.site_config(name).train
        assert section is not None
        with Ledger(tmp_path / name / "ledger.db") as ledger:
            units[name] = load_units(
                open_dataset(section, classes=CLASSES), features, cache=None, unit="record", cap=1,
                max_units=settings.sites[name].max_units, key=ledger.key,
            )  # fmt: skip
    for step, (tensors, aggregate) in enumerate(seen):
        assert aggregate.asked == draw.cohort(step)
        total = np.zeros(segment.length, np.int64)
        for name in draw.cohort(step):
            values = clipped_sum(
                task, tensors, units[name], max_grad_norm=settings.privacy.max_grad_norm, engine="closed-form"
            )
            noise = generators[name].discrete_gaussian(segment.length, segment.noise_variance)
            total += round_to_grid(values, segment) + noise
        expected = from_grid(total, segment)
        np.testing.assert_array_equal(aggregate.values["gradient"], expected)
        following = seen[step + 1][0] if step + 1 < len(seen) else world.coordinator.engine.progress.state.tensors
        declared = sum(settings.sites[name].max_units for name in draw.cohort(step))
        spec = method.spec(settings)
        moved = spec.unflatten(spec.flatten({n: tensors[n] for n in spec.shapes}) - rate * expected / declared)
        for name, value in moved.items():
            np.testing.assert_array_equal(following[name], value)


@pytest.mark.slow
def test_a_site_pays_for_the_rounds_that_may_ask_it_and_the_report_says_so(tmp_path: Path) -> None:
    # 7 rounds of 3 out of 5: some are asked 5 times, others 4.
    world = World(tmp_path, sites=5, rounds=7, waits=DRAWN, privacy={"spare_attempts": 0})
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    settings = world.settings
    _, cohort = cohort_of(settings, trainers_only=True)
    plan = load_training_method("linear").plan(settings, cohort)
    assert (plan.asked, plan.attempts, cohort.sites) == (5, 5, 3)
    assert plan.epsilon <= settings.privacy.target_epsilon < plan.epsilon * 1.01
    outcome = world.coordinator.outcome
    assert outcome is not None
    asked = Counter(s for a in outcome["attempts"] if a["stage"] == "training" for s in a["cohort"])
    assert sum(asked.values()) == 21
    assert max(asked.values()) == plan.asked
    for name, report in world.reports.items():
        assert len(report["budgets"]["train"]["releases"]) == asked[name]
        price = paid_by(name, plan.events_of(asked[name]), settings)
        assert report["epsilon"] == pytest.approx(epsilon(price, delta=settings.privacy.delta))
        assert report["secagg"] == {"mode": "active", "sites": 3, "colluders": 1, "min_survivors": 3}
    whole = network_report([json.loads(json.dumps(report)) for report in world.reports.values()])
    assert whole["epsilon"] == pytest.approx(plan.epsilon_expected)
    (alone,) = (f for f in whole["several_sites"]["figures"] if f["sites"] == 1 and f["population"] == "train")
    assert alone["epsilon"] == pytest.approx(plan.epsilon_expected)
    assert not verify_report(whole).findings


def test_the_same_run_of_everybody_needs_more_noise() -> None:
    # What the balance buys: σ for the rounds a site may be asked in, not for all of them.
    def noise(**rounds: Any) -> float:
        settings = settings_of(method={"name": "linear", "rounds": 20}, **rounds)
        _, cohort = cohort_of(settings, trainers_only=True)
        return load_training_method("linear").plan(settings, cohort).noise_multiplier

    assert noise(**DRAWN) == pytest.approx(noise() * np.sqrt((12 + 1) / (20 + 1)), rel=1e-6)


def settings_of(**changes: Any) -> RunSettings:
    rounds = {key: changes.pop(key) for key in list(changes) if key in DRAWN}
    raw: dict[str, Any] = {
        "classes": CLASSES,
        "encoder": {"model": "features", "pretrained": "file", "dimension": 16, "fingerprint": "0" * 64},
        "privacy": {"unit": "record", "max_records_per_unit": 1},
        "rounds": rounds,
        "sites": {f"site-{index}": {"max_units": 200} for index in range(5)},
    }
    return RunSettings.model_validate(raw | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": 3}, "prepared_rounds = 16 with a drawn cohort"),
        ({"cohort": 6, "prepared_rounds": 0}, "rounds.cohort = 6 of 5"),
        ({"cohort": 2, "prepared_rounds": 0}, "greater than or equal to 3"),
    ],
)
def test_cohorts_that_cannot_be_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(**changes)
    assert settings_of(cohort=5).draws is False
    assert settings_of(**DRAWN).draws is True


@pytest.mark.parametrize(
    "method",
    [
        {"name": "prototypes", "rounds": 1},
        {"name": "ridge", "rounds": 1},
        {"name": "clip2fl"},
        {"name": "facmic", "alignment": {"weight": 1.0, "target": "0" * 64, "prototypes": True}},
    ],
)
def test_a_release_that_is_made_once_asks_everybody(method: dict[str, Any]) -> None:
    def start(**rounds: Any) -> None:
        settings = settings_of(method=method, **rounds)
        _, cohort = cohort_of(settings, trainers_only=True)
        load_training_method(method["name"]).start(settings, cohort)

    with pytest.raises(ConfigError, match="FS-1050"):
        start(**DRAWN)
    start()


def test_a_run_that_draws_too_few_is_refused_at_joining(tmp_path: Path) -> None:
    world = World(tmp_path, sites=5, rounds=1, waits=DRAWN)
    world.start()
    policy = PolicyConfig(max_epsilon=8.0, unit="record", max_evaluation_epsilon=8.0, min_cohort=4)
    with pytest.raises(ProtocolError, match="FS-1331: .* a cohort of 3 sites"):
        world.take_part("site-1", changes={"policy": policy})()
    assert world.coordinator.engine.draw is None
    assert not (tmp_path / "site-1" / "state" / "runs").exists()


@pytest.mark.slow
def test_floors_of_a_site_apply_to_the_drawn_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a site could not tell beforehand."""
    monkeypatch.setattr("fedsecure.client.rehearse", lambda *_, **__: None)
    world = World(tmp_path, sites=5, rounds=1, waits=DRAWN)
    world.start()
    policy = PolicyConfig(max_epsilon=8.0, unit="record", max_evaluation_epsilon=8.0, min_cohort=4)

    def ends(name: str) -> None:
        try:
            world.take_part(name, changes={"policy": policy})()
        finally:
            world.hurry()

    world.run(*(lambda n=name: ends(n) for name in world.names))
    draw = world.coordinator.engine.draw
    assert draw is not None
    refused = {world.names[int(i)] for i, e in world.errors.items() if isinstance(e, PrivacyError | ProtocolError)}
    assert refused
    assert refused <= set(draw.cohort(0))
    assert {error.code for error in world.errors.values()} <= {"FS-1226", "FS-1331", "FS-1501"}
    for name in world.names:
        with Ledger(tmp_path / name / "ledger.db") as ledger:
            assert not ledger.spent(f"{name}-train", "train")


# --- an aggregator that picks ---------------------------------------------------------------------------------------


class Knowing:
    """A site that knows the draw, and an aggregator that asks it something else, in a context that fits."""

    def __init__(self, world: World, client: Client, draw: Draw) -> None:
        self.member, self.draw, self.world = client._member, draw, world
        # A round that asks this site.
        self.step = next(k for k in range(world.rounds) if client.config.site in draw.cohort(k))

    def query(self, cohort: tuple[str, ...]) -> Query:
        round = self.step + 1
        ask = self.world.coordinator.engine.schedule.ask(
            replace(self.world.coordinator.engine.progress, stage="training", state=self.member.start)
        )
        assert ask is not None
        core = self.world.coordinator
        hashes = {name: bytes(32) for name in ask.inputs}
        query = core.engine.openings.query(ask, round=round, attempt=0, inputs=hashes, draw=self.draw)
        return replace(query, cohort=cohort)

    def ask(self, query: Query, draw: Draw | None) -> pb.Ask:
        descriptor = round_context(
            self.member.settings, query, roster=self.member.identity.roster, trainers_only=True, draw=draw
        )
        return pb.Ask(query_json=query.to_json(), descriptor=descriptor.canonical())


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    world = World(tmp_path_factory.mktemp("knowing"), sites=5, rounds=5, waits=DRAWN)
    world.start()
    with world.client("site-1") as client:
        yield Knowing(world, client, draw_of(world.settings, make_record(world)))


def make_record(world: World, *, number: int = 0, run: bytes | None = None, parties: int = 5) -> Record:
    """A toss among honest sites of this world."""
    settings, roster = world.settings, world.coordinator._identity.roster
    names = tuple(world.names[:parties])
    toss = toss_context(settings, run=run or world.coordinator.run, number=number, parties=names, roster=roster)
    server = CoinServer(toss, roster=roster)
    coins = {}
    for name in names:
        key = load_identity(world.folder / "keys" / "sites" / name / "identity").signing_key
        coins[name] = CoinSite(toss, site=name, signing_key=key, roster=roster)
        server.receive(name, coins[name].commit())
    for name, shown in server.close().items():
        server.receive(name, coins[name].reveal(shown))
    server.close()
    return server.record()


def test_the_drawn_cohort_is_accepted_and_another_is_not(knowing: Knowing, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = knowing.draw.cohort(knowing.step)
    fair = knowing.query(drawn)
    assert accept(knowing.ask(fair, knowing.draw), knowing.member, draw=knowing.draw).query == fair

    sites, _ = tossers(knowing.member.settings)
    swapped = next(s for s in sites if s not in drawn)
    picked = knowing.query(tuple(sorted({*drawn, swapped} - {next(s for s in drawn if s != "site-1")})))
    for query in (picked, knowing.query(sites)):
        asked = knowing.ask(picked, knowing.draw)
        asked.query_json = query.to_json()
        with pytest.raises(ProtocolError, match="FS-1399"):
            accept(asked, knowing.member, draw=knowing.draw)
    # The positive control: policy, roster, context and price are all in order, so the comparison is what refuses.
    monkeypatch.setattr("fedsecure.site.questions.asked_at", lambda *_, **__: picked.cohort)
    accept(knowing.ask(picked, knowing.draw), knowing.member, draw=knowing.draw)


def test_two_sites_with_different_seeds_cannot_be_in_one_round(
    knowing: Knowing, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = knowing.draw.cohort(knowing.step)
    # Another seed that happens to draw the same cohort: only the context tells them apart.
    other = next(
        draw
        for draw in (replace(knowing.draw, seed=bytes([v]) * 32) for v in range(256))
        if draw.cohort(knowing.step) == drawn
    )
    fair = knowing.query(drawn)
    with pytest.raises(ProtocolError, match="FS-1372"):
        accept(knowing.ask(fair, other), knowing.member, draw=knowing.draw)
    monkeypatch.setattr(Draw, "bind", lambda self, config_hash: config_hash)
    accept(knowing.ask(fair, other), knowing.member, draw=knowing.draw)


def test_a_training_question_before_the_draw_is_refused(knowing: Knowing) -> None:
    fair = knowing.query(knowing.draw.cohort(knowing.step))
    with pytest.raises(ProtocolError, match="FS-1397"):
        accept(knowing.ask(fair, knowing.draw), knowing.member)
    settings = knowing.member.settings
    assert asked_at(settings, 0, draw=None) == tuple(knowing.world.names), "evaluation asks all, draw or no draw"


class Meddling(MemoryTransport):
    """An aggregator that sends one site another preparation than the others."""

    change: Callable[[bytes], bytes | None]

    def next(self, request: pb.NextRequest) -> pb.Directive:
        changed = pb.Directive()
        changed.CopyFrom(super().next(request))
        if changed.WhichOneof("kind") == "prepare":
            raw = self.change(bytes(changed.prepare.descriptor))
            if raw is not None:
                changed.prepare.descriptor = raw
        return changed


def run_with(world: World, change: Callable[[bytes], bytes | None]) -> dict[str, BaseException]:
    """A run whose first site is lied to; what that site, and the others, ended with."""
    transport = Meddling(world.coordinator, "site-1", world.gate)
    transport.change = change
    attacked = world.take_part("site-1", transport=transport)

    def ends() -> None:
        try:
            attacked()
        finally:
            world.hurry()

    world.run(ends, *(world.take_part(name) for name in world.names[1:]))
    return world.errors


LIES: dict[str, tuple[Callable[[World], Callable[[bytes], bytes | None]], str]] = {
    # The record of another run, whose seed the aggregator likes.
    "an old seed": (
        lambda world: lambda raw: make_record(world, run=b"o" * 16).pack() if raw_is_record(raw) else None,
        "FS-1391",
    ),
    # A toss that was really made, of this run, without what this site revealed.
    "a reveal dropped": (lambda world: second_record(world), "FS-1398|FS-1393"),
    # A later toss, for this site only: a split view. All in it is honestly signed.
    "another toss for one site": (
        lambda world: lambda raw: make_record(world, number=1).pack() if raw_is_record(raw) else None,
        "FS-1399|FS-1372",
    ),
    "a toss among too few": (
        lambda world: lambda raw: raw if raw_is_record(raw) else few(world),
        "FS-1391",
    ),
    "tosses without end": (lambda world: lambda raw: raw if raw_is_record(raw) else late(world), "FS-1391"),
}


def raw_is_record(raw: bytes) -> bool:
    return raw[4:].startswith(b"fedsecure/coin/v1/record")


def second_record(world: World) -> Callable[[bytes], bytes | None]:
    def change(raw: bytes) -> bytes | None:
        if not raw_is_record(raw):
            return None
        roster = world.coordinator._identity.roster
        real = Record.parse(raw, roster=roster)
        toss = real.toss
        # The colluders among the others sign again, for a list without site-1.
        server = CoinServer(toss, roster=roster)
        coins = {}
        for name in toss.parties[1:]:
            key = load_identity(world.folder / "keys" / "sites" / name / "identity").signing_key
            coins[name] = CoinSite(toss, site=name, signing_key=key, roster=roster)
            server.receive(name, coins[name].commit())
        for name, shown in server.close().items():
            server.receive(name, coins[name].reveal(shown))
        server.close()
        return server.record().pack()

    return change


def few(world: World) -> bytes:
    roster = world.coordinator._identity.roster
    toss = toss_context(
        world.settings, run=world.coordinator.run, number=0, parties=tuple(world.names[:2]), roster=roster
    )
    return replace(toss, required=2).canonical()


def late(world: World) -> bytes:
    roster = world.coordinator._identity.roster
    most = world.settings.rounds.max_attempts
    return toss_context(
        world.settings, run=world.coordinator.run, number=most, parties=tuple(world.names), roster=roster
    ).canonical()


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_a_site_that_is_told_another_draw_does_not_go_on(tmp_path: Path, lie: str) -> None:
    world = World(tmp_path, sites=5, rounds=5, waits=DRAWN)
    world.start()
    make, codes = LIES[lie]
    errors = run_with(world, make(world))
    mine = errors.get("0")
    assert isinstance(mine, ProtocolError), errors
    assert mine.code in codes.split("|")
    with Ledger(tmp_path / "site-1" / "ledger.db") as ledger:
        assert not ledger.spent("site-1-train", "train")


@pytest.mark.slow
def test_the_same_meddling_without_a_lie_is_no_obstacle(tmp_path: Path) -> None:
    world = World(tmp_path, sites=5, rounds=2, waits=DRAWN)
    world.start()
    assert not run_with(world, lambda raw: None)


# --- a site that does not keep to it, and one that is late ----------------------------------------------------------


class Withholding(MemoryTransport):
    """A site that commits and, having seen the others' commitments, reveals nothing; the time is up once all others
    have."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world.coordinator, name, world.gate)
        self.world, self.name, self.sent = world, name, 0

    def next(self, request: pb.NextRequest) -> pb.Directive:
        drawing = self.world.coordinator.engine.drawing
        assert drawing is not None
        with self.world.gate:
            toss = drawing._toss
            if self.sent > 1 and toss is not None and toss.waiting_for() == (self.name,):
                drawing._deadline = 0.0
        return super().next(request)

    def send(self, message: pb.PhaseMessage) -> None:
        self.sent += 1
        if self.sent != 2:
            super().send(message)


@pytest.mark.slow
def test_who_withholds_a_reveal_is_left_out_of_the_next_toss_and_gets_its_record(tmp_path: Path) -> None:
    world = World(tmp_path, sites=5, rounds=5, waits=DRAWN)
    world.start()
    withholding = Withholding(world, "site-3")
    others = [world.take_part(name) for name in world.names if name != "site-3"]
    world.run(world.take_part("site-3", transport=withholding), *others)
    assert not world.errors
    draw = kept(world)
    (given_up,) = draw["given_up"]
    assert draw["tosses"] == 2
    assert given_up["parties"] == world.names
    assert "FS-1396" in given_up["reason"]
    assert "site-3" in given_up["reason"]
    assert [h.facts["code"] for h in world.happened if h.kind == "alarm"] == ["FS-1396"]
    record = Record.parse(bytes.fromhex(draw["record"]), roster=world.coordinator._identity.roster)
    assert list(record.reveals) == [name for name in world.names if name != "site-3"]
    outcome = world.coordinator.outcome
    assert outcome is not None
    assert outcome["complete"]
    asked = Counter(s for a in outcome["attempts"] if a["stage"] == "training" for s in a["cohort"])
    assert asked == dict.fromkeys(world.names, 3), "it has no say in the seed, and its share of the rounds"


def test_tosses_are_bounded(tmp_path: Path) -> None:
    world = World(tmp_path, sites=5, rounds=2, waits={**DRAWN, "max_attempts": 1})
    world.start()
    withholding = Withholding(world, "site-3")
    others = [world.take_part(name) for name in world.names if name != "site-3"]
    world.run(world.take_part("site-3", transport=withholding), *others)
    assert (kept(world)["tosses"], kept(world)["record"]) == (1, "")
    assert world.coordinator.failure is not None
    assert "FS-1396" in str(world.coordinator.failure)
    # Nor does a restart give the aggregator a further choice.
    assert again(world).draw is None
    with pytest.raises(RoundAborted, match="FS-1396"):
        again(world).begin(world.names, 0.0)


@pytest.mark.slow
def test_a_site_that_comes_back_keeps_to_the_draw_it_knew_and_so_does_an_aggregator(tmp_path: Path) -> None:
    world = World(tmp_path, sites=5, rounds=6, waits=DRAWN)
    world.start()

    def leaves_and_returns() -> None:
        with world.client("site-2") as client:
            for query in client.queries():
                client.answer(query)
                break
            known = client._draws.draw
        with world.client("site-2") as client:
            assert client._draws.draw == known is not None
            with pytest.raises(ProtocolError, match="FS-1398"):
                client._draws.learn(make_record(world).pack())
            with pytest.raises(ProtocolError, match="FS-1398"):
                client._draws.toss(make_record(world, number=1).toss.canonical())
            client.run()

    world.run(leaves_and_returns, *(world.take_part(name) for name in world.names if name != "site-2"))
    assert not world.errors
    assert kept(world)["tosses"] == 1
    assert again(world).draw == world.coordinator.engine.draw is not None
    assert again(world).number == 0
