"""A hostile aggregator at one site's doorstep: whatever it asks, says or sends, nothing is read, charged or shown raw.

Each client here talks to the real coordinator; the attack is what stands between the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from federation_world import CLASSES, World

from fedsecure.client import Client
from fedsecure.config import EncoderConfig, RunSettings
from fedsecure.data.loading import from_arrays
from fedsecure.errors import ConfigError, DataError, FedsecureError, IdentityError, PrivacyError, ProtocolError
from fedsecure.identity.provision import provision
from fedsecure.messages import Event, Query, Segment, digest_tensor
from fedsecure.methods.agenda import question, starting_state
from fedsecure.methods.base import Ask
from fedsecure.methods.cohorts import cohort_of
from fedsecure.privacy.ledger import Ledger
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.site.line import Line
from fedsecure.site.questions import accept
from fedsecure.transport.memory import MemoryTransport
from fedsecure.transport.tensors import pack_tensor
from fedsecure.wire import federation_pb2 as pb


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Client]]:
    """Three sites that have joined; nothing has been answered."""
    world = World(tmp_path_factory.mktemp("scene"), public_evaluation=False)
    world.start()
    with ExitStack() as stack:
        clients = [stack.enter_context(world.client(name)) for name in world.names]
        yield world, clients[0]


def honest(client: Client, round: int, attempt: int = 0) -> Query:
    """What the aggregator should ask."""
    settings = client._member.settings
    ask = question(settings, round, start=starting_state(settings))
    assert ask is not None
    return Query(
        run=client.run_id,
        round=round,
        attempt=attempt,
        method=ask.method,
        version=ask.version,
        cohort=cohort_of(settings, trainers_only=ask.trainers_only)[0],
        inputs={name: digest_tensor(name, value) for name, value in ask.inputs.items()},
        segments=ask.segments,
        events=ask.events,
    )


def wrapped(client: Client, query: Query) -> pb.Ask:
    """The question with a context that fits it in every byte, as an aggregator would make it."""
    _, cohort = cohort_of(client._member.settings, trainers_only=query.method != "evaluate")
    descriptor = RoundDescriptor.from_query(
        query,
        roster=client._identity.roster,
        config_hash=client._member.settings.digest(),
        base_hash=bytes.fromhex(client._member.features.fingerprint),
        colluders=cohort.colluders,
        min_survivors=cohort.min_survivors,
    )
    return pb.Ask(query_json=query.to_json(), descriptor=descriptor.canonical())


def cheap(query: Query) -> Query:
    """The price of a thousandth of the units, while the settings have the site take them all."""
    return replace(query, events=tuple(replace(event, sampling_rate=1e-3) for event in query.events))


def quieter(query: Query) -> Query:
    """An honest price for less noise than the plan has."""
    (event,), (segment,) = query.events, query.segments
    lower = replace(
        event, noise_multiplier=event.noise_multiplier / 2, local_noise_multiplier=event.noise_multiplier / 4
    )
    return replace(query, events=(lower,), segments=(replace(segment, noise_variance=segment.noise_variance / 4),))


def bare_beside(query: Query) -> Query:
    return replace(query, segments=(*query.segments, Segment("more", 3, 2.0**-12, 0, 1 << 20)))


def two_events(query: Query) -> Query:
    return replace(query, events=(*query.events, Event("evaluation", "evaluation counts", 5.0, 5.0)))


TRAINING = 1
ATTACKS: dict[str, Callable[[Client], Query]] = {
    "the price of a sample": lambda c: cheap(honest(c, TRAINING)),
    "less noise, honestly priced": lambda c: quieter(honest(c, TRAINING)),
    "a segment without noise beside": lambda c: bare_beside(honest(c, TRAINING)),
    "an event that nobody asked for": lambda c: two_events(honest(c, TRAINING)),
    "hits counted in between": lambda c: replace(honest(c, 0), round=TRAINING),
    "a round too many": lambda c: replace(honest(c, TRAINING), round=99),
    "training once more at the end": lambda c: replace(honest(c, TRAINING), round=c._member.settings.method.rounds + 1),
    "attempts without end": lambda c: replace(honest(c, TRAINING), attempt=c._member.settings.rounds.max_attempts),
    "another version": lambda c: replace(honest(c, TRAINING), version="2"),
    "a tensor more": lambda c: replace(honest(c, TRAINING), inputs={"D": bytes(32), "E": bytes(32)}),
    "a hash cut short": lambda c: replace(honest(c, TRAINING), inputs={"D": bytes(31)}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_question_other_than_the_settings_call_for_is_refused(scene: tuple[World, Client], attack: str) -> None:
    _, client = scene
    query = ATTACKS[attack](client)
    with pytest.raises(ProtocolError, match="FS-1373"):
        accept(wrapped(client, query), client._member)


def test_what_the_settings_call_for_is_accepted(scene: tuple[World, Client]) -> None:
    _, client = scene
    settings, start = client._member.settings, client._member.start
    for round in range(settings.method.rounds + 2):
        query = honest(client, round, attempt=1)
        assert accept(wrapped(client, query), client._member).query == query
    assert question(settings, settings.method.rounds + 2, start=start) is None
    assert question(settings, -1, start=start) is None


@pytest.mark.parametrize("attack", ["the price of a sample", "less noise, honestly priced", "hits counted in between"])
def test_nothing_else_would_have_refused_it(
    scene: tuple[World, Client], attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The positive control: signed context, policy and price are all in order, so the comparison is what refuses.
    _, client = scene
    query = ATTACKS[attack](client)
    state = starting_state(client._member.settings)
    believed = Ask(query.method, query.version, state.tensors, query.segments, query.events, query.method != "evaluate")
    monkeypatch.setattr("fedsecure.site.questions.question", lambda *_, **__: believed)
    accept(wrapped(client, query), client._member)
    client._sources.door(None, None).check(query)


def text_of(client: Client, change: Callable[[dict[str, Any]], None]) -> str:
    raw = json.loads(honest(client, TRAINING).to_json())
    change(raw)
    return json.dumps(raw)


MALFORMED: dict[str, Callable[[Client], str]] = {
    "not JSON": lambda c: "{",
    "a list": lambda c: "[]",
    "nothing": lambda c: "null",
    "deep": lambda c: "[" * 100_000,
    "a variance over zero": lambda c: text_of(c, lambda q: q["segments"][0].update(noise_variance=["1", "0"])),
    "a grid beyond floats": lambda c: text_of(c, lambda q: q["segments"][0].update(grid="0x1p99999")),
    "a grid that is no number": lambda c: text_of(c, lambda q: q["segments"][0].update(grid="nan")),
    "an infinite round": lambda c: text_of(c, lambda q: q.update(round=float("inf"))),
    "inputs as a list": lambda c: text_of(c, lambda q: q.update(inputs=[])),
    "events as a number": lambda c: text_of(c, lambda q: q.update(events=3)),
    "a round of many digits": lambda c: text_of(c, lambda q: q.update(round="9" * 5000)),
    "a lone surrogate": lambda c: text_of(c, lambda q: q.update(method="\ud800")),
    "a huge length": lambda c: text_of(c, lambda q: q["segments"][0].update(length=1 << 70)),
    "a negative round": lambda c: text_of(c, lambda q: q.update(round=-1)),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_question_is_one_typed_refusal(scene: tuple[World, Client], case: str) -> None:
    _, client = scene
    with pytest.raises(ProtocolError, match="FS-137[13]"):
        accept(pb.Ask(query_json=MALFORMED[case](client), descriptor=b""), client._member)


@pytest.mark.parametrize(
    "tensor",
    [
        np.full((3, 16), np.nan, np.float32),
        np.full((3, 16), np.inf, np.float32),
        np.zeros((3, 16), np.float64),
        np.zeros((16, 3), np.float32),
        np.zeros((300, 16), np.float32),
    ],
    ids=["nan", "infinity", "float64", "turned", "larger"],
)
def test_a_model_that_is_no_model_is_refused(scene: tuple[World, Client], tensor: Any) -> None:
    _, client = scene

    def fetched(value: Any) -> Any:
        sender = SimpleNamespace(fetch=lambda request: pack_tensor("D", value))
        line = Line(sender, wait_seconds=1.0, progress=lambda moment: None)  # type: ignore[arg-type]
        return line.fetch({"D": digest_tensor("D", value)}, client._member.start.tensors)

    with pytest.raises(ProtocolError, match="FS-1374"):
        fetched(tensor)
    good = np.ones((3, 16), np.float32)
    np.testing.assert_array_equal(fetched(good)["D"], good)


class Welcoming(MemoryTransport):
    """An aggregator whose welcome is its own."""

    change: Callable[[pb.JoinReply], None]

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        reply = super().join(request)
        self.change(reply)
        return reply


def settings_with(change: Callable[[dict[str, Any]], None]) -> Callable[[pb.JoinReply], None]:
    def altered(reply: pb.JoinReply) -> None:
        raw = json.loads(reply.settings_json)
        change(raw)
        reply.settings_json = json.dumps(raw)

    return altered


WELCOMES: dict[str, tuple[Callable[[pb.JoinReply], None], str]] = {
    "a run id as long as a path": (lambda r: setattr(r, "run", b"r" * 200), "FS-1377"),
    "no run id": (lambda r: setattr(r, "run", b""), "FS-1377"),
    "a private set called public": (
        settings_with(lambda s: s["sites"]["site-1"].update(evaluation_public=True)),
        "FS-1011",
    ),
    "a file of the site as encoder": (settings_with(lambda s: s["encoder"].update(pretrained="/dev/zero")), "FS-1012"),
    "an adapter beyond all memory": (
        settings_with(
            lambda s: s["classes"].extend(f"c{i}" for i in range(9990)) or s["encoder"].update(dimension=65536)
        ),
        "FS-1013",
    ),
    "an escape in a name": (settings_with(lambda s: s.update(name="\x1b]0;owned\x07")), "FS-1008"),
    "an escape in a class": (settings_with(lambda s: s["classes"].append("\x1b[2J")), "FS-1008"),
    "deep settings": (lambda r: setattr(r, "settings_json", "[" * 100_000), "FS-1008"),
    "a stranger in the run": (
        settings_with(lambda s: s["sites"].update({"sybil": s["sites"]["site-2"]})),
        "FS-1450",
    ),
    "less noise than the budget bears": (settings_with(lambda s: s["privacy"].update(target_epsilon=500)), "FS-1201"),
}


@pytest.mark.parametrize("case", WELCOMES)
def test_a_hostile_welcome_is_refused_before_anything_is_charged(tmp_path: Path, case: str) -> None:
    world = World(tmp_path, public_evaluation=False)
    if case == "an adapter beyond all memory":
        world.settings = world.settings.model_copy(
            update={"privacy": world.settings.privacy.model_copy(update={"minimum_signal_to_noise": 0.0})}
        )
    world.start()
    change, code = WELCOMES[case]
    transport = Welcoming(world.coordinator, "site-1", world.gate)
    transport.change = change
    with pytest.raises(FedsecureError) as caught, world.client("site-1", transport=transport):
        pass
    assert caught.value.code == code
    assert str(caught.value).isprintable()
    with Ledger(tmp_path / "site-1" / "ledger.db") as ledger:
        assert not ledger.history()


def test_an_observer_of_the_roster_is_not_counted_as_a_trainer(tmp_path: Path) -> None:
    world = World(tmp_path)
    roles = {"site-1": "train", "site-2": "train", "site-3": "observe"}
    provision(tmp_path / "others", federation="world", sites=roles, hosts=("localhost",))
    (tmp_path / "keys").rename(tmp_path / "first")
    (tmp_path / "others").rename(tmp_path / "keys")
    with pytest.raises(IdentityError, match="FS-1455"):
        world.start()


class Speaking(MemoryTransport):
    """An aggregator that writes to other people's terminals."""

    def next(self, request: pb.NextRequest) -> pb.Directive:
        return pb.Directive(wait=pb.Wait(reason="\x1b]0;owned\x07" + "wait" * 5000))


