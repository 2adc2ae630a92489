"""Stateful fuzzing of prepared epochs: any set-up, any round on any slot, any message, restarts on both sides.

As for rounds (``test_fuzz_rounds``): the aggregator and one site of four are hostile. Typed errors only, a site either
unchanged or out for good, exact sums, and a ledger for every slot of every epoch: one vector under its pads, one
survivor signature, one release of shares, and of no owner both a seed and a mask key, whatever rounds the slot was
asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from epoch_world import EpochWorld, SlotRun, make_epoch
from fuzz_world import BENDS, Ledger, Repeatable, bend, drawn
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from secagg_world import BASE, CONFIG, RUN, client_message, federation, make_query, make_vectors

from fedsecure.errors import FedsecureError, ProtocolError, RoundAborted
from fedsecure.secagg import transcript
from fedsecure.secagg.client import SecAggClient, State
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch import EpochClient, Epochs
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.epoch_server import EpochServer
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.secagg.server import Phase, SecAggServer
from fedsecure.secagg.spool import MemorySpool
from fedsecure.wire import secagg_pb2 as pb

N, COLLUDER, SLOTS = 4, 4, 3  # the last site's identity key is the attacker's too: c = 1
SET_UP = ("shares", "receive_shares")
STEPS = ("sign_survivors", "unmask", "finished")
Slot = tuple[bytes, int]


def slot_of(descriptor: RoundDescriptor) -> Slot:
    return descriptor.epoch, descriptor.slot


@lru_cache
@drawn("archive")
def archive() -> tuple[tuple[bytes, ...], tuple[tuple[str, bytes], ...]]:
    """To replay from: everything said in epoch 0, in this very context, by sites that drew other keys."""
    world, down, up = EpochWorld(N, slots=SLOTS), list[bytes](), list[tuple[str, bytes]]()
    clients = {site: epochs.set_up(world.descriptor) for site, epochs in world.sites.items()}
    said = {site: client.advertise() for site, client in clients.items()}
    for phase in ("advertise", "shares"):
        for site, raw in said.items():
            world.server.receive(site, raw)
        up += said.items()
        heard = world.server.close()
        down += heard.values()
        if phase == "advertise":
            said = {site: clients[site].shares(raw) for site, raw in heard.items()}
    for site, raw in heard.items():
        clients[site].receive_shares(raw)
    run = SlotRun(world, world.round(0)).masked().survivors().unmask()
    down += [raw for by_site in run.broadcast.values() for raw in by_site.values()]
    up += [(site, raw) for (_, site), raw in run.sent.items()] + [(s, header) for s, (header, _) in run.uploads.items()]
    return (*dict.fromkeys(down), run.server.finish().result_message), tuple(up)


class EpochMachine(RuleBasedStateMachine):
    """Epochs of three slots among four sites, one after the other, with everything an attacker may try."""

    def __init__(self) -> None:
        super().__init__()
        self.names = federation(N).sites
        self.latches = {site: MemoryLatch() for site in self.names}
        self.sites = {site: self.process(site) for site in self.names}
        self.epochs: list[EpochDescriptor] = []
        self.clients: dict[str, EpochClient] = {}
        self.attempts: dict[str, list[SecAggClient]] = {site: [] for site in self.names}
        self.ledgers: defaultdict[Slot, Ledger] = defaultdict(Ledger)
        self.vectors: dict[bytes, dict[str, np.ndarray]] = {}
        self.server: EpochServer | None = None
        self.heard: dict[str, bytes] = {}
        self.round: SecAggServer | None = None
        self.asked: RoundDescriptor | None = None
        self.told: dict[str, bytes] = {}
        self.down: list[bytes] = []
        self.up: list[tuple[str, bytes]] = []

    def process(self, site: str) -> Epochs:
        f = federation(N)
        return Epochs(site=site, signing_key=f.keys[site], roster=f.roster, latch=self.latches[site])

    # --- what a site may do, whatever it is asked -----------------------------------------------------------------

    def prepare(self, site: str, act: Callable[[EpochClient], Any]) -> Any:
        """A step of the set-up: an answer, or a refusal that changes nothing or ends the epoch for this site."""
        client = self.clients[site]
        before, left = client.state, client.slots_left
        try:
            out = act(client)
        except FedsecureError as refusal:
            out, code = None, refusal.code
        else:
            code = ""
        if code:
            out_for_good = (client.state, client.slots_left, client._own) == (State.ABORTED, 0, None)
            assert (client.state, client.slots_left) == (before, left) if code == "FS-1320" else out_for_good
            return None
        assert list(State).index(client.state) == list(State).index(before) + 1
        if isinstance(out, bytes):
            self.up.append((site, out))
        return out

    def begin(self, site: str, descriptor: RoundDescriptor) -> SecAggClient | None:
        """A round on a slot: it and those before it are gone, or nothing is."""
        epoch = self.clients.get(site)
        before = dict(epoch._slots) if epoch else {}
        try:
            client = self.sites[site].round(descriptor)
        except ProtocolError as refusal:
            code = refusal.code
        else:
            code = ""
        if code:
            assert code in ("FS-1345", "FS-1356", "FS-1357", "FS-1358", "FS-1359")
            assert (dict(epoch._slots) if epoch else {}) == before
            return None
        assert epoch is not None
        assert set(epoch._slots) == {number for number in before if number > descriptor.slot}
        assert descriptor.epoch == epoch.descriptor.ctx
        for name in ("threshold", "min_survivors", "colluders", "cohort", "mode", "config_hash"):
            assert getattr(descriptor, name) == getattr(epoch.descriptor, name)
        self.attempts[site].append(client)
        return client

    def call(self, site: str, client: SecAggClient, act: Callable[[SecAggClient], Any]) -> Any:
        """A step of a round: an answer, or a refusal that changes nothing or ends the attempt."""
        before = client.state
        try:
            out = act(client)
        except FedsecureError as refusal:
            out, code = None, refusal.code
        else:
            code = ""
        if code:
            assert client.state is (before if code == "FS-1320" else State.ABORTED), (before, client.state, code)
            return None
        assert list(State).index(client.state) == list(State).index(before) + 1
        if client.state is not State.DONE:
            raw = out if isinstance(out, bytes) else out.header
            self.ledgers[slot_of(client._descriptor)].note(site, raw)
            self.up.append((site, raw))
        return out

    def to_server(self, server: EpochServer | SecAggServer | None, act: Callable[[Any], Any]) -> None:
        """A refused message changes nothing at the aggregator."""
        if server is None:
            return
        before = server.phase, server.waiting_for()
        try:
            act(server)
        except ProtocolError:
            assert (server.phase, server.waiting_for()) == before

    # --- the honest course ----------------------------------------------------------------------------------------

    @initialize(steps=st.integers(0, 7))
    def start(self, steps: int) -> None:
        self.new_epoch()
        for _ in range(min(steps, 2)):
            self.everybody_prepares()
            self.close_set_up()
        if steps > 1:
            self.everybody_prepares()
        if steps > 2:
            self.open_round(skip=0)
        for _ in range(steps - 2):
            self.everybody()
            self.close_round()

    @rule()
    def new_epoch(self) -> None:
        """Also what an aggregator does after it has lost everything."""
        f = federation(N)
        self.epochs.append(make_epoch(N, slots=SLOTS, epoch=len(self.epochs)))
        self.server = EpochServer(self.epochs[-1], roster=f.roster, signing_key=f.aggregator)
        self.heard, self.round, self.asked = {}, None, None
        self.clients = {site: epochs.set_up(self.epochs[-1]) for site, epochs in self.sites.items()}

    @rule(site=st.sampled_from(range(N)))
    def honest_set_up(self, site: int) -> None:
        name = self.names[site]
        client, server = self.clients.get(name), self.server
        if client is None or server is None:
            return
        out, got = None, self.heard.get(name, b"")
        if server.phase is Phase.ADVERTISE and client.state is State.NEW:
            out = self.prepare(name, lambda c: c.advertise())
        elif server.phase is Phase.SHARES and client.state is State.ADVERTISED:
            out = self.prepare(name, lambda c: c.shares(got))
        elif server.phase is Phase.DONE and client.state is State.SHARED:
            self.prepare(name, lambda c: c.receive_shares(got))
        if out is not None:
            self.to_server(server, lambda s: s.receive(name, out))

    @rule()
    def everybody_prepares(self) -> None:
        for site in range(N):
            self.honest_set_up(site)

    @rule()
    def close_set_up(self) -> None:
        if self.server is not None and self.server.can_close():
            self.heard = dict(self.server.close())
            self.down += dict.fromkeys(self.heard.values())

    @rule(skip=st.integers(0, 1))
    def open_round(self, skip: int) -> None:
        """The next round on the next slot, or with one passed over."""
        if self.server is None or self.server.next_slot is None:
            return
        slot = self.server.next_slot + skip
        if slot < SLOTS:
            number = self.asked.round + 1 if self.asked else 10 * len(self.epochs)
            self.asked = self.descriptor(number, slot)
            self.round = self.server.round(self.asked, spool=MemorySpool())
            self.told = {}

    def descriptor(self, number: int, slot: int, **changes: Any) -> RoundDescriptor:
        return RoundDescriptor.from_query(
            make_query(N, round=number, **changes),
            roster=federation(N).roster,
            config_hash=CONFIG,
            base_hash=BASE,
            epoch=self.epochs[-1].ctx,
            slot=slot,
        )

    @rule(site=st.sampled_from(range(N)))
    def honest(self, site: int) -> None:
        name, server, asked = self.names[site], self.round, self.asked
        if server is None or asked is None:
            return
        mine = [client for client in self.attempts[name] if client.ctx == asked.ctx]
        client = mine[-1] if mine else self.begin(name, asked)
        if client is None:
            return
        out, got = None, self.told.get(name, b"")
        if server.phase is Phase.MASKED and client.state is State.RECEIVED:
            self.mask(name, client, server)
        elif server.phase is Phase.SURVIVORS and client.state is State.MASKED:
            out = self.call(name, client, lambda c: c.sign_survivors(got))
        elif server.phase is Phase.UNMASK and client.state is State.SIGNED:
            out = self.call(name, client, lambda c: c.unmask(got))
        if out is not None:
            self.to_server(server, lambda s: s.receive(name, out))

    def mask(self, site: str, client: SecAggClient, server: SecAggServer | None) -> None:
        d = client._descriptor
        vectors = self.vectors.setdefault(d.ctx, make_vectors(d, d.round))
        masked = self.call(site, client, lambda c: c.mask(vectors[site]))
        if masked is not None:
            self.to_server(server, lambda s: s.receive_masked(site, masked.header, masked.payload))

    @rule()
    def everybody(self) -> None:
        for site in range(N):
            self.honest(site)

    @rule()
    def close_round(self) -> None:
        server = self.round
        if server is None or not server.can_close():
            return
        if server.phase is not Phase.UNMASK:
            self.told = dict(server.close())
            self.down += dict.fromkeys(self.told.values())
            return
        try:
            result = server.finish()
        except RoundAborted:
            assert server.phase is Phase.ABORTED
            return
        vectors = self.vectors[server.ctx]
        total = sum((vectors[site].astype(object) for site in result.survivors), np.zeros(1, dtype=object))
        np.testing.assert_array_equal(result.total, ((total + 2**31) % 2**32 - 2**31).astype(np.int64))
        self.down.append(result.result_message)

    # --- the attacker ---------------------------------------------------------------------------------------------

    @rule(data=st.data(), site=st.integers(0, N - 1), name=st.sampled_from(SET_UP), how=st.sampled_from(BENDS))
    def hostile_set_up_message(self, data: st.DataObject, site: int, name: str, how: str) -> None:
        pool = data.draw(st.sampled_from([self.down, archive()[0]])) or [b""]
        raw = bend(data.draw(st.sampled_from(list(pool))), how, data, sites=N, slots=SLOTS)
        if self.clients.get(self.names[site]) is not None:
            self.prepare(self.names[site], lambda c: getattr(c, name)(raw))

    @rule(site=st.integers(0, N - 1), number=st.integers(0, 3))
    def stale_set_up(self, site: int, number: int) -> None:
        """An epoch that was set up before: refused, and what is there stays there."""
        name = self.names[site]
        client = self.clients.get(name)
        if client is None or number >= len(self.epochs):
            return
        before = client.state, client.slots_left
        with pytest.raises(ProtocolError, match="FS-1345"):
            self.sites[name].set_up(self.epochs[number])
        assert (client.state, client.slots_left) == before

    @rule(site=st.integers(0, N - 1), slot=st.integers(0, SLOTS), ahead=st.integers(-2, 2), attempt=st.integers(0, 1))
    def hostile_round(self, site: int, slot: int, ahead: int, attempt: int) -> None:
        """Any slot for any round; a site that takes it masks for it."""
        base = self.asked.round if self.asked else 10 * len(self.epochs)
        client = self.begin(self.names[site], self.descriptor(max(0, base + ahead), slot, attempt=attempt))
        if client is not None:
            self.mask(self.names[site], client, None)

    @rule(site=st.integers(0, N - 1), slot=st.integers(0, SLOTS - 1))
    def misfit_round(self, site: int, slot: int) -> None:
        """Anything else than what the epoch has fixed, on any slot: refused."""
        good = self.descriptor(self.later(), slot)
        for epoch in self.epochs[:-1]:
            assert self.begin(self.names[site], replace(good, epoch=epoch.ctx)) is None
        for changes in (
            {"cohort": good.cohort[::-1]},
            {"cohort": good.cohort[:3]},
            {"threshold": 2},
            {"min_survivors": 4},
            {"run_id": bytes(16)},
            {"epoch": b"", "slot": 0},
        ):
            assert self.begin(self.names[site], forged(good, **changes)) is None

    def later(self) -> int:
        """The number of a round that no site has begun."""
        return 1 + max([client._descriptor.round for mine in self.attempts.values() for client in mine], default=50)

    def attempt(self, data: st.DataObject, site: int) -> SecAggClient | None:
        """One of the site's attempts, mostly the newest."""
        mine = self.attempts[self.names[site]]
        return mine[-1 - data.draw(st.integers(0, min(1, len(mine) - 1)))] if mine else None

    @rule(data=st.data(), site=st.integers(0, N - 1), name=st.sampled_from(STEPS), how=st.sampled_from(BENDS))
    def hostile_message(self, data: st.DataObject, site: int, name: str, how: str) -> None:
        pool = data.draw(st.sampled_from([self.down, archive()[0]])) or [b""]
        raw = bend(data.draw(st.sampled_from(list(pool))), how, data, sites=N)
        client = self.attempt(data, site)
        if client is not None:
            self.call(self.names[site], client, lambda c: getattr(c, name)(raw))

    @rule(data=st.data(), site=st.integers(0, N - 1), absent=st.integers(0, N))
    def plausible_survivors(self, data: st.DataObject, site: int, absent: int) -> None:
        """A split view within all bounds: everybody, or everybody but one."""
        client = self.attempt(data, site)
        if client is not None:
            self.offer_survivors(site, client, [k for k in range(1, N + 1) if k != absent])

    def offer_survivors(self, site: int, client: SecAggClient, members: list[int]) -> None:
        raw = pb.ServerMessage(survivor_list=pb.SurvivorList(survivors=members)).SerializeToString()
        self.call(self.names[site], client, lambda c: c.sign_survivors(raw))

    @rule(data=st.data(), site=st.integers(0, N - 1), forge=st.booleans())
    def hostile_signatures(self, data: st.DataObject, site: int, forge: bool) -> None:
        """Any choice of the signatures ever made for any slot, and the colluder's on what the target wants to see."""
        client = self.attempt(data, site)
        if client is None:
            return
        made = [
            (self.names.index(who) + 1, signature)
            for ledger in self.ledgers.values()
            for who, signatures in ledger.signed.items()
            for signature in signatures
        ]
        wanted = data.draw(st.lists(st.integers(0, len(made) - 1), unique=True)) if made else []
        self.show(site, client, dict(made[k] for k in wanted), forge=forge)

    def show(self, site: int, client: SecAggClient, items: dict[int, bytes], *, forge: bool = True) -> None:
        if forge and client.state is State.SIGNED:
            body = transcript.survivors_body(client._t1, client._t2, client._survivors)
            key = federation(N).keys[self.names[COLLUDER - 1]]
            items = items | {COLLUDER: transcript.sign(key, "survivors", client.ctx, body)}
        message = pb.SurvivorSignatures(
            signatures=[pb.SurvivorSignature(index=i, signature=s) for i, s in sorted(items.items())]
        )
        raw = pb.ServerMessage(survivor_signatures=message).SerializeToString()
        self.call(self.names[site], client, lambda c: c.unmask(raw))

    @rule(
        slot=st.integers(0, SLOTS - 1),
        asked=st.lists(st.booleans(), min_size=3, max_size=3),
        absent=st.lists(st.integers(0, N), min_size=3, max_size=3),
    )
    def split_slot(self, slot: int, asked: list[bool], absent: list[int]) -> None:
        """A whole attack on one slot: each honest site is asked for one of two rounds, hears of other survivors, and is
        shown every signature there is, with the colluder's on whatever it wants to see."""
        base = self.later()
        begun, seen = {}, {}
        for site, (later, gone) in enumerate(zip(asked, absent, strict=True)):
            client = self.begin(self.names[site], self.descriptor(base + later, slot))
            if client is not None:
                self.mask(self.names[site], client, None)
                self.offer_survivors(site, client, [k for k in range(1, N + 1) if k != gone])
                begun[site] = client
        for who, signatures in self.ledgers[self.epochs[-1].ctx, slot].signed.items():
            seen[self.names.index(who) + 1] = next(iter(signatures))
        for site, client in begun.items():
            self.show(site, client, seen)

    @rule(data=st.data(), site=st.integers(0, N - 1), how=st.sampled_from(BENDS), own=st.booleans())
    def hostile_upward(self, data: st.DataObject, site: int, how: str, own: bool) -> None:
        pool = data.draw(st.sampled_from([self.up, archive()[1]])) or [("", b"")]
        who, raw = data.draw(st.sampled_from(list(pool)))
        raw = bend(raw, how, data, sites=N, slots=SLOTS)
        sender = who if own else self.names[site]
        self.to_server(self.server, lambda s: s.receive(sender, raw))
        self.to_server(self.round, lambda s: s.receive(sender, raw))
        if self.asked is not None:
            size = 4 * self.asked.length
            self.to_server(self.round, lambda s: s.receive_masked(sender, raw, bytes(size)))

    @rule(site=st.integers(0, N - 1), slot=st.integers(0, SLOTS - 1))
    def restart(self, site: int, slot: int) -> None:
        """A new process with the same state folder has no slots, and never sets up an epoch that it had begun."""
        name = self.names[site]
        begun = self.clients[name].state is not State.NEW
        self.sites[name] = self.process(name)
        self.attempts[name] = []
        with pytest.raises(ProtocolError, match="FS-1358"):
            self.sites[name].round(self.descriptor(999, slot))
        self.clients[name] = self.sites[name].set_up(self.epochs[-1])
        if begun:
            with pytest.raises(ProtocolError, match="FS-1345"):
                self.clients[name].advertise()
            assert self.clients[name].state is State.ABORTED

    @rule(site=st.integers(0, N - 1))
    @precondition(lambda self: any(self.attempts.values()))
    def set_back(self, site: int) -> None:
        """A snapshot of the machine is put back, used slots in it: the latch knows them, whatever the round."""
        name = self.names[site]
        epoch, mine = self.clients[name], self.attempts[name]
        used = [client._descriptor.slot for client in mine if client._descriptor.epoch == epoch.descriptor.ctx]
        if not used or epoch.state is not State.RECEIVED:
            return
        blank = next(iter(epoch._slots.values()), None)
        if blank is None:
            return
        epoch._slots[max(used)] = replace(blank, seed=bytearray(32))
        last = self.latches[name]._records[RUN.hex()]
        asked = self.descriptor(last.round, max(used), attempt=last.attempt + 1)
        with pytest.raises(ProtocolError, match="FS-1345"):
            self.sites[name].round(asked)
        assert max(used) not in epoch._slots

    # --- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def no_slot_gives_away_more_than_one_sum(self) -> None:
        for ledger in self.ledgers.values():
            ledger.check()

    @invariant()
    def who_is_out_holds_no_secret(self) -> None:
        for client in self.clients.values():
            if client.state is State.ABORTED:
                assert (client.slots_left, client._own, client._kept) == (0, None, [])
        for mine in self.attempts.values():
            for attempt in mine:
                if attempt.state in (State.ABORTED, State.UNMASKED, State.DONE):
                    assert (attempt._seed, attempt._mask_key, attempt._shares) == (None, None, {})


