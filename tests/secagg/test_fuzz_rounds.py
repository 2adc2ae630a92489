"""Stateful fuzzing of both sides of a round: any message, in any state, by anyone, however bent (secagg.md §6.3).

The aggregator and one site of four are hostile. Whatever they do: typed errors only, a site either unchanged or out
for good, one survivor signature and one release of shares for a context, and an information ledger over all releases
in which no owner's seed and mask key ever both appear.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from fuzz_world import BENDS, Ledger, Repeatable, bend, drawn
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from secagg_world import Run, client_message, federation, make_descriptor, make_query, make_vectors

from fedsecure.errors import FedsecureError, ProtocolError, RoundAborted
from fedsecure.secagg import client as client_module
from fedsecure.secagg import transcript
from fedsecure.secagg.client import SecAggClient, State
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.secagg.server import Phase, SecAggServer
from fedsecure.secagg.spool import MemorySpool
from fedsecure.wire import secagg_pb2 as pb

N, COLLUDER = 4, 4  # the last site's identity key is the attacker's too: c = 1
STEPS = ("shares", "receive_shares", "sign_survivors", "unmask", "finished")


class CountingSpool(MemorySpool):
    """Room for one vector at a time of the round's size, and for nothing else."""

    def __init__(self, size: int) -> None:
        self.size = size

    def create(self, size: int) -> Any:
        assert size == self.size, "room for something other than a vector"
        return super().create(size)


@lru_cache
@drawn("archive")
def archives() -> tuple[tuple[tuple[bytes, ...], tuple[tuple[str, bytes], ...]], ...]:
    """Finished rounds to replay from: of this very context with other keys, of another attempt, of another run."""
    out = []
    for query in (make_query(N), make_query(N, attempt=1), make_query(N, run=bytes(16))):
        run = Run(make_descriptor(N, query=query))
        result = run.complete()
        down = [raw for by_site in run.broadcast.values() for raw in by_site.values()]
        up = [(site, raw) for (_, site), raw in run.sent.items()]
        up += [(site, header) for site, (header, _) in run.uploads.items()]
        out.append(((*dict.fromkeys(down), result.result_message), tuple(up)))
    return tuple(out)


