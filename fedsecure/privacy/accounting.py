"""ε, μ and attack power, always recomputed from the frozen events (privacy.md §1.2, §3; Dong, Roth and Su 2022).

One source of truth, by what the events are; the relation is ``REPLACE_SPECIAL`` throughout (zero-out: a unit's records
are replaced by nothing, and the number of units is public).

* Full batch: Gaussian mechanisms, whose composition is exactly μ-GDP with μ² = Σ steps/σ².
* Poisson sampling of a site with noise of its own: Google's dp-accounting composes privacy-loss distributions,
  pessimistically, on a grid of 1e-3.
* Poisson sampling with noise that the sites share: Rényi divergence of the sum (:mod:`fedsecure.privacy.renyi`). Where
  both kinds of sampling occur, everything is composed by Rényi divergence.

The noise added in the ring is discrete. With standard deviation σ in grid steps it equals, up to a factor e^±τ at every
point, the continuous Gaussian of variance σ² − 4 rounded at random to the lattice by a discrete Gaussian of standard
deviation 2, which is post-processing (Peikert 2010, theorem 3.1); τ = 4·exp(−8π²) < 3e-34 a coordinate. So μ is at most
``LATTICE_SLACK`` = 4/(2·256²), relatively, above what is computed from σ, since ``grid`` keeps σ at 256 steps or more;
with the usual million steps it is below 1e-11.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

from fedsecure.errors import PrivacyError
from fedsecure.messages import Event, FloatArray
from fedsecure.privacy import renyi

Adversary = Literal["colluding", "beyond"]
# Noise multiplier, sampling rate, how often, and whether the sites share the noise of a sampled step: all that ε
# depends on.
_Composition = tuple[tuple[float, float, int, bool], ...]

LATTICE_SLACK = 4 / (2 * 256**2)
_PLD_GRID = 1e-3
_NORMAL = NormalDist()


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(
            "FS-1202",
            f"delta = {delta!r}",
            expected="a number in (0, 1)",
            cure="choose δ below 1 over the units",
        )


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise PrivacyError(
            "FS-1202",
            f"{name} = {value!r}",
            expected="a finite number above 0",
            cure=f"give a positive {name}",
        )


def _log_phi(x: float) -> float:
    """ln Φ(x), by the continued fraction of Mills' ratio where erfc would underflow."""
    if x > -20:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    tail = -x
    for k in range(40, 0, -1):
        tail = -x + k / tail
    return -0.5 * x * x - 0.5 * math.log(2 * math.pi) - math.log(tail)


def gaussian_delta(mu: float, eps: float) -> float:
    """δ(ε) of a μ-GDP mechanism: Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2) (Dong, Roth and Su 2022, corollary 2.13).

    Args:
        mu: μ ≥ 0.
        eps: ε ≥ 0.

    Returns:
        δ in [0, 1].
    """
    if mu <= 0:
        return 0.0
    near, far = -eps / mu + mu / 2, -eps / mu - mu / 2
    return max(0.0, math.exp(_log_phi(near)) - math.exp(eps + _log_phi(far)))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest ε with δ(ε) ≤ delta, from above, to 1e-12 relative."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
    return _bisect(lambda eps: gaussian_delta(mu, eps) <= delta, 0.0, high, tolerance=1e-12)


def _bisect(holds: Callable[[float], bool], low: float, high: float, *, tolerance: float) -> float:
    """Smallest value for which a monotone condition holds; it holds at ``high``, and at the value
    returned."""
    while high - low > tolerance * high:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _composition(events: Iterable[Event], adversary: Adversary) -> _Composition:
    counts: Counter[tuple[float, float, bool]] = Counter()
    for event in events:
        z = event.noise_multiplier if adversary == "colluding" else event.local_noise_multiplier
        counts[(z, event.sampling_rate, shares_sampled_noise(event))] += event.steps
    return tuple(sorted((z, q, steps, shared) for (z, q, shared), steps in counts.items()))


def shares_sampled_noise(event: Event) -> bool:
    """Whether an event is Poisson-sampled and its noise is a sum of several sites' shares."""
    return event.sampling_rate < 1 and event.local_noise_multiplier < event.noise_multiplier


def accountant(events: Iterable[Event]) -> Literal["gdp", "pld", "rdp"]:
    """How ε of some events is computed: exact Gaussian DP, privacy-loss distributions, or Rényi divergence."""
    known = tuple(events)
    if any(shares_sampled_noise(event) for event in known):
        return "rdp"
    return "pld" if any(event.sampling_rate < 1 for event in known) else "gdp"


def _square(composition: _Composition) -> float:
    """μ² of the full-batch part."""
    return math.fsum(steps / z**2 for z, q, steps, _ in composition if q == 1)


def mu(events: Iterable[Event], *, adversary: Adversary = "colluding") -> float | None:
    """μ of the composition, or ``None`` if an event is Poisson-sampled (then no exact μ exists).

    Args:
        events: in any order; empty gives 0.
        adversary: ``"colluding"``: the aggregator with at most c sites; ``"beyond"``: with more than c.
    """
    composition = _composition(events, adversary)
    if any(q < 1 for _, q, _, _ in composition):
        return None
    return math.sqrt(_square(composition))


def epsilon(events: Iterable[Event], *, delta: float, adversary: Adversary = "colluding") -> float:
    """ε(δ) of the composition of all events, an upper bound.

    Args:
        events: in any order; empty gives 0.
        delta: δ in (0, 1).
        adversary: ``"colluding"``: the aggregator with at most c sites; ``"beyond"``: with more than c.

    Raises:
        PrivacyError: FS-1202 δ is outside (0, 1).
    """
    _check_delta(delta)
    return _composed_epsilon(_composition(events, adversary), delta)