def forged(descriptor: RoundDescriptor, **changes: Any) -> RoundDescriptor:
    """Without the constructor's checks."""
    fake = object.__new__(RoundDescriptor)
    for field in fields(RoundDescriptor):
        object.__setattr__(fake, field.name, changes.get(field.name, getattr(descriptor, field.name)))
    return fake


class RepeatableEpochMachine(Repeatable, EpochMachine):
    def __init__(self) -> None:
        archive()  # of other secrets
        super().__init__()


class TestEpochs(RepeatableEpochMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.mark.slow
class TestEpochsAtLength(RepeatableEpochMachine.TestCase):
    settings = settings(max_examples=250, stateful_step_count=50, deadline=None)


# --- the fuzzer can fail -----------------------------------------------------------------------------------------


def two_rounds_on_one_slot(machine: EpochMachine) -> None:
    """Everybody answers round 10 on slot 0 with all survivors, and is then asked for round 11 on it without site 1."""
    machine.start(2)
    for number, members in ((10, [1, 2, 3, 4]), (11, [2, 3, 4])):
        begun = {}
        for site in members:
            client = machine.begin(machine.names[site - 1], machine.descriptor(number, 0))
            if client is not None:
                begun[site] = client
                machine.mask(machine.names[site - 1], client, None)
        for site, client in begun.items():
            machine.offer_survivors(site - 1, client, members)
        signatures = pb.SurvivorSignatures()
        for who, made in machine.ledgers[machine.epochs[-1].ctx, 0].signed.items():
            if number == 10 or len(made) > 1:
                index = machine.names.index(who) + 1
                signatures.signatures.add(index=index, signature=max(made, key=lambda s: s in fresh(machine, begun)))
        raw = pb.ServerMessage(survivor_signatures=signatures).SerializeToString()
        for site, client in begun.items():
            machine.call(machine.names[site - 1], client, lambda c, raw=raw: c.unmask(raw))


def fresh(machine: EpochMachine, begun: dict[int, SecAggClient]) -> set[bytes]:
    """The survivors' signatures that these attempts made."""
    return {
        transcript.sign(
            federation(N).keys[machine.names[site - 1]],
            "survivors",
            client.ctx,
            transcript.survivors_body(client._t1, client._t2, client._survivors),
        )
        for site, client in begun.items()
    }


def test_the_ledger_notices_a_slot_that_serves_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = EpochMachine()
    two_rounds_on_one_slot(sound)
    for ledger in sound.ledgers.values():
        ledger.check()
    assert any(ledger.released for ledger in sound.ledgers.values())
    honest = EpochClient.round

    def undying(self: EpochClient, descriptor: RoundDescriptor) -> SecAggClient:
        kept = {number: replace(slot, seed=bytearray(slot.seed)) for number, slot in self._slots.items()}
        try:
            return honest(self, descriptor)
        finally:
            self._slots.update(kept)

    monkeypatch.setattr(EpochClient, "round", undying)
    monkeypatch.setattr(MemoryLatch, "begin", lambda *_: None)
    monkeypatch.setattr(MemoryLatch, "mark_signed", lambda *_: None)
    monkeypatch.setattr(MemoryLatch, "mark_consumed", lambda *_: None)
    monkeypatch.setattr(EpochMachine, "begin", lambda self, site, d: self.sites[site].round(d))
    broken = EpochMachine()
    two_rounds_on_one_slot(broken)
    (ledger,) = broken.ledgers.values()
    with pytest.raises(AssertionError, match="two vectors"):
        ledger.check()
    ledger.masked.clear()
    ledger.signed.clear()
    for site, messages in ledger.released.items():
        ledger.released[site] = messages[-1:] if site != broken.names[0] else messages
    with pytest.raises(AssertionError, match="both kinds"):
        ledger.check()


def test_the_fuzzer_notices_slots_that_survive_a_refusal_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused round must not cost a slot."""
    honest = EpochClient.round

    def leaky(self: EpochClient, descriptor: RoundDescriptor) -> SecAggClient:
        try:
            return honest(self, descriptor)
        except ProtocolError:
            self._slots.popitem()
            raise

    monkeypatch.setattr(EpochClient, "round", leaky)
    machine = EpochMachine()
    machine.start(2)
    with pytest.raises(AssertionError):
        machine.begin(machine.names[0], machine.descriptor(10, SLOTS))
    assert client_message(machine.up[0][1]).HasField("advertisement")
