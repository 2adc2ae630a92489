"""Vectors on their way in: what has come is kept and gone on from, and nothing that does not fit is written."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsecure.aggregator import uploads as module
from fedsecure.aggregator.parsing import Unreadable
from fedsecure.aggregator.uploads import Partial, Uploads
from fedsecure.errors import RunError, TransportError
from fedsecure.wire import federation_pb2 as pb

HEADER = pb.UploadHeader(session=bytes(16), ctx=bytes(32), header=b"signed", size=8)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 3)


def chunk(offset: int, data: bytes, *, digest: bytes | None = None) -> pb.UploadPart:
    sha256 = hashlib.sha256(data).digest() if digest is None else digest
    return pb.UploadPart(chunk=pb.Chunk(offset=offset, data=data, sha256=sha256))


async def stream(*parts: Any) -> AsyncIterator[Any]:
    for part in parts:
        if isinstance(part, BaseException):
            raise part
        yield part


def begun(uploads: Uploads, site: str = "a") -> Partial:
    return uploads.begin(site, HEADER, memoryview(bytearray(8)))


def fill(uploads: Uploads, partial: Partial, *parts: Any) -> None:
    asyncio.run(uploads.fill("a", partial, stream(*parts), still_on=lambda: None))


WHOLE = [chunk(0, b"abc"), chunk(3, b"def"), chunk(6, b"gh")]


def test_chunks_fill_the_buffer_in_order_and_exactly() -> None:
    uploads = Uploads()
    partial = begun(uploads)
    fill(uploads, partial, *WHOLE)
    assert bytes(partial.whole) == b"abcdefgh"


@given(st.lists(st.integers(0, 3), max_size=6))
def test_a_broken_stream_goes_on_where_it_broke(breaks: list[int]) -> None:
    """Whatever number of chunks gets through each time, and whether or not the site begins anew."""
    uploads = Uploads()
    partial = begun(uploads)
    for through in breaks:
        ahead = WHOLE[partial.filled // 3 :] if partial.filled < 8 else []
        with pytest.raises((ConnectionError, TransportError)):
            fill(uploads, partial, *ahead[:through], ConnectionError())
        assert uploads.find("a", HEADER) is partial
        assert not uploads.busy("a", HEADER.ctx)
    before = partial.filled
    fill(uploads, partial, *(WHOLE[partial.filled // 3 :] if partial.filled < 8 else []))
    assert bytes(partial.whole) == b"abcdefgh"
    assert partial.filled == 8 >= before


def test_a_stream_may_begin_anew() -> None:
    uploads = Uploads()
    partial = begun(uploads)
    with pytest.raises(TransportError, match="FS-1507"):
        fill(uploads, partial, chunk(0, b"xyz"))
    fill(uploads, partial, *WHOLE)
    assert bytes(partial.whole) == b"abcdefgh"


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([], "FS-1507"),
        (WHOLE[:2], "FS-1507"),
        ([WHOLE[0], WHOLE[0]], "FS-1506"),
        ([WHOLE[0], WHOLE[2]], "FS-1506"),
        ([WHOLE[1]], "FS-1506"),
        ([chunk(0, b"abcd")], "FS-1506"),
        ([chunk(0, b"ab")], "FS-1506"),
        ([chunk(0, b"")], "FS-1506"),
        ([*WHOLE, chunk(8, b"")], "FS-1506"),
        ([*WHOLE, chunk(8, b"i")], "FS-1506"),
        ([chunk(1 << 63, b"abc")], "FS-1506"),
        ([pb.UploadPart(header=HEADER)], "FS-1506"),
        ([pb.UploadPart()], "FS-1506"),
        ([chunk(0, b"abc", digest=hashlib.sha256(b"abd").digest())], "FS-1533"),
        ([chunk(0, b"abc", digest=b"short")], "FS-1533"),
        ([Unreadable()], "FS-1535"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(parts: list[Any], code: str) -> None:
    uploads = Uploads()
    partial = begun(uploads)
    with pytest.raises(TransportError, match=code):
        fill(uploads, partial, *parts)
    assert bytes(partial.whole[partial.filled :]) == bytes(8 - partial.filled), "nothing is written that is not counted"


def test_chunks_of_version_1_have_no_hash() -> None:
    uploads = Uploads()
    partial = begun(uploads)
    fill(uploads, partial, *(chunk(at, b"abcdefgh"[at : at + 3], digest=b"") for at in (0, 3, 6)))
    assert bytes(partial.whole) == b"abcdefgh"


def test_a_half_open_upload_ends_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_SECONDS", 0.01)
    uploads = Uploads()
    partial = begun(uploads)

    async def stalled() -> AsyncIterator[pb.UploadPart]:
        yield WHOLE[0]
        await asyncio.Event().wait()

    with pytest.raises(TransportError, match="FS-1512"):
        asyncio.run(uploads.fill("a", partial, stalled(), still_on=lambda: None))
    assert partial.filled == 3
    assert not uploads.busy("a", HEADER.ctx)


def test_one_stream_at_a_time_and_who_asks_takes_over() -> None:
    uploads = Uploads()
    partial = begun(uploads)

    async def race() -> list[BaseException | None]:
        entered, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[pb.UploadPart]:
            yield WHOLE[0]
            entered.set()
            await go_on.wait()
            yield WHOLE[1]

        first = asyncio.create_task(uploads.fill("a", partial, slow(), still_on=lambda: None))
        await entered.wait()
        with pytest.raises(TransportError, match="FS-1511"):
            await uploads.fill("a", partial, stream(*WHOLE), still_on=lambda: None)
        partial.stream = None  # the site has asked where to go on
        await uploads.fill("a", partial, stream(*WHOLE[1:]), still_on=lambda: None)
        go_on.set()
        return list(await asyncio.gather(first, return_exceptions=True))

    (late,) = asyncio.run(race())
    assert isinstance(late, TransportError)
    assert late.code == "FS-1511"
    assert bytes(partial.whole) == b"abcdefgh", "the stream that was taken over wrote nothing more"


def test_nothing_is_taken_from_a_caller_who_must_not_go_on() -> None:
    uploads = Uploads()
    partial = begun(uploads)

    def revoked() -> None:
        raise RunError("FS-1705", "a", expected="b", cure="c")

    with pytest.raises(RunError, match="FS-1705"):
        asyncio.run(uploads.fill("a", partial, stream(*WHOLE), still_on=revoked))
    assert partial.filled == 0


def test_only_the_same_upload_goes_on() -> None:
    uploads = Uploads()
    partial = begun(uploads)
    for change in ({"session": bytes(15) + b"\1"}, {"ctx": b"other"}, {"header": b"other"}, {"size": 9}):
        other = pb.UploadHeader()
        other.CopyFrom(HEADER)
        other.MergeFrom(pb.UploadHeader(**change))
        assert uploads.find("a", other) is None
    assert uploads.find("b", HEADER) is None
    renamed = pb.UploadHeader(request=bytes(16))
    renamed.MergeFrom(HEADER)
    assert uploads.find("a", renamed) is partial


def test_what_has_come_goes_with_the_attempt_and_one_site_has_one() -> None:
    uploads = Uploads()
    first = begun(uploads)
    second = begun(uploads)
    other_run = pb.UploadHeader(session=bytes(16), ctx=b"of another run", header=b"signed", size=8)
    aside = uploads.begin("a", other_run, memoryview(bytearray(8)))
    assert uploads.find("a", HEADER) is second
    uploads.drop("a", first)
    assert uploads.find("a", HEADER) is second
    assert uploads.find("a", other_run) is aside
    uploads.sweep(lambda ctx: ctx == HEADER.ctx)
    assert uploads.find("a", HEADER) is second
    assert uploads.find("a", other_run) is None
    uploads.sweep(lambda ctx: False)
    assert uploads.find("a", HEADER) is None
