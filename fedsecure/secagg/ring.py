"""The ring Z_2^b of masked vectors, b = 32 or 16: signed integers in, signed integers out, and the chance that a sum
wraps around (secagg.md §4.2)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsecure.errors import ProtocolError
from fedsecure.messages import RingArray

BITS = 32
WORDS: dict[int, np.dtype[Any]] = {32: np.dtype(np.uint32), 16: np.dtype(np.uint16)}


def word(bits: int) -> np.dtype[Any]:
    """The unsigned word of a ring of ``bits``, 32 or 16."""
    return WORDS[bits]


def to_ring(values: npt.NDArray[Any], bits: int = BITS) -> RingArray:
    """Integers in [−2^(b−1), 2^(b−1)) as ring words.

    Args:
        values: int64, one-dimensional.
        bits: b, 32 or 16.

    Returns:
        uint32 or uint16, the residues modulo 2^b.

    Raises:
        ProtocolError: FS-1302 a value is outside the ring and would wrap without a trace, FS-1303 not int64.
    """
    if values.dtype != np.int64 or values.ndim != 1:
        raise ProtocolError(
            "FS-1303",
            f"an array of {values.dtype} with {values.ndim} dimension(s)",
            expected="a one-dimensional array of int64",
            cure="round to integers before encoding",
        )
    half = 1 << (bits - 1)
    if len(values) and (int(values.min()) < -half or int(values.max()) >= half):
        raise ProtocolError(
            "FS-1302",
            "a value outside the ring",
            expected=f"integers in [-2^{bits - 1}, 2^{bits - 1})",
            cure="use a coarser grid or a lower clamp",
        )
    return values.astype(word(bits))


def lift(words: RingArray) -> npt.NDArray[np.int64]:
    """The representatives in [−2^(b−1), 2^(b−1)) of ring words (uint32 or uint16), as int64."""
    native = words.astype(words.dtype.newbyteorder("="), copy=False)
    return native.view(np.int16 if native.dtype.itemsize == 2 else np.int32).astype(np.int64)


def wrap_probability_log2(sites: int, length: int, *, clamp: int, noise_std: float, bits: int = BITS) -> float:
    """Base-2 logarithm of a bound on the chance that any coordinate of the sum wraps around, at most 0.

    P ≤ 2d·exp(−(2^(b−1) − nK)² / (2nσ_i²)) (secagg.md §4.2).

    Args:
        sites: n.
        length: d, coordinates.
        clamp: K, grid steps.
        noise_std: σ_i of each site's noise, grid steps; 0 for none.
        bits: b.
    """
    room = (1 << (bits - 1)) - sites * clamp
    if room <= 0:
        return 0.0
    if noise_std == 0:
        return -math.inf
    exponent = (room / noise_std) ** 2 / (2 * sites)
    return min(0.0, 1 + math.log2(length) - exponent * math.log2(math.e))
