"""The load test prints what it promises, with real processes; and its sparing sites are sites to the aggregator."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedsecure.errors import ProtocolError
from fedsecure.identity import keys
from fedsecure.identity.provision import load_identity, provision
from fedsecure.identity.roster import Roster, RosterEntry
from fedsecure.messages import Query, Segment
from fedsecure.secagg.client import MaskedInput
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.server import SecAggServer
from fedsecure.secagg.spool import MemorySpool
from fedsecure.secagg.thresholds import Mode
from fedsecure.site.line import Line
from fedsecure.transport.base import CHUNK_BYTES
from fedsecure.transport.channel import GrpcTransport
from fedsecure.transport.versions import OURS
from fedsecure.wire import federation_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 200
CASES = ("sites1000_d1e5", "sites100_d1e6", "soak200")


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, from the repository's root and no other package called benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    from benchmarks import aggregator_sites

    return aggregator_sites


@pytest.fixture
def driver(sites: Any) -> Any:
    """The module of the sites' lines, of the same package."""
    from benchmarks import aggregator_driver

    return aggregator_driver


class Stub:
    """In the place of gRPC's: what is sent, by call."""

    def __init__(self) -> None:
        self.sent: dict[str, list[Any]] = {}

    def __getattr__(self, call: str) -> Any:
        def record(request: Any, *, timeout: float) -> Any:
            self.sent.setdefault(call, []).extend([request] if call != "Upload" else request)
            return pb.JoinReply(protocol=OURS.highest)

        return record


class AsyncStub(Stub):
    def __getattr__(self, call: str) -> Any:
        async def record(request: Any, *, timeout: float) -> None:
            self.sent.setdefault(call, []).extend([request] if call != "Upload" else [part async for part in request])

        return record


def shape(message: Any) -> Any:
    """The fields that a message sets, and those of messages in it."""
    return {field.name: shape(value) if field.message_type else None for field, value in message.ListFields()}


def test_the_driver_sends_what_the_released_site_sends(driver: Any, tmp_path: Path) -> None:
    """Ids of requests, hashes of chunks and versions among it, so that the aggregator does for them what it does."""
    provision(tmp_path, federation="load", sites={"site-1": "train"}, hosts=("localhost",))
    identity = load_identity(tmp_path / "sites" / "site-1" / "identity")
    masked = MaskedInput(b"header", memoryview(os.urandom(2 * CHUNK_BYTES + 8)), bytes(32))
    transport, released = GrpcTransport("localhost:1", identity, connect_seconds=1.0), Stub()
    transport._stub = released
    line = Line(transport, wait_seconds=1.0, progress=lambda moment: None)
    line.join(identity.roster.hash)
    for _ in range(2):
        line.send(b"ctx", b"payload")
    line.upload(b"ctx", masked)
    line.close()

    site = driver.Site(driver.Board(driver.Plan("", "", released=False, warm_up=0), b""), identity)
    site._stub, site._ctx = AsyncStub(), b"ctx"

    async def drive() -> None:
        await site._join()
        for _ in range(2):
            await site._send(b"payload")
        await site._upload(SimpleNamespace(mask=lambda vector: vector), masked)

    asyncio.run(drive())
    driven = site._stub.sent
    assert {call: [shape(message) for message in messages] for call, messages in driven.items()} == {
        call: [shape(message) for message in messages] for call, messages in released.sent.items()
    }
    ids = [message.request for message in driven["Join"] + driven["Send"]] + [driven["Upload"][0].header.request]
    assert len(set(ids)) == 4
    assert {len(request) for request in ids} == {16}
    assert all(hashlib.sha256(part.chunk.data).digest() == part.chunk.sha256 for part in driven["Upload"][1:])


