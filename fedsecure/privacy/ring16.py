"""Segments for the ring of 16 bits, and the rounding of single records that their coarse grid calls for (secagg.md
§4.1 item 2, §4.2).

Sixteen bits leave a bound Δ of some thousand steps. Rounding a site's sum once costs √d + 64 steps of
sensitivity, which at d = 10^5 is a sixth of that. Where a method can, it rounds every record by itself
(``rounding="record"``, :func:`sum_records`): stochastic, without bias, drawn again until the integer norm is at
most Δ (Kairouz, Liu and Steinke, ICML 2021, theorem 1 with β = e^-1/2), cut down exactly otherwise. Then ‖v‖ ≤ Δ
is a fact about integers, which no float error can break.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedsecure.errors import PrivacyError
from fedsecure.messages import FloatArray, Segment
from fedsecure.privacy.grid import LEAST_STD, check_finite, check_numbers, check_segment, from_grid
from fedsecure.privacy.noise import PrivacyRng
from fedsecure.privacy.rotation import rotation

Integers = npt.NDArray[np.int64]
Rounding = Literal["sum", "record"]

RING_BITS = 16
_WRAP_LOG2 = -40.0
_CLIP_SLACK = 1e-5
_SUM_SLACK = 64
_MOST_INFLATION = 2.0
_LITTLE_INFLATION = 1.02
_REDRAWS = 3
_ROWS = 1 << 22  # coordinates rounded at a time


def ring16_segment(
    name: str,
    length: int,
    *,
    clip_norm: float,
    noise_multiplier: float,
    honest: int,
    sites: int,
    units: int,
    rotation_seed: bytes,
    rounding: Rounding,
) -> Segment:
    """A rotated segment of a query with ``ring_bits=16`` whose noise the sites share.

    Δ is the largest bound for which κ standard deviations of everybody's noise and the largest rotated signal fit
    2^15: Δ = (2^15 − 1)/(κ z' + ρ) with z' = z·√(n/honest) and κ = √(2 ln(2d·2^40)), so that the sum wraps with
    probability 2^-40 at most. The signal of n·units aligned vectors has coordinates of about
    ρ = n·units·√(2 ln 2d)/√d after the rotation; what exceeds it is clamped, which costs accuracy and never privacy.

    Args:
        name, length: of the segment; d = ``length``.
        clip_norm: C, the L2 norm a unit's vector is clipped to.
        noise_multiplier: z, standard deviation over Δ of the honest sites' noise together.
        honest: u_min − c.
        sites: n.
        units: number of units at a site whose vectors are expected to be aligned, at most; ≥ 1.
        rotation_seed: 32 public bytes, fresh for each query.
        rounding: ``"sum"`` where the method returns a plain sum, ``"record"`` only where it goes through
            :func:`sum_records`.

    Raises:
        PrivacyError: FS-1211 a number is out of range or the noise is below 256 steps a site; FS-1214 sixteen bits
            are too few; FS-1206 the sum may wrap.
    """
    assert units >= 1
    check_numbers(name, clip_norm=clip_norm, noise_multiplier=noise_multiplier, honest=honest, sites=sites)
    room = 2 ** (RING_BITS - 1) - 1
    deviations = _deviations(length)
    signal = sites * units * _spread(length)
    total = noise_multiplier * math.sqrt(sites / honest)
    bound = math.floor(room / (deviations * total + signal))
    # Rounding K and σ² up takes a little of the room; give it back.
    while bound > 0:
        clamp = math.ceil(signal * bound / sites)
        variance = Fraction(math.ceil((Fraction(noise_multiplier) * bound) ** 2 / honest))
        left = room - sites * clamp
        if left > 0 and left >= deviations * math.sqrt(sites * variance):
            break
        bound -= 1
    norm = clip_room(bound, length, rounding=rounding) if bound > 0 else 0.0
    if norm * _MOST_INFLATION < bound or norm <= 0:
        raise PrivacyError(
            "FS-1214", f"segment {name!r}: a bound of {bound} steps for {length} coordinates",
            expected="a bound well above √d, so that rounding does not outweigh the clip norm",
            cure="use ring_bits = 32, fewer units a step, or rounding of single records",
        )  # fmt: skip
    segment = Segment(name, length, clip_norm / norm, bound, clamp, variance, rotation_seed)
    check_segment(segment, sites, RING_BITS)
    return segment


def aligned_units(
    length: int, *, noise_multiplier: float, honest: int, sites: int, units: int, rounding: Rounding
) -> int:
    """How many aligned units of a site a segment can make room for while rounding stays cheap, at most ``units``.

    Room for a signal is taken from the bound Δ. This is the largest number that leaves Δ within 2 % of the clip norm
    in steps, and the noise as fine as it must be; 1 where none does. Units beyond it that all point one way are
    clamped: accuracy, never privacy.

    Args:
        length, noise_multiplier, honest, sites, rounding: as for :func:`ring16_segment`.
        units: the largest declared number of units at a site.
    """
    least = 1
    while clip_room(least, length, rounding=rounding) * _LITTLE_INFLATION < least:
        least *= 2
    low = least // 2
    while least - low > 1:
        middle = (least + low) // 2
        cheap = clip_room(middle, length, rounding=rounding) * _LITTLE_INFLATION >= middle
        least, low = (middle, low) if cheap else (least, middle)
    # A hundredth more than the least noise: the segment's bound is rounded down.
    least = max(least, math.ceil(1.01 * LEAST_STD * math.sqrt(honest) / noise_multiplier))
    noise = _deviations(length) * noise_multiplier * math.sqrt(sites / honest)
    room = ((1 << RING_BITS - 1) - 1) / least - noise
    return max(1, min(units, math.floor(room / (sites * _spread(length)))))


def _deviations(length: int) -> float:
    """κ: so many standard deviations are exceeded by none of d coordinates but with probability 2^-40."""
    return math.sqrt(2 * (math.log(2 * length) - _WRAP_LOG2 * math.log(2)))


def _spread(length: int) -> float:
    """The largest coordinate, about, of a rotated vector of length 1."""
    return min(1.0, math.sqrt(2 * math.log(2 * length) / length))


def clip_room(bound: int, length: int, *, rounding: Rounding) -> float:
    """The clip norm, in grid steps, that a bound Δ leaves room for; 0 if none.

    ``"sum"``: Δ = C/γ·(1 + 1e-5) + √d + 64. ``"record"``: the larger of C/γ = Δ − √d and the root of
    (C/γ)² + C/γ + d/4 + √d/2 = Δ² (Kairouz, Liu and Steinke, ICML 2021), each less 1e-5 for the clip's own error.
    """
    root = math.sqrt(length)
    if rounding == "sum":
        norm = bound - root - _SUM_SLACK
    else:
        under = 1 + 4 * (bound**2 - length / 4 - root / 2)
        norm = max(bound - root, (math.sqrt(under) - 1) / 2 if under > 0 else 0.0)
    return max(0.0, norm / (1 + _CLIP_SLACK))


def round_records(steps: FloatArray, *, bound: int, rng: PrivacyRng) -> Integers:
    """Round vectors to integers without bias, each of exact integer norm at most ``bound``.

    A row whose rounded norm is too large is drawn again up to three times, then cut: v ← trunc(v·Δ/‖v‖).

    Args:
        steps: float64, shape (records, d), in grid steps; rows longer than Δ are scaled down first.
        bound: Δ ≥ 1, below 2^31.
        rng: the privacy generator.

    Returns:
        int64, shape (records, d), every row with Σ v² ≤ Δ².

    Raises:
        PrivacyError: FS-1207 a value is not finite.
    """
    assert steps.ndim == 2 and 1 <= bound < 1 << 31
    check_finite(steps, "a record's vector")
    largest = np.abs(steps).max(axis=1, initial=0.0)
    norms = largest * np.linalg.norm(steps / np.where(largest > 0, largest, 1.0)[:, None], axis=1)
    fitted = steps * np.minimum(1.0, bound / np.maximum(norms, 1e-300))[:, None]
    below = np.floor(fitted)
    chance = fitted - below
    out = np.empty(steps.shape, dtype=np.int64)
    rows = np.arange(len(steps))
    for _ in range(1 + _REDRAWS):
        draws = rng.uniform(chance[rows].size).reshape(-1, steps.shape[1])
        out[rows] = below[rows].astype(np.int64) + (draws <= chance[rows])
        rows = rows[_squares(out[rows]) > bound**2]
        if not len(rows):
            return out
    for row in rows:
        scale = bound / math.sqrt(int(_squares(out[row])))
        cut = np.trunc(out[row] * scale).astype(np.int64)
        while int(_squares(cut)) > bound**2:  # a float just above an integer
            scale *= 1 - 2.0**-20
            cut = np.trunc(out[row] * scale).astype(np.int64)
        out[row] = cut
    return out


def sum_records(records: Iterable[FloatArray], segment: Segment, *, rng: PrivacyRng) -> FloatArray:
    """The sum of records, rotated and rounded one by one, as real values that the door encodes without a change.

    Args:
        records: float64 vectors of shape (d,), each of norm at most the clip norm of the segment; taken in blocks, so
            that they need not be in memory together.
        segment: made with ``rounding="record"``.
        rng: the privacy generator.

    Returns:
        float64, shape (d,): :func:`fedsecure.privacy.grid.round_to_grid` gives back the integer sum exactly (up to the
        clamp), and one record moves that by at most Δ in L2 norm.

    Raises:
        PrivacyError: FS-1207 a value is not finite.
    """
    total = np.zeros(segment.length, dtype=np.int64)
    count = max(1, _ROWS // segment.length)
    waiting = iter(records)
    while block := list(islice(waiting, count)):
        rows = np.stack(block)
        assert rows.shape == (len(block), segment.length)
        if segment.rotation_seed is not None:
            rows = rotation(segment.rotation_seed, segment.length).forward(rows)
        total += round_records(rows / segment.grid, bound=segment.bound, rng=rng).sum(axis=0)
    return from_grid(total, segment)


def _squares(vectors: Integers) -> Integers:
    """Σ v² along the last axis, exact: |v| is below 2^31, and rows are no longer than Δ + √d."""
    return np.asarray(np.einsum("...i,...i->...", vectors, vectors), dtype=np.int64)
