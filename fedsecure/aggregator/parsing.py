"""Messages that are no protobuf of the service: a typed answer to whoever sent them, and no trace in the log for each.

gRPC parses a request before any code of the service runs, and would answer with an internal error and a stack trace.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from google.protobuf.message import DecodeError

from fedsecure.errors import TransportError
from fedsecure.transport.tls import grpc


class Unreadable:
    """Stands where a message would."""


class Parsing(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic when it runs
    """Lets every method of the service see what cannot be read.

    Args:
        refuse: answers a call whose only message is unreadable. In a stream the method sees :class:`Unreadable`.
    """

    def __init__(self, refuse: Callable[[Any], Awaitable[NoReturn]]) -> None:
        self._refuse = refuse
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no method of this service
            return None
        name = handler_call_details.method
        if name not in self._handlers:
            self._handlers[name] = self._lenient(handler)
        return self._handlers[name]

    def _lenient(self, handler: Any) -> Any:
        parse = handler.request_deserializer

        def read(raw: bytes) -> Any:
            try:
                return parse(raw)
            except DecodeError:
                return Unreadable()

        changes: dict[str, Any] = {"request_deserializer": read}
        if handler.unary_unary is not None:
            answer = handler.unary_unary

            async def one(request: Any, context: Any) -> Any:
                if isinstance(request, Unreadable):
                    await self._refuse(context)
                return await answer(request, context)

            changes["unary_unary"] = one
        if handler.unary_stream is not None:
            stream = handler.unary_stream

            async def many(request: Any, context: Any) -> Any:
                if isinstance(request, Unreadable):
                    await self._refuse(context)
                async for reply in stream(request, context):
                    yield reply

            changes["unary_stream"] = many
        return handler._replace(**changes)


def unreadable() -> TransportError:
    """FS-1535, to be raised."""
    return TransportError(
        "FS-1535",
        "a message that cannot be read",
        expected="a protobuf message of this service",
        cure="install the same fedsecure release on both sides",
    )


__all__ = ["Parsing", "Unreadable", "unreadable"]
