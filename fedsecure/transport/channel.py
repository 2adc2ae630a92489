"""The site's gRPC channel: mutual TLS, bounded deadlines, retries with jitter, chunks of 1 MiB that resume.

Every call here is safe to repeat: what changes something carries the id of its request, and the aggregator answers a
repeated one without doing it twice. Uploads and downloads go on where they broke off (docs/transport.md).
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from fedsecure.errors import FedsecureError, IdentityError, TransportError
from fedsecure.identity.provision import Identity
from fedsecure.transport.base import CHUNK_BYTES
from fedsecure.transport.probe import Address, shake_hands
from fedsecure.transport.retries import Retries
from fedsecure.transport.status import from_details, retry_after
from fedsecure.transport.tensors import MAX_TENSOR_BYTES
from fedsecure.transport.tls import KEEPALIVE, LIMITS, channel_credentials, grpc
from fedsecure.transport.versions import OURS, RESUMABLE, accept_answer
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
# Of a connection that finds out why TLS failed.
_PROBE_SECONDS = 10.0
# What gRPC says where the other side's TLS or certificate is wrong, which no repetition mends. A handshake that merely
# breaks off says "Handshake read failed": so do an aggregator that ends in that moment and a line that is cut.
_REFUSED = ("handshake failed", "verification check failed", "certificate")
_UNAVAILABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


class GrpcTransport:
    """One site's connection to the aggregator.

    Args:
        address: ``host:port``.
        identity: keys and certificates of the site.
        connect_seconds: how long a call is tried again without getting on before giving up.
        call_seconds: deadline of one small call.
    """

    def __init__(self, address: str, identity: Identity, *, connect_seconds: float, call_seconds: float = 60.0) -> None:
        self._address = address
        self._identity = identity
        self._patience = connect_seconds
        self._deadline = call_seconds
        self._up = 0
        self._down = 0
        self._count = threading.Lock()
        # Until an aggregator has said that it knows more.
        self._version = OURS.lowest
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
        asked = pb.GreetRequest()
        asked.CopyFrom(request)
        asked.protocol, asked.newest = OURS.lowest, OURS.highest
        reply = self._call(lambda: self._stub.Greet(asked, timeout=self._deadline), asked.ByteSize())
        accept_answer(reply.protocol)
        return reply

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        asked = pb.JoinRequest()
        asked.CopyFrom(request)
        asked.protocol, asked.newest, asked.request = OURS.lowest, OURS.highest, _fresh_id()
        reply = self._call(lambda: self._stub.Join(asked, timeout=self._deadline), asked.ByteSize())
        self._version = accept_answer(reply.protocol)
        return reply

    def next(self, request: pb.NextRequest) -> pb.Directive:
        return self._call(lambda: self._stub.Next(request, timeout=self._deadline), request.ByteSize())

    def send(self, message: pb.PhaseMessage) -> None:
        named = pb.PhaseMessage()
        named.CopyFrom(message)
        named.request = _fresh_id()
        self._call(lambda: self._stub.Send(named, timeout=self._deadline), named.ByteSize())

    def beat(self, request: pb.BeatRequest) -> None:
        named = pb.BeatRequest()
        named.CopyFrom(request)
        if named.leaving:
            named.request = _fresh_id()
        self._call(lambda: self._stub.Beat(named, timeout=self._deadline), named.ByteSize())

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        named = pb.UploadHeader()
        named.CopyFrom(header)
        named.request = _fresh_id()
        retries = Retries(self._patience)
        arrived = 0

        def attempt() -> None:
            nonlocal arrived
            start = 0
            if retries.failures and self._version >= RESUMABLE:
                progress = self._stub.UploadStatus(named, timeout=self._deadline)
                if progress.complete:
                    return
                start = progress.offset
                if start > len(payload) or (start % CHUNK_BYTES and start < len(payload)):
                    start = 0  # no end of a chunk: nothing that this side has sent
                if start > arrived:
                    arrived = start
                    retries.progressed()
            # A slow hospital line: at least 100 kB/s are allowed for.
            deadline = self._deadline + (len(payload) - start) / 1e5
            self._stub.Upload(self._parts(named, payload, start), timeout=deadline)

        self._call(attempt, named.ByteSize(), retries)

    def _parts(self, header: pb.UploadHeader, payload: memoryview, start: int) -> Iterator[pb.UploadPart]:
        yield pb.UploadPart(header=header)
        for offset in range(start, len(payload), CHUNK_BYTES):
            data = bytes(payload[offset : offset + CHUNK_BYTES])
            with self._count:
                self._up += len(data)
            yield pb.UploadPart(chunk=pb.Chunk(offset=offset, data=data, sha256=hashlib.sha256(data).digest()))

    def fetch(self, request: pb.FetchRequest) -> bytes:
        """A broadcast tensor; whoever calls compares it with its hash."""
        asked = pb.FetchRequest()
        asked.CopyFrom(request)
        retries = Retries(self._patience)
        whole = bytearray()

        def receive() -> None:
            if self._version < RESUMABLE:
                whole.clear()
            asked.offset = len(whole)
            for chunk in self._stub.Fetch(asked, timeout=self._deadline + 600):
                if chunk.offset != len(whole) or len(whole) + len(chunk.data) > MAX_TENSOR_BYTES:
                    raise TransportError(
                        "FS-1505",
                        f"a chunk at offset {chunk.offset} of {len(chunk.data)} bytes",
                        expected=f"offset {len(whole)} and at most {MAX_TENSOR_BYTES} bytes in all",
                        cure="install the same fedsecure release on both sides",
                    )
                whole.extend(chunk.data)
                with self._count:
                    self._down += len(chunk.data)
                if chunk.data and self._version >= RESUMABLE:
                    retries.progressed()

        self._call(receive, asked.ByteSize(), retries)
        return bytes(whole)

    def close(self) -> None:
        # A signal may have landed inside grpc, whose close then waits for ever: nobody's exit hangs on it.
        closing = threading.Thread(target=self._channel.close, name="close-channel", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def _call(self, attempt: Callable[[], _Reply], size: int, retries: Retries | None = None) -> _Reply:
        # Who waits for a small answer counts from the question on.
        retries = retries or Retries(self._patience, since=time.monotonic())
        closed = False
        while True:
            try:
                reply = attempt()
            except grpc.RpcError as error:
                asked = retry_after(error.details())
                known = from_details(error.details())
                if asked is None:
                    problem = known or self._beyond_repair(error)
                    if problem is not None:
                        raise problem from None
                closed = closed or _closed(error)
                pause = retries.pause(time.monotonic(), asked=asked or 0.0)
                if pause is None:
                    raise (known or self._gave_up(error, closed=closed)) from None
                time.sleep(pause)
                continue
            with self._count:
                self._up += size
                if hasattr(reply, "ByteSize"):
                    self._down += reply.ByteSize()
            return reply

    def _beyond_repair(self, error: grpc.RpcError) -> FedsecureError | None:
        """The typed error behind a status of gRPC's own, or None where trying again may help."""
        text = (error.details() or "").lower()
        if error.code() in _UNAVAILABLE:
            return self._untrusted() if any(words in text for words in _REFUSED) else None
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return TransportError(
                "FS-1534",
                "a message above the limit of one call",
                expected=f"at most {dict(LIMITS)['grpc.max_receive_message_length'] >> 20} MiB",
                cure="install the same fedsecure release on both sides",
            )
        return TransportError(
            "FS-1502",
            f"the aggregator answered {error.code().name}",
            expected="an answer of the federation service",
            cure="look at the aggregator's log for this time",
        )

    def _untrusted(self) -> FedsecureError | None:
        """What is wrong with the other side's TLS, tried by itself, since gRPC names no certificate."""
        try:
            shake_hands(Address.parse(self._address), self._identity, seconds=_PROBE_SECONDS)
        except TransportError as error:
            # Nobody there any more: an aggregator that ended in that moment, or a line that is cut.
            return None if error.code == "FS-1521" else error
        except FedsecureError as error:
            return error
        return IdentityError(
            "FS-1453",
            f"{self._address} is the roster's aggregator, and accepts no connection of this site",
            expected="a certificate of this site that the aggregator accepts, in TLS 1.3",
            cure="check this machine's clock; ask the coordinator for a new certificate",
        )

    def _gave_up(self, error: grpc.RpcError, *, closed: bool) -> FedsecureError:
        """Why a line never came to be; ``closed``: somebody took a connection, and closed it."""
        if closed:
            problem = self._untrusted()
            if isinstance(problem, IdentityError):
                return problem
        return TransportError(
            "FS-1501",
            f"no answer from {self._address} for {self._patience:g} s ({error.code().name})",
            expected="a running aggregator at that address",
            cure="start `fedsecure serve`, check the address and the firewall; what is charged stays charged",
        )


def _closed(error: grpc.RpcError) -> bool:
    """Whether somebody was there and closed the line: in TLS 1.3 a client whose certificate is refused sees no more.

    Of a name with several addresses gRPC tells the failure of one.
    """
    text = (error.details() or "").lower()
    return "failed to connect" in text and "refused" not in text


def _fresh_id() -> bytes:
    return os.urandom(16)
