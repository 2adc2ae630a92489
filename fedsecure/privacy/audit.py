"""The empirical audit in three layers (privacy.md §4): replay, canaries, attack. It reaches training by callbacks only.

A replays the deterministic part with one unit left out, and tests noise and sampler alone. B plants canaries, each a
unit whose clipped gradient is C in one coordinate, flips a coin for each, and compares what leaves with what the
accountant believes: lower bounds on ε after Steinke et al. (2023), and two-sided tests of mean and variance, which
are the sharper ones. C, a membership attack, is a figure for the report. Coins come from the privacy generator.

A sound mechanism fails an audit with probability below 1e-4: B's four tests at |z| > 4.5 raise about 3e-5 false alarms
together, each test of A less than 1e-6, each bound on ε 1e-6.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedsecure.messages import Event, FloatArray
from fedsecure.privacy import accounting
from fedsecure.privacy.audit_bounds import (
    Bools,
    Membership,
    gaussian_epsilon,
    membership_attack,
    one_run_epsilon,
    rates_epsilon,
)
from fedsecure.privacy.noise import PrivacyRng

__all__ = [
    "AuditResult",
    "Bound",
    "CanaryClaim",
    "Check",
    "Membership",
    "audit_canaries",
    "check_agreement",
    "check_noise",
    "check_sampler",
    "check_sensitivity",
    "check_unchanged",
    "membership_attack",
]

ClippedSum = Callable[[Bools], FloatArray]
Draw = Callable[[int, int], FloatArray]
Sample = Callable[[int], Bools]
Observe = Callable[[Bools], FloatArray]

CONFORMANCE = 4.5
NOISE_Z = 5.1
KOLMOGOROV = 2.9
AGREEMENT = 1e-5
PRINTED_RISK = 0.05
GATE_RISK = 1e-6
_SHARP_DELTA = 1e-11


@dataclass(frozen=True, slots=True)
class Check:
    """One test: it holds if ``found`` is a number of magnitude at most ``limit``."""

    layer: Literal["A", "B"]
    name: str
    found: float
    limit: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.found) and abs(self.found) <= self.limit


@dataclass(frozen=True, slots=True)
class Bound:
    """An empirical lower bound on ε.

    Attributes:
        name: the method.
        epsilon: at 95 % confidence, for printing; a sound and tight mechanism exceeds its claim here one time in 20.
        claimed: ε of the proof at the same δ.
        certain, limit: the bound at 1 − 1e-6 and the proof's ε, both at a δ that leaves the method power at this
            confidence; the claim is refuted where the one exceeds the other.
    """

    name: str
    epsilon: float
    claimed: float
    certain: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.certain <= self.limit


@dataclass(frozen=True, slots=True)
class AuditResult:
    """All layers of one audit.

    Attributes:
        epsilon, delta: what the accountant proves for the audited steps.
        checks: layers A and B.
        bounds: empirical lower bounds on ε at the same δ.
        memberships: layer C; not part of ``passed``.
        facts: what was audited, label → value.
    """

    epsilon: float
    delta: float
    checks: tuple[Check, ...]
    bounds: tuple[Bound, ...]
    memberships: tuple[Membership, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if every check holds and no bound refutes the claim."""
        return all(check.passed for check in self.checks) and all(bound.passed for bound in self.bounds)

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the checks and bounds that failed."""
        failed = [check.name for check in self.checks if not check.passed]
        return (*failed, *(bound.name for bound in self.bounds if not bound.passed))

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of layer, test, finding, limit and verdict; proven ε stands beside every empirical one."""
        verdict = {True: "pass", False: "FAIL"}
        rows: list[tuple[str, str, str, str, str]] = [
            (c.layer, c.name, f"{c.found:.4g}", f"{c.limit:.4g}", verdict[c.passed]) for c in self.checks
        ]
        rows += [
            ("B", f"ε at least, {b.name}", f"{b.epsilon:.2f}", f"{b.claimed:.2f} proven", verdict[b.passed])
            for b in self.bounds
        ]
        for m in self.memberships:
            found = f"AUC {m.auc:.3f}, TPR {m.tpr_at_1:.1%} at 1 %, {m.tpr_at_01:.2%} at 0.1 % FPR"
            rows.append(("C", f"membership, {m.subject}", found, "–", "figure"))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; numbers that are not finite become ``None``."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        for check in checks:
            check["found"] = check["found"] if math.isfinite(check["found"]) else None
        return {
            "passed": self.passed,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "facts": dict(self.facts),
            "checks": checks,
            "bounds": [{**asdict(bound), "passed": bound.passed} for bound in self.bounds],
            "membership": [asdict(found) for found in self.memberships],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False)


# --- layer A: what must hold without any statistics, and noise and sampler on their own ---------------------------


