"""The coordinator behind gRPC: mutual TLS, the caller's identity from its certificate, bounded sizes and waits.

One event loop; every call into the coordinator happens on it, so calls never overlap. Nothing here computes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedsecure.aggregator.coordinator import PROTOCOL, Coordinator
from fedsecure.aggregator.house import House
from fedsecure.errors import EnvironmentProblem, FedsecureError, RunError, TransportError
from fedsecure.identity.provision import Identity
from fedsecure.identity.standing import Standing
from fedsecure.transport.base import CHUNK_BYTES
from fedsecure.transport.status import to_details
from fedsecure.transport.tls import KEEPALIVE, LIMITS, grpc, server_credentials
from fedsecure.wire import federation_pb2 as pb
from fedsecure.wire import federation_pb2_grpc as rpc

POLL_SECONDS = 10.0
TICK_SECONDS = 0.25
# A site needs three calls at a time: the long poll, the beat, and one that carries something.
MAX_CALLS = 16
PART_SECONDS = 30.0
_Context = grpc.aio.ServicerContext[Any, Any]
log = logging.getLogger("fedsecure.aggregator")


class Service(rpc.FederationServicer):
    """gRPC face of one coordinator, or of a house of several."""

    def __init__(self, coordinator: Coordinator | House, identity: Identity, standing: Standing | None = None) -> None:
        self._core = coordinator
        self._identity = identity
        self._standing = standing or Standing(identity)
        self._changed = asyncio.Event()
        self._calls: Counter[str] = Counter()
        self._uploading: set[str] = set()

    async def Greet(self, request: pb.GreetRequest, context: _Context) -> pb.GreetReply:
        try:
            with self._call(context) as site:
                core = self._core.chosen(site, request.federation)
                return pb.GreetReply(
                    protocol=PROTOCOL,
                    run=core.run,
                    settings_json=core.settings.canonical(),
                    unix_ms=time.time_ns() // 1_000_000,
                    waiting=core.reason(time.monotonic()),
                    roster_hash=self._identity.roster.hash,
                )
        except Exception as error:
            await _refuse(context, error)

    async def Join(self, request: pb.JoinRequest, context: _Context) -> pb.JoinReply:
        try:
            with self._call(context) as site:
                reply = self._core.join(site, request, time.monotonic())
                self._progress()
                return reply
        except Exception as error:
            await _refuse(context, error)

    async def Next(self, request: pb.NextRequest, context: _Context) -> pb.Directive:
        try:
            with self._call(context) as site:
                give_up = time.monotonic() + POLL_SECONDS
                while True:
                    now = time.monotonic()
                    found = self._core.poll(site, request.session, request.after, now)
                    if found is not None:
                        return found
                    if now >= give_up:
                        return pb.Directive(wait=pb.Wait(reason=self._core.reason(now)))
                    await self._sleep(site, request.session, give_up - now)
        except Exception as error:
            await _refuse(context, error)

    async def Beat(self, request: pb.BeatRequest, context: _Context) -> pb.Ack:
        try:
            with self._call(context) as site:
                give_up = time.monotonic() + (0.0 if request.leaving else POLL_SECONDS)
                self._core.beat(site, request.session, time.monotonic(), request.leaving)
                self._progress()
                while (now := time.monotonic()) < give_up:
                    self._core.beat(site, request.session, now)
                    await self._sleep(site, request.session, min(1.0, give_up - now))
                return pb.Ack()
        except Exception as error:
            await _refuse(context, error)

    async def Send(self, request: pb.PhaseMessage, context: _Context) -> pb.Ack:
        try:
            with self._call(context) as site:
                self._core.send(site, request, time.monotonic())
                self._progress()
                return pb.Ack()
        except Exception as error:
            await _refuse(context, error)

    async def Upload(self, parts: AsyncIterator[pb.UploadPart], context: _Context) -> pb.Ack:
        try:
            with self._call(context) as site, self._one_upload(site):
                stream = aiter(parts)
                header = (await _part(stream) or pb.UploadPart()).header
                whole = self._core.expect_upload(site, header, time.monotonic())
                if whole is not None:
                    await _fill(whole, stream, check=lambda: self._caller(context))
                    self._core.upload(site, header, whole, time.monotonic())
                    self._progress()
                return pb.Ack()
        except Exception as error:
            await _refuse(context, error)

    async def Fetch(self, request: pb.FetchRequest, context: _Context) -> AsyncIterator[pb.Chunk]:
        try:
            with self._call(context) as site:
                blob = self._core.fetch(site, request.session, request.digest, time.monotonic())
                for offset in range(0, len(blob), CHUNK_BYTES):
                    self._caller(context)
                    yield pb.Chunk(offset=offset, data=blob[offset : offset + CHUNK_BYTES])
        except Exception as error:
            await _refuse(context, error)

    async def run(self) -> None:
        """Tick until the run is over and the sites have heard so."""
        written = 0.0
        while not self._core.finished(time.monotonic()):
            self._progress()
            if time.monotonic() - written > 0.5:
                self._write_status()
                written = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)
        self._write_status()

    def _write_status(self) -> None:
        try:
            self._core.write_status(time.monotonic())
        except FedsecureError as error:
            # The status is for people; the run's own files end the run where they cannot be written.
            log.warning("%s", error)

    @contextmanager
    def _call(self, context: _Context) -> Iterator[str]:
        """The caller's site, one of at most ``MAX_CALLS`` calls at a time."""
        site = self._caller(context)
        if self._calls[site] >= MAX_CALLS:
            raise TransportError(
                "FS-1510",
                f"more than {MAX_CALLS} calls of {site!r} at a time",
                expected="one process that polls, beats and sends",
                cure="stop what else uses this site's identity",
            )
        self._calls[site] += 1
        try:
            yield site
            # Nothing is answered to who was taken out of the roster meanwhile.
            self._caller(context)
        finally:
            self._calls[site] -= 1

    @contextmanager
    def _one_upload(self, site: str) -> Iterator[None]:
        if site in self._uploading:
            raise TransportError(
                "FS-1511",
                f"a second upload of {site!r} beside the first",
                expected="one upload at a time",
                cure="none needed; the site tries again",
            )
        self._uploading.add(site)
        try:
            yield
        finally:
            self._uploading.discard(site)

    def _caller(self, context: _Context) -> str:
        """The roster's site whose certificate this connection presented."""
        pems = list(context.auth_context().get("x509_pem_cert", ()))
        if pems:
            certificate = x509.load_pem_x509_certificate(pems[0])
            return self._standing.site_of(hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest())
        return self._standing.site_of(b"")

    def _progress(self) -> None:
        """Do what is due and wake everybody who waits; each wait has an event of its own generation."""
        self._core.tick(time.monotonic())
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _sleep(self, site: str, token: bytes, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout=seconds)
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            # The caller hung up: its process or its line is gone.
            self._core.gone(site, token, time.monotonic())
            raise


