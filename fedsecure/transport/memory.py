"""The in-memory twin of the gRPC transport: the same messages, handed straight to the coordinator."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from fedsecure.wire import federation_pb2 as pb

# Seconds for which a site waits for news before it asks again.
_PATIENCE = 1.0


class Core(Protocol):
    """The coordinator's calls, as the transport needs them."""

    def join(self, site: str, request: pb.JoinRequest, now: float) -> pb.JoinReply: ...
    def poll(self, site: str, token: bytes, after: int, now: float) -> pb.Directive | None: ...
    def beat(self, site: str, token: bytes, now: float, leaving: str = "") -> None: ...
    def send(self, site: str, message: pb.PhaseMessage, now: float) -> None: ...
    def expect_upload(self, site: str, header: pb.UploadHeader, now: float) -> memoryview | None: ...
    def upload(self, site: str, header: pb.UploadHeader, payload: memoryview | bytes, now: float) -> None: ...
    def fetch(self, site: str, token: bytes, digest: bytes, now: float) -> bytes: ...
    def gone(self, site: str, token: bytes, now: float) -> None: ...
    def tick(self, now: float) -> None: ...
    def wait(self, token: bytes, now: float) -> pb.Directive: ...


class MemoryTransport:
    """One site's end; all sites of a coordinator share ``gate``."""

    def __init__(self, core: Core, site: str, gate: threading.Condition) -> None:
        self._core = core
        self._site = site
        self._gate = gate
        self._token = b""
        # A beat on its way when the line is closed must not be heard after it.
        self._closed = False
        self._up = 0
        self._down = 0

    @property
    def bytes_up(self) -> int:
        return self._up

    @property
    def bytes_down(self) -> int:
        return self._down

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        with self._gate:
            reply = self._core.join(self._site, request, time.monotonic())
            self._token = request.session
            self._wake()
        return reply

    def next(self, request: pb.NextRequest) -> pb.Directive:
        until = time.monotonic() + _PATIENCE
        with self._gate:
            self._wake()
            while True:
                found = self._core.poll(self._site, request.session, request.after, time.monotonic())
                if found is not None:
                    self._down += found.ByteSize()
                    return found
                if time.monotonic() >= until:
                    return self._core.wait(request.session, time.monotonic())
                self._gate.wait(timeout=0.05)
                # Nobody is woken here: two sites that wait would wake each other without end.
                self._core.tick(time.monotonic())

    def send(self, message: pb.PhaseMessage) -> None:
        with self._gate:
            self._up += message.ByteSize()
            self._core.send(self._site, message, time.monotonic())
            self._wake()

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        with self._gate:
            self._up += header.ByteSize() + len(payload)
            whole = self._core.expect_upload(self._site, header, time.monotonic())
            if whole is not None:
                whole[:] = payload
                self._core.upload(self._site, header, whole, time.monotonic())
            self._wake()

    def fetch(self, request: pb.FetchRequest) -> bytes:
        with self._gate:
            blob = self._core.fetch(self._site, request.session, request.digest, time.monotonic())
        self._down += len(blob)
        return blob

    def beat(self, request: pb.BeatRequest) -> None:
        with self._gate:
            if self._closed:
                return
            self._core.beat(self._site, request.session, time.monotonic(), request.leaving)
            self._wake()
        if not request.leaving:
            time.sleep(0.2)

    def close(self) -> None:
        with self._gate:
            self._closed = True
            self._core.gone(self._site, self._token, time.monotonic())
            self._wake()

    def _wake(self) -> None:
        self._core.tick(time.monotonic())
        self._gate.notify_all()
