"""Quorum, deadlines and late joiners, under a clock of the test's own: what docs/configuration.md says of [rounds]."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import World

from fedsecure.config import EvaluationConfig
from fedsecure.identity.provision import load_identity
from fedsecure.messages import Query
from fedsecure.methods.contexts import draw_of
from fedsecure.secagg.client import SecAggClient
from fedsecure.secagg.coin import CoinSite, Record, Toss, is_toss
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.secagg.thresholds import Thresholds
from fedsecure.wire import federation_pb2 as pb

PHASE, TRAINING, START = 20.0, 60.0, 100.0


class Hand:
    """One site's side of the conversation, one message at a time."""

    def __init__(self, table: Table, name: str) -> None:
        self.table, self.name, self.token, self.after = table, name, os.urandom(16), 0
        self.identity = load_identity(table.world.folder / "keys" / "sites" / name / "identity")
        self.heard: list[pb.Directive] = []
        self.session: SecAggClient
        self.query: Query
        roster = self.identity.roster
        table.core.join(name, pb.JoinRequest(protocol=1, session=self.token, roster_hash=roster.hash), table.now)
        self.listen()

    def listen(self) -> list[pb.Directive]:
        """All that has come since."""
        new = []
        while (directive := self.table.core.poll(self.name, self.token, self.after, self.table.now)) is not None:
            if directive.sequence <= self.after:
                break
            self.after = directive.sequence
            new.append(directive)
        self.heard += new
        return new

    def last(self, kind: str) -> Any:
        """The last directive of a kind."""
        self.listen()
        return next(getattr(d, kind) for d in reversed(self.heard) if d.WhichOneof("kind") == kind)

    def was_asked(self) -> list[int]:
        """The attempts it was asked to take part in."""
        self.listen()
        asked = [Query.from_json(d.ask.query_json) for d in self.heard if d.WhichOneof("kind") == "ask"]
        return [query.attempt + 10 * query.round for query in asked]

    def send(self, payload: bytes, ctx: bytes = b"") -> None:
        message = pb.PhaseMessage(session=self.token, ctx=ctx or self.session.ctx, payload=payload)
        self.table.core.send(self.name, message, self.table.now)

    def advertise(self) -> None:
        ask = self.last("ask")
        self.query = Query.from_json(ask.query_json)
        descriptor = RoundDescriptor.parse(ask.descriptor)
        key, roster = self.identity.signing_key, self.identity.roster
        self.session = SecAggClient(descriptor, site=self.name, signing_key=key, roster=roster, latch=MemoryLatch())
        self.send(self.session.advertise())

    def shares(self) -> None:
        self.send(self.session.shares(self.last("relay").payload))

    def masked(self) -> None:
        self.session.receive_shares(self.last("relay").payload)
        sealed = self.session.mask(np.full(self.query.length, 7, np.uint32))
        payload = memoryview(sealed.payload).cast("B")
        header = pb.UploadHeader(session=self.token, ctx=self.session.ctx, header=sealed.header, size=len(payload))
        whole = self.table.core.expect_upload(self.name, header, self.table.now)
        assert whole is not None
        whole[:] = payload
        self.table.core.upload(self.name, header, whole, self.table.now)

    def survivors(self) -> None:
        self.send(self.session.sign_survivors(self.last("relay").payload))

    def unmask(self) -> None:
        self.send(self.session.unmask(self.last("relay").payload))


class Table:
    """Some sites and a coordinator; every round is a training round with keys of its own."""

    def __init__(self, folder: Path, *, sites: int = 5, rounds: int = 3, present: int | None = None, **waits: Any):
        given = {
            "phase_seconds": PHASE, "training_seconds": TRAINING, "start_seconds": START, "silence_seconds": 1e6,
            "prepared_rounds": 0,
        }  # fmt: skip
        self.world = World(folder, sites=sites, rounds=rounds, waits={**given, **waits})
        self.world.settings = self.world.settings.model_copy(update={"evaluation": EvaluationConfig(when=())})
        self.core = self.world.start()
        self.now = self.core.engine.waiting_since
        self.hands = [Hand(self, name) for name in self.world.names[:present]]
        self.least = Thresholds.choose(self.world.settings.cohort_size()).min_survivors
        self.tick()

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.core.tick(self.now)

    def play(self, hands: list[Hand], *phases: str) -> None:
        for phase in phases:
            for hand in hands:
                getattr(hand, phase)()
            self.tick()

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return self.core.attempts