def test_what_an_aggregator_says_is_shown_without_control_characters(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.start()
    shown: list[str] = []
    transport = Speaking(world.coordinator, "site-1", world.gate)
    options = {"changes": {"wait_seconds": 0.01}, "progress": lambda moment: shown.append(moment.what)}
    with (
        world.client("site-1", transport=transport, **options) as client,
        pytest.raises(FedsecureError, match="FS-1711") as caught,
    ):
        next(client.queries())
    assert any("wait" in text for text in shown)
    assert all(text.isprintable() and len(text) <= 2000 for text in shown)
    assert str(caught.value).isprintable()


class Stuttering(MemoryTransport):
    """An aggregator that never comes to the point."""

    directive = pb.Directive(sequence=1, relay=pb.Relay(phase="shares"))

    def next(self, request: pb.NextRequest) -> pb.Directive:
        return self.directive


@pytest.mark.parametrize(
    "directive",
    [pb.Directive(sequence=1, relay=pb.Relay(phase="shares")), pb.Directive(sequence=5), pb.Directive()],
    ids=["the same again", "of no kind", "empty"],
)
def test_directives_without_end_are_not_followed(tmp_path: Path, directive: pb.Directive) -> None:
    world = World(tmp_path)
    world.start()
    transport = Stuttering(world.coordinator, "site-1", world.gate)
    transport.directive = directive
    with world.client("site-1", transport=transport) as client, pytest.raises(ProtocolError, match="FS-1375"):
        next(client.queries())


SUMMARIES = {
    "not JSON": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "attempts that are none": '{"attempts": [3]}',
    "a stage of its own": '{"evaluations": {"<script>": {"hits": [], "totals": []}}}',
    "accuracy without end": '{"evaluations": {"after": {"hits": [1e999], "totals": [1]}}}',
}


@pytest.mark.parametrize("case", SUMMARIES)
def test_a_hostile_summary_is_one_typed_refusal(scene: tuple[World, Client], case: str) -> None:
    _, client = scene
    with pytest.raises(ProtocolError, match="FS-1376"):
        client._finish(pb.Finished(complete=True, summary_json=SUMMARIES[case]))
    assert client.outcome is None


def test_final_tensors_of_other_names_are_refused(scene: tuple[World, Client]) -> None:
    _, client = scene
    with pytest.raises(ProtocolError, match="FS-1378"):
        client._finish(pb.Finished(complete=True, summary_json="{}", outputs={f"x{i}": bytes(32) for i in range(1000)}))


def arrays(name: str, *, public: bool = False, classes: tuple[str, ...] = CLASSES, patients: Any = None) -> Any:
    rows = np.eye(6, 16, dtype=np.float32)
    return from_arrays(rows, np.arange(6) % 3, classes=classes, name=name, public=public, patients=patients)


def test_a_data_set_handed_in_must_be_the_declared_one(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.start()
    with world.client("site-1") as client:
        client._sources.door(arrays("site-1-train"), arrays("site-1-test", public=True))
        with pytest.raises(PrivacyError, match="FS-1228"):
            client._sources.door(arrays("another"), None)
        with pytest.raises(PrivacyError, match="FS-1228"):
            client._sources.door(None, arrays("site-1-test", public=False))
        with pytest.raises(DataError, match="FS-1126"):
            client._sources.door(arrays("site-1-train", classes=CLASSES[::-1]), None)


def test_another_data_set_is_read_and_not_the_one_before(scene: tuple[World, Client]) -> None:
    _, client = scene
    small, large = arrays("site-1-train"), None
    sizes = [len(client._sources.door(data, None).sources["train"].load()) for data in (small, large, small)]
    assert sizes == [6, 30, 6]


def test_a_patient_is_in_the_training_set_or_in_the_private_evaluation_set(tmp_path: Path) -> None:
    world = World(tmp_path, public_evaluation=False)
    raw = world.settings.model_dump()
    raw["privacy"] |= {"unit": "patient"}
    world.settings = RunSettings.model_validate(raw)
    world.start()
    patients = [f"p{i}" for i in range(6)]
    train = arrays("site-1-train", patients=patients)
    apart = arrays("site-1-test", patients=[f"q{i}" for i in range(6)])
    shared = arrays("site-1-test", patients=[*patients[:1], *(f"q{i}" for i in range(5))])
    with world.client("site-1") as client:
        for evaluation, fine in ((apart, True), (shared, False)):
            sources = client._sources.door(train, evaluation).sources
            sources["train"].load()
            if fine:
                sources["evaluation"].load()
            else:
                with pytest.raises(PrivacyError, match="FS-1229"):
                    sources["evaluation"].load()


def test_a_record_is_in_the_training_set_or_in_the_private_evaluation_set(tmp_path: Path) -> None:
    world = World(tmp_path, public_evaluation=False)
    world.start()
    with world.client("site-1") as client:
        train, apart = client.config.train, client.config.evaluation
        assert train is not None
        assert apart is not None
        for evaluation, fine in ((apart, True), (train.model_copy(update={"name": apart.name}), False)):
            client._sources.member = replace(
                client._sources.member, config=client.config.model_copy(update={"evaluation": evaluation})
            )
            loaders = client._sources.door(None, None).sources
            loaders["train"].load()
            if fine:
                loaders["evaluation"].load()
                client._sources._loaded.clear()
            else:
                with pytest.raises(PrivacyError, match=r"FS-1229.*record"):
                    loaders["evaluation"].load()


def test_the_encoder_config_still_takes_tags() -> None:
    config = EncoderConfig(model="ViT-B-16", pretrained="laion2b_s34b_b88k", dimension=512, fingerprint="0" * 64)
    assert config.prompt.format("x")
    with pytest.raises(ConfigError, match="FS-1008"):
        RunSettings.parse("{}")
