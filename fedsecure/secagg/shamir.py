"""Shamir's secret sharing of 32-byte secrets over the prime field p = 2^256 + 297 (Shamir 1979; secagg.md
§3.3), with Gao's decoder for shares of which some are wrong (Gao, "A new algorithm for decoding Reed-Solomon
codes", 2003).

Every 32-byte string is a field element below p, so a secret needs no splitting; a share is 33 big-endian
bytes. The evaluation point of a site is its protocol index, never its position in a list.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

_Polynomial = list[int]  # coefficients, constant term first, no zero at the end


def share(secret: bytes, threshold: int, *, points: Sequence[int]) -> dict[int, bytes]:
    """Split ``secret`` (32 bytes) so that any ``threshold`` shares give it back and fewer say nothing.

    ``points`` are the distinct evaluation points ≥ 1; returns point → 33-byte share.
    """
    assert len(secret) == SECRET_BYTES and 1 <= threshold <= len(points)
    assert min(points) >= 1 and len(set(points)) == len(points)
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    out = {}
    for point in points:
        value = 0
        for coefficient in coefficients:
            value = (value * point + coefficient) % PRIME
        out[point] = value.to_bytes(SHARE_BYTES, "big")
    return out


def interpolate(shares: Mapping[int, bytes], at: int = 0) -> int:
    """Value at ``at`` of the polynomial of least degree through ``shares`` (point → share), below p.

    Raises ``ValueError`` where a share is not 33 bytes of a field element.
    """
    points = tuple(sorted(shares))
    weights = _weights(points, at)
    return sum(w * element(shares[x]) for w, x in zip(weights, points, strict=True)) % PRIME


def reconstruct(shares: Mapping[int, bytes]) -> bytes | None:
    """The 32-byte secret of ``shares``, or ``None`` where the shares are of no 32-byte secret."""
    try:
        return _as_secret(interpolate(shares))
    except ValueError:
        return None


def agree(shares: Mapping[int, bytes], threshold: int) -> bool:
    """Whether all ``shares`` lie on one polynomial of degree below ``threshold``; a wrong yes has odds of 1 in p.

    One inner product with a random word of the dual code, where :func:`interpolate` at every further point
    would cost one each (Cascudo and David, "SCRAPE", 2017, lemma 1).
    """
    points = tuple(sorted(shares))
    if len(points) <= threshold:
        return True
    try:
        values = [element(shares[x]) for x in points]
    except ValueError:
        return False
    return sum(w * y for w, y in zip(_parity(points, threshold), values, strict=True)) % PRIME == 0


def decode(shares: Mapping[int, bytes], threshold: int) -> tuple[bytes, set[int]] | None:
    """The 32-byte secret of m ``shares`` of which up to (m − threshold) / 2 may be wrong, and the wrong ones' points.

    ``None`` where there is no secret within that distance. A share that is no field element is an erasure, which
    counts half.
    """
    values = {}
    for x in sorted(shares):
        try:
            values[x] = element(shares[x])
        except ValueError:
            continue  # an erasure
    points = tuple(values)
    if len(points) < threshold:
        return None
    product = [1]
    for x in points:
        product = [(low - x * high) % PRIME for low, high in zip([0, *product], [*product, 0], strict=True)]
    before, now = product, _through(points, values, product)
    left, right = list[int](), [1]
    while 2 * len(now) > len(points) + threshold + 1:  # deg ≥ (m + t) / 2
        quotient, remainder = _divide(before, now)
        before, now = now, remainder
        left, right = right, _minus(left, _times(quotient, right))
    polynomial, rest = _divide(now, right)
    secret = _as_secret(polynomial[0] if polynomial else 0)
    if rest or len(polynomial) > threshold or secret is None:
        return None
    return secret, {x for x in shares if x not in values or _value(polynomial, x) != values[x]}


def element(raw: bytes) -> int:
    """The field element in 33 big-endian bytes; ``ValueError`` where it is none."""
    value = int.from_bytes(raw, "big")
    if len(raw) != SHARE_BYTES or value >= PRIME:
        raise ValueError("no field element")
    return value


def _as_secret(value: int) -> bytes | None:
    return value.to_bytes(SECRET_BYTES, "big") if value < 1 << (8 * SECRET_BYTES) else None


@lru_cache(maxsize=64)
def _inverse_gaps(points: tuple[int, ...]) -> tuple[int, ...]:
    """1 / ∏ (x − other) for every x, the part of Lagrange's weights that does not depend on where."""
    gaps = np.subtract.outer(np.array(points, dtype=np.int64), points)
    np.fill_diagonal(gaps, 1)
    # As many factors as fit 62 bits are multiplied at once; in a sparse graph every owner has other points.
    size = 62 // max(1, (max(points) - min(points)).bit_length())
    gaps = np.pad(gaps, ((0, 0), (0, -len(points) % size)), constant_values=1)
    rows = gaps.reshape(len(points), -1, size).prod(axis=2)
    return tuple(_inverses([math.prod(row) % PRIME for row in rows.tolist()]))


