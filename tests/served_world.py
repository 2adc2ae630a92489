"""A federation's coordinator behind real gRPC and mutual TLS, in a thread of its own, for tests."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from federation_world import World

from fedsecure.aggregator.service import start
from fedsecure.identity.provision import Identity, load_identity
from fedsecure.transport.channel import GrpcTransport
from fedsecure.transport.tls import channel_credentials, grpc
from fedsecure.wire import federation_pb2 as pb


class Served:
    """A coordinator behind gRPC in a thread of its own."""

    def __init__(self, folder: Path, *, silence_seconds: float = 60.0, **options: Any) -> None:
        self.world = World(folder, waits={"silence_seconds": silence_seconds}, **options)
        self.core = self.world.start()
        identity = load_identity(folder / "keys" / "aggregator" / "identity")
        self.loop = asyncio.new_event_loop()
        ready: list[Any] = []

        async def begin() -> None:
            ready.extend(await start(self.core, identity, "127.0.0.1:0"))

        self.loop.run_until_complete(begin())
        self.server, self.service, self.port = ready
        self.ticking = self.loop.create_task(self.service.run())
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.tokens = {name: os.urandom(16) for name in self.world.names}
        self.lines: list[GrpcTransport] = []

    def identity(self, name: str) -> Identity:
        return load_identity(self.world.folder / "keys" / "sites" / name / "identity")

    def line(self, name: str, *, port: int = 0, connect_seconds: float = 20.0) -> GrpcTransport:
        """A site's line, to another ``port`` where something stands between."""
        address = f"localhost:{port or self.port}"
        self.lines.append(GrpcTransport(address, self.identity(name), connect_seconds=connect_seconds))
        return self.lines[-1]

    def join_request(self, name: str) -> pb.JoinRequest:
        roster = self.core._identity.roster
        return pb.JoinRequest(protocol=1, session=self.tokens[name], roster_hash=roster.hash)

    def joined(self, name: str, **options: Any) -> GrpcTransport:
        line = self.line(name, **options)
        line.join(self.join_request(name))

        async def ready() -> None:
            # As the first poll or beat does, without waiting for its answer.
            self.core.beat(name, self.tokens[name], time.monotonic())
            self.service._progress()

        asyncio.run_coroutine_threadsafe(ready(), self.loop).result(10)
        return line

    def within(self, action: Callable[[], Any]) -> Any:
        """What an action on the service's own thread returns; calls into the coordinator never overlap."""

        async def act() -> Any:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), self.loop).result(30)

    def raw(self, name: str) -> grpc.Channel:
        """A channel of a site for messages that the stubs would not make; to be closed by whoever opens it."""
        return grpc.secure_channel(f"localhost:{self.port}", channel_credentials(self.identity(name)))

    def stop(self) -> None:
        for line in self.lines:
            line.close()

        async def end() -> None:
            self.ticking.cancel()
            await asyncio.gather(self.ticking, return_exceptions=True)
            await self.server.stop(grace=0)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()
