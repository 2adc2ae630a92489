"""The site's gRPC channel: mutual TLS, bounded deadlines, retries with jitter, chunks of 1 MiB.

Only calls that are safe to repeat are retried; an upload is, since the aggregator counts a repeated one once.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from fedsecure.errors import FedsecureError, IdentityError, TransportError
from fedsecure.identity.provision import Identity
from fedsecure.transport.base import CHUNK_BYTES
from fedsecure.transport.status import from_details
from fedsecure.transport.tensors import MAX_TENSOR_BYTES
from fedsecure.transport.tls import KEEPALIVE, LIMITS, channel_credentials, grpc
from fedsecure.wire import federation_pb2 as pb
from fedsecure.wire import federation_pb2_grpc as rpc

_Reply = TypeVar("_Reply")
# gRPC by itself waits up to two minutes before it dials again.
_RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
]
# What an orderly close needs is milliseconds.
_CLOSE_SECONDS = 5.0
_BUSY = ("FS-1510", "FS-1511", "FS-1512")
# What gRPC says where the other side's TLS or certificate is wrong, which no repetition mends. A handshake that merely
# breaks off says "Handshake read failed": so do an aggregator that ends in that moment and a line that is cut.
_REFUSED = ("handshake failed", "verification check failed", "certificate")
_UNAVAILABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


class GrpcTransport:
    """One site's connection to the aggregator.

    Args:
        address: ``host:port``.
        identity: keys and certificates of the site.
        connect_seconds: how long an unreachable aggregator is tried again before giving up.
        call_seconds: deadline of one small call.
    """

    def __init__(self, address: str, identity: Identity, *, connect_seconds: float, call_seconds: float = 60.0) -> None:
        self._address = address
        self._patience = connect_seconds
        self._deadline = call_seconds
        self._up = 0
        self._down = 0
        self._count = threading.Lock()
        self._channel = grpc.secure_channel(
            address, channel_credentials(identity), options=[*LIMITS, *KEEPALIVE, *_RECONNECT]
        )
        self._stub = rpc.FederationStub(self._channel)

    @property
    def bytes_up(self) -> int:
        return self._up

    @property
    def bytes_down(self) -> int:
        return self._down

    def greet(self, request: pb.GreetRequest) -> pb.GreetReply:
        """What the aggregator says of itself; needs no session and changes nothing."""
        return self._call(lambda: self._stub.Greet(request, timeout=self._deadline), request.ByteSize())

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        return self._call(lambda: self._stub.Join(request, timeout=self._deadline), request.ByteSize())

    def next(self, request: pb.NextRequest) -> pb.Directive:
        return self._call(lambda: self._stub.Next(request, timeout=self._deadline), request.ByteSize())

    def send(self, message: pb.PhaseMessage) -> None:
        self._call(lambda: self._stub.Send(message, timeout=self._deadline), message.ByteSize())

    def beat(self, request: pb.BeatRequest) -> None:
        self._call(lambda: self._stub.Beat(request, timeout=self._deadline), request.ByteSize())

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        def parts() -> Iterator[pb.UploadPart]:
            yield pb.UploadPart(header=header)
            for offset in range(0, len(payload), CHUNK_BYTES):
                data = bytes(payload[offset : offset + CHUNK_BYTES])
                yield pb.UploadPart(chunk=pb.Chunk(offset=offset, data=data))

        # A slow hospital line: at least 100 kB/s are allowed for.
        deadline = self._deadline + len(payload) / 1e5
        self._call(lambda: self._stub.Upload(parts(), timeout=deadline), header.ByteSize() + len(payload))

    def fetch(self, request: pb.FetchRequest) -> bytes:
        def receive() -> bytes:
            whole = bytearray()
            for chunk in self._stub.Fetch(request, timeout=self._deadline + 600):
                if chunk.offset != len(whole) or len(whole) + len(chunk.data) > MAX_TENSOR_BYTES:
                    raise TransportError(
                        "FS-1505",
                        f"a chunk at offset {chunk.offset} of {len(chunk.data)} bytes",
                        expected=f"offset {len(whole)} and at most {MAX_TENSOR_BYTES} bytes in all",
                        cure="install the same fedsecure release on both sides",
                    )
                whole += chunk.data
            return bytes(whole)

        blob = self._call(receive, request.ByteSize())
        with self._count:
            self._down += len(blob)
        return blob

    def close(self) -> None:
        # A signal may have landed inside grpc, whose close then waits for ever: nobody's exit hangs on it.
        closing = threading.Thread(target=self._channel.close, name="close-channel", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def _call(self, attempt: Callable[[], _Reply], size: int) -> _Reply:
        give_up = time.monotonic() + self._patience
        pause = 0.1
        while True:
            try:
                reply = attempt()
            except grpc.RpcError as error:
                problem = self._translate(error)
                if problem is not None:
                    raise problem from None
                if time.monotonic() + pause > give_up:
                    raise self._unreachable(error) from None
                time.sleep(pause * (0.5 + secrets.randbelow(1000) / 1000))
                pause = min(2 * pause, 5.0)
                continue
            with self._count:
                self._up += size
                if hasattr(reply, "ByteSize"):
                    self._down += reply.ByteSize()
            return reply

    def _translate(self, error: grpc.RpcError) -> FedsecureError | None:
        """The typed error behind a status, or None where trying again may help."""
        known = from_details(error.details())
        if known is not None:
            return None if known.code in _BUSY else known
        if error.code() in _UNAVAILABLE:
            text = (error.details() or "").lower()
            if any(words in text for words in _REFUSED):
                return IdentityError(
                    "FS-1453",
                    f"the TLS handshake with {self._address} failed",
                    expected="an aggregator certificate of the federation's CA, valid now and for this host name",
                    cure="check the address and the clock; if a firewall opens TLS, have it leave this port alone",
                )
            return None
        return TransportError(
            "FS-1502",
            f"the aggregator answered {error.code().name}",
            expected="an answer of the federation service",
            cure="look at the aggregator's log for this time",
        )

    def _unreachable(self, error: grpc.RpcError) -> TransportError:
        return TransportError(
            "FS-1501",
            f"no answer from {self._address} for {self._patience:g} s ({error.code().name})",
            expected="a running aggregator at that address",
            cure="start `fedsecure serve`, check the address and the firewall; what is charged stays charged",
        )
