"""What one bounded release can say about a site's features: class sums, second moments, and how zero-shot does.

The statistics of a DP least-squares fit (privacy.md §2.4; Mehta et al. 2023, "Large scale transfer learning for
differentially private image classification"; Vu, Nguyen and others call the same thing sufficient statistics
perturbation). A record with unit input a, label y and zero-shot answer ŷ contributes one vector of length 1,

    [ w_g · pack(a aᵀ),  w_c · e_y ⊗ a,  w_h · (1[ŷ = y], 1[ŷ ≠ y]) ],   w_g² + w_c² + w_h² = 1,

where pack keeps the upper triangle with its off-diagonal entries times √2, so that lengths stay. A unit contributes
its records' mean, clipped once to length 1: so class counts never leave, and one unit moves the sum by at most 1.
No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsecure.learning.adapters import Vector
from fedsecure.learning.engines import check_fit
from fedsecure.learning.task import HeadTask, unit_rows
from fedsecure.learning.units import UnitFeatures

# Two counts need little of a unit's length: at 0.2 they cost every other figure 2 % more noise.
HITS_WEIGHT = 0.2
_CHUNK = 4096
_TIE = 1e-3


@dataclass(frozen=True, slots=True)
class Moments:
    """The layout of the statistics.

    Attributes:
        classes, dimension: K and d.
        gram_share: share in [0, 1) of a contribution's squared length, the counts' apart, that the second moments get;
            0 leaves them out.
    """

    classes: int
    dimension: int
    gram_share: float = 0.0

    @property
    def length(self) -> int:
        """p: d(d+1)/2 where there are second moments, then K·d, then 2."""
        d = self.dimension
        return (d * (d + 1) // 2 if self.gram_share else 0) + self.classes * d + 2

    @property
    def weights(self) -> tuple[float, float, float]:
        """w_g, w_c and w_h."""
        rest = 1 - HITS_WEIGHT**2
        return math.sqrt(rest * self.gram_share), math.sqrt(rest * (1 - self.gram_share)), HITS_WEIGHT


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Sums over units in their own scale, with the standard deviation of each entry's noise.

    Attributes:
        class_sums: (K, d), Σ e_y ⊗ a.
        gram: (d, d) symmetric, Σ a aᵀ, or None; its noise is ``gram_noise`` on the diagonal and 1/√2 of it beside.
        hits, misses: of zero-shot.
        class_noise, gram_noise, count_noise: standard deviations.
    """

    class_sums: Vector
    gram: Vector | None
    hits: float
    misses: float
    class_noise: float
    gram_noise: float
    count_noise: float


def moment_sum(task: HeadTask, units: UnitFeatures, layout: Moments) -> Vector:
    """Σ over units of the clipped mean contribution: float64, shape (layout.length,); each unit's has length at most 1.

    A record whose features are not finite counts as the zero vector, so that it cannot stop the run.

    Args:
        task: public constants; its centre and prior.
        units: U units of up to m records.
        layout: of the vector.

    Raises:
        ModelError: FS-1638 for features of another width or labels outside the class list.
    """
    check_fit(task, units)
    d, k = layout.dimension, layout.classes
    prior, centre = task.prior, np.asarray(task.centre, np.float64)
    gram_weight, class_weight, hits_weight = layout.weights
    gram, sums, hits = np.zeros((d, d)), np.zeros((k, d)), np.zeros(2)
    for start in range(0, len(units), _CHUNK):
        part = units.select(slice(start, start + _CHUNK))
        rows = np.asarray(part.features, np.float64)
        inputs = _inputs(np.where(np.isfinite(rows).all(axis=-1, keepdims=True), rows, 0.0), centre)
        right = _right(inputs @ prior.T, part.labels)
        cosines = inputs @ inputs.swapaxes(1, 2)
        alike = part.labels[:, :, None] == part.labels[:, None, :]
        both = right[:, :, None] * right[:, None, :] + (1 - right)[:, :, None] * (1 - right)[:, None, :]
        products = gram_weight**2 * cosines**2 + class_weight**2 * alike * cosines + hits_weight**2 * both
        weights = part.weights
        lengths = np.sqrt(np.maximum(np.einsum("ui,uij,uj->u", weights, products, weights), 0.0))
        weights = weights / np.maximum(lengths, 1.0)[:, None]
        flat, scaled = inputs[part.mask], weights[part.mask]
        weighted = flat * scaled[:, None]
        np.add.at(sums, part.labels[part.mask], weighted)
        hits += scaled @ np.stack([right[part.mask], 1 - right[part.mask]], axis=1)
        if layout.gram_share:
            gram += weighted.T @ flat
    pieces = [gram_weight * _pack(gram)] if layout.gram_share else []
    return np.concatenate([*pieces, class_weight * sums.ravel(), hits_weight * hits])


def read_moments(values: Vector, layout: Moments, *, noise: float) -> Statistics:
    """The statistics in a sum of :func:`moment_sum`.

    Args:
        values: float64, shape (layout.length,).
        layout: its layout.
        noise: standard deviation of each entry's noise, for a contribution of length 1.
    """
    d, k = layout.dimension, layout.classes
    gram_weight, class_weight, hits_weight = layout.weights
    packed, sums, hits = np.split(values, [layout.length - 2 - k * d, layout.length - 2])
    return Statistics(
        class_sums=sums.reshape(k, d) / class_weight,
        gram=_unpack(packed / gram_weight, d) if layout.gram_share else None,
        hits=float(hits[0] / hits_weight),
        misses=float(hits[1] / hits_weight),
        class_noise=noise / class_weight,
        gram_noise=noise / gram_weight if layout.gram_share else math.inf,
        count_noise=noise / hits_weight,
    )


def _right(cosines: Vector, labels: npt.NDArray[np.int64]) -> Vector:
    """1 where the label's cosine is the largest, 0 where it is not, and a slope 10^-3 wide between.

    A step would turn the last bit of a matrix product, which may depend on the other records, into a whole count.
    """
    own = np.take_along_axis(cosines, labels[..., None], axis=-1)[..., 0]
    others = cosines.copy()
    np.put_along_axis(others, labels[..., None], -np.inf, axis=-1)
    return np.asarray(np.clip(0.5 + (own - others.max(axis=-1)) / _TIE, 0.0, 1.0), np.float64)


def _inputs(rows: Vector, centre: Vector) -> Vector:
    """a = unit(unit(x) − centre); a zero row stays zero, so that a broken record says nothing."""
    lengths = np.abs(rows).max(axis=-1, keepdims=True, initial=0.0)
    unit = unit_rows(rows / np.where(lengths > 0, lengths, 1.0))
    return unit_rows(unit - centre) * (lengths > 0) if centre.any() else unit


def _pack(symmetric: Vector) -> Vector:
    upper = np.triu_indices(symmetric.shape[0])
    return np.asarray(symmetric[upper] * np.where(upper[0] == upper[1], 1.0, math.sqrt(2)), np.float64)


def _unpack(packed: npt.NDArray[np.float64], dimension: int) -> Vector:
    upper = np.triu_indices(dimension)
    values = packed / np.where(upper[0] == upper[1], 1.0, math.sqrt(2))
    full = np.zeros((dimension, dimension))
    full[upper] = values
    full[upper[::-1]] = values
    return full
