"""A machine's line to the enrolment desk: it trusts the CA that its invitation pins, and shows no certificate.

A call is tried again while the line is down or the desk busy; every wait is bounded.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from fedsecure.errors import FedsecureError, IdentityError
from fedsecure.identity.answers import MAX_ANSWER
from fedsecure.transport.probe import Address
from fedsecure.transport.status import from_details
from fedsecure.transport.tls import grpc, stranger_credentials
from fedsecure.wire import enrolment_pb2 as pb
from fedsecure.wire import enrolment_pb2_grpc as rpc

_Reply = TypeVar("_Reply")
_BUSY = "FS-1475"
# What gRPC says where the other side's certificate is wrong.
_FOREIGN = ("handshake failed", "verification check failed", "certificate")
_AGAIN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_ANSWER + (1 << 20)),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
]


class DeskLine:
    """A connection to the desk. Use as a context manager.

    Args:
        address: ``host:port``.
        ca: PEM of the federation's CA.
        seconds: how long a desk that does not answer is tried again.

    Raises:
        ConfigError: FS-1019, no address.
        IdentityError: from the calls: FS-1477 no answer, FS-1478 another certificate, and what the desk refuses.
    """

    def __init__(self, address: str, ca: bytes, *, seconds: float) -> None:
        self._address, self._seconds = str(Address.parse(address)), seconds
        self._channel = grpc.secure_channel(self._address, stranger_credentials(ca), options=_OPTIONS)
        self._stub = rpc.EnrolmentStub(self._channel)

    def __enter__(self) -> DeskLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def ask(self, request: bytes) -> bytes:
        """The coordinator's answer to a request, or nothing yet."""
        message = pb.EnrolmentRequest(request=request)
        return self._call(lambda: self._stub.Ask(message, timeout=self._patience(20.0))).answer

    def roster(self, site: str, made: int, signature: bytes) -> bytes:
        """The newest roster's file."""
        message = pb.RosterRequest(site=site, made=made, signature=signature)
        return self._call(lambda: self._stub.Refresh(message, timeout=self._patience(20.0))).roster

    def _patience(self, most: float) -> float:
        return min(most, max(1.0, self._seconds))

    def _call(self, attempt: Callable[[], _Reply]) -> _Reply:
        give_up, pause = time.monotonic() + self._seconds, 0.2
        while True:
            try:
                return attempt()
            except grpc.RpcError as error:
                known = from_details(error.details())
                if known is not None and known.code != _BUSY:
                    raise known from None
                text = (error.details() or "").lower()
                if known is None and any(words in text for words in _FOREIGN):
                    raise self._foreign() from None
                if (known is None and error.code() not in _AGAIN) or time.monotonic() + pause > give_up:
                    raise known or self._silent(error) from None
            time.sleep(pause * (0.5 + secrets.randbelow(1000) / 1000))
            pause = min(2 * pause, 5.0)

    def _foreign(self) -> FedsecureError:
        return IdentityError(
            "FS-1478",
            f"{self._address} shows a certificate that is not of the CA in the invitation, or not for this name",
            expected="the aggregator's certificate, of the pinned CA and for this host",
            cure="check the address; if something between opens TLS, have it leave this port alone, or carry files",
        )

    def _silent(self, error: grpc.RpcError) -> FedsecureError:
        return IdentityError(
            "FS-1477",
            f"no answer from the enrolment desk at {self._address} for {self._seconds:g} s ({error.code().name})",
            expected="`fedsecure serve` with `enrolment` set, and a network that lets this port through",
            cure="repeat the command later, or carry files: --out at the site, --welcome with the answer",
        )
