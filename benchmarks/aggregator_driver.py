"""The sites of a load test: one coroutine and one gRPC channel each, mutual TLS with a certificate of its own.

A process of its own, started by :mod:`benchmarks.aggregator_case` with one JSON argument. It prints a JSON line when
all sites have the result of a round, and one with the latencies at the end. What a site computes stands in
:mod:`benchmarks.aggregator_sites`; all that it says, polls, beats, fetches and uploads goes over its own channel. All
sites act as soon as they are told, so a latency holds the wait behind the others, on both sides. A call whose
connection breaks is made again, as the released site does it, and counted. Requests carry the ids, and chunks the
hashes, that the released site's do.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.aggregator_sites import Rehearsal, SparingClient, basis
from fedsecure.aggregator.answers import ID_BYTES
from fedsecure.identity import keys
from fedsecure.identity.provision import Identity, load_identity
from fedsecure.messages import Query
from fedsecure.secagg.client import SecAggClient
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.transport.base import CHUNK_BYTES
from fedsecure.transport.tls import KEEPALIVE, LIMITS, channel_credentials, grpc
from fedsecure.transport.versions import OURS
from fedsecure.wire import federation_pb2 as pb
from fedsecure.wire import federation_pb2_grpc as rpc

JOINING = 32  # handshakes at a time
PATIENCE = 600.0
AGAIN_SECONDS = 0.5
TRIES = 20
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_Reply = TypeVar("_Reply")


@dataclass(frozen=True)
class Plan:
    """What the driver is told.

    Attributes:
        address: the aggregator's.
        folder: of the sites' identities.
        released: sites run the released client; else the sparing one.
        warm_up: rounds before latencies count.
    """

    address: str
    folder: str
    released: bool
    warm_up: int


@dataclass
class Board:
    """What all sites share: questions, decoded once; latencies; who has the result of which round."""

    plan: Plan
    aggregator_key: bytes
    latencies: dict[str, list[float]] = field(default_factory=dict)
    repeated: int = 0
    joining: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(JOINING))
    _asked: tuple[bytes, Query, RoundDescriptor, Rehearsal] | None = None
    _sum_hash: bytes = b""
    _results: Counter[bytes] = field(default_factory=Counter)
    _rounds: int = 0

    def question(self, ask: pb.Ask) -> tuple[Query, RoundDescriptor, Rehearsal]:
        if self._asked is None or self._asked[0] != ask.descriptor:
            descriptor = RoundDescriptor.parse(ask.descriptor)
            query = Query.from_json(ask.query_json)
            total = np.zeros(descriptor.length, dtype="<u4")
            total[: len(descriptor.cohort)] = 1
            self._sum_hash = hashlib.sha256(total.data).digest()
            self._asked = ask.descriptor, query, descriptor, Rehearsal(descriptor, self.aggregator_key)
        return self._asked[1:]

    def result(self, ctx: bytes, sum_hash: bytes, sites: int) -> None:
        assert sum_hash == self._sum_hash, "the published sum is not that of all sites"
        self._results[ctx] += 1
        if self._results[ctx] == sites:
            del self._results[ctx]
            print(json.dumps({"round": self._rounds}), flush=True)
            self._rounds += 1

    async def persistent(self, call: Callable[[], Awaitable[_Reply]]) -> _Reply:
        for _ in range(TRIES):
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                task = asyncio.current_task()
                if error.code() not in _BROKEN or (task is not None and task.cancelling()):
                    raise
            self.repeated += 1
            await asyncio.sleep(AGAIN_SECONDS)
        return await call()

    async def timed(self, kind: str, call: Callable[[], Awaitable[_Reply]]) -> _Reply:
        start = time.perf_counter()
        reply = await self.persistent(call)
        if self._rounds >= self.plan.warm_up:
            self.latencies.setdefault(kind, []).append(time.perf_counter() - start)
        return reply


class Site:
    """One site, from its join to the run's end."""

    def __init__(self, board: Board, identity: Identity) -> None:
        self._board, self._identity = board, identity
        self._token = os.urandom(16)
        self._query: Query | None = None
        self._client: SecAggClient | SparingClient | None = None

    async def run(self) -> None:
        address, credentials = self._board.plan.address, channel_credentials(self._identity)
        async with grpc.aio.secure_channel(address, credentials, options=[*LIMITS, *KEEPALIVE]) as channel:
            self._stub: Any = rpc.FederationStub(channel)
            await self._join()
            beating = asyncio.create_task(self._beat())
            try:
                await self._listen()
            finally:
                beating.cancel()
                with suppress(asyncio.CancelledError, grpc.RpcError):
                    await beating

    async def _join(self) -> None:
        request = pb.JoinRequest(
            protocol=OURS.lowest,
            newest=OURS.highest,
            session=self._token,
            roster_hash=self._identity.roster.hash,
            software="benchmark",
            request=fresh_id(),
        )
        async with self._board.joining:
            await self._board.persistent(lambda: self._stub.Join(request, timeout=PATIENCE))

    async def _beat(self) -> None:
        request = pb.BeatRequest(session=self._token)
        while True:
            await self._board.persistent(lambda: self._stub.Beat(request, timeout=PATIENCE))

    async def _listen(self) -> None:
        after = 0
        while True:
            directive = await self._next(after)
            after = directive.sequence or after
            kind = directive.WhichOneof("kind")
            if kind == "ask":
                await self._begin(directive.ask)
            elif kind == "relay":
                await self._go_on(directive.relay)
            elif kind == "abort":
                raise RuntimeError(f"the attempt ended: {directive.abort.code} {directive.abort.reason[:500]}")
            elif kind == "finished":
                assert directive.finished.complete, directive.finished.summary_json[:500]
                await self._next(after)  # says that this one has arrived
                return

    async def _next(self, after: int) -> pb.Directive:
        request = pb.NextRequest(session=self._token, after=after)
        return await self._board.persistent(lambda: self._stub.Next(request, timeout=PATIENCE))

    async def _begin(self, ask: pb.Ask) -> None:
        self._query, descriptor, rehearsal = self._board.question(ask)
        identity = self._identity
        if self._board.plan.released:
            self._client = SecAggClient(
                descriptor,
                site=identity.site,
                signing_key=identity.signing_key,
                roster=identity.roster,
                latch=MemoryLatch(),
            )
        else:
            self._client = SparingClient(rehearsal, site=identity.site, signing_key=identity.signing_key)
        self._ctx, self._index = descriptor.ctx, descriptor.index(identity.site)
        await self._send(self._client.advertise())

    async def _go_on(self, relay: pb.Relay) -> None:
        query, client = self._query, self._client
        assert query is not None
        assert client is not None
        assert relay.ctx == self._ctx
        if relay.phase == "shares":
            await self._send(client.shares(relay.payload))
        elif relay.phase == "masked":
            client.receive_shares(relay.payload)
            for digest in query.inputs.values():
                await self._board.timed("fetch", functools.partial(self._fetch, digest))
            await self._upload(client, basis(self._index, query.length))
        elif relay.phase == "survivors":
            await self._send(client.sign_survivors(relay.payload))
        elif relay.phase == "unmask":
            await self._send(client.unmask(relay.payload))
        else:
            assert relay.phase == "result", relay.phase
            self._board.result(relay.ctx, client.finished(relay.payload), len(query.cohort))

    async def _send(self, payload: bytes) -> None:
        message = pb.PhaseMessage(session=self._token, ctx=self._ctx, payload=payload, request=fresh_id())
        await self._board.timed("send", lambda: self._stub.Send(message, timeout=PATIENCE))

    async def _fetch(self, digest: bytes) -> int:
        request = pb.FetchRequest(session=self._token, digest=digest)
        return sum([len(chunk.data) async for chunk in self._stub.Fetch(request, timeout=PATIENCE)])

    async def _upload(self, client: SecAggClient | SparingClient, vector: Any) -> None:
        masked = client.mask(vector)
        size = len(masked.payload)
        header = pb.UploadHeader(
            session=self._token, ctx=self._ctx, header=masked.header, size=size, request=fresh_id()
        )

        async def parts() -> AsyncIterator[pb.UploadPart]:
            yield pb.UploadPart(header=header)
            for offset in range(0, size, CHUNK_BYTES):
                data = bytes(masked.payload[offset : offset + CHUNK_BYTES])
                digest = hashlib.sha256(data).digest()
                yield pb.UploadPart(chunk=pb.Chunk(offset=offset, data=data, sha256=digest))

        await self._board.timed("upload", lambda: self._stub.Upload(parts(), timeout=PATIENCE))