class RoundMachine(RuleBasedStateMachine):
    """One attempt among four sites, with everything an attacker may try."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptor = make_descriptor(N)
        self.sites = self.descriptor.cohort
        f = federation(N)
        self.spool = CountingSpool(4 * self.descriptor.length)
        self.server = SecAggServer(self.descriptor, roster=f.roster, signing_key=f.aggregator, spool=self.spool)
        self.latches = {site: MemoryLatch() for site in self.sites}
        self.clients = {site: self.make(site) for site in self.sites}
        self.vectors = make_vectors(self.descriptor)
        self.down: list[bytes] = []  # server → site messages seen so far
        self.up: list[tuple[str, bytes]] = []
        self.uploads: dict[str, tuple[bytes, bytes]] = {}
        self.inbox: dict[str, bytes] = {}
        self.result = b""
        self.ledger = Ledger()

    def make(self, site: str) -> SecAggClient:
        f = federation(N)
        latch = self.latches[site]
        return SecAggClient(self.descriptor, site=site, signing_key=f.keys[site], roster=f.roster, latch=latch)

    def call(self, site: str, act: Callable[[SecAggClient], Any]) -> Any:
        """Whatever a site is asked: it answers, or refuses and is unchanged, or refuses and is out for good."""
        client = self.clients[site]
        before = client.state
        try:
            out = act(client)
        except FedsecureError as refusal:
            code = refusal.code
        else:
            code = ""
        if code:
            assert client.state is (before if code == "FS-1320" else State.ABORTED), (before, client.state, code)
            return None
        assert list(State).index(client.state) == list(State).index(before) + 1
        if isinstance(out, bytes) and client.state is not State.DONE:
            self.ledger.note(site, out)
            self.up.append((site, out))
        return out

    def step(self, site: str) -> None:
        """The next thing an honest site does with what an honest aggregator has sent it."""
        client, got = self.clients[site], self.inbox.get(site, b"")
        phase, out = self.server.phase, None
        if phase is Phase.ADVERTISE and client.state is State.NEW:
            out = self.call(site, lambda c: c.advertise())
        elif phase is Phase.SHARES and client.state is State.ADVERTISED:
            out = self.call(site, lambda c: c.shares(got))
        elif phase is Phase.MASKED and client.state is State.SHARED:
            self.call(site, lambda c: c.receive_shares(got))
        elif phase is Phase.MASKED and client.state is State.RECEIVED:
            masked = self.call(site, lambda c: c.mask(self.vectors[site]))
            if masked is not None:
                self.uploads[site] = (masked.header, bytes(masked.payload))
                self.up.append((site, masked.header))
                self.to_server(lambda: self.server.receive_masked(site, masked.header, masked.payload))
        elif phase is Phase.SURVIVORS and client.state is State.MASKED:
            out = self.call(site, lambda c: c.sign_survivors(got))
        elif phase is Phase.UNMASK and client.state is State.SIGNED:
            out = self.call(site, lambda c: c.unmask(got))
        if isinstance(out, bytes):
            self.to_server(lambda: self.server.receive(site, out))

    def to_server(self, act: Callable[[], Any]) -> None:
        """A refused message changes nothing at the aggregator."""
        before = self.server.phase, self.server.waiting_for()
        try:
            act()
        except ProtocolError:
            assert (self.server.phase, self.server.waiting_for()) == before

    @initialize(phases=st.integers(0, 5))
    def begin(self, phases: int) -> None:
        for _ in range(phases):
            for site in self.sites * 2:
                self.step(site)
            self.close()

    @rule(site=st.integers(0, N - 1))
    def honest(self, site: int) -> None:
        self.step(self.sites[site])

    @rule()
    def everybody(self) -> None:
        for site in self.sites * 2:
            self.step(site)

    @rule()
    @precondition(lambda self: self.server.can_close() and self.server.phase is not Phase.UNMASK)
    def close(self) -> None:
        if not self.server.can_close() or self.server.phase is Phase.UNMASK:
            return
        self.inbox = dict(self.server.close())
        self.down += dict.fromkeys(self.inbox.values())

    @rule()
    @precondition(lambda self: self.server.can_close() and self.server.phase is Phase.UNMASK)
    def finish(self) -> None:
        try:
            result = self.server.finish()
        except RoundAborted:
            assert self.server.phase is Phase.ABORTED
            return
        total = sum((self.vectors[site].astype(object) for site in result.survivors), np.zeros(1, dtype=object))
        np.testing.assert_array_equal(result.total, ((total + 2**31) % 2**32 - 2**31).astype(np.int64))
        self.down.append(result.result_message)

    @rule(data=st.data(), site=st.integers(0, N - 1), name=st.sampled_from(STEPS), how=st.sampled_from(BENDS))
    def hostile_message(self, data: st.DataObject, site: int, name: str, how: str) -> None:
        pools = [self.down, *(down for down, _ in archives())]
        pool = [raw for raw in data.draw(st.sampled_from(pools))] or [b""]
        raw = bend(data.draw(st.sampled_from(pool)), how, data)
        self.call(self.sites[site], lambda c: getattr(c, name)(raw))

    @rule(site=st.integers(0, N - 1), members=st.lists(st.integers(0, N + 1), max_size=N + 1))
    def hostile_survivors(self, site: int, members: list[int]) -> None:
        self.offer_survivors(site, members)

    @rule(site=st.integers(0, N - 1), absent=st.integers(1, N))
    def plausible_survivors(self, site: int, absent: int) -> None:
        """A split view within all bounds: everybody but one."""
        self.offer_survivors(site, [k for k in range(1, N + 1) if k != absent])

    def offer_survivors(self, site: int, members: list[int]) -> None:
        raw = pb.ServerMessage(survivor_list=pb.SurvivorList(survivors=members)).SerializeToString()
        self.call(self.sites[site], lambda c: c.sign_survivors(raw))

    @rule(data=st.data(), site=st.integers(0, N - 1), forge=st.booleans())
    def hostile_signatures(self, data: st.DataObject, site: int, forge: bool) -> None:
        """Any choice of the signatures ever made, and the colluder's on whatever the target wants to see."""
        client = self.clients[self.sites[site]]
        known = {(self.sites.index(who) + 1, s) for who, made in self.ledger.signed.items() for s in made}
        items = data.draw(st.sets(st.sampled_from(sorted(known)))) if known else set()
        if forge and client.state is State.SIGNED:
            body = transcript.survivors_body(client._t1, client._t2, client._survivors)
            key = federation(N).keys[self.sites[COLLUDER - 1]]
            forged = transcript.sign(key, "survivors", self.descriptor.ctx, body)
            items = {item for item in items if item[0] != COLLUDER} | {(COLLUDER, forged)}
        message = pb.SurvivorSignatures(
            signatures=[pb.SurvivorSignature(index=i, signature=s) for i, s in sorted(items)]
        )
        raw = pb.ServerMessage(survivor_signatures=message).SerializeToString()
        self.call(self.sites[site], lambda c: c.unmask(raw))

    @rule(data=st.data(), site=st.integers(0, N - 1), how=st.sampled_from(BENDS), own=st.booleans())
    def hostile_upward(self, data: st.DataObject, site: int, how: str, own: bool) -> None:
        pools = [self.up, *(up for _, up in archives())]
        who, raw = data.draw(st.sampled_from(data.draw(st.sampled_from(pools)) or [("", b"")]))
        raw = bend(raw, how, data)
        sender = who if own else self.sites[site]
        self.to_server(lambda: self.server.receive(sender, raw))
        self.to_server(lambda: self.server.receive_masked(sender, raw, bytes(4 * self.descriptor.length)))

    @rule(data=st.data(), how=st.sampled_from(BENDS))
    @precondition(lambda self: self.uploads)
    def hostile_upload(self, data: st.DataObject, how: str) -> None:
        site = data.draw(st.sampled_from(sorted(self.uploads)))
        header, payload = self.uploads[site]
        self.to_server(lambda: self.server.receive_masked(site, header, bend(payload, how, data)))
        self.to_server(lambda: self.server.buffer(site, bend(header, how, data)))

    @rule(site=st.integers(0, N - 1))
    def restart(self, site: int) -> None:
        """A new process with the same state folder: if the attempt had begun, it never begins again."""
        name = self.sites[site]
        begun = self.clients[name].state is not State.NEW
        self.clients[name] = self.make(name)
        if begun:
            with pytest.raises(ProtocolError, match="FS-1345"):
                self.clients[name].advertise()
            assert self.clients[name].state is State.ABORTED

    @rule(site=st.integers(0, N - 1))
    def rolled_back_memory(self, site: int) -> None:
        """Even a site whose state is set back (a snapshot of its machine) does not sign or release twice."""
        client = self.clients[self.sites[site]]
        back = {State.SIGNED: State.MASKED, State.UNMASKED: State.SIGNED}.get(client.state)
        if back is not None:
            client._state = back
            raw = self.down[-1] if self.down else b""
            with pytest.raises(FedsecureError):
                (client.sign_survivors if back is State.MASKED else client.unmask)(raw)
            assert client.state is State.ABORTED

    @invariant()
    def nothing_is_given_away_twice_or_in_both_kinds(self) -> None:
        self.ledger.check()

    @invariant()
    def who_is_out_holds_no_secret(self) -> None:
        for client in self.clients.values():
            if client.state in (State.ABORTED, State.UNMASKED, State.DONE):
                assert (client._seed, client._mask_key, client._cipher_key, client._shares) == (None, None, None, {})


