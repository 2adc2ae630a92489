"""The enrolment desk beside a running aggregator: takes requests, hands out answers and rosters, decides nothing.

It listens on a port of its own, since whoever enrols has no certificate yet: TLS 1.3 with the server's certificate
alone. Requests lie in the drop box until the coordinator, perhaps on another machine, has answered. Without a valid
invitation or a member's key a caller learns nothing about who is a member (docs/enrolment.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NoReturn

from fedsecure.config import FederationConfig
from fedsecure.errors import EnvironmentProblem, FedsecureError, IdentityError, RunError
from fedsecure.files import make_folder
from fedsecure.identity import answers, keys
from fedsecure.identity.box import MAX_PENDING, Box
from fedsecure.identity.certificates import AGGREGATOR
from fedsecure.identity.enrolling import roster_request
from fedsecure.identity.invitations import expired
from fedsecure.identity.provision import Identity
from fedsecure.identity.requests import MAX_REQUEST, Request, altered, unauthenticated
from fedsecure.identity.standing import Standing
from fedsecure.transport.status import to_details
from fedsecure.transport.tls import grpc, one_sided_credentials
from fedsecure.wire import enrolment_pb2 as pb
from fedsecure.wire import enrolment_pb2_grpc as rpc

# A site that waits asks every few seconds; bursts beyond these are refused before anything is parsed.
PEER_BURST, PEER_RATE = 20.0, 2.0
ALL_BURST, ALL_RATE = 200.0, 50.0
MAX_PEERS = 4096
MAX_CALLS = 64
CLOCK_SECONDS = 300
LOOK_SECONDS = 2.0
SAY_SECONDS = 600.0
_OPTIONS = [
    ("grpc.max_receive_message_length", 4 * MAX_REQUEST),
    ("grpc.max_send_message_length", answers.MAX_ANSWER + (1 << 20)),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.so_reuseport", 0),
]
_Context = grpc.aio.ServicerContext[Any, Any]
log = logging.getLogger("fedsecure.aggregator.enrolment")


class Limiter:
    """Token buckets: one for each caller's address and one for all, in calls a second."""

    def __init__(self) -> None:
        self._all = (ALL_BURST, 0.0)
        self._peers: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, peer: str, now: float) -> None:
        """One call of ``peer``; IdentityError FS-1475 where it is one too many."""
        self._peers[peer] = _taken(self._peers.get(peer, (PEER_BURST, now)), now, burst=PEER_BURST, rate=PEER_RATE)
        self._peers.move_to_end(peer)
        self._all = _taken(self._all, now, burst=ALL_BURST, rate=ALL_RATE)
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)


