"""A federation in memory for the secure-aggregation tests: keys, roster, a query, and whole rounds with drop-outs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.identity import keys as identity_keys
from fedsecure.identity.roster import Roster, RosterEntry
from fedsecure.messages import Event, Query, Segment
from fedsecure.secagg.client import SecAggClient
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.secagg.server import Phase, SecAggResult, SecAggServer
from fedsecure.secagg.spool import MemorySpool
from fedsecure.secagg.thresholds import Mode
from fedsecure.wire import secagg_pb2 as pb

CONFIG, BASE = bytes([7] * 32), bytes([8] * 32)
RUN = bytes(range(16))


@dataclass(frozen=True)
class Federation:
    """Roster and everybody's identity key; the last site of the roster is in no cohort."""

    roster: Roster
    keys: dict[str, Ed25519PrivateKey]
    aggregator: Ed25519PrivateKey

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.keys)[:-1]


def identity_key(n: int, name: str) -> Ed25519PrivateKey:
    """The same in every run: what a fuzzer finds can be replayed."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{n} sites: {name}".encode()).digest())


@lru_cache
def federation(n: int) -> Federation:
    width = max(2, len(str(n)))
    members = {site: identity_key(n, site) for site in (f"site-{i:0{width}d}" for i in range(n + 1))}
    aggregator = identity_key(n, "aggregator")
    entries = tuple(
        RosterEntry(site, "train", identity_keys.public_bytes(key), hashlib.sha256(site.encode()).digest())
        for site, key in members.items()
    )
    roster = Roster("test", 1, entries, identity_keys.public_bytes(aggregator), bytes([9] * 32))
    return Federation(roster, members, aggregator)


def make_query(n: int, *, length: int = 5, round: int = 0, attempt: int = 0, **changes: object) -> Query:
    segments = (
        Segment("delta", max(1, length - 2), 2.0**-10, 2**20, 2**20, Fraction(2**40, 3), bytes([5] * 32)),
        *((Segment("counts", 2, 1.0, 0, 2**10),) if length > 2 else ()),
    )
    fields: dict[str, object] = {
        "run": RUN,
        "round": round,
        "attempt": attempt,
        "method": "linear",
        "version": "1",
        "cohort": federation(n).sites,
        "inputs": {"adapter": hashlib.sha256(b"adapter").digest()},
        "segments": segments,
        "events": (Event("train", "training", 1.25, 0.75),),
    }
    return Query(**{**fields, **changes})  # type: ignore[arg-type]


def make_descriptor(
    n: int,
    *,
    query: Query | None = None,
    mode: Mode = Mode.ACTIVE,
    colluders: int | None = None,
    min_survivors: int | None = None,
) -> RoundDescriptor:
    return RoundDescriptor.from_query(
        query or make_query(n),
        roster=federation(n).roster,
        config_hash=CONFIG,
        base_hash=BASE,
        colluders=colluders,
        min_survivors=min_survivors,
        mode=mode,
    )


def make_client(descriptor: RoundDescriptor, site: str, latch: MemoryLatch | None = None) -> SecAggClient:
    f = federation(len(descriptor.cohort))
    return SecAggClient(
        descriptor,
        site=site,
        signing_key=f.keys[site],
        roster=f.roster,
        latch=latch or MemoryLatch(),
    )


def make_server(descriptor: RoundDescriptor) -> SecAggServer:
    f = federation(len(descriptor.cohort))
    return SecAggServer(descriptor, roster=f.roster, signing_key=f.aggregator, spool=MemorySpool())


def make_vectors(descriptor: RoundDescriptor, seed: int = 0) -> dict[str, np.ndarray]:
    """Uniform ring words for every site: a stronger test of exactness than small signed values."""
    rng = np.random.default_rng(seed)
    return {s: rng.integers(0, 2**32, descriptor.length, dtype=np.uint32) for s in descriptor.cohort}


Tamper = Callable[[str, bytes], bytes]


@dataclass
class Run:
    """One attempt, phase by phase. ``drops`` maps a phase to the sites whose message of it never comes."""

    descriptor: RoundDescriptor
    drops: dict[Phase, Collection[str]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self.server = make_server(self.descriptor)
        self.clients = {site: make_client(self.descriptor, site) for site in self.descriptor.cohort}
        self.vectors = make_vectors(self.descriptor, self.seed)
        self.live = list(self.descriptor.cohort)
        self.sent: dict[tuple[str, str], bytes] = {}  # (phase, site) → bytes that left a site
        self.broadcast: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, tuple[bytes, memoryview]] = {}

    def _leave(self, phase: Phase) -> list[str]:
        self.live = [site for site in self.live if site not in self.drops.get(phase, ())]
        return self.live

    def _send(self, phase: Phase, site: str, message: bytes) -> None:
        self.sent[phase.value, site] = message
        assert self.server.receive(site, message)

    def _close(self, phase: Phase) -> None:
        self.broadcast[phase.value] = dict(self.server.close())

    def advertise(self) -> Run:
        for site in self._leave(Phase.ADVERTISE):
            self._send(Phase.ADVERTISE, site, self.clients[site].advertise())
        self._close(Phase.ADVERTISE)
        return self

    def shares(self) -> Run:
        for site in self._leave(Phase.SHARES):
            message = self.clients[site].shares(self.broadcast["advertise"][site])
            self._send(Phase.SHARES, site, message)
        self._close(Phase.SHARES)
        return self

    def masked(self, *, close: bool = True) -> Run:
        for site in self._leave(Phase.MASKED):
            client = self.clients[site]
            client.receive_shares(self.broadcast["shares"][site])
            masked = client.mask(self.vectors[site])
            self.uploads[site] = (masked.header, masked.payload)
            assert self.server.receive_masked(site, masked.header, masked.payload)
        if close:
            self._close(Phase.MASKED)
        return self

    def survivors(self) -> Run:
        if self.descriptor.mode is Mode.HBC:
            self.broadcast["survivors"] = self.broadcast["masked"]
            return self
        for site in self._leave(Phase.SURVIVORS):
            message = self.clients[site].sign_survivors(self.broadcast["masked"][site])
            self._send(Phase.SURVIVORS, site, message)
        self._close(Phase.SURVIVORS)
        return self

    def unmask(self) -> Run:
        for site in self._leave(Phase.UNMASK):
            message = self.clients[site].unmask(self.broadcast["survivors"][site])
            self._send(Phase.UNMASK, site, message)
        return self

    def complete(self) -> SecAggResult:
        self.advertise().shares().masked().survivors().unmask()
        return self.server.finish()

    def expected(self, survivors: Collection[str]) -> np.ndarray:
        """The sum in plain integers, reduced and centred independently of the package."""
        total = sum((self.vectors[site].astype(object) for site in survivors), np.zeros(1, dtype=object))
        return ((total + 2**31) % 2**32 - 2**31).astype(np.int64)


def client_message(raw: bytes) -> pb.ClientMessage:
    return pb.ClientMessage.FromString(raw)


def server_message(raw: bytes) -> pb.ServerMessage:
    return pb.ServerMessage.FromString(raw)


def edit(raw: bytes, change: Callable[[pb.ServerMessage], None]) -> bytes:
    """A server message with something changed by an attacker in the middle."""
    message = server_message(raw)
    change(message)
    return message.SerializeToString()