@lru_cache(maxsize=256)
def _weights(points: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Lagrange's weights for ``at``; kept, since all secrets of a round use the same points."""
    if at in points:
        return tuple(int(x == at) for x in points)
    top = math.prod(at - x for x in points) % PRIME
    below = _inverses([(at - x) % PRIME for x in points])
    return tuple(top * gap % PRIME * b % PRIME for gap, b in zip(_inverse_gaps(points), below, strict=True))


@lru_cache(maxsize=64)
def _parity(points: tuple[int, ...], threshold: int) -> tuple[int, ...]:
    """A random word orthogonal to all polynomials of degree below ``threshold`` on ``points``."""
    coefficients = [secrets.randbelow(PRIME) for _ in range(len(points) - threshold)]
    gaps = _inverse_gaps(points)
    return tuple(_value(coefficients, x) * gap % PRIME for x, gap in zip(points, gaps, strict=True))


def _inverses(values: Sequence[int]) -> list[int]:
    """Inverses modulo p of non-zero ``values`` with one inversion (Montgomery 1987)."""
    products = [1]
    for value in values:
        products.append(products[-1] * value % PRIME)
    inverse, out = pow(products[-1], -1, PRIME), []
    for value, before in zip(reversed(values), reversed(products[:-1]), strict=True):
        out.append(inverse * before % PRIME)
        inverse = inverse * value % PRIME
    return out[::-1]


def _through(points: tuple[int, ...], values: Mapping[int, int], product: _Polynomial) -> _Polynomial:
    """The polynomial of least degree through ``values``; ``product`` is ∏ (X − x)."""
    total = [0] * len(points)
    for x, gap in zip(points, _inverse_gaps(points), strict=True):
        factor, carry = values[x] * gap % PRIME, 0
        for power in range(len(points) - 1, -1, -1):  # synthetic division of product by X − x
            carry = (product[power + 1] + x * carry) % PRIME
            total[power] += factor * carry
    return _trim([value % PRIME for value in total])


def _value(polynomial: _Polynomial, at: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * at + coefficient) % PRIME
    return value


def _divide(top: _Polynomial, bottom: _Polynomial) -> tuple[_Polynomial, _Polynomial]:
    """Quotient and remainder; ``bottom`` is not zero."""
    rest, inverse = list(top), pow(bottom[-1], -1, PRIME)
    quotient = [0] * max(0, len(top) - len(bottom) + 1)
    for shift in reversed(range(len(quotient))):
        factor = rest[shift + len(bottom) - 1] * inverse % PRIME
        quotient[shift] = factor
        for power, coefficient in enumerate(bottom):
            rest[shift + power] = (rest[shift + power] - factor * coefficient) % PRIME
    return _trim(quotient), _trim(rest)


def _times(a: _Polynomial, b: _Polynomial) -> _Polynomial:
    out = [0] * (len(a) + len(b))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] += x * y
    return _trim([value % PRIME for value in out])


def _minus(a: _Polynomial, b: _Polynomial) -> _Polynomial:
    size = max(len(a), len(b))
    pairs = zip(a + [0] * (size - len(a)), b + [0] * (size - len(b)), strict=True)
    return _trim([(x - y) % PRIME for x, y in pairs])


def _trim(a: _Polynomial) -> _Polynomial:
    while a and a[-1] == 0:
        a.pop()
    return a