async def _part(stream: AsyncIterator[pb.UploadPart]) -> pb.UploadPart | None:
    """The next part of an upload, or None at its end; half-open uploads end here."""
    try:
        return await asyncio.wait_for(anext(stream, None), PART_SECONDS)
    except TimeoutError:
        raise TransportError(
            "FS-1512",
            f"no further part of an upload for {PART_SECONDS:g} s",
            expected="a stream that goes on",
            cure="check the line; the site sends the upload again",
        ) from None


async def _fill(whole: memoryview, stream: AsyncIterator[pb.UploadPart], *, check: Callable[[], object] = bool) -> None:
    """Chunks in order, exactly as many bytes as the buffer holds; ``check`` may refuse the caller at each."""
    filled = 0
    while (part := await _part(stream)) is not None:
        check()
        data = part.chunk.data
        if part.chunk.offset != filled or filled + len(data) > len(whole):
            raise TransportError(
                "FS-1506",
                f"a chunk at offset {part.chunk.offset} of {len(data)} bytes",
                expected=f"offset {filled} and {len(whole)} bytes in all",
                cure="send the upload again",
            )
        whole[filled : filled + len(data)] = data
        filled += len(data)
    if filled != len(whole):
        raise TransportError(
            "FS-1507",
            f"an upload that ended after {filled} bytes",
            expected=f"{len(whole)} bytes",
            cure="send the upload again",
        )


async def _refuse(context: _Context, error: Exception) -> NoReturn:
    """Answer with the typed error. What is none stays in this log, with its trace, and leaves as a code only."""
    if not isinstance(error, FedsecureError):
        log.error("a call failed", exc_info=error)
        error = RunError(
            "FS-1718",
            "the aggregator failed to handle this call",
            expected="an answer",
            cure="see the aggregator's log for this time",
        )
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, to_details(error))
    raise AssertionError("abort raises")


async def start(
    coordinator: Coordinator | House, identity: Identity, listen: str, *, standing: Standing | None = None
) -> tuple[grpc.aio.Server, Service, int]:
    """Bind and start; returns the server, the service and the port.

    Raises:
        EnvironmentProblem: FS-1801, the address is in use or not this machine's.
    """
    server = grpc.aio.server(options=[*LIMITS, *KEEPALIVE, ("grpc.so_reuseport", 0)])
    service = Service(coordinator, identity, standing)
    rpc.add_FederationServicer_to_server(service, server)
    try:
        port = server.add_secure_port(listen, server_credentials(identity))
    except RuntimeError:
        port = 0
    if port == 0:
        raise EnvironmentProblem(
            "FS-1801",
            f"cannot listen on {listen}",
            expected="a free port of an address of this machine",
            cure="stop what uses it (`ss -ltnp`), or change `listen`",
        )
    await server.start()
    return server, service, port
