"""Masked vectors on their way in: chunk by chunk into a buffer that outlives a broken stream, one a site and run.

Chunks come in order, each of 1 MiB but the last, each with its SHA-256 since version 2 of the wire protocol. What has
come is kept until the vector is whole, the site begins another, or the attempt takes no uploads any more. Nothing here
believes a vector: its signed hash is compared when it is whole (:mod:`fedsecure.secagg.server`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from hmac import compare_digest

from fedsecure.aggregator.parsing import unreadable
from fedsecure.errors import TransportError
from fedsecure.transport.base import CHUNK_BYTES
from fedsecure.wire import federation_pb2 as pb

PART_SECONDS = 30.0


@dataclass(slots=True)
class Partial:
    """A vector that is coming.

    Attributes:
        name: hash of the session, context and signed header that it belongs to.
        ctx: the attempt's context.
        whole: room for the vector.
        filled: bytes that have come.
        stream: the call that fills it; None where that one broke, or was told to end.
    """

    name: bytes
    ctx: bytes
    whole: memoryview
    filled: int = 0
    stream: object | None = None


class Uploads:
    """At most one vector of each site in each attempt, and a run has one attempt at a time; filled by one stream."""

    def __init__(self) -> None:
        self._partials: dict[tuple[str, bytes], Partial] = {}

    def find(self, site: str, header: pb.UploadHeader) -> Partial | None:
        """What has come of this very upload; not of another one that the site began before."""
        found = self._partials.get(_place(site, header))
        return found if found is not None and compare_digest(found.name, _name(header)) else None

    def begin(self, site: str, header: pb.UploadHeader, whole: memoryview) -> Partial:
        """Room for a new upload, in place of whatever the site had begun before."""
        self._partials[_place(site, header)] = Partial(_name(header), bytes(header.ctx), whole)
        return self._partials[_place(site, header)]

    def busy(self, site: str, ctx: bytes) -> bool:
        """Whether a stream of this site is coming in for that attempt."""
        found = self._partials.get((site, ctx))
        return found is not None and found.stream is not None

    def require_one(self, site: str, ctx: bytes) -> None:
        """TransportError FS-1511 where a stream of this site is coming in already."""
        if self.busy(site, ctx):
            raise _second(site)

    async def fill(
        self, site: str, partial: Partial, parts: AsyncIterator[pb.UploadPart], *, still_on: Callable[[], None]
    ) -> None:
        """Take chunks until the vector is whole and the stream has ended.

        The first chunk's offset says whether the stream begins anew or goes on.

        Args:
            site: whose.
            partial: where to.
            parts: the stream after its header.
            still_on: called before each chunk counts; raises where the upload must not go on.

        Raises:
            TransportError: FS-1506 a gap, an overlap or a chunk of another size, FS-1507 the end came early, FS-1511
                the site has asked where to go on, so that another stream follows, FS-1512 nothing came for too long,
                FS-1533 a chunk is not what its hash says.
        """
        self.require_one(site, partial.ctx)
        mine = partial.stream = object()
        first = True
        try:
            while (part := await next_part(parts)) is not None:
                if partial.stream is not mine or self._partials.get((site, partial.ctx)) is not partial:
                    raise _second(site)
                still_on()
                if first and part.chunk.offset == 0:
                    partial.filled = 0
                first = False
                _take(partial, part.chunk)
        finally:
            if partial.stream is mine:
                partial.stream = None
        if partial.filled != len(partial.whole):
            raise TransportError(
                "FS-1507",
                f"an upload that ended after {partial.filled} bytes",
                expected=f"{len(partial.whole)} bytes",
                cure="send the upload again",
            )

    def drop(self, site: str, partial: Partial) -> None:
        """Let go of an upload that is counted, or refused as a whole."""
        if self._partials.get((site, partial.ctx)) is partial:
            del self._partials[site, partial.ctx]

    def sweep(self, accepts: Callable[[bytes], bool]) -> None:
        """Let go of what belongs to attempts that take no uploads any more."""
        for place in [place for place in self._partials if not accepts(place[1])]:
            del self._partials[place]


async def next_part(stream: AsyncIterator[pb.UploadPart]) -> pb.UploadPart | None:
    """The next part of an upload, or None at its end; half-open uploads end here."""
    try:
        part = await asyncio.wait_for(anext(stream, None), PART_SECONDS)
    except TimeoutError:
        raise TransportError(
            "FS-1512",
            f"no further part of an upload for {PART_SECONDS:g} s",
            expected="a stream that goes on",
            cure="check the line; the site sends the rest again",
        ) from None
    if part is not None and not isinstance(part, pb.UploadPart):
        raise unreadable()
    return part


def _take(partial: Partial, chunk: pb.Chunk) -> None:
    wanted = min(CHUNK_BYTES, len(partial.whole) - partial.filled)
    if chunk.offset != partial.filled or len(chunk.data) != wanted or not wanted:
        raise TransportError(
            "FS-1506",
            f"a chunk at offset {chunk.offset} of {len(chunk.data)} bytes",
            expected=f"offset {partial.filled}, {wanted} bytes, and {len(partial.whole)} bytes in all",
            cure="install the same fedsecure release on both sides",
        )
    # Version 1 knew no hashes; the vector's own is signed, and compared in any case.
    if chunk.sha256 and not compare_digest(hashlib.sha256(chunk.data).digest(), chunk.sha256):
        raise TransportError(
            "FS-1533",
            f"a chunk at offset {chunk.offset} that is not what its SHA-256 says",
            expected="the bytes that the site read",
            cure="have the site's memory and disk checked; the next attempt sends a new vector",
        )
    partial.whole[partial.filled : partial.filled + wanted] = chunk.data
    partial.filled += wanted


def _second(site: str) -> TransportError:
    return TransportError(
        "FS-1511",
        f"a second upload of {site!r} beside the first",
        expected="one upload at a time",
        cure="none needed; the site tries again",
    )


def _place(site: str, header: pb.UploadHeader) -> tuple[str, bytes]:
    return site, bytes(header.ctx)


def _name(header: pb.UploadHeader) -> bytes:
    """Of all that an upload is about, so that no other one can go on in its place."""
    same = pb.UploadHeader(session=header.session, ctx=header.ctx, header=header.header, size=header.size)
    return hashlib.sha256(same.SerializeToString(deterministic=True)).digest()


__all__ = ["Partial", "Uploads", "next_part"]
