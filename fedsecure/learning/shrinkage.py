"""From noisy statistics to a residual head that is worth its noise: never a step further from zero-shot than pays.

Everything here is post-processing of one DP release: it costs no privacy. Each rule follows the noise that the public
numbers predict. The direction of a class is its noisy sum without the direction all classes share; its length is put
right by empirical Bayes (Efron and Morris 1973); and how far the head leaves zero-shot is :func:`weight`, a
function of the predicted signal-to-noise and of how often zero-shot is right, which the release tells as well.
"""

from __future__ import annotations

import math

import numpy as np

from fedsecure.learning.adapters import Vector
from fedsecure.learning.moments import Moments, Statistics

# Squared length of a class's mean direction, times which the squared class size is the power of its sum: between the
# 0.43 of centred and the 0.18 of uncentred CLIP ViT-B/32 features.
_CLASS_POWER = 0.3
# A regularisation of twice the noise's operator norm; between 0.3 and 3 it hardly matters.
_RIDGE = 2.0


def class_signal(layout: Moments, *, units: float, noise: float) -> float:
    """s: predicted length of a class's sum over the standard deviation of the noise in each entry; public numbers only.

    Args:
        layout: of the statistics.
        units: declared units over all sites.
        noise: standard deviation of the sum's noise, for a contribution of length 1.
    """
    return math.sqrt(_CLASS_POWER) * units / layout.classes * layout.weights[1] / noise


def weight(signal: float, error: float) -> float:
    """η: length of a class's direction beside the zero-shot rows, whose length is 1; 0 where there is no signal.

    As the prior's own error e grows, so does what data may say: where the classes' directions are mostly noise
    η = 0.0105 s⁴/(s² + 4)·min(1, 5e), else 1.25 s·e^1.5, at most 30 e^1.5, with a smooth transition. The constants were
    chosen on validation rows of CLIP ViT-B/32 features (UCF101, Caltech101, also with text embeddings made worse).

    Args:
        signal: s of :func:`class_signal`, ≥ 0.
        error: share of units that zero-shot gets wrong, in [0, 1].
    """
    trust = error**1.5
    terms = (0.0105 * signal**4 / (signal**2 + 4) * min(1.0, 5 * error), 1.25 * signal * trust, 30 * trust)
    return 0.0 if min(terms) <= 0 else 1 / math.sqrt(math.fsum(term**-2 for term in terms))


def zero_shot_error(statistics: Statistics, *, units: float) -> float:
    """Share of units that zero-shot gets wrong, less three standard deviations of its noise: in doubt it is right.

    Zero means either a prior without errors or noise that hides them, and then nothing should be learnt.
    """
    total = max(statistics.hits + statistics.misses, 0.25 * units)
    return min(max((statistics.misses - 3 * statistics.count_noise) / total, 0.0), 1.0)


def prototype_directions(statistics: Statistics, *, units: float) -> Vector:
    """Class sums without their common direction, each divided by its estimated length: (K, d) float64.

    The squared lengths less d·σ² are noisy; they are drawn towards their mean as far as noise explains their
    spread, and that mean towards the predicted one.
    """
    sums, noise = statistics.class_sums, statistics.class_noise
    classes, dimension = sums.shape
    common = sums.sum(axis=0)
    common = common / max(float(np.linalg.norm(common)), 1e-300)
    rows = sums - np.outer(sums @ common, common)
    predicted = _CLASS_POWER * (units / classes) ** 2
    power = (rows**2).sum(axis=1) - dimension * noise**2
    spread = 2 * dimension * noise**4 + 4 * noise**2 * predicted
    prior = (0.6 * predicted) ** 2
    mean = predicted + (float(power.mean()) - predicted) * prior / (prior + spread / classes)
    mean = max(mean, 0.2 * predicted)
    between = max(float(power.var()) - spread, (0.2 * mean) ** 2)
    power = mean + (power - mean) * between / (between + spread)
    return np.asarray(rows / np.sqrt(np.maximum(power, 0.25 * mean))[:, None], np.float64)


def ridge_directions(directions: Vector, statistics: Statistics, *, units: float) -> Vector:
    """Directions times λ(G + λI)⁻¹, G being the second moments with negative eigenvalues set to zero.

    That is the least-squares solution with a penalty λ on the distance from zero-shot. λ is twice the operator norm
    √(2d)·σ of the noise in G plus the mean eigenvalue units/d, so that this tends to the identity as noise grows. The
    overall length stays that of ``directions``.

    Args:
        directions: (K, d) of :func:`prototype_directions`.
        statistics: with second moments.
        units: declared units over all sites.
    """
    assert statistics.gram is not None, "the layout has second moments"
    dimension = len(statistics.gram)
    penalty = _RIDGE * statistics.gram_noise * math.sqrt(2 * dimension) + units / dimension
    values, vectors = np.linalg.eigh(statistics.gram)
    shrunk = (directions @ vectors * (penalty / (np.maximum(values, 0.0) + penalty))) @ vectors.T
    length = float(np.linalg.norm(shrunk))
    return np.asarray(shrunk * (float(np.linalg.norm(directions)) / length if length > 0 else 0.0), np.float64)
