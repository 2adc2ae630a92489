"""The public randomised Hadamard rotation of a segment: spreads its energy over all coordinates, so that a ring of
16 bits holds it (secagg.md §4.2; Suresh et al., "Distributed Mean Estimation with Limited Communication", ICML 2017).

No padding to a power of two: a random order, random signs, and H_1024/32 on consecutive blocks of 1,024.
What is left over at the end is covered by one more signed block over the last 1,024 coordinates, which overlaps
its neighbour. Below 1,024 coordinates the block is the largest power of two that fits. Every step is an
orthogonal map, so norms stay what they are up to float64 rounding, and the inverse is the steps backwards.
Order and signs come from an AES-256-CTR stream under a 32-byte public seed and are the same on every
machine.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedsecure.messages import FloatArray

BLOCK = 1024
SEED_BYTES = 32
_PREFIX = b"fedsecure/rotation/v1\0"


class Rotation:
    """The rotation of vectors of one length under one seed.

    Args:
        seed: 32 public bytes.
        length: d ≥ 1.
    """

    def __init__(self, seed: bytes, length: int) -> None:
        assert len(seed) == SEED_BYTES and length >= 1
        self.length = length
        self._block = min(BLOCK, 1 << (length.bit_length() - 1))
        self._whole = length - length % self._block
        self._order = _permutation(seed, length)
        bits = np.frombuffer(_stream(seed, b"signs", (length + self._block + 7) // 8), dtype=np.uint8)
        signs = 1.0 - 2.0 * np.unpackbits(bits, count=length + self._block)
        # The scale of the blocks goes into the signs: one pass less over the vector.
        scale = 1.0 / np.sqrt(self._block)
        self._signs, self._last = signs[:length], signs[length:] * scale
        self._signs[: self._whole] *= scale

    def forward(self, values: FloatArray) -> FloatArray:
        """Rotate float64 vectors, shape (…, d); returns a new array of the same shape."""
        self._check(values)
        out = np.take(values, self._order, axis=-1)
        out *= self._signs
        _transform(out[..., : self._whole], self._block)
        if self._whole < self.length:
            tail = out[..., self.length - self._block :] * self._last
            _transform(tail, self._block)
            out[..., self.length - self._block :] = tail
        return out

    def inverse(self, values: FloatArray) -> FloatArray:
        """Undo :meth:`forward`."""
        self._check(values)
        turned = values.astype(np.float64, copy=True)
        if self._whole < self.length:
            tail = turned[..., self.length - self._block :].copy()
            _transform(tail, self._block)
            turned[..., self.length - self._block :] = tail * self._last
        _transform(turned[..., : self._whole], self._block)
        turned *= self._signs
        out = np.empty_like(turned)
        out[..., self._order] = turned
        return out

    def _check(self, values: FloatArray) -> None:
        assert values.dtype == np.float64 and values.shape[-1] == self.length


@lru_cache(maxsize=4)
def rotation(seed: bytes, length: int) -> Rotation:
    """The rotation, kept for the next call with the same seed: 16 bytes a coordinate."""
    return Rotation(seed, length)


def _transform(values: FloatArray, block: int) -> None:
    """H_block (entries ±1) on consecutive blocks of the last axis, in place; H_{ab} = H_a ⊗ H_b."""
    rows = values.shape[:-1]
    for row in np.ndindex(*rows):
        part = values[row]
        left, right = _hadamard(1 << (block.bit_length() // 2)), _hadamard(block >> (block.bit_length() // 2))
        # Some hundred blocks at a time stay in the cache.
        step = block * max(1, (1 << 15) // block)
        for start in range(0, len(part), step):
            piece = part[start : start + step].reshape(-1, len(left), len(right))
            piece[:] = left @ (piece @ right)


@lru_cache(maxsize=16)
def _hadamard(size: int) -> npt.NDArray[np.float64]:
    """Sylvester's matrix of entries ±1, symmetric."""
    out = np.ones((1, 1))
    while len(out) < size:
        out = np.block([[out, out], [out, -out]])
    return out


def _permutation(seed: bytes, length: int) -> npt.NDArray[np.int64]:
    """0 … length − 1 in the order of one random 16-bit word each, ties in ascending order.

    Which coordinates meet in a block is what matters, and that is random; a stable sort of short words is several
    times faster than a full shuffle.
    """
    words = np.frombuffer(_stream(seed, b"order", 2 * length), dtype="<u2").astype(np.uint16, copy=False)
    return np.argsort(words, kind="stable")


def _stream(seed: bytes, name: bytes, size: int) -> bytes:
    key = hashlib.sha256(_PREFIX + name + b"\0" + seed).digest()
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))