def check_sensitivity(
    clipped_sum: ClippedSum, units: int, *, bound: float, name: str, probes: Sequence[int] | None = None
) -> Check:
    """Leave each unit out, of all units and of nothing else: the sum moves by at most ``bound`` in L2 norm.

    Args:
        clipped_sum: presence of each unit, (units,) bool → the sum, noise frozen.
        units: how many there are.
        bound: C, or Δ in grid steps.
        name: for the table.
        probes: which units to leave out; all when None.
    """
    everyone = np.ones(units, np.bool_)
    nobody = np.zeros(units, np.bool_)
    whole, empty = clipped_sum(everyone), clipped_sum(nobody)
    worst = 0.0
    for unit in range(units) if probes is None else probes:
        without, alone = everyone.copy(), nobody.copy()
        without[unit], alone[unit] = False, True
        for one, two in ((whole, clipped_sum(without)), (clipped_sum(alone), empty)):
            distance = float(np.linalg.norm(one - two)) if one.shape == two.shape else math.inf
            worst = distance if math.isnan(distance) else max(worst, distance)
    return Check("A", name, worst, bound)


def check_agreement(one: FloatArray, two: FloatArray, *, floor: float, name: str) -> Check:
    """Two ways to the same sum differ by at most 1e-5 of the larger's norm, or of ``floor``, such as C."""
    scale = max(float(np.linalg.norm(one)), float(np.linalg.norm(two)), floor)
    return Check("A", name, float(np.linalg.norm(one - two)) / scale, AGREEMENT)


def check_unchanged(one: npt.ArrayLike, two: npt.ArrayLike, *, name: str) -> Check:
    """What is not noised is the same, bit for bit, with and without a unit."""
    first, second = np.asarray(one, np.float64), np.asarray(two, np.float64)
    found = float(np.abs(first - second).max(initial=0.0)) if first.shape == second.shape else math.inf
    return Check("A", name, found, 0.0)


def check_noise(draw: Draw, *, std: float, values: int = 1 << 19) -> tuple[Check, ...]:
    """Size, shape and independence of the noise; |z| ≤ 5.1, that is 0.5 % of the standard deviation at 2^19 values.

    Args:
        draw: (client 0 or 1, step) → a step's noise, (d,) float64. Each client is a generator of its own, as after a
            restart.
        std: what the accountant believes.
        values: at least so many are drawn.
    """
    from scipy.special import ndtr

    first = draw(0, 0), draw(1, 0)
    steps = max(2, math.ceil(values / (2 * len(first[0]))))
    # Both from their first step on: generators with one seed agree only while they are in step.
    noise = np.stack([[first[client], *(draw(client, k) for k in range(1, steps))] for client in (0, 1)]) / std
    flat = noise.ravel()
    n = len(flat)
    spread = float(flat.std())
    sample = np.sort(flat[:: max(1, n >> 17)])
    place = ndtr(sample)
    at = np.arange(len(sample) + 1) / len(sample)
    distance = max(float((at[1:] - place).max()), float((place - at[:-1]).max()))
    along = flat.reshape(2, -1)
    return (
        Check("A", "noise: mean, z", float(flat.mean()) * math.sqrt(n), NOISE_Z),
        Check("A", "noise: standard deviation, z", (spread - 1) * math.sqrt(2 * n), NOISE_Z),
        Check("A", "noise: Kolmogorov–Smirnov, √n·D", distance * math.sqrt(len(sample)), KOLMOGOROV),
        Check("A", "noise: correlation of neighbours, z", _correlation(along[:, :-1], along[:, 1:]), NOISE_Z),
        Check("A", "noise: correlation of steps, z", _correlation(noise[:, :-1], noise[:, 1:]), NOISE_Z),
        Check("A", "noise: correlation of sites, z", _correlation(noise[0], noise[1]), NOISE_Z),
    )


def _correlation(one: FloatArray, two: FloatArray) -> float:
    scale = float(np.sqrt((one**2).sum() * (two**2).sum()))
    return float((one * two).sum()) / max(scale, 1e-300) * math.sqrt(one.size)


def check_sampler(sample: Sample, *, rate: float, units: int = 256, draws: int = 2000) -> tuple[Check, ...]:
    """Batch sizes must vary as a binomial's, and inclusion in one step must say nothing about the next.

    Args:
        sample: number of units → (units,) bool, called once a step.
        rate: q; at 1 everyone takes part.
    """
    if rate == 1:
        absent = sum(int((~sample(units)).sum()) for _ in range(min(draws, 50)))
        return (Check("A", "sampler: units left out of a full batch", absent, 0.0),)
    taken = np.stack([sample(units) for _ in range(draws)]).astype(np.float64)
    sizes = taken.sum(axis=1)
    spread = units * rate * (1 - rate)
    excess = (1 - 6 * rate * (1 - rate)) / spread
    centred = (taken - rate) / math.sqrt(rate * (1 - rate))
    repeats = float((centred[:-1] * centred[1:]).sum()) / math.sqrt((draws - 1) * units)
    return (
        Check("A", "sampler: batch size, z", float(sizes.mean() - units * rate) / math.sqrt(spread / draws), NOISE_Z),
        Check(
            "A",
            "sampler: variance of the batch size, z",
            float(sizes.var(ddof=1) / spread - 1) / math.sqrt((2 + excess) / draws),
            NOISE_Z,
        ),
        Check("A", "sampler: correlation of steps, z", repeats, NOISE_Z),
    )


