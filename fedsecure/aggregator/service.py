"""The coordinator behind gRPC: mutual TLS, the caller's identity from its certificate, bounded sizes and waits.

One event loop; every call into the coordinator happens on it, so calls never overlap. Nothing here computes.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedsecure.aggregator.answers import Answers
from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.aggregator.health import add_to
from fedsecure.aggregator.house import House
from fedsecure.aggregator.limits import STRANGERS, Limits, allow_connections
from fedsecure.aggregator.parsing import Parsing, unreadable
from fedsecure.aggregator.refusals import Refusals
from fedsecure.aggregator.uploads import Partial, Uploads, next_part
from fedsecure.errors import EnvironmentProblem, FedsecureError, RunError, TransportError
from fedsecure.identity.provision import Identity
from fedsecure.identity.standing import Standing
from fedsecure.transport.base import CHUNK_BYTES
from fedsecure.transport.status import RETRY_AFTER, to_details
from fedsecure.transport.tls import KEEPALIVE, LIMITS, SERVER_LIMITS, grpc, server_credentials
from fedsecure.transport.versions import agree, asked_for
from fedsecure.wire import federation_pb2 as pb
from fedsecure.wire import federation_pb2_grpc as rpc

POLL_SECONDS = 10.0
TICK_SECONDS = 0.25
# After a failure of this machine's disk or database a call may come again.
_MENDED_SECONDS = 2.0
# How long one refusal too many waits of who is no member: nothing asks him to come again.
_STRANGER_SECONDS = 1.0
_Context = grpc.aio.ServicerContext[Any, Any]
log = logging.getLogger("fedsecure.aggregator")


class Service(rpc.FederationServicer):
    """gRPC face of one coordinator, or of a house of several."""

    def __init__(self, coordinator: Coordinator | House, identity: Identity, standing: Standing | None = None) -> None:
        self._core = coordinator
        self._standing = standing or Standing(identity)
        self._limits = Limits()
        self._answers = Answers()
        self._uploads = Uploads()
        self._refusals = Refusals()

    async def Greet(self, request: pb.GreetRequest, context: _Context) -> pb.GreetReply:
        async with self._call(context) as site:
            core = self._core.chosen(site, request.federation)
            return pb.GreetReply(
                protocol=agree(asked_for(request)),
                run=core.run,
                settings_json=core.settings.canonical(),
                unix_ms=time.time_ns() // 1_000_000,
                waiting=core.reason(time.monotonic()),
                roster_hash=core.roster.hash,
            )

    async def Join(self, request: pb.JoinRequest, context: _Context) -> pb.JoinReply:
        async with self._call(context) as site:

            def join() -> pb.JoinReply:
                reply = self._core.join(site, request, time.monotonic(), expires=_shown(context)[1])
                reply.protocol = agree(asked_for(request))
                self._progress()
                return reply

            return self._answers.once(site, request, join)

    async def Next(self, request: pb.NextRequest, context: _Context) -> pb.Directive:
        async with self._call(context) as site:
            give_up = time.monotonic() + POLL_SECONDS
            while True:
                now, news = time.monotonic(), asyncio.Event()
                found = self._core.poll(site, request.session, request.after, now, news.set)
                if found is not None:
                    self._core.carried(request.session, down=found.ByteSize())
                    return found
                if now >= give_up:
                    return self._core.wait(request.session, now)
                await self._sleep(site, request.session, give_up - now, news)

    async def Beat(self, request: pb.BeatRequest, context: _Context) -> pb.Ack:
        async with self._call(context) as site:

            def beat() -> pb.Ack:
                self._core.beat(site, request.session, time.monotonic(), request.leaving)
                self._progress()
                return pb.Ack()

            reply = self._answers.once(site, request, beat)
            give_up = time.monotonic() + (0.0 if request.leaving else POLL_SECONDS)
            while (now := time.monotonic()) < give_up:
                self._core.beat(site, request.session, now)
                await self._sleep(site, request.session, min(1.0, give_up - now), asyncio.Event())
            return reply

    async def Send(self, request: pb.PhaseMessage, context: _Context) -> pb.Ack:
        async with self._call(context) as site:

            def send() -> pb.Ack:
                self._core.carried(request.session, up=request.ByteSize())
                self._core.send(site, request, time.monotonic())
                self._progress()
                return pb.Ack()

            return self._answers.once(site, request, send)

    async def Upload(self, parts: AsyncIterator[pb.UploadPart], context: _Context) -> pb.Ack:
        async with self._call(context) as site:
            stream = aiter(parts)
            header = (await next_part(stream) or pb.UploadPart()).header
            partial = self._upload(site, header)
            if partial is not None:
                await self._uploads.fill(site, partial, stream, still_on=lambda: self._still_on(site, header, context))
                # Whole: counted, or refused for good; either way nothing of it is needed any more.
                self._uploads.drop(site, partial)
                self._core.carried(header.session, up=header.ByteSize() + len(partial.whole))
                self._core.upload(site, header, partial.whole, time.monotonic())
                self._answers.keep(site, header, pb.Ack())
                self._progress()
            return pb.Ack()

    async def UploadStatus(self, request: pb.UploadHeader, context: _Context) -> pb.UploadProgress:
        async with self._call(context) as site:
            partial = self._upload(site, request, take_over=True)
            if partial is None:
                return pb.UploadProgress(offset=request.size, complete=True)
            return pb.UploadProgress(offset=partial.filled)

    def _upload(self, site: str, header: pb.UploadHeader, *, take_over: bool = False) -> Partial | None:
        """What has come of an upload, or room for all of it; None where it is counted already.

        A stream that seems to be coming in still is in the way of another one, unless the site asks for its progress
        (``take_over``): then it has broken at the site's end, whatever this end knows of it.
        """
        now = time.monotonic()
        if self._answers.find(site, header, pb.Ack) is not None:
            return None
        self._uploads.sweep(self._core.accepts_upload)
        partial = self._uploads.find(site, header)
        if partial is not None:
            self._core.beat(site, header.session, now)
        if partial is not None and take_over:
            partial.stream = None
        self._uploads.require_one(site, bytes(header.ctx))
        if partial is None:
            whole = self._core.expect_upload(site, header, now)
            partial = None if whole is None else self._uploads.begin(site, header, whole)
        return partial

    def _still_on(self, site: str, header: pb.UploadHeader, context: _Context) -> None:
        """The caller is a member still (IdentityError FS-1460), and its session lives (RunError FS-1705)."""
        self._caller(context)
        self._core.beat(site, header.session, time.monotonic())

    async def Fetch(self, request: pb.FetchRequest, context: _Context) -> AsyncIterator[pb.Chunk]:
        async with self._call(context) as site:
            with self._limits.fetching(site):
                offset, size = request.offset, self._fetched(site, request)[1]
                if offset > size:
                    raise TransportError(
                        "FS-1536",
                        f"a download from offset {offset} on, of {size} bytes",
                        expected="an offset within the tensor",
                        cure="install the same fedsecure release on both sides",
                    )
                # Looked up again for each chunk: a caller that does not read keeps no tensor in memory.
                while offset < size:
                    self._caller(context)
                    data = self._fetched(site, request)[0][offset : offset + CHUNK_BYTES]
                    self._core.carried(request.session, down=len(data))
                    yield pb.Chunk(offset=offset, data=data)
                    offset += len(data)

    def _fetched(self, site: str, request: pb.FetchRequest) -> tuple[bytes, int]:
        blob = self._core.fetch(site, request.session, request.digest, time.monotonic())
        return blob, len(blob)

    async def unreadable(self, context: _Context) -> NoReturn:
        """The answer to a message that is none."""
        async with self._call(context):
            raise unreadable()
        raise AssertionError("raises what it is given")

    async def run(self) -> None:
        """Tick until the run is over and the sites have heard so."""
        written = 0.0
        while not self._core.finished(time.monotonic()):
            self._progress()
            self._uploads.sweep(self._core.accepts_upload)
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

    def _call(self, context: _Context) -> _Call:
        """One call, from the caller's certificate to a typed answer."""
        return _Call(self, context)

    def _caller(self, context: _Context) -> str:
        """The roster's site whose certificate this connection presented."""
        return self._standing.site_of(_shown(context)[0])

    def _progress(self) -> None:
        """Do what is due; whoever is told something is woken, and nobody else."""
        self._core.tick(time.monotonic())

    async def _sleep(self, site: str, token: bytes, seconds: float, news: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(seconds):
                await news.wait()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            # The caller hung up: its process or its line is gone.
            self._core.gone(site, token, time.monotonic())
            raise


def _shown(context: _Context) -> tuple[bytes, float]:
    """Fingerprint of the certificate that a connection presented, and the Unix time at which it ends."""
    pems = list(context.auth_context().get("x509_pem_cert", ()))
    return _read(bytes(pems[0])) if pems else (b"", 0.0)


@functools.lru_cache(maxsize=4096)
def _read(pem: bytes) -> tuple[bytes, float]:
    # Asked for twice with every call and chunk, of the same few certificates.
    certificate = x509.load_pem_x509_certificate(pem)
    fingerprint = hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()
    return fingerprint, certificate.not_valid_after_utc.timestamp()


class _Call:
    """One call: whose it is and whether it may come now, and at its end the typed error, if that is its answer."""

    def __init__(self, service: Service, context: _Context) -> None:
        self._service = service
        self._context = context
        self._site = STRANGERS
        self._entered = False
        self._held_back = False

    async def __aenter__(self) -> str:
        limits, now = self._service._limits, time.monotonic()
        try:
            self._site = self._service._caller(self._context)
            limits.enter(self._site, now)
        except Exception as error:
            self._held_back = self._site == STRANGERS and limits.turn_away(now)
            await self._decline(error)
        self._entered = True
        return self._site

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered:
            self._service._limits.leave(self._site)
        if error is None:
            try:
                # Nothing is answered to who was taken out of the roster meanwhile.
                self._service._caller(self._context)
            except FedsecureError as late:
                error = late
        if isinstance(error, Exception):
            await self._decline(error)

    async def _decline(self, error: Exception) -> NoReturn:
        """Answer with the typed error. What is none stays in this log, with its trace, and leaves as a code only.

        So does what is wrong with this machine: a site would take a full disk for its own, and leave. It tries again.
        """
        again = _MENDED_SECONDS if isinstance(error, EnvironmentProblem) else None
        if again is not None:
            log.error("a call failed: %s", error)
        elif not isinstance(error, FedsecureError):
            log.error("a call failed", exc_info=error)
        if again is not None or not isinstance(error, FedsecureError):
            error = RunError(
                "FS-1718",
                "the aggregator failed to handle this call",
                expected="an answer",
                cure="see the aggregator's log for this time",
            )
        service, code = self._service, grpc.StatusCode.FAILED_PRECONDITION
        if service._refusals.note(self._site, error, time.monotonic()):
            try:
                service._core.refused(self._site, error.code)
            except FedsecureError as worse:
                log.warning("a refusal is not in the audit log: %s", worse)
        if error.code in RETRY_AFTER:
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
        if error.code in RETRY_AFTER or self._held_back:
            # Whoever does not wait as he is asked to waits here, so that a flood is as slow as its answers.
            with service._limits.holding(self._site) as held:
                if held:
                    await asyncio.sleep(RETRY_AFTER.get(error.code, _STRANGER_SECONDS))
        await self._context.abort(code, to_details(error, again=again))
        raise AssertionError("abort raises")


async def start(
    coordinator: Coordinator | House, identity: Identity, listen: str, *, standing: Standing | None = None
) -> tuple[grpc.aio.Server, Service, int]:
    """Bind and start; returns the server, the service and the port.

    Raises:
        EnvironmentProblem: FS-1801, the address is in use or not this machine's.
    """
    allow_connections()
    service = Service(coordinator, identity, standing)
    server = grpc.aio.server(options=[*LIMITS, *KEEPALIVE, *SERVER_LIMITS], interceptors=[Parsing(service.unreadable)])
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
    health = add_to(server, call=service._call, admit=service._caller)
    await server.start()
    health.set(True)
    return server, service, port
