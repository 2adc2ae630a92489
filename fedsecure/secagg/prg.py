"""Mask streams: AES-256 in counter mode on zeros, added to a ring vector chunk by chunk (secagg.md §3.4, NIST
SP 800-38A).

PRG(k) is AES-256-CTR with key k and a 128-bit big-endian counter from 0; ring word e of b bits is the
little-endian word at byte e·b/8. A key masks one vector, ever. Chunks of 256 KiB keep keystream and
accumulator in a second-level cache of 1 MiB. Large sums are shared with worker processes
(:mod:`fedsecure.secagg.parallel`) tile by tile: a tile is a range of words and a batch of keys, and the sum does not
depend on the tiling.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedsecure.secagg import parallel

Words = npt.NDArray[np.uint32] | npt.NDArray[np.uint16]
_Fill = Callable[[memoryview, memoryview], int]

CHUNK = 1 << 16  # words of 32 bits; as many bytes of other words
WORD = 4
BATCH = 256  # ciphers open at a time: their state is about 1 kB each
_KEY_BYTES, _BLOCK, _LINE = 32, 16, 64
_TILE_BYTES = 1 << 24  # keystream of one tile: some milliseconds
_MARGIN = 15  # older releases of cryptography want room for one block less a byte
# Never written, so all of it is one page of the machine and takes no room in the cache.
_ZEROS = memoryview(mmap.mmap(-1, CHUNK * WORD, access=mmap.ACCESS_COPY)).toreadonly()
_REQUEST = struct.Struct("<BQQII")  # word size, first word, words, keys to add, keys to subtract


def add_masks(
    vector: Words,
    plus: Iterable[bytes],
    minus: Iterable[bytes],
    *,
    chunk: int | None = None,
    workers: int | None = None,
) -> None:
    """Add PRG(k) for k in ``plus`` and subtract it for k in ``minus``, modulo 2^b and in place.

    Args:
        vector: contiguous little-endian uint32 (b = 32) or uint16 (b = 16), any length.
        plus, minus: 32-byte keys.
        chunk: words at a time, at most the 256 KiB that ``None`` stands for; the result does not depend on it.
        workers: processes that share the work, this one among them; ``None`` for one a core where the work is
            large enough to pay (:func:`fedsecure.secagg.parallel.crew`). The result does not depend on it.
    """
    added, subtracted = list(plus), list(minus)
    size = vector.nbytes * (len(added) + len(subtracted))
    with parallel.crew(size, workers=workers) as crew:
        if crew is None:
            add_streams(vector, added, subtracted, chunk=chunk)
        else:
            crew.run(_tiles(vector, added, subtracted))


def add_streams(
    vector: Words, plus: Sequence[bytes], minus: Sequence[bytes], *, first: int = 0, chunk: int | None = None
) -> None:
    """As :func:`add_masks`, alone, and with words ``first`` … of every stream (first · b a multiple of 128)."""
    size = vector.itemsize
    chunk = min(chunk or len(_ZEROS), len(_ZEROS) // size)
    buffer = _kept.stream
    words = np.frombuffer(buffer, dtype=vector.dtype, count=len(_ZEROS) // size)
    bounds = [0, *range(_lead(vector) % chunk or chunk, len(vector), chunk), len(vector)]
    parts = [vector[start:end] for start, end in pairwise(bounds)]
    for added, subtracted in _batches(plus, minus, BATCH):
        streams: list[tuple[_Fill, np.ufunc]] = [(_open(key, first * size).update_into, np.add) for key in added]
        streams += [(_open(key, first * size).update_into, np.subtract) for key in subtracted]
        for part in parts:
            source, stream = _ZEROS[: part.nbytes], words[: len(part)]
            for fill, operation in streams:
                fill(source, buffer)
                operation(part, stream, part)
    words[:] = 0


def keystream(key: bytes, words: int, *, dtype: npt.DTypeLike = "<u4") -> Words:
    """The first ``words`` ring words of PRG(key), little-endian uint32 or, with ``dtype="<u2"``, uint16."""
    return np.frombuffer(_open(key, 0).update(bytes(np.dtype(dtype).itemsize * words)), dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Tile:
    """A part of one sum: words ``first`` … of the vector, and some of the keys."""

    part: Words  # a view of the vector
    first: int
    plus: Sequence[bytes] = field(repr=False)
    minus: Sequence[bytes] = field(repr=False)

    kind = parallel.MASKS

    def here(self) -> None:
        add_streams(self.part, self.plus, self.minus, first=self.first)

    def request(self) -> bytes:
        counts = (len(self.part), len(self.plus), len(self.minus))
        return _REQUEST.pack(self.part.itemsize, self.first, *counts) + b"".join((*self.plus, *self.minus))

    def take(self, answer: bytes, slot: memoryview) -> None:
        np.add(self.part, np.frombuffer(slot, dtype=self.part.dtype, count=len(self.part)), self.part)


def answer(request: memoryview, slot: memoryview) -> bytes:
    """A worker's side of a tile: leaves the sum of the streams in ``slot``."""
    size, first, count, added, subtracted = _REQUEST.unpack_from(request)
    raw = bytes(request[_REQUEST.size :])
    keys = [raw[at : at + _KEY_BYTES] for at in range(0, len(raw), _KEY_BYTES)]
    assert len(keys) == added + subtracted
    words: Words = np.frombuffer(slot, dtype=f"<u{size}", count=count)
    words[:] = 0
    add_streams(words, keys[:added], keys[added:], first=first)
    return b""


def _tiles(vector: Words, plus: Sequence[bytes], minus: Sequence[bytes]) -> Iterator[_Tile]:
    step = parallel.SLOT_BYTES // vector.itemsize
    keys = max(1, min(BATCH, _TILE_BYTES // max(1, min(vector.nbytes, parallel.SLOT_BYTES))))
    for added, subtracted in _batches(plus, minus, keys):
        for first in range(0, len(vector), step):
            yield _Tile(vector[first : first + step], first, added, subtracted)


def _batches(
    plus: Sequence[bytes], minus: Sequence[bytes], size: int
) -> Iterator[tuple[Sequence[bytes], Sequence[bytes]]]:
    """Up to ``size`` keys at a time, those to add before those to subtract."""
    for start in range(0, len(plus) + len(minus), size):
        added = plus[start : start + size]
        yield added, minus[max(0, start - len(plus)) : max(0, start + size - len(plus))]


class _Kept(threading.local):
    """Room for one chunk of keystream, a thread: on a cache line and mapped already, worth 2 to 4 per cent."""

    def __init__(self) -> None:
        room = bytearray(len(_ZEROS) + _MARGIN + _LINE)
        start = -np.frombuffer(room, dtype=np.uint8).ctypes.data % _LINE
        self.stream = memoryview(room)[start : start + len(_ZEROS) + _MARGIN]


_kept = _Kept()


def _lead(vector: Words) -> int:
    """Words before the first cache line of ``vector``, as far as they are whole cipher blocks."""
    lead = -vector.ctypes.data % _LINE
    return 0 if lead % _BLOCK else lead // vector.itemsize


def _open(key: bytes, position: int) -> CipherContext:
    """The stream of ``key`` from byte ``position`` on, a multiple of 16."""
    assert len(key) == _KEY_BYTES and position % _BLOCK == 0
    counter = (position // _BLOCK).to_bytes(_BLOCK, "big")
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