class RepeatableRoundMachine(Repeatable, RoundMachine):
    def __init__(self) -> None:
        archives()  # of other secrets
        super().__init__()


class TestRounds(RepeatableRoundMachine.TestCase):
    settings = settings(max_examples=50, stateful_step_count=25, deadline=None)


@pytest.mark.slow
class TestRoundsAtLength(RepeatableRoundMachine.TestCase):
    settings = settings(max_examples=400, stateful_step_count=50, deadline=None)


# --- the fuzzer can fail -----------------------------------------------------------------------------------------


def split_view(machine: RoundMachine) -> None:
    """Two sites hear that site 1 survived, one that it did not; each is shown what signatures there are."""
    machine.begin(3)
    assert machine.server.phase is Phase.SURVIVORS
    for site, members in ((0, [1, 2, 3, 4]), (1, [1, 2, 3, 4]), (2, [2, 3, 4])):
        machine.offer_survivors(site, members)
    gathered = [
        pb.SurvivorSignature(index=machine.sites.index(site) + 1, signature=signature)
        for site, made in machine.ledger.signed.items()
        for signature in made
    ]
    raw = pb.ServerMessage(survivor_signatures=pb.SurvivorSignatures(signatures=gathered)).SerializeToString()
    for site in machine.sites[:3]:
        machine.call(site, lambda c: c.unmask(raw))


