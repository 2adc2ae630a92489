"""Shares of the classes from a noisy histogram, where the settings declare none (``class_prior = "released"``).

FACMIC's in-batch loss weighs classes by the counts of a batch; one record at a time that is the logarithm of their
shares on the logits (facmic.md §5.4-1). Counts are private: one histogram with a round's noise replaces them.
"""

from __future__ import annotations

import numpy as np

from fedsecure.config import RunSettings
from fedsecure.learning.adapters import Float32, Vector
from fedsecure.learning.units import UnitFeatures

COUNTS = "counts"
PURPOSE = "class counts"
# A tensor beside the adapter's: what the first round's histogram says.
SHARES = "class.shares"
# Half a record: what a class is taken to have at least, so that no logarithm is of zero.
_LEAST = 0.5


def releases_counts(settings: RunSettings) -> bool:
    """Whether the first round asks for the classes' counts."""
    return settings.method.class_prior == "released"


def class_counts(units: UnitFeatures, classes: int) -> Vector:
    """Σ over units of the shares of a unit's records by class: float64, (K,); each unit's has length 1 at most."""
    counts = np.zeros(classes)
    np.add.at(counts, units.labels[units.mask], units.weights[units.mask])
    return counts


def shares_of(counts: Vector, *, noise: float) -> Float32:
    """(K,) shares of the classes, above 0 and of sum 1, from noisy counts.

    Differences between classes are drawn back by what noise alone would make of them (James and Stein 1961, towards
    the mean): counts that noise buries give equal shares, and so no prior at all.

    Args:
        counts: float64, (K,).
        noise: standard deviation of each count's noise.
    """
    mean = counts.mean()
    away = counts - mean
    found = float(away @ away)
    trusted = max(0.0, 1 - (len(counts) - 1) * noise**2 / found) if found > 0 else 0.0
    likely = np.maximum(max(mean, _LEAST) + trusted * away, _LEAST)
    return np.asarray(likely / likely.sum(), np.float32)