ALL = ("advertise", "shares", "masked", "survivors", "unmask")


def test_with_everybody_there_a_round_waits_for_no_clock(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.play(table.hands, *ALL)
    (attempt,) = table.attempts
    assert attempt["survivors"] == table.world.names
    assert attempt["seconds"] == 0


@pytest.mark.parametrize(("phase", "wait"), [("advertise", PHASE), ("shares", PHASE), ("masked", TRAINING)])
def test_a_phase_goes_on_with_a_quorum_at_its_deadline_and_not_before(tmp_path: Path, phase: str, wait: float) -> None:
    table = Table(tmp_path)
    slow, quick = table.hands[-1], table.hands[:-1]
    assert len(quick) == table.least
    before, after = ALL[: ALL.index(phase)], ALL[ALL.index(phase) + 1 :]
    table.play(table.hands, *before)
    table.play(quick, phase)
    standing = table.core.engine.attempt
    assert standing is not None
    assert standing.waiting_for() == (slow.name,), "it is there, and has not answered"
    table.tick(wait - 0.5)
    assert standing.waiting_for() == (slow.name,)
    table.tick(1.0)
    table.play(quick, *after)
    (attempt,) = table.attempts
    assert attempt["survivors"] == [hand.name for hand in quick]
    told = slow.last("abort")
    assert (told.code, told.ctx) == ("FS-1707", quick[0].session.ctx)
    assert slow.was_asked() == [0, 10], "the next round asks it again"


@pytest.mark.parametrize(("phase", "code"), [("advertise", "FS-1350"), ("shares", "FS-1351"), ("masked", "FS-1352")])
def test_below_the_quorum_the_attempt_is_aborted_and_everybody_hears_why(tmp_path: Path, phase: str, code: str) -> None:
    table = Table(tmp_path)
    table.play(table.hands, *ALL[: ALL.index(phase)])
    table.play(table.hands[: table.least - 1], phase)
    ctx = table.hands[0].session.ctx
    assert not table.attempts
    table.tick(TRAINING + 1)
    (attempt,) = table.attempts
    assert attempt["code"] == code
    assert "survivors" not in attempt
    for hand in table.hands:
        told = hand.last("abort")
        assert (told.ctx, told.code) == (ctx, code)
        assert code in told.reason
        assert hand.was_asked() == [0, 1], "the next attempt begins at once"
    # It has a context of its own, and can end well.
    table.play(table.hands, *ALL)
    assert table.attempts[-1]["survivors"] == table.world.names
    assert table.hands[0].session.ctx != ctx


def test_attempts_are_bounded_and_the_last_reason_is_told(tmp_path: Path) -> None:
    table = Table(tmp_path, max_attempts=2)
    for _ in range(2):
        table.tick(PHASE + 1)
    assert table.core.failure is not None
    assert table.core.failure.code == "FS-1702"
    for hand in table.hands:
        assert "FS-1702" in hand.last("finished").summary_json


def test_a_late_joiner_takes_part_from_the_next_round_on(tmp_path: Path) -> None:
    table = Table(tmp_path, present=4)
    assert table.core.engine.attempt is None, "the first question waits for everybody"
    table.tick(START + 1)
    early = list(table.hands)
    table.play(early, "advertise")
    late = Hand(table, table.world.names[4])
    table.tick()
    assert late.was_asked() == []
    table.play(early, *ALL[1:])
    assert table.attempts[-1]["survivors"] == [hand.name for hand in early]
    assert table.attempts[-1]["seconds"] == 0, "nobody waited for the late one"
    assert late.was_asked() == [10]
    table.play([*early, late], *ALL)
    assert table.attempts[-1]["survivors"] == table.world.names


def test_a_run_that_never_has_a_quorum_ends_and_names_the_missing(tmp_path: Path) -> None:
    table = Table(tmp_path, present=3)
    table.tick(START - 1)
    assert table.core.failure is None
    table.tick(2)
    assert table.core.failure is not None
    assert table.core.failure.code == "FS-1701"
    assert "site-4 not seen yet, site-5 not seen yet" in str(table.core.failure)
    assert not table.core.failure.final
    table.hands[0].listen()
    kinds = {directive.WhichOneof("kind") for directive in table.hands[0].heard}
    assert "finished" not in kinds, "who is there waits for the next process"
    assert not table.core.finished(table.now)
    assert table.core.finished(table.now + 1.5)


def toss(table: Table) -> None:
    """The draw, all taking part."""
    coins = {}
    for hand in table.hands:
        raw = hand.last("prepare").descriptor
        assert is_toss(raw)
        key, roster = hand.identity.signing_key, hand.identity.roster
        coins[hand.name] = CoinSite(Toss.parse(raw), site=hand.name, signing_key=key, roster=roster)
        hand.send(coins[hand.name].commit(), coins[hand.name].toss.ctx)
    for hand in table.hands:
        coin = coins[hand.name]
        hand.send(coin.reveal(hand.last("relay").payload), coin.toss.ctx)
    table.tick()


def test_a_drawn_round_asks_its_cohort_and_nobody_takes_the_place_of_the_missing(tmp_path: Path) -> None:
    table = Table(tmp_path, sites=7, cohort=5)
    toss(table)
    draw = table.core.engine.draw
    assert draw is not None
    drawn = [hand for hand in table.hands if hand.name in draw.cohort(0)]
    assert [hand.name for hand in table.hands if hand.was_asked()] == [hand.name for hand in drawn]
    table.play(drawn[:4], *ALL[:1])
    table.tick(PHASE + 1)
    table.play(drawn[:4], *ALL[1:])
    assert table.attempts[-1]["survivors"] == [hand.name for hand in drawn[:4]]
    # The next round has the next cohort, whoever failed in this one; its attempts keep it.
    following = [hand for hand in table.hands if hand.name in draw.cohort(1)]
    table.tick(PHASE + 1)
    assert table.attempts[-1]["code"] == "FS-1350"
    assert table.attempts[-1]["cohort"] == [hand.name for hand in following]
    assert [hand.was_asked()[-2:] == [10, 11] for hand in table.hands] == [hand in following for hand in table.hands]
    table.play(following, *ALL)
    assert table.attempts[-1]["survivors"] == list(draw.cohort(1))


def test_a_late_joiner_is_drawn_like_the_others_and_gets_the_record(tmp_path: Path) -> None:
    table = Table(tmp_path, sites=7, present=6, cohort=5)
    assert not table.core.engine.tossing, "the draw waits for everybody, like the first question"
    table.tick(START + 1)
    toss(table)
    late = Hand(table, table.world.names[6])
    raw = late.last("prepare").descriptor
    record = Record.parse(raw, roster=late.identity.roster)
    assert list(record.reveals) == table.world.names[:6]
    assert draw_of(table.world.settings, record) == table.core.engine.draw
    assert late.name in {name for step in range(3) for name in draw_of(table.world.settings, record).cohort(step)}
    assert all(hand.last("prepare").descriptor == raw for hand in table.hands)


def test_an_aggregator_that_ends_in_a_toss_goes_on_with_the_next_one(tmp_path: Path) -> None:
    table = Table(tmp_path, cohort=3)
    assert Toss.parse(table.hands[0].last("prepare").descriptor).number == 0
    table.core = table.world.start()
    table.now = table.core.engine.waiting_since
    table.hands = [Hand(table, name) for name in table.world.names]
    table.tick()
    assert Toss.parse(table.hands[0].last("prepare").descriptor).number == 1
    toss(table)
    known = table.core.engine.draw
    assert known is not None
    # And one that ends after it keeps the draw.
    table.core = table.world.start()
    assert table.core.engine.draw == known
    back = Hand(table, table.world.names[0])
    assert draw_of(
        table.world.settings, Record.parse(back.last("prepare").descriptor, roster=back.identity.roster)
    ) == (known)


def test_a_drawn_round_below_its_quorum_waits_for_its_own_sites(tmp_path: Path) -> None:
    table = Table(tmp_path, sites=7, cohort=5)
    toss(table)
    draw = table.core.engine.draw
    assert draw is not None
    gone = [hand for hand in table.hands if hand.name in draw.cohort(0)][:2]
    for hand in gone:
        table.core.beat(hand.name, hand.token, table.now, "FS-1720")
    table.tick(PHASE + 1)
    assert table.core.engine.attempt is None
    assert all(hand.name in table.core.reason(table.now) for hand in gone)
    back = Hand(table, gone[0].name)
    table.tick()
    assert table.core.engine.attempt is not None
    assert back.was_asked() == [1]
