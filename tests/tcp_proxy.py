"""A TCP proxy for tests that passes bytes on unread, and can hold, slow down, cut and truncate connections."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Weather:
    """What becomes of the bytes; may be changed while they flow.

    Attributes:
        delay: seconds each piece of a stream is held.
        rate: bytes a second of each direction; 0 is no limit.
        cut_after: bytes up of one connection after which it is cut, in the middle of a record; 0 is never.
        cuts: how many connections to cut so; each counts one off.
    """

    delay: float = 0.0
    rate: float = 0.0
    cut_after: int = 0
    cuts: int = 0


@dataclass
class Proxy:
    """Listens on ``port`` of this machine and passes everything on to ``to``."""

    to: int
    weather: Weather = field(default_factory=Weather)
    port: int = 0
    opened: int = 0
    cut: int = 0
    bytes_up: int = 0

    def __enter__(self) -> Proxy:
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            self._server.close()
            for writer in list(self._open):
                writer.transport.abort()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut_all(self) -> None:
        """Cut every connection now, as a firewall that is started again."""

        def cut() -> None:
            self.cut += len(self._open) // 2
            for writer in list(self._open):
                writer.transport.abort()

        self._loop.call_soon_threadsafe(cut)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, up_writer}
        self._open |= both
        try:
            await asyncio.gather(
                self._pass(reader, up_writer, both, self._upward()), self._pass(up_reader, writer, both, len)
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._open -= both
            for end in both:
                end.transport.abort()

    def _upward(self) -> Callable[[bytes], int]:
        """How much of each piece of one connection gets through."""
        sent = 0

        def through(data: bytes) -> int:
            nonlocal sent
            limit = self.weather.cut_after
            if limit and self.weather.cuts and sent + len(data) > limit:
                self.weather.cuts -= 1
                return limit - sent
            sent += len(data)
            self.bytes_up += len(data)
            return len(data)

        return through

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        both: set[asyncio.StreamWriter],
        through: Callable[[bytes], int],
    ) -> None:
        while data := await reader.read(1 << 16):
            if self.weather.delay:
                await asyncio.sleep(self.weather.delay)
            if self.weather.rate:
                await asyncio.sleep(len(data) / self.weather.rate)
            count = through(data)
            writer.write(data[:count])
            if count < len(data):
                self.cut += 1
                await writer.drain()
                for end in both:
                    end.transport.abort()
                return
            await writer.drain()
        writer.write_eof()