class Desk:
    """What the service does, without its sockets.

    Args:
        standing: who is a member; newer rosters from the drop box are taken up in it.
        box: the drop box.
        now: Unix seconds.
    """

    def __init__(
        self, identity: Identity, standing: Standing, box: Box, *, now: Callable[[], float] = time.time
    ) -> None:
        self._coordinator_key = identity.coordinator_key
        self._standing, self._box, self._now = standing, box, now
        self._mark: tuple[int, int] | None = None

    def ask(self, raw: bytes) -> bytes:
        """The answer to a request, or nothing yet.

        Raises:
            IdentityError: FS-1462 nobody who may ask, FS-1463 a late invitation, FS-1464 another request used the
                invitation, FS-1465 altered, FS-1475 too many requests are waiting.
        """
        request = Request.opened(raw)
        request.check(self._coordinator_key)
        self.look()
        answer = self._box.answer(request.digest)
        if answer is not None:
            self._box.drop(request)
            return self._newest(answer, request)
        if request.kind == "renew":
            self._check_member(request.site, request.identity_key)
        elif request.invitation is None or request.invitation.expires <= self._now():
            raise expired(request.site, request.invitation.expires if request.invitation else 0)
        self._file(request)
        return b""

    def roster(self, site: str, made: int, signature: bytes) -> bytes:
        """The newest roster's file, for a member whose identity key signed the question; FS-1462 for others."""
        self.look()
        known = [e.identity_key for e in self._standing.roster.entries if e.site == site]
        if site == AGGREGATOR:
            known = [self._standing.roster.aggregator_key]
        if (
            not known
            or abs(self._now() - made) > CLOCK_SECONDS
            or not keys.verify(known[0], *roster_request(site, made), signature)
        ):
            raise unauthenticated()
        return self._standing.sealed

    def look(self) -> None:
        """Take up the drop box's roster where it has changed."""
        file = self._box.folder / "roster.json"
        try:
            found = file.stat()
            mark = (found.st_mtime_ns, found.st_size)
            if mark == self._mark:
                return
            self._mark = mark
            changes = self._standing.adopt(keys.read(file))
        except OSError:
            return
        except FedsecureError as error:
            log.error("the roster in force stays: %s", error)
            return
        if changes:
            log.warning("roster version %d: %s", self._standing.roster.version, "; ".join(changes))

    def _newest(self, answer: bytes, request: Request) -> bytes:
        """The answer with the roster in force, which is at least as new as the welcome's own."""
        try:
            welcome = answers.opened(answer, request=request.digest, coordinator_key=self._coordinator_key)
        except IdentityError as error:
            if error.code == "FS-1467":
                return answer
            log.error("an answer in the drop box is not the coordinator's: %s", error)
            return b""
        if self._standing.roster.version < welcome.version:
            self._standing.adopt(welcome.roster)
        return replace(welcome, roster=self._standing.sealed).sealed()

    def _check_member(self, site: str, identity_key: bytes) -> None:
        roster = self._standing.roster
        members = {entry.site: entry.identity_key for entry in roster.entries} | {AGGREGATOR: roster.aggregator_key}
        if members.get(site) != identity_key:
            raise unauthenticated()

    def _file(self, request: Request) -> None:
        waiting = self._box.pending()
        if any(one.digest == request.digest for one in waiting):
            return
        if request.invitation is not None:
            verifier = request.invitation.verifier
            if any(one.invitation and one.invitation.verifier == verifier for one in waiting):
                raise IdentityError(
                    "FS-1464",
                    f"another request with the invitation of {request.site!r} is waiting",
                    expected="one request for each invitation",
                    cure="ask the coordinator for a new one; if the other request is not yours, say so",
                )
        else:
            earlier = [one for one in waiting if one.kind == "renew" and one.site == request.site]
            if any(one.made > request.made for one in earlier):
                raise altered("a newer renewal of this member is waiting")
            for one in earlier:
                self._box.drop(one)
                waiting.remove(one)
        if len(waiting) >= MAX_PENDING:
            raise IdentityError(
                "FS-1475",
                f"{len(waiting)} requests wait for the coordinator already",
                expected=f"fewer than {MAX_PENDING}",
                cure="try again later, or send the request as a file (`--out`)",
            )
        self._box.put(request)
        what = "a renewal" if request.kind == "renew" else "an enrolment"
        log.warning("%s of %s waits for the coordinator", what, request.site)


