"""Bytes one site sends up in a round of the released client and server, all phases, over 4 bytes a coordinate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from fedsecure.identity import keys as identity_keys
from fedsecure.identity.roster import Roster, RosterEntry
from fedsecure.messages import Query, Segment
from fedsecure.secagg.client import SecAggClient
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.secagg.server import SecAggServer
from fedsecure.secagg.spool import MemorySpool


def measure(sites: int, lengths: tuple[int, ...], *, progress: Callable[[str], None]) -> dict[str, float]:
    """Largest ratio over the sites and ``lengths`` for rings of 32 and 16 bits.

    One whole round in ACTIVE mode with vectors of the first length gives the size of everything but the vector. That
    does not depend on the ring, and on the length only by the few bytes of a number, counted as four.
    """
    small = max(_messages(sites, lengths[0], progress))
    return {f"n{sites}_b{bits}": max((small + d * bits // 8 + 4) / (4 * d) for d in lengths) for bits in (32, 16)}


def _messages(sites: int, length: int, progress: Callable[[str], None]) -> list[int]:
    names = [f"site-{i:03d}" for i in range(sites)]
    keys, aggregator = {name: identity_keys.generate() for name in names}, identity_keys.generate()
    entries = tuple(
        RosterEntry(name, "train", identity_keys.public_bytes(keys[name]), hashlib.sha256(name.encode()).digest())
        for name in names
    )
    roster = Roster("benchmark", 1, entries, identity_keys.public_bytes(aggregator), bytes(32))
    segment = Segment("sum", length, 2.0**-10, 2**10, 2**10, Fraction(2**20), None)
    query = Query(bytes(16), 0, 0, "linear", "1", tuple(names), {"adapter": bytes(32)}, (segment,), ())
    descriptor = RoundDescriptor.from_query(query, roster=roster, config_hash=bytes(32), base_hash=bytes(32))
    server = SecAggServer(descriptor, roster=roster, signing_key=aggregator, spool=MemorySpool())
    clients = {
        name: SecAggClient(descriptor, site=name, signing_key=keys[name], roster=roster, latch=MemoryLatch())
        for name in names
    }
    sent = dict.fromkeys(names, 0)

    def receive(phase: str, step: Callable[[str], bytes]) -> None:
        for name in names:
            progress(f"wire: {phase} of {name}")
            message = step(name)
            sent[name] += len(message)
            server.receive(name, message)

    receive("advertisement", lambda name: clients[name].advertise())
    down = server.close()
    receive("shares", lambda name: clients[name].shares(down[name]))
    down = server.close()
    vector = np.zeros(length, dtype="<u4")
    for name in names:
        progress(f"wire: vector of {name}")
        clients[name].receive_shares(down[name])
        masked = clients[name].mask(vector)
        assert len(masked.payload) == vector.nbytes
        sent[name] += len(masked.header)
        server.receive_masked(name, masked.header, masked.payload)
    down = server.close()
    receive("signature", lambda name: clients[name].sign_survivors(down[name]))
    down = server.close()
    receive("release", lambda name: clients[name].unmask(down[name]))
    assert not server.finish().total.any()
    return list(sent.values())
