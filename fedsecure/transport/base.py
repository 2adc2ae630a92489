"""What a client needs from the other side, whatever carries it: gRPC over mutual TLS, or memory in tests."""

from __future__ import annotations

from typing import Protocol

from fedsecure.wire import federation_pb2 as pb

CHUNK_BYTES = 1 << 20


class Transport(Protocol):
    """Blocking calls of one site. Each is bounded; failures are the errors of :mod:`fedsecure.errors`."""

    @property
    def bytes_up(self) -> int: ...

    @property
    def bytes_down(self) -> int: ...

    def join(self, request: pb.JoinRequest) -> pb.JoinReply: ...

    def next(self, request: pb.NextRequest) -> pb.Directive: ...

    def send(self, message: pb.PhaseMessage) -> None: ...

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None: ...

    def fetch(self, request: pb.FetchRequest) -> bytes: ...

    def beat(self, request: pb.BeatRequest) -> None: ...

    def close(self) -> None: ...
