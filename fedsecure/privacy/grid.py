"""From real sums to ring integers and back: grid, sensitivity bound, noise share and clamp (secagg.md
§4.1–4.2, 4.5).

A site sums its units' clipped vectors in float64 and rounds once. Each unit moves the rounded sum by at most
Δ = C/γ·(1 + 1e-5) + √d + 64 steps in L2: its clipped vector with the clip's own float32 error, the change of
the rounding errors (at most one step a coordinate), and the error of the float64 sums. Of n units of m records in
B blocks of 256 records, one unit that is replaced in its place changes its own block and B additions behind it, so by
at most 2·B·n·2^-53·C, below 64 steps of C/2^24 where n²·m ≤ 2^42, which settings must keep; on the grid C/2^20 up to
half a million units in any order of summation. Clamping a coordinate to [−K, K] is 1-Lipschitz:
it can cost accuracy, never privacy. A segment with a rotation seed is rotated before it is rounded, and turned
back after the sum is decoded; norms and sensitivities stay what they are.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from fedsecure.errors import PrivacyError
from fedsecure.messages import FloatArray, Segment
from fedsecure.privacy.noise import PrivacyRng
from fedsecure.privacy.rotation import rotation

Integers = npt.NDArray[np.int64]

RING_BITS = 32
_FINEST = 20
_CLIP_SLACK = 1e-5
_PIECE = 1 << 16
_SUM_SLACK = 64
_MAX_WRAP_LOG2 = -40.0
# From here on a discrete Gaussian's δ(ε) is within 1 % of the continuous one's: the sums over the lattice and the
# integrals differ by at most half a step times the tail's decay rate, about 4.3/σ at δ = 1e-5.
LEAST_STD = 256


def distributed_segment(
    name: str,
    length: int,
    *,
    clip_norm: float,
    noise_multiplier: float,
    honest: int,
    sites: int,
    units: int,
) -> Segment:
    """A segment whose noise the sites share: any ``honest`` sites together give the whole of it.

    Args:
        name, length: of the segment; d = ``length``.
        clip_norm: C, the L2 norm a unit's vector is clipped to.
        noise_multiplier: z, standard deviation over Δ of the honest sites' noise together.
        honest: u_min − c; each site's variance is (zΔ)²/honest, rounded up to an integer.
        sites: n, the number of sites in the sum; K = ⌊2^30/n⌋.
        units: the largest declared number of units at a site. The grid γ = C/2^20 is coarsened until so many vectors
            that all point along one coordinate fit the clamp, as far as the slack in Δ stays below 1/32.

    Raises:
        PrivacyError: FS-1211 a number is out of range; FS-1206 the noise would wrap around the ring.
    """
    check_numbers(name, clip_norm=clip_norm, noise_multiplier=noise_multiplier, honest=honest, sites=sites)
    clamp = (1 << 30) // sites
    coarsest = math.ceil(math.log2(32 * (math.sqrt(length) + _SUM_SLACK)))
    fine_enough = math.ceil(math.log2(LEAST_STD * math.sqrt(honest) / noise_multiplier))
    coarsest = min(_FINEST, max(coarsest, fine_enough))
    finest = min(_FINEST, math.floor(math.log2(clamp / max(1, units))))
    for exponent in range(max(finest, coarsest), coarsest - 1, -1):
        bound = math.ceil(2**exponent * (1 + _CLIP_SLACK) + math.sqrt(length) + _SUM_SLACK)
        variance = Fraction(math.ceil((Fraction(noise_multiplier) * bound) ** 2 / honest))
        segment = Segment(name, length, clip_norm / 2**exponent, bound, clamp, variance)
        if wrap_probability_log2(segment, sites) <= _MAX_WRAP_LOG2:
            check_segment(segment, sites)
            return segment
    raise _wraps(segment, sites)


def check_numbers(name: str, *, clip_norm: float, noise_multiplier: float, honest: int, sites: int) -> None:
    """FS-1211 where C or z is no finite number above 0, or u_min − c is not between 1 and n."""
    if not (math.isfinite(clip_norm) and clip_norm > 0 and math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise PrivacyError(
            "FS-1211", f"segment {name!r} with clip norm {clip_norm!r} and noise multiplier {noise_multiplier!r}",
            expected="finite numbers above 0", cure="mend max_grad_norm and noise_multiplier",
        )  # fmt: skip
    if not 1 <= honest <= sites:
        raise PrivacyError(
            "FS-1211", f"{honest} honest of {sites} sites", expected="1 ≤ u_min − c ≤ number of sites",
            cure="mend colluders and min_survivors in [rounds]",
        )  # fmt: skip


def exact_segment(name: str, length: int, *, grid: float, sites: int, clamp: int | None = None) -> Segment:
    """A segment the door adds no noise to: values that are already private (``noise="local"``), or public.

    Args:
        name, length: of the segment.
        grid: γ, the real value of one step.
        sites: n, the number of sites in the sum.
        clamp: K in steps; ⌊2^30/n⌋ if not given.

    Raises:
        PrivacyError: FS-1206 the clamped values of all sites do not fit the ring.
    """
    segment = Segment(name, length, grid, 0, (1 << 30) // sites if clamp is None else clamp)
    check_segment(segment, sites)
    return segment


def wrap_probability_log2(segment: Segment, sites: int, ring_bits: int = RING_BITS) -> float:
    """log2 of a bound on the probability that the sum of ``sites`` vectors wraps around the ring (secagg.md
    §4.2). The clamp K stands for the largest signal, rotated or not."""
    room = 2 ** (ring_bits - 1) - 1 - sites * segment.clamp
    if room <= 0:
        return 0.0
    if segment.noise_variance == 0:
        return -math.inf
    exponent = room**2 / (2 * sites * float(segment.noise_variance))
    return float(min(0.0, math.log2(2 * segment.length) - exponent / math.log(2)))


def check_segment(segment: Segment, sites: int, ring_bits: int = RING_BITS) -> None:
    """Refuse a segment whose sum could wrap around, or whose noise is too fine for the accountant.

    Raises:
        PrivacyError: FS-1206 wrap-around more likely than 2^-40; FS-1211 noise below 256 grid steps; FS-1212
        rotation in the ring of 32 bits.
    """
    if segment.rotation_seed is not None and ring_bits == RING_BITS:
        raise PrivacyError(
            "FS-1212", f"segment {segment.name!r} asks for a rotation", expected="none: the ring has 32 bits",
            cure="use the aggregator and the sites in the same version",
        )  # fmt: skip
    if wrap_probability_log2(segment, sites, ring_bits) > _MAX_WRAP_LOG2:
        raise _wraps(segment, sites, ring_bits)
    if 0 < segment.noise_variance < LEAST_STD**2:
        raise PrivacyError(
            "FS-1211", f"segment {segment.name!r} has noise of {segment.noise_std:.3g} grid steps a site",
            expected=f"at least {LEAST_STD} steps", cure="choose a finer grid or a larger noise multiplier",
        )  # fmt: skip


def _wraps(segment: Segment, sites: int, ring_bits: int = RING_BITS) -> PrivacyError:
    log2 = wrap_probability_log2(segment, sites, ring_bits)
    return PrivacyError(
        "FS-1206",
        f"segment {segment.name!r}: the sum of {sites} sites wraps the ring with probability 2^"
        f"{log2:.0f} (clamp {segment.clamp}, noise {segment.noise_std:.3g} steps)",
        expected="at most 2^-40",
        cure="ask for a larger ε or fewer rounds, so that the noise is smaller",
    )


def segment_clip_norm(segment: Segment) -> float:
    """The clip norm C that a noised segment's bound leaves room for, a real number; 0 if none.

    A site half clips to no more than this, so that an aggregator cannot ask for a bound that its C exceeds.
    """
    room = segment.bound - math.sqrt(segment.length) - _SUM_SLACK
    return max(0.0, room / (1 + _CLIP_SLACK) * segment.grid)


def round_to_grid(values: FloatArray, segment: Segment) -> Integers:
    """Real values to grid steps: rotated where the segment says so, nearest integer, clamped to [−K, K].

    Args:
        values: float64, shape (segment.length,).

    Raises:
        PrivacyError: FS-1208 wrong length; FS-1207 a value is not finite.
    """
    if values.shape != (segment.length,):
        raise PrivacyError(
            "FS-1208", f"{values.shape} values for segment {segment.name!r}", expected=f"({segment.length},)",
            cure="the method's two halves disagree: install the same version everywhere",
        )  # fmt: skip
    check_finite(values, f"segment {segment.name!r}")
    with np.errstate(over="ignore"):
        steps = np.rint(_rotated(values, segment) / segment.grid)
    return np.clip(steps, -segment.clamp, segment.clamp).astype(np.int64)


def check_finite(values: FloatArray, what: str) -> None:
    """FS-1207 where a value is NaN or infinite."""
    if not np.isfinite(values).all():
        raise PrivacyError(
            "FS-1207", f"{what} holds NaN or infinity", expected="finite numbers only",
            cure="a unit whose gradient is not finite must be zeroed by the engine: report this as a defect",
        )  # fmt: skip


def from_grid(steps: Integers, segment: Segment) -> FloatArray:
    """Grid steps to real values, turned back where the segment is rotated: float64, shape (segment.length,)."""
    values = steps.astype(np.float64) * segment.grid
    seed = segment.rotation_seed
    return values if seed is None else rotation(seed, segment.length).inverse(values)


def _rotated(values: FloatArray, segment: Segment) -> FloatArray:
    seed = segment.rotation_seed
    if seed is None:
        return values
    # Scaled first, so that sums of huge values do not overflow in the rotation.
    top = float(np.abs(values).max())
    turned = rotation(seed, segment.length).forward(values / top if top else values)
    return turned * top if top else turned


def privatise_on_grid(
    clipped_sum: FloatArray, *, clip_norm: float, noise_multiplier: float, rng: PrivacyRng
) -> FloatArray:
    """One local step's private sum: clipped sum and Gaussian noise, both on the integer grid C/2^24
    (privacy.md §3.8).

    The support of the result does not depend on the data, which closes the holes of floating-point noise
    (Mironov 2012).

    Args:
        clipped_sum: float64, shape (d,): the sum of the units' vectors, each of norm at most ``clip_norm``.
        clip_norm: C.
        noise_multiplier: z; the noise's standard deviation is z·Δ steps with Δ = 2^24·(1 + 1e-5) + √d + 64.
        rng: the privacy generator.

    Raises:
        PrivacyError: FS-1207 a value is not finite.
    """
    grid = clip_norm / 2**24
    bound = 2**24 * (1 + _CLIP_SLACK) + math.sqrt(clipped_sum.size) + _SUM_SLACK
    std = noise_multiplier * bound
    values = rng.gaussian(clipped_sum.size, std)
    room = np.empty(min(_PIECE, clipped_sum.size))
    # In pieces that a core's cache holds from the first operation to the last.
    for start in range(0, clipped_sum.size, _PIECE):
        exact, noise = clipped_sum[start : start + _PIECE], values[start : start + _PIECE]
        np.rint(noise, out=noise)
        steps = np.multiply(exact, 1 / grid, out=room[: exact.size])
        noise += np.rint(steps, out=steps)
        noise *= grid
        check_finite(noise, "a clipped sum")
    return values
