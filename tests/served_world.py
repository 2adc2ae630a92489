"""A federation's coordinator behind real gRPC and mutual TLS, in a thread of its own, for tests."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

from federation_world import World

from fedsecure.aggregator.service import start
from fedsecure.identity.provision import load_identity
from fedsecure.transport.channel import GrpcTransport
from fedsecure.wire import federation_pb2 as pb


class Served:
    """A coordinator behind gRPC in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder, waits={"silence_seconds": 60.0})
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

    def line(self, name: str) -> GrpcTransport:
        identity = load_identity(self.world.folder / "keys" / "sites" / name / "identity")
        self.lines.append(GrpcTransport(f"localhost:{self.port}", identity, connect_seconds=20.0))
        return self.lines[-1]

    def joined(self, name: str) -> GrpcTransport:
        line = self.line(name)
        roster = self.core._identity.roster
        line.join(pb.JoinRequest(protocol=1, session=self.tokens[name], roster_hash=roster.hash))

        async def ready() -> None:
            # As the first poll or beat does, without waiting for its answer.
            self.core.beat(name, self.tokens[name], time.monotonic())
            self.service._progress()

        asyncio.run_coroutine_threadsafe(ready(), self.loop).result(10)
        return line

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
