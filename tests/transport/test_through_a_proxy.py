"""Through a TCP proxy that delays, slows down, cuts and truncates: rounds complete, and nothing is sent twice over."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_world import Served
from tcp_proxy import Proxy, Weather

from fedsecure.errors import FedsecureError
from fedsecure.transport.base import CHUNK_BYTES
from fedsecure.transport.tls import grpc
from fedsecure.wire import federation_pb2 as pb
from fedsecure.wire import federation_pb2_grpc as rpc

CHUNKS = 6


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path, rounds=1, public_evaluation=True)
    yield service
    service.stop()


class Wide:
    """A coordinator whose vector has several chunks; counts what is done."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch, *, ctx: bytes = b"c" * 32) -> None:
        self.payload = hashlib.shake_128(b"vector").digest(CHUNKS * CHUNK_BYTES - 100)
        self.whole: list[bytes] = []
        self.rooms = 0
        self.ctx = ctx
        core = served.core

        def room(site: str, header: pb.UploadHeader, now: float) -> memoryview:
            core.beat(site, header.session, now)
            self.rooms += 1
            return memoryview(bytearray(header.size))

        def upload(site: str, header: pb.UploadHeader, payload: memoryview, now: float) -> None:
            self.whole.append(bytes(payload))

        monkeypatch.setattr(core, "expect_upload", room)
        monkeypatch.setattr(core, "upload", upload)
        monkeypatch.setattr(core, "accepts_upload", lambda ctx: ctx == self.ctx)
        monkeypatch.setattr(core, "fetch", lambda *_: self.payload)

    def header(self, served: Served, **changes: Any) -> pb.UploadHeader:
        fields = {"session": served.tokens["site-1"], "ctx": self.ctx, "header": b"h", "size": len(self.payload)}
        return pb.UploadHeader(**{**fields, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("weather", [Weather(delay=0.01), Weather(rate=2e6), Weather(cut_after=6_000, cuts=4)])
def test_a_run_completes(served: Served, weather: Weather) -> None:
    with Proxy(served.port, weather) as proxy:
        lines = {name: served.line(name, port=proxy.port, connect_seconds=60.0) for name in served.world.names}
        served.world.run(*(served.world.take_part(name, transport=line) for name, line in lines.items()))
        assert not served.world.errors
        assert served.core.outcome is not None
        assert served.core.outcome["complete"]
        assert proxy.opened >= 3
        assert proxy.cut == (4 if weather.cut_after else 0)


def test_a_run_completes_although_every_line_is_cut_again_and_again(served: Served) -> None:
    with Proxy(served.port) as proxy:
        over = threading.Event()

        def storm() -> None:
            # Often enough to hit most calls, and not for ever: a line that never holds carries nothing.
            for _ in range(12):
                if over.wait(0.25):
                    return
                proxy.cut_all()

        stormy = threading.Thread(target=storm)
        lines = {name: served.line(name, port=proxy.port, connect_seconds=60.0) for name in served.world.names}
        stormy.start()
        served.world.run(*(served.world.take_part(name, transport=line) for name, line in lines.items()))
        over.set()
        stormy.join()
        assert not served.world.errors
        assert served.core.outcome is not None
        assert served.core.outcome["complete"]
        assert proxy.cut


def test_an_upload_goes_on_where_it_was_cut(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Wide(served, monkeypatch)
    with Proxy(served.port, Weather(cut_after=3 * CHUNK_BYTES, cuts=2)) as proxy:
        line, starts = served.joined("site-1", port=proxy.port), list[int]()
        cut_up = line._parts

        def parts(header: pb.UploadHeader, payload: memoryview, start: int) -> Iterator[pb.UploadPart]:
            starts.append(start)
            return cut_up(header, payload, start)

        monkeypatch.setattr(line, "_parts", parts)
        line.upload(wide.header(served), memoryview(wide.payload))
        assert proxy.cut == 2
        assert starts[0] == 0 < starts[-1], "the last stream had less to carry"
        assert wide.whole == [wide.payload], "counted once"
        assert wide.rooms == 1, "what had come was kept"
        # Of each cut stream some chunks are lost with gRPC's window, and no more.
        assert proxy.bytes_up < 2 * len(wide.payload)
    partials = served.within(lambda: dict(served.service._uploads._partials))
    assert not partials, "nothing of a vector that is counted is kept"


def test_an_upload_to_an_aggregator_of_version_1_begins_anew(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Wide(served, monkeypatch)
    with Proxy(served.port, Weather(cut_after=3 * CHUNK_BYTES, cuts=1)) as proxy:
        line = served.joined("site-1", port=proxy.port)
        line._version = 1
        line.upload(wide.header(served), memoryview(wide.payload))
        assert wide.whole == [wide.payload]


def test_a_download_goes_on_where_it_was_cut(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, begun = Wide(served, monkeypatch), list[int]()
    fetch = served.service._fetched

    def fetched(site: str, request: pb.FetchRequest) -> tuple[bytes, int]:
        begun.append(request.offset)
        return fetch(site, request)

    monkeypatch.setattr(served.service, "_fetched", fetched)
    with Proxy(served.port, Weather(rate=8e6)) as proxy:
        line = served.joined("site-1", port=proxy.port)

        def cut() -> None:
            give_up = time.monotonic() + 30
            while line.bytes_down < 2 * CHUNK_BYTES and time.monotonic() < give_up:
                time.sleep(0.001)
            proxy.weather.rate = 0.0
            proxy.cut_all()

        cutting = threading.Thread(target=cut)
        cutting.start()
        blob = line.fetch(pb.FetchRequest(session=served.tokens["site-1"], digest=bytes(32)))
        cutting.join()
    assert hashlib.sha256(blob).digest() == hashlib.sha256(wide.payload).digest()
    assert max(begun) >= 2 * CHUNK_BYTES, "the second stream began where the first had ended"
    beyond = pb.FetchRequest(session=served.tokens["site-1"], digest=bytes(32), offset=len(blob) + 1)
    with served.raw("site-1") as channel, pytest.raises(grpc.RpcError, match="FS-1536"):
        list(rpc.FederationStub(channel).Fetch(beyond))


def test_a_partial_upload_goes_with_its_attempt(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Wide(served, monkeypatch)
    with Proxy(served.port, Weather(cut_after=3 * CHUNK_BYTES, cuts=20)) as proxy:
        line = served.joined("site-1", port=proxy.port, connect_seconds=0.0)

        def kept() -> int:
            return served.within(lambda: sum(p.filled for p in served.service._uploads._partials.values()))

        # A cut connection may take what it carried with it before the server has looked.
        for _ in range(20):
            with pytest.raises(FedsecureError, match="FS-1501"):
                line.upload(wide.header(served), memoryview(wide.payload))
            if kept():
                break
        assert kept() > 0
        wide.ctx = b"another attempt"
        give_up = time.monotonic() + 20
        while kept():
            assert time.monotonic() < give_up, "the next tick lets go of it"
            time.sleep(0.05)