class Service(rpc.EnrolmentServicer):
    """gRPC face of one desk."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._limiter = Limiter()

    async def Ask(self, request: pb.EnrolmentRequest, context: _Context) -> pb.EnrolmentReply:
        try:
            self._limiter.take(_host(context), time.monotonic())
            return pb.EnrolmentReply(answer=self._desk.ask(request.request))
        except Exception as error:
            await _refuse(context, error)

    async def Refresh(self, request: pb.RosterRequest, context: _Context) -> pb.RosterReply:
        try:
            self._limiter.take(_host(context), time.monotonic())
            return pb.RosterReply(roster=self._desk.roster(request.site, request.made, request.signature))
        except Exception as error:
            await _refuse(context, error)


class Open:
    """The listening desk; :func:`open_desk` makes it."""

    def __init__(self, server: grpc.aio.Server, desk: Desk, port: int) -> None:
        self.desk, self.port = desk, port
        self._server = server
        self._looking = asyncio.create_task(self._look())

    async def close(self) -> None:
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)
        await self._server.stop(grace=0.5)

    async def _look(self) -> None:
        while True:
            self.desk.look()
            await asyncio.sleep(LOOK_SECONDS)


async def open_desk(config: FederationConfig, identity: Identity, standing: Standing) -> Open | None:
    """Listen on ``config.enrolment``, if it says so.

    Raises:
        EnvironmentProblem: FS-1801, the address is in use or not this machine's.
    """
    if not config.enrolment:
        return None
    desk = Desk(identity, standing, Box(make_folder(config.state / "enrolment")))
    opened = await listen(desk, identity, config.enrolment)
    log.warning("the enrolment desk listens on %s:%d", config.enrolment.rpartition(":")[0], opened.port)
    return opened


async def listen(desk: Desk, identity: Identity, address: str) -> Open:
    """As :func:`open_desk`, for a desk that is there."""
    server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
    rpc.add_EnrolmentServicer_to_server(Service(desk), server)
    try:
        port = server.add_secure_port(address, one_sided_credentials(identity))
    except RuntimeError:
        port = 0
    if port == 0:
        raise EnvironmentProblem(
            "FS-1801",
            f"the enrolment desk cannot listen on {address}",
            expected="a free port of an address of this machine",
            cure="stop what uses it (`ss -ltnp`), or change `enrolment`",
        )
    await server.start()
    return Open(server, desk, port)


@asynccontextmanager
async def members(config: FederationConfig, identity: Identity, sites: Collection[str]) -> AsyncIterator[Standing]:
    """Who may call, with the desk open where the settings have one; entered once all ``sites`` are in the roster.

    Without a desk it is entered at once. Raises as :func:`open_desk`, and FS-1473 for a roster that was set back.
    """
    standing = Standing(identity, config.identity / "roster.json", floor=config.state / "roster-version")
    desk = await open_desk(config, identity, standing)
    try:
        if desk:
            await _all_there(standing, sites)
        yield standing
    finally:
        if desk:
            await desk.close()


async def _all_there(standing: Standing, sites: Collection[str]) -> None:
    """People approve, so there is no deadline but the operator's; who is missing is said now and every ten minutes."""
    said = float("-inf")
    while missing := sorted(set(sites) - {entry.site for entry in standing.roster.entries}):
        if time.monotonic() - said >= SAY_SECONDS:
            log.warning("waiting for the enrolment of %d of %d sites: %s", len(missing), len(sites), ", ".join(missing))
            said = time.monotonic()
        await asyncio.sleep(LOOK_SECONDS / 4)


def _taken(bucket: tuple[float, float], now: float, *, burst: float, rate: float) -> tuple[float, float]:
    level, since = bucket
    level = min(burst, level + rate * max(0.0, now - since))
    if level < 1.0:
        raise IdentityError(
            "FS-1475",
            "too many calls of the enrolment desk",
            expected=f"at most {rate:g} a second",
            cure="none needed; it is tried again",
        )
    return level - 1.0, now


def _host(context: _Context) -> str:
    return str(context.peer()).rpartition(":")[0]


async def _refuse(context: _Context, error: Exception) -> NoReturn:
    """Answer with the typed error; what is none stays in this log, and leaves as a code only."""
    if not isinstance(error, FedsecureError) or isinstance(error, EnvironmentProblem):
        log.error("a call of the desk failed", exc_info=error)
        error = RunError(
            "FS-1718",
            "the enrolment desk failed to handle this call",
            expected="an answer",
            cure="see the aggregator's log for this time",
        )
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, to_details(error))
    raise AssertionError("abort raises")
