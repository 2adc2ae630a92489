"""The standard gRPC health service (``grpc.health.v1``) on the aggregator's own port.

The port asks every caller for a certificate of the federation's authority (TLS 1.3, both sides), and ``call`` for
one of the roster, within the limits of each site, so only members can ask. Load balancers without a certificate use
``/readyz`` instead.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any

from fedsecure.errors import FedsecureError
from fedsecure.transport.status import to_details
from fedsecure.transport.tls import grpc

from grpc_health.v1 import health_pb2, health_pb2_grpc  # isort: skip -- after fedsecure.transport.tls

SERVICE = "fedsecure.v1.Federation"
MAX_WATCHES = 2
# How soon a watch ends whose caller has left the roster.
LOOK_SECONDS = 1.0
_Reply = health_pb2.HealthCheckResponse
_Context = grpc.aio.ServicerContext[Any, Any]
# A call that counts, as its caller's name; ends in a refusal where the roster or the limits do not allow it.
Call = Callable[[_Context], AbstractAsyncContextManager[str]]
# From a caller's context to its name; raises FedsecureError for whom the roster does not hold.
Admit = Callable[[_Context], str]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its base has no types
    """Answers ``Check`` and ``Watch`` for the server as a whole (``""``) and for :data:`SERVICE`.

    All calls are made on the server's loop.
    """

    def __init__(self, call: Call, admit: Admit) -> None:
        self._call, self._admit = call, admit
        self._serving = False
        self._changed = asyncio.Event()
        self._watches: Counter[str] = Counter()

    def set(self, serving: bool) -> None:
        """Tell all who ask, and all who watch, whether the run is served."""
        self._serving = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: _Context) -> health_pb2.HealthCheckResponse:
        async with self._call(context):
            status = self._status()
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service but {SERVICE}")
        return _Reply(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> AsyncIterator[Any]:
        """The status now, and each one after; ends when the caller hangs up, leaves the roster, or the server stops."""
        async with self._call(context) as caller:
            full = self._watches[caller] >= MAX_WATCHES
        if full:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHES} watches at a time")
        known = request.service in ("", SERVICE)
        self._watches[caller] += 1
        try:
            while True:
                changed = self._changed
                yield _Reply(status=self._status() if known else _Reply.SERVICE_UNKNOWN)
                news = False
                while not news:
                    with suppress(TimeoutError):
                        news = await asyncio.wait_for(changed.wait(), LOOK_SECONDS)
                    await self._still_on(context)
        finally:
            self._watches[caller] -= 1

    def _status(self) -> Any:
        return _Reply.SERVING if self._serving else _Reply.NOT_SERVING

    async def _still_on(self, context: _Context) -> None:
        """The caller is a member still; else the call ends here."""
        try:
            self._admit(context)
        except FedsecureError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, to_details(error))


def add_to(server: grpc.aio.Server, *, call: Call | None = None, admit: Admit | None = None) -> Health:
    """Put the service on a server that has not been started; it says NOT_SERVING until told otherwise.

    Args:
        call: counts a call, names its caller, or refuses it; without it whoever the port lets in may ask.
        admit: names the caller of a watch under way, or raises; by default it goes on.
    """
    health = Health(call or (lambda context: nullcontext(str(context.peer()))), admit or (lambda context: ""))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return health


__all__ = ["SERVICE", "Health", "add_to"]
