"""The gradients of a classifier, class by class, in closed form and bounded a unit: what CLIP2FL asks of sites.

CLIP2FL (arXiv 2312.08648), equation 3: for each class the cross-entropy's gradient in a given classifier. For one
record of class c it is (p − e_c) ⊗ [z; 1], so forward passes are enough and its norm is ‖p − e_c‖·√(‖z‖² + 1).

The published form sends class means, and only of the classes a site holds, which tells which these are and, for a class
of one record, that record's very feature. Here a unit's gradients over all classes together are clipped once, and their
*sums* fill one tensor for all classes: adding a unit moves it by at most C_g, whatever class it is of, so it is noised
as one Gaussian release. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedsecure.learning.adapters import Vector
from fedsecure.learning.classifier import Classifier, Floats, unfit
from fedsecure.learning.units import UnitFeatures

Rows = Literal["full", "diagonal"]
# The clip's own float64 error, as in the engines of training.
_SAFETY = 1 - 1e-9
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class ClassGradients:
    """The layout of the gradients of all classes.

    Attributes:
        classes, dimension: K and d ≥ 1.
        rows: ``"full"``: the whole matrix of each class; ``"diagonal"``: the row of the class itself, Σ (p_c − 1)·z,
            which is K times shorter. The other rows are further weightings of the same features, by tiny p.
        bias: whether the classifier has one.
    """

    classes: int
    dimension: int
    rows: Rows = "diagonal"
    bias: bool = True

    def __post_init__(self) -> None:
        if self.classes < 2 or self.dimension < 1 or self.rows not in ("full", "diagonal"):
            raise unfit(f"{self}", 'K >= 2, d >= 1 and rows "full" or "diagonal"')

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, R, d or d + 1): class, row of the classifier, coordinate; R is K or 1. The bias is the last column."""
        rows = self.classes if self.rows == "full" else 1
        return (self.classes, rows, self.dimension + self.bias)

    @property
    def length(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


def class_gradient_sum(
    features: Floats,
    units: UnitFeatures,
    classifier: Classifier,
    layout: ClassGradients,
    *,
    clip_norm: float = math.inf,
    outer: Floats | None = None,
) -> Vector:
    """Σ over units of clip(Σ over its records of w·(p − e_y) ⊗ [z; 1] in class y's slot), w = 1/records of the unit.

    Removing a unit moves the result by at most ``clip_norm`` in L2 norm: a unit's whole contribution is scaled by
    min(1, C_g/‖·‖), its norm taken from inner products of its records. One that is not finite counts for nothing.

    Args:
        features: (U, m, d) the student's features z, in float64 inside.
        units: the same U units, for labels, masks and weights.
        classifier: where the gradient is taken, public.
        layout: K and d as the classifier's, unless ``outer`` is given.
        clip_norm: C_g > 0; ∞ does not clip.
        outer: (U, m, d') what stands in the outer product in place of z, such as its projection.

    Returns:
        (layout.length,) float64, laid out as ``layout.shape``; zeros for a class nobody here holds.

    Raises:
        ModelError: FS-1681 shapes that do not fit, labels outside the classes, or a C_g that is not above 0.
    """
    if not clip_norm > 0:
        raise unfit(f"class gradients clipped to {clip_norm}", "a clip norm above 0")
    right = features if outer is None else outer
    fits = features.shape[:2] == right.shape[:2] == units.mask.shape and features.shape[2:] == (classifier.dimension,)
    if not fits or (layout.classes, layout.dimension) != (classifier.classes, right.shape[-1]):
        raise unfit(
            f"features {features.shape} and {right.shape} of {units.mask.shape} records for {layout}",
            f"(U, m, {classifier.dimension}) and the classifier's {classifier.classes} classes",
        )
    labels = units.labels[units.mask]
    if labels.size and not (labels.min() >= 0 and labels.max() < layout.classes):
        raise unfit(f"labels up to {int(labels.max())}", f"integers from 0 to {layout.classes - 1}")
    total = np.zeros(layout.shape)
    for start in range(0, len(units), _CHUNK):
        part = slice(start, start + _CHUNK)
        _add(total, features[part], right[part], units.select(part), classifier, layout, clip_norm)
    return total.ravel()


def _add(
    total: Vector,
    features: Floats,
    right: Floats,
    units: UnitFeatures,
    classifier: Classifier,
    layout: ClassGradients,
    clip_norm: float,
) -> None:
    bad = ~(np.isfinite(features).all(-1) & np.isfinite(right).all(-1)) & units.mask
    kept = units.mask & ~bad.any(axis=1, keepdims=True)
    features, right = (np.where(kept[..., None], rows, 0.0) for rows in (features, right))
    if layout.bias:
        right = np.concatenate([right, np.ones((*right.shape[:2], 1))], axis=-1)
    left = classifier.probabilities(np.asarray(features, np.float64))
    own = np.take_along_axis(left, units.labels[..., None], axis=-1) - 1
    if layout.rows == "full":
        np.put_along_axis(left, units.labels[..., None], own, axis=-1)
    else:
        left = own
    weights = np.where(kept, units.weights, 0.0)
    alike = units.labels[:, :, None] == units.labels[:, None, :]
    products = alike * (left @ left.swapaxes(1, 2)) * (right @ right.swapaxes(1, 2))
    # Records of a unit may cancel; what rounding could hide of them counts as length.
    alone = np.einsum("ui,ui->u", weights, np.sqrt(np.einsum("uii->ui", products)))
    squares = np.einsum("ui,uij,uj->u", weights, products, weights) + 1e-12 * alone**2
    lengths = np.sqrt(np.maximum(squares, 0.0))
    scale = np.minimum(1.0, clip_norm * _SAFETY / np.maximum(lengths, 1e-300))
    weights = weights * scale[:, None]
    flat, labels = right[kept], units.labels[kept]
    errors = left[kept] * weights[kept][:, None]
    for label in np.unique(labels):
        mine = labels == label
        total[label] += errors[mine].T @ flat[mine]


def clear_classes(
    gradients: Vector, layout: ClassGradients, *, noise_std: float, threshold: float = 2.0
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which classes' gradients stand out of the noise: ‖S_c‖² ≥ threshold·dim·std², dim·std² being the noise's own.

    A class that nobody holds passes without noise only if its gradient is not zero.

    Args:
        gradients: (layout.length,) or ``layout.shape``, a noisy sum.
        noise_std: standard deviation of each entry's noise, ≥ 0.
        threshold: κ > 1; 2 needs as much signal as noise.
    """
    slots = gradients.reshape(layout.classes, -1)
    squares = np.einsum("ci,ci->c", slots, slots)
    return np.asarray((squares > 0) & (squares >= threshold * slots.shape[1] * noise_std**2))


def span_basis(text: Floats) -> Vector:
    """B of shape (K, d) with B Bᵀ a projection: coordinates of features in the span of K public text rows, K < d.

    ‖B z‖ is the length of z's projection on the span, and Bᵀ B z the projection itself. B = (T Tᵀ)^(−1/2) T is the one
    orthonormal set closest to the rows (Löwdin 1950), the same everywhere, unlike one from a decomposition whose signs
    are free. Noise in the span has norm √K where it had √d.

    Raises:
        ModelError: FS-1681 rows that are not finite, or no fewer than their width.
    """
    if text.ndim != 2 or not len(text) < text.shape[1] or not bool(np.isfinite(text).all()):
        raise unfit(f"texts of shape {text.shape} to project on", "finite rows, fewer than their width")
    rows = np.asarray(text, np.float64)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    large = values > 1e-8 * values.max()
    inverse = (vectors[:, large] / np.sqrt(values[large])) @ vectors[:, large].T
    return np.asarray(inverse @ rows, np.float64)