class Round:
    """One round of sparing sites at the released server."""

    def __init__(self, sites: Any, number: int, mode: Mode) -> None:
        self.names = [f"site-{i:03d}" for i in range(number)]
        own, aggregator = {name: keys.generate() for name in self.names}, keys.generate()
        entries = tuple(
            RosterEntry(name, "train", keys.public_bytes(key), hashlib.sha256(name.encode()).digest())
            for name, key in own.items()
        )
        roster = Roster("load", 1, entries, keys.public_bytes(aggregator), bytes(32))
        segment = Segment("sum", LENGTH, 2.0**-10, 2**10, 2**10, Fraction(2**20))
        query = Query(bytes(16), 0, 0, "linear", "1", tuple(self.names), {}, (segment,), ())
        descriptor = RoundDescriptor.from_query(
            query, roster=roster, config_hash=bytes(32), base_hash=bytes(32), mode=mode
        )
        self.basis = sites.basis
        self.server = SecAggServer(descriptor, roster=roster, signing_key=aggregator, spool=MemorySpool())
        self.rehearsal = sites.Rehearsal(descriptor, roster.aggregator_key)
        self.clients = {n: sites.SparingClient(self.rehearsal, site=n, signing_key=own[n]) for n in self.names}

    def send(self, step: str, told: Any = None) -> Any:
        """One message of every site; returns what the server says then."""
        for name, client in self.clients.items():
            arguments = () if told is None else (told[name],)
            assert self.server.receive(name, getattr(client, step)(*arguments))
        return None if step == "unmask" else self.server.close()

    def upload(self, told: Any) -> Any:
        for index, (name, client) in enumerate(self.clients.items(), start=1):
            client.receive_shares(told[name])
            masked = client.mask(self.basis(index, LENGTH))
            assert self.server.receive_masked(name, masked.header, masked.payload)
        return self.server.close()


@pytest.mark.parametrize(("number", "mode"), [(5, Mode.ACTIVE), (130, Mode.HBC)])
def test_the_released_server_takes_a_sparing_site_for_a_site(sites: Any, number: int, mode: Mode) -> None:
    """Both graphs: every message passes its checks, the masks come off, and the sum is that of all inputs."""
    round_ = Round(sites, number, mode)
    told = round_.upload(round_.send("shares", round_.send("advertise")))
    if mode is Mode.ACTIVE:
        told = round_.send("sign_survivors", told)
    round_.send("unmask", told)
    result = round_.server.finish()
    total = np.zeros(LENGTH, dtype="<u4")
    total[:number] = 1
    assert np.array_equal(result.total, total)
    assert result.survivors == tuple(round_.names)
    assert not result.bad_shares
    hashes = {client.finished(result.result_message) for client in round_.clients.values()}
    assert hashes == {hashlib.sha256(total.data).digest()}


def test_a_sparing_site_that_errs_is_found_out(sites: Any) -> None:
    """The checks of the test above are at work: one wrong byte of a vector, or a foreign seed, is not accepted."""
    round_ = Round(sites, 5, Mode.ACTIVE)
    told = round_.send("shares", round_.send("advertise"))
    first = round_.names[0]
    round_.clients[first].receive_shares(told[first])
    masked = round_.clients[first].mask(round_.basis(1, LENGTH))
    with pytest.raises(ProtocolError, match="FS-1329"):
        round_.server.receive_masked(first, masked.header, bytes([masked.payload[0] ^ 1]) + bytes(masked.payload[1:]))
    told = round_.send("sign_survivors", round_.upload(told))
    round_.rehearsal.seeds[2] = os.urandom(32)
    round_.send("unmask", told)
    with pytest.raises(ProtocolError, match="FS-1355"):
        round_.server.finish()


@pytest.mark.slow
def test_the_json_has_the_promised_keys() -> None:
    """Aggregator and sites as processes, mutual TLS between them, 130 sites on a sparse graph among the cases."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks.aggregator", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert set(result) == {*CASES, "about"}
    for name in CASES:
        case = result[name]
        assert case["rounds_per_minute"] > 0
        assert 0 < case["p50_ms"] <= case["p99_ms"]
        assert set(case["calls_ms"]) == {"send", "fetch", "upload"}
        assert case["cpu_s"] > 0
        assert 20 < case["rss_first_mb"] <= case["rss_mb"] < 1000
        assert 20 < case["rss_last_mb"] <= case["rss_mb"]


def test_an_unknown_case_is_named() -> None:
    command = [sys.executable, "-m", "benchmarks.aggregator", "--only", "soak200,none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "--only: no none" in done.stderr
