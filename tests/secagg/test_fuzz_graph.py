"""Stateful fuzzing of a round on a k-regular graph, small enough to be fuzzed: nine sites of degree four.

The graph has claim A only (secagg.md §3.8), so the aggregator follows the protocol here and the *network* is hostile:
what it delivers is bent, replayed from another round of the same context, or meant for somebody else. In mode HBC a
survivor list is not signed, so a site can be handed another one than the aggregator's; it still releases once, and of
neighbours only, and the ledger of what all others released never holds both kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from fuzz_world import BENDS, Ledger, Repeatable, bend, drawn
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from secagg_world import Run, client_message, make_client, make_descriptor, make_server, make_vectors, server_message

from fedsecure.errors import FedsecureError, ProtocolError, RoundAborted
from fedsecure.secagg import descriptor as descriptor_module
from fedsecure.secagg import thresholds
from fedsecure.secagg.client import SecAggClient, State
from fedsecure.secagg.descriptor import HARARY, RoundDescriptor
from fedsecure.secagg.graph import Graph
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.secagg.server import Phase
from fedsecure.secagg.thresholds import Mode

N, K, T, LEAST = 9, 4, 3, 7
STEPS = ("shares", "receive_shares", "unmask", "finished")


@lru_cache
def sparse() -> RoundDescriptor:
    """Below the least number of sites of a sparse graph, which only the constructor insists on."""
    with patch.object(thresholds, "MAX_SITES", N - 1), patch.object(descriptor_module, "MAX_SITES", N - 1):
        few = make_descriptor(N, mode=Mode.HBC, colluders=1, min_survivors=LEAST)
        return replace(few, graph=HARARY, neighbours=K, threshold=T)


@lru_cache
@drawn("archive")
def archive() -> tuple[tuple[bytes, ...], tuple[tuple[str, bytes], ...]]:
    """A finished round of this very context with other keys, and another ring."""
    run = Run(sparse(), {Phase.MASKED: ["site-03"]})
    result = run.complete()
    down = [raw for by_site in run.broadcast.values() for raw in by_site.values()]
    up = [(site, raw) for (_, site), raw in run.sent.items()] + [(s, header) for s, (header, _) in run.uploads.items()]
    return (*dict.fromkeys(down), result.result_message), tuple(up)


class GraphMachine(RuleBasedStateMachine):
    """One attempt among nine sites."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptor = sparse()
        self.names = self.descriptor.cohort
        self.server = make_server(self.descriptor)
        self.latches = {site: MemoryLatch() for site in self.names}
        self.clients = {site: make_client(self.descriptor, site, self.latches[site]) for site in self.names}
        self.vectors = make_vectors(self.descriptor)
        self.told: dict[str, bytes] = {}
        self.down: list[bytes] = []
        self.up: list[tuple[str, bytes]] = []
        self.ledger, self.misled = Ledger(), Ledger()

    def call(self, site: str, act: Callable[[SecAggClient], Any]) -> Any:
        """An answer, or a refusal that changes nothing or ends the attempt."""
        client, code, out = self.clients[site], "", None
        before = client.state
        try:
            out = act(client)
        except FedsecureError as refusal:
            code = refusal.code
        if code:
            assert client.state is (before if code == "FS-1320" else State.ABORTED), (before, client.state, code)
            return None
        assert list(State).index(client.state) > list(State).index(before)
        if isinstance(out, bytes) and client.state is not State.DONE:
            self.up.append((site, out))
            if client.state is State.UNMASKED:
                self.released(site, client, out)
        return out

    def released(self, site: str, client: SecAggClient, out: bytes) -> None:
        """Of neighbours only, none twice, nothing of its own; and noted down."""
        message = client_message(out).unmask
        owners = [share.owner for kind in (message.seed_shares, message.mask_key_shares) for share in kind]
        assert len(set(owners)) == len(owners) <= K
        assert set(owners) <= set(client._graph.peers(client._index))
        honest = server_message(self.told[site]).survivor_list.survivors if site in self.told else []
        ledger = self.ledger if list(client._survivors) == list(honest) else self.misled
        ledger.note(site, out)

    def to_server(self, act: Callable[[], Any]) -> None:
        before = self.server.phase, self.server.waiting_for()
        try:
            act()
        except ProtocolError:
            assert (self.server.phase, self.server.waiting_for()) == before

    @initialize(phases=st.integers(0, 4), absent=st.integers(0, N))
    def begin(self, phases: int, absent: int) -> None:
        """The honest course, with one site missing from the uploads, or nobody."""
        for phase in range(phases):
            for site in range(N):
                if phase < 2 or site != absent:
                    self.honest(site)
                    self.honest(site)
            self.close()

    @rule(site=st.integers(0, N - 1))
    def honest(self, site: int) -> None:
        name = self.names[site]
        client, phase, got, out = self.clients[name], self.server.phase, self.told.get(name, b""), None
        if phase is Phase.ADVERTISE and client.state is State.NEW:
            out = self.call(name, lambda c: c.advertise())
        elif phase is Phase.SHARES and client.state is State.ADVERTISED:
            out = self.call(name, lambda c: c.shares(got))
        elif phase is Phase.MASKED and client.state is State.SHARED:
            self.call(name, lambda c: c.receive_shares(got))
        elif phase is Phase.MASKED and client.state is State.RECEIVED:
            masked = self.call(name, lambda c: c.mask(self.vectors[name]))
            if masked is not None:
                self.ledger.note(name, masked.header)
                self.to_server(lambda: self.server.receive_masked(name, masked.header, masked.payload))
        elif phase is Phase.UNMASK and client.state is State.MASKED:
            out = self.call(name, lambda c: c.unmask(got))
        if out is not None:
            self.to_server(lambda: self.server.receive(name, out))

    @rule()
    def everybody(self) -> None:
        for site in range(N):
            self.honest(site)

    @rule()
    def close(self) -> None:
        if not self.server.can_close():
            return
        if self.server.phase is not Phase.UNMASK:
            self.told = dict(self.server.close())
            self.down += dict.fromkeys(self.told.values())
            return
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
        pool = data.draw(st.sampled_from([self.down, archive()[0]])) or [b""]
        raw = bend(data.draw(st.sampled_from(list(pool))), how, data, sites=N)
        self.call(self.names[site], lambda c: getattr(c, name)(raw))

    @rule(data=st.data(), site=st.integers(0, N - 1), how=st.sampled_from(BENDS), own=st.booleans())
    def hostile_upward(self, data: st.DataObject, site: int, how: str, own: bool) -> None:
        pool = data.draw(st.sampled_from([self.up, archive()[1]])) or [("", b"")]
        who, raw = data.draw(st.sampled_from(list(pool)))
        raw = bend(raw, how, data, sites=N)
        sender = who if own else self.names[site]
        self.to_server(lambda: self.server.receive(sender, raw))
        self.to_server(lambda: self.server.receive_masked(sender, raw, bytes(4 * self.descriptor.length)))

    @rule(site=st.integers(0, N - 1))
    def restart(self, site: int) -> None:
        name = self.names[site]
        begun = self.clients[name].state is not State.NEW
        self.clients[name] = make_client(self.descriptor, name, self.latches[name])
        if begun:
            with pytest.raises(ProtocolError, match="FS-1345"):
                self.clients[name].advertise()

    @invariant()
    def nothing_is_given_away_twice_or_in_both_kinds(self) -> None:
        self.ledger.check()
        assert all(len(messages) == 1 for messages in self.misled.released.values())
        assert not set(self.misled.released) & set(self.ledger.released)

    @invariant()
    def who_is_out_holds_no_secret(self) -> None:
        for client in self.clients.values():
            if client.state in (State.ABORTED, State.UNMASKED, State.DONE):
                assert (client._seed, client._mask_key, client._cipher_key, client._shares) == (None, None, None, {})


class RepeatableGraphMachine(Repeatable, GraphMachine):
    def __init__(self) -> None:
        archive()  # of other secrets
        super().__init__()


class TestGraph(RepeatableGraphMachine.TestCase):
    settings = settings(max_examples=20, stateful_step_count=20, deadline=None)


@pytest.mark.slow
class TestGraphAtLength(RepeatableGraphMachine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_course_of_the_machine_opens_a_sum_without_the_absent_site() -> None:
    machine = GraphMachine()
    machine.begin(4, 5)
    assert machine.server.phase is Phase.DONE
    keys = {s.owner for m in machine.ledger.released.values() for s in m[0].mask_key_shares}
    assert keys == {6}
    machine.ledger.check()


def test_the_machine_notices_shares_for_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that shared with everybody, or released for everybody, would not do what the graph's bounds are for."""
    monkeypatch.setattr(Graph, "peers", lambda self, index: tuple(m for m in self.members if m != index))
    machine = GraphMachine()
    with pytest.raises(AssertionError):
        machine.begin(4, N)
