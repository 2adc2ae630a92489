"""The world's network: every call is two packets, which the world delivers, loses, copies, holds back or reorders.

A call that is lost ends like a broken connection, and the site's side tries again for a while, as the gRPC transport
does. Long polls and beats wait at the aggregator, as in its service.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from faults.baton import Actor, Killed

from fedsecure.errors import FedsecureError, TransportError
from fedsecure.wire import federation_pb2 as pb

if TYPE_CHECKING:
    from faults.world import SimulatedWorld, SiteProcess

Kind = Literal["join", "next", "send", "upload", "fetch", "beat", "gone"]
# What a site's transport says again by itself.
BUSY = ("FS-1510", "FS-1511", "FS-1512", "FS-1718")


class Broken(Exception):
    """The connection of a call broke; whether the call was served is not known."""


@dataclass(slots=True)
class Call:
    """One call of one thread of a site's process.

    ``payload`` is the vector of an upload; ``buffer`` the aggregator's room for it, between header and body.
    """

    number: int
    kind: Kind
    process: SiteProcess
    actor: Actor
    request: Any
    payload: bytes = b""
    buffer: memoryview | None = None
    waits_until: float = 0.0
    over: bool = False

    @property
    def site(self) -> str:
        return self.process.name


@dataclass(slots=True)
class Packet:
    """A request, the body of an upload, or a reply, on its way from ``earliest`` on."""

    what: Literal["request", "body", "reply"]
    call: Call
    earliest: float
    reply: Any = None

    def __str__(self) -> str:
        return f"{self.what} {self.call.number} {self.call.kind} {self.call.site}"


@dataclass(slots=True)
class Network:
    """Packets on their way, in the order in which they were sent."""

    packets: list[Packet] = field(default_factory=list)

    def deliverable(self, now: float) -> list[Packet]:
        return [packet for packet in self.packets if packet.earliest <= now]

    def reply(self, call: Call, now: float, answer: Any) -> None:
        """Send what becomes of a call."""
        self.packets.append(Packet("reply", call, now, answer))

    def next_time(self, now: float) -> float | None:
        return min((packet.earliest for packet in self.packets if packet.earliest > now), default=None)


class SimulatedTransport:
    """A site's end: blocks its thread until the world lets a reply come."""

    def __init__(self, world: SimulatedWorld, process: SiteProcess, *, connect_seconds: float) -> None:
        self._world, self._process, self._patience = world, process, connect_seconds
        self.token = b""
        self.bytes_up = self.bytes_down = 0

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        self.token = request.session
        reply: pb.JoinReply = self._call("join", request)
        return reply

    def next(self, request: pb.NextRequest) -> pb.Directive:
        reply: pb.Directive = self._call("next", request)
        return reply

    def send(self, message: pb.PhaseMessage) -> None:
        self._call("send", message)

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        self._call("upload", header, bytes(payload))

    def fetch(self, request: pb.FetchRequest) -> bytes:
        reply: bytes = self._call("fetch", request)
        return reply

    def beat(self, request: pb.BeatRequest) -> None:
        self._call("beat", request)

    def close(self) -> None:
        if not self._process.dead:
            self._world.hung_up(self._process)

    def _call(self, kind: Kind, request: Any, payload: bytes = b"") -> Any:
        world = self._world
        if hasattr(request, "request"):
            # The same id in every repetition of this call, as the gRPC transport's; random there.
            named = type(request)()
            named.CopyFrom(request)
            named.request = hashlib.sha256(b"call %d" % world.next_call()).digest()[:16]
            request = named
        problem: FedsecureError | None
        give_up, pause = world.stage.now + self._patience, 0.1
        while True:
            if self._process.dead:
                raise Killed
            try:
                return world.call(self._process, kind, request, payload)
            except Broken:
                problem = None
            except FedsecureError as error:
                if error.code not in BUSY:
                    raise
                problem = error
            if world.stage.now + pause > give_up:
                raise problem or TransportError(
                    "FS-1501", "no answer in the simulated world", expected="an aggregator", cure="start it again"
                )
            world.stage.sleep(pause)
            pause = min(2 * pause, 5.0)