@lru_cache(maxsize=4096)
def _composed_epsilon(composition: _Composition, delta: float) -> float:
    if not composition:
        return 0.0
    own = tuple(part for part in composition if not part[3])
    if len(own) < len(composition):
        # Each accountant is an upper bound of its own looseness; with the larger, a further event never lowers ε.
        return max(_composed_epsilon(own, delta), renyi.epsilon(_divergence(composition), delta))
    if all(q == 1 for _, q, _, _ in composition):
        return _gaussian_epsilon(math.sqrt(_square(composition)), delta)
    return max(0.0, float(_pld(composition).get_epsilon(delta)))


def _divergence(composition: _Composition) -> FloatArray:
    return renyi.divergence((z, q, steps) for z, q, steps, _ in composition)


@lru_cache(maxsize=64)
def _pld(composition: _Composition) -> Any:
    """dp-accounting's accountant with everything composed; the Gaussian part as one equivalent event."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    composed = PLDAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
        value_discretization_interval=_PLD_GRID,
    )
    square = _square(composition)
    if square > 0:
        composed.compose(dp_accounting.GaussianDpEvent(1 / math.sqrt(square)))
    for z, q, steps, _ in composition:
        if q < 1:
            sampled = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
            composed.compose(sampled, steps)
    return composed


@lru_cache(maxsize=64)
def _profile(composition: _Composition) -> tuple[tuple[float, float], ...]:
    """(ε, δ(ε)) for ε from 0.02 to 28."""
    grid = [0.02 * 1.12**k for k in range(65)]
    if any(shared for *_, shared in composition):
        divergences = _divergence(composition)
        return tuple((eps, renyi.delta(divergences, eps)) for eps in grid)
    return tuple(zip(grid, (float(delta) for delta in _pld(composition).get_delta(grid)), strict=True))


def mu_for_epsilon(eps: float, delta: float) -> float:
    """Largest μ whose ε(δ) does not exceed ``eps``.

    Raises:
        PrivacyError: FS-1202 ε or δ is out of range.
    """
    _check_positive("epsilon", eps)
    _check_delta(delta)
    low, high = 0.0, 1.0
    while gaussian_delta(high, eps) <= delta:
        low, high = high, high * 2
    # The bisection keeps the side where the guarantee is broken; step back to the side where it holds.
    broken = _bisect(lambda m: gaussian_delta(m, eps) > delta, low, high, tolerance=1e-13)
    found = broken * (1 - 4e-13)
    while found > 0 and _gaussian_epsilon(found, delta) > eps:
        found *= 1 - 1e-12
    return found


def calibrate(
    target_epsilon: float, delta: float, *, steps: int, sampling_rate: float = 1.0, shared: bool = False
) -> float:
    """Least noise multiplier for which ``steps`` releases stay within ``target_epsilon`` at δ.

    Exact for full batch; for Poisson sampling within 1e-4 relative, and never below the guarantee. ``shared``: the
    noise is a sum of several sites' (``noise = "distributed"``), which matters under Poisson sampling.

    Raises:
        PrivacyError: FS-1202 an argument is out of range.
    """
    _check_positive("steps", steps)
    if not 0 < sampling_rate <= 1:
        raise PrivacyError(
            "FS-1202", f"sampling rate = {sampling_rate!r}", expected="a number in (0, 1]",
            cure="1 is full batch; less is Poisson sampling",
        )  # fmt: skip
    full = math.sqrt(steps) / mu_for_epsilon(target_epsilon, delta)

    def holds(z: float) -> bool:
        return _composed_epsilon(((z, sampling_rate, steps, shared and sampling_rate < 1),), delta) <= target_epsilon

    return least_multiplier(holds, full, exact=sampling_rate == 1)


def least_multiplier(holds: Callable[[float], bool], full: float, *, exact: bool) -> float:
    """The least noise multiplier that holds, from the one that does at full batch up to rounding.

    ``exact``: full batch it is. Else within 1e-4 relative: sampling can only help, so the full-batch multiplier is
    enough, up to the accountant's pessimism.
    """
    if exact:
        while not holds(full):
            full *= 1 + 1e-12
        return full
    high = full
    while not holds(high):
        high *= 1.1
    low = high
    while holds(low):
        high, low = low, low / 2
    return _bisect(holds, low, high, tolerance=1e-4)


def attack_power(mu: float, fpr: float) -> float:
    """Largest true-positive rate of any membership attack at false-positive rate ``fpr`` against a μ-GDP
    release.

    Φ(Φ⁻¹(fpr) + μ) (Dong, Roth and Su 2022, definition 2.6). ``fpr`` in (0, 1).
    """
    return _NORMAL.cdf(_NORMAL.inv_cdf(fpr) + mu)


def attack_bound(events: Iterable[Event], fpr: float, *, adversary: Adversary = "colluding") -> float:
    """Like :func:`attack_power` for any events: exact for full batch, else the least bound of an ε(δ) curve.

    For each (ε, δ): TPR ≤ min(δ + e^ε·fpr, 1 − e^−ε(1 − δ − fpr)) (Kairouz, Oh and Viswanath 2015).
    """
    composition = _composition(events, adversary)
    if all(q == 1 for _, q, _, _ in composition):
        return attack_power(math.sqrt(_square(composition)), fpr)
    bounds = (
        min(delta + math.exp(eps) * fpr, 1 - math.exp(-eps) * (1 - delta - fpr)) for eps, delta in _profile(composition)
    )
    return float(min(1.0, *bounds))
