"""Standard normal values from uniform words, by the ziggurat method, vectorised.

Marsaglia and Tsang, "The Ziggurat Method for Generating Random Variables", Journal of Statistical Software 5(8), 2000;
Doornik, "An Improved Ziggurat Method to Generate Normal Random Samples", 2005. The area under exp(−x²/2), x ≥ 0, is cut
into 1024 layers of one area v. Layer i reaches from 0 to x_i and lies between the curve's heights at x_i and x_{i+1};
layer 0 is the rectangle below the height at r = x_1, with the tail beyond r. A word picks a layer and a signed point of
its width: left of x_{i+1} it lies under the curve, which holds for 99.6 % of all words and costs a product and a
comparison. The rest is decided by the curve, or in the tail by Marsaglia's method (Technometrics 6, 1964).

Bits are never used twice: 10 of a word choose the layer and the other 54 the point, so values are multiples of
x_i·2^-53, rounded to float64. The tail ends where ln 2^-53 does, at 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsecure.messages import FloatArray

Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
# Overwrites words with the next ones of a uniform stream.
Fill = Callable[[Words], None]

LAYERS = 1024
# r: so many layers of one area end at the curve's top (their areas, and the whole of it, are tested).
TAIL = 4.038849846109505
_BITS = 10
_PIECE = 1 << 16


def _edges() -> FloatArray:
    """x_0 … x_1024."""
    area = TAIL * math.exp(-TAIL * TAIL / 2) + math.sqrt(math.pi / 2) * math.erfc(TAIL / math.sqrt(2))
    found = [area * math.exp(TAIL * TAIL / 2), TAIL]
    while len(found) < LAYERS:
        found.append(math.sqrt(-2 * math.log(area / found[-1] + math.exp(-(found[-1] ** 2) / 2))))
    return np.array([*found, 0.0])


EDGES = _edges()
_HEIGHTS = np.exp(-np.square(EDGES) / 2)
_HEIGHTS[0] = 0.0


@dataclass(frozen=True, slots=True)
class _Layers:
    """What a point of each layer is multiplied by, and what is certainly under the curve; shape (1024,)."""

    scales: FloatArray
    inner: FloatArray


def normal(n: int, fill: Fill, std: float = 1.0) -> FloatArray:
    """``n`` independent normal values of mean 0, float64, shape (n,).

    Args:
        n: how many.
        fill: the uniform stream; about 1.01 words a value are taken from it.
        std: their standard deviation, above 0.
    """
    out, left, of = np.empty(n), [], []
    # Wider layers cost nothing; to multiply the values would be one more pass over them.
    layers = _Layers(EDGES[:-1] * (std * 2.0 ** (_BITS - 63)), EDGES[1:] * std)
    # Memory that is fresh from the operating system costs as much as the numbers in it.
    most = min(n, _PIECE)
    words, indices, bounds = np.empty(most, np.uint64), np.empty(most, np.int64), np.empty(most)
    for start in range(0, n, _PIECE):
        piece = out[start : start + _PIECE]
        count = len(piece)
        undecided = _points(piece, layers, indices[:count], words[:count], bounds[:count], fill)
        left.append(undecided + start)
        of.append(indices[undecided])
    if n:
        _decide(out, layers, np.concatenate(left), np.concatenate(of), fill, std)
    return out


def _decide(values: FloatArray, layers: _Layers, left: Integers, of: Integers, fill: Fill, std: float) -> None:
    """Settle the values at ``left``, points of the layers ``of`` that may be above the curve."""
    while len(left):
        x, tail = values[left], of == 0
        values[left[tail]] = np.copysign(std * _beyond(int(tail.sum()), fill), x[tail])
        left, of, x = left[~tail], of[~tail], x[~tail]
        low, high = _HEIGHTS[of], _HEIGHTS[of + 1]
        above = low + uniform(len(x), fill) * (high - low) >= np.exp(-np.square(x / std) / 2)
        # Whoever is above the curve is drawn anew.
        left = left[above]
        again, of = np.empty(len(left)), np.empty(len(left), np.int64)
        undecided = _points(again, layers, of, np.empty(len(left), np.uint64), np.empty(len(left)), fill)
        values[left] = again
        left, of = left[undecided], of[undecided]


def uniform(n: int, fill: Fill) -> FloatArray:
    """``n`` uniform multiples of 2^-53 in (0, 1], float64, shape (n,)."""
    words = np.empty(n, np.uint64)
    fill(words)
    words >>= np.uint64(11)
    # Signed words are converted at once, unsigned ones in a branch.
    values = words.view(np.int64).astype(np.float64)
    values += 1.0
    values *= 2.0**-53
    return values


def _points(
    values: FloatArray, layers: _Layers, of: Integers, words: Words, bounds: FloatArray, fill: Fill
) -> Integers:
    """A point of a layer for each value; which of them are not known to be under the curve. ``of`` becomes the layers'
    numbers; ``bounds`` is scratch."""
    fill(words)
    np.bitwise_and(words, np.uint64(LAYERS - 1), out=of.view(np.uint64))
    signed = words.view(np.int64)
    signed >>= _BITS
    np.copyto(values, signed)
    values *= np.take(layers.scales, of, out=bounds, mode="clip")
    np.take(layers.inner, of, out=bounds, mode="clip")
    return np.flatnonzero(np.abs(values, out=words.view(np.float64)) >= bounds)


def _beyond(n: int, fill: Fill) -> FloatArray:
    """``n`` values of the tail beyond r."""
    found, open_ = np.empty(n), np.arange(n)
    while len(open_):
        more = -np.log(uniform(len(open_), fill)) / TAIL
        kept = -2 * np.log(uniform(len(open_), fill)) > np.square(more)
        found[open_[kept]] = TAIL + more[kept]
        open_ = open_[~kept]
    return found


__all__ = ["EDGES", "LAYERS", "TAIL", "normal", "uniform"]