def test_the_ledger_notices_a_site_that_does_not_check_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = RoundMachine()
    split_view(sound)
    sound.ledger.check()
    assert not sound.ledger.released
    monkeypatch.setattr(SecAggClient, "_check_signatures", lambda self, message: None)
    broken = RoundMachine()
    split_view(broken)
    with pytest.raises(AssertionError, match="both kinds"):
        broken.ledger.check()


def test_the_ledger_notices_a_second_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryLatch, "mark_signed", lambda self, ctx: None)
    machine = RoundMachine()
    machine.begin(3)
    for members in ([1, 2, 3, 4], [1, 2, 3]):
        machine.offer_survivors(0, members)
        machine.clients[machine.sites[0]]._state = State.MASKED
    with pytest.raises(AssertionError, match="second survivor signature"):
        machine.ledger.check()


def test_the_fuzzer_notices_an_untyped_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyError("out of place")

    monkeypatch.setattr(client_module.transcript, "by_index", crash)
    machine = RoundMachine()
    with pytest.raises(KeyError):
        machine.begin(2)


def test_an_example_can_be_replayed_byte_for_byte() -> None:
    def said(kind: type[RoundMachine]) -> list[bytes]:
        machine = kind()
        try:
            machine.begin(5)
            machine.finish()
        finally:
            machine.teardown()
        assert machine.server.phase is Phase.DONE
        return machine.down

    assert said(RepeatableRoundMachine) == said(RepeatableRoundMachine)
    assert said(RoundMachine) != said(RoundMachine)


# --- memory ------------------------------------------------------------------------------------------------------


def test_no_message_makes_a_side_allocate_beyond_its_bound() -> None:
    """Oversize bytes are refused unread; within the size limit, even the densest lists stay small."""
    machine = RoundMachine()
    machine.begin(1)
    limit = transcript.size_limit(N)
    dense = [b"\x0a" + bytes([2, 0x0A, 0]) * (limit // 4), b"\x12\x00" * (limit // 2), b"\x1a\x00" * (limit // 2)]
    huge = bytes(1 << 24)
    tracemalloc.start()
    try:
        for raw in (*dense, huge):
            client = machine.make(machine.sites[0])
            client._state = State.ADVERTISED
            with pytest.raises(ProtocolError):
                client.shares(raw)
            with pytest.raises(ProtocolError):
                machine.server.receive(machine.sites[0], raw)
            with pytest.raises(ProtocolError):
                machine.server.receive_masked(machine.sites[0], raw, b"")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_header_that_claims_a_huge_vector_reserves_nothing() -> None:
    machine = RoundMachine()
    machine.begin(2)
    site = machine.sites[0]
    for _ in range(2):
        machine.step(site)
    header, _ = machine.uploads[site]
    message = client_message(header)
    message.masked_input.length = 2**60
    body = transcript.masked_body(message.masked_input)
    message.masked_input.signature = transcript.sign(
        federation(N).keys[site], "masked-input", machine.descriptor.ctx, body
    )
    fresh = RoundMachine()
    fresh.begin(2)
    with pytest.raises(ProtocolError, match="FS-13(26|29)"):
        fresh.server.buffer(site, message.SerializeToString())
