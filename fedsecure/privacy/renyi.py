"""Rényi privacy of noise that several sites add together, with Poisson sampling (privacy.md, "Sampling"; §1.2).

A sum of discrete Gaussians is no discrete Gaussian, but almost: by Kairouz, Liu and Steinke (ICML 2021, theorem 1) the
sum of n of them with standard deviation σ each satisfies D_α ≤ α/2·(Δ²/(nσ²) + τd/2), τ ≤ 10·n·exp(−π²σ²). The grid
keeps σ at 256 steps or more, where :func:`sum_slack_log10` puts τd/2 below 10^-280000: the continuous Gaussian's
divergence bounds the sum's at every order, to the last bit of a float. One discrete Gaussian needs no slack at all
(Canonne, Kamath and Steinke 2020, proposition 5).

Sampling a unit with probability q is amplified order by order. For a whole α the expansion of Mironov, Talwar and Zhang
(2019, §3.3) needs only moments of the likelihood ratio of whole order, which D_k bounds; reflection maps the lattice
onto itself and swaps the two neighbours, so that the other direction is no larger (their theorem 5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from fedsecure.messages import FloatArray

ORDERS = np.array([*range(2, 64), *range(64, 256, 8), *range(256, 2049, 64)], dtype=np.float64)


def sum_slack_log10(std: float, *, sites: int, length: int) -> float:
    """log10 of what noise of several sites adds to 1/z²: τd/2 ≤ 5·n·d·exp(−π²σ²).

    Args:
        std: σ of a single site's noise, in grid steps.
        sites: n ≥ 1.
        length: d ≥ 1, coordinates.
    """
    return math.log10(5 * sites * length) - math.pi**2 * std**2 / math.log(10)


@lru_cache(maxsize=256)
def _sampled(z: float, q: float) -> tuple[float, ...]:
    """D_α at every order for one Poisson-sampled step of noise multiplier z."""
    found = []
    for order in ORDERS.astype(int):
        k = np.arange(order + 1, dtype=np.float64)
        steps = np.log(np.arange(1, order + 1, dtype=np.float64))
        factorials = np.concatenate([[0.0], np.cumsum(steps)])
        binomials = factorials[-1] - factorials - factorials[::-1]
        terms = binomials + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * z * z)
        top = float(terms.max())
        # log Σ is positive by Jensen's inequality; a rounding error of the sum must not make it negative.
        found.append(max(0.0, top + math.log(math.fsum(np.exp(terms - top)))) / (int(order) - 1))
    return tuple(found)


def divergence(steps: Iterable[tuple[float, float, int]]) -> FloatArray:
    """Rényi divergence of a composition at each of ``ORDERS``, an upper bound.

    Args:
        steps: (noise multiplier z > 0, sampling rate q in (0, 1], how often).
    """
    total = np.zeros(len(ORDERS))
    for z, q, count in steps:
        total += count * (ORDERS / (2 * z * z) if q == 1 else np.array(_sampled(z, q)))
    return total


def epsilon(divergences: FloatArray, delta: float) -> float:
    """ε(δ): least D_α + ln((α−1)/α) − (ln δ + ln α)/(α−1) (Canonne, Kamath and Steinke 2020, proposition 12)."""
    bounds = divergences + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(bounds.min()))


def delta(divergences: FloatArray, eps: float) -> float:
    """δ(ε), the same bound solved for δ."""
    bounds = (ORDERS - 1) * (divergences - eps + np.log1p(-1 / ORDERS)) - np.log(ORDERS)
    return math.exp(min(0.0, float(bounds.min())))