def fresh_id() -> bytes:
    """Of a request that changes something: made again with the same id, it is done once."""
    return os.urandom(ID_BYTES)


def identities(folder: Path) -> list[Identity]:
    """All sites' identities; the roster, the same for all, is checked once."""
    sites = sorted(folder.iterdir())
    first = load_identity(sites[0] / "identity")
    return [
        replace(
            first,
            site=site.name,
            signing_key=keys.load_private_key(site / "identity" / "identity.key"),
            certificate=(site / "identity" / "certificate.pem").read_bytes(),
            tls_key=(site / "identity" / "tls-key.pem").read_bytes(),
        )
        for site in sites
    ]


async def drive(plan: Plan) -> Board:
    """Let all sites take part in one run."""
    members = identities(Path(plan.folder))
    board = Board(plan, members[0].roster.aggregator_key)
    try:
        async with asyncio.TaskGroup() as group:
            for identity in members:
                group.create_task(Site(board, identity).run())
    except ExceptionGroup as errors:
        cancelled = grpc.StatusCode.CANCELLED  # of the others, which were told to stop
        cause, _ = errors.split(lambda e: not (isinstance(e, grpc.aio.AioRpcError) and e.code() is cancelled))
        raise (cause or errors).exceptions[0] from None
    return board


def main(arguments: list[str]) -> None:
    board = asyncio.run(drive(Plan(**json.loads(arguments[0]))))
    print(json.dumps({"latencies": board.latencies, "repeated": board.repeated}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