# --- layer B: canaries ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CanaryClaim:
    """What the accountant believes about the audited steps.

    Attributes:
        epsilon, delta: the proof's.
        noise: σ, standard deviation of one step's noise over C.
        sampling_rate: q.
        steps: T.
        amplitude: what an included canary adds to its coordinate, over C; about 1.
    """

    epsilon: float
    delta: float
    noise: float
    sampling_rate: float
    steps: int
    amplitude: float = 1.0


def audit_canaries(
    observe: Observe, *, count: int, claim: CanaryClaim, rng: PrivacyRng | None = None
) -> tuple[tuple[Check, ...], tuple[Bound, ...]]:
    """Flip a coin for each canary, watch their coordinates, and compare with the claim.

    Args:
        observe: (count,) bool, which canaries are in → (T, count) float64: what left at each canary's coordinate in
            each step, less what all other units put there, over C.
        count: m canaries, ≥ 20.
        claim: the proof's numbers.
        rng: flips the coins; a fresh generator by default.

    Returns:
        the four conformance tests, and three lower bounds on ε.
    """
    included = (rng or PrivacyRng()).poisson_mask(count, 0.5)
    seen = observe(included)
    assert seen.shape == (claim.steps, count) and count >= 20
    q, steps, a = claim.sampling_rate, claim.steps, claim.amplitude
    variance = claim.noise**2
    total = seen.sum(axis=0)
    power = np.clip((2 * a * seen - a * a) / (2 * variance), -700, 700)
    score = (np.log1p(q * np.expm1(power)) if q < 1 else power).sum(axis=0)

    out_variance = steps * variance
    in_variance = out_variance + steps * a * a * q * (1 - q)
    fourth = steps * a**4 * q * (1 - q) * (1 - 6 * q * (1 - q))
    checks = (
        *_moments("in", total[included], mean=q * steps * a, variance=in_variance, fourth=fourth),
        *_moments("out", total[~included], mean=0.0, variance=out_variance, fourth=0.0),
    )
    # What is not finite fails the tests above; the bounds only need an order.
    score, total = np.nan_to_num(score), np.nan_to_num(total)
    # A one-run p-value is hardly below 2mδ over the number of right guesses, so at 1e-6 it needs a smaller δ.
    event = Event("train", "audit", claim.noise, claim.noise, q, steps)
    sharp = accounting.epsilon((event,), delta=_SHARP_DELTA)
    methods: tuple[tuple[str, Callable[..., float], FloatArray, float, float], ...] = (
        ("one run (Steinke)", one_run_epsilon, score, _SHARP_DELTA, sharp),
        ("rates (Clopper–Pearson)", rates_epsilon, score, claim.delta, claim.epsilon),
        ("Gaussian", gaussian_epsilon, total, claim.delta, claim.epsilon),
    )
    bounds = tuple(
        Bound(
            name=name,
            epsilon=method(scores, included, delta=claim.delta, risk=PRINTED_RISK),
            claimed=claim.epsilon,
            certain=method(scores, included, delta=delta, risk=GATE_RISK),
            limit=limit,
        )
        for name, method, scores, delta, limit in methods
    )
    return checks, bounds


def _moments(which: str, total: FloatArray, *, mean: float, variance: float, fourth: float) -> tuple[Check, Check]:
    """z of mean and variance of sums with the given moments; ``fourth`` is their fourth cumulant.

    The variance's z is Wilson and Hilferty's (1931), on as many degrees of freedom as its error has: plain z would
    raise several times more false alarms with few canaries.
    """
    n = len(total)
    cube = 2 / (9 * n) * (1 + fourth / (2 * variance**2))
    with np.errstate(over="ignore", invalid="ignore"):
        middle = float(total.mean() - mean) / math.sqrt(variance / n)
        spread = (float(np.cbrt(total.var(ddof=1) / variance)) - (1 - cube)) / math.sqrt(cube)
    return (
        Check("B", f"canaries {which}: mean, z", middle, CONFORMANCE),
        Check("B", f"canaries {which}: variance, z", spread, CONFORMANCE),
    )
