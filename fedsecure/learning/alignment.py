"""Local maximum mean discrepancy between labelled source features and soft-labelled target features.

``lmmd`` is the batch form of Zhu et al., "Deep Subdomain Adaptation Network" (IEEE TNNLS 2021), equation 6, with the
five-Gaussian kernel that FACMIC (MICCAI 2024) uses. It couples the records of a batch and so has no per-record
sensitivity: it serves the non-private reference only.

``Witness`` is its per-record form: with random Fourier features (Rahimi and Recht, NeurIPS 2007) the gradient of the
discrepancy in one source feature needs only two mean embeddings per class. Frozen and public, they leave a loss that
depends on one record, which differential privacy can clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsecure.errors import ModelError

KERNELS = 5
LARGEST_CLASS_WEIGHT = 3.0

Float64 = npt.NDArray[np.float64]


def mean_square_distance(features: Tensor) -> Tensor:
    """σ̄: the mean squared distance over ordered pairs of distinct rows of (n, d) features; 0-d.

    Raises:
        ModelError: FS-1661 for fewer than two rows.
    """
    count = len(features)
    if count < 2:
        raise _unusable(f"{count} feature row(s) for a kernel's bandwidth", "two or more rows")
    return torch.cdist(features, features).square().sum() / (count * count - count)


def bandwidths(mean_square: float) -> tuple[float, ...]:
    """The five σ_m = σ̄·2^m/4, m = 0 … 4, of the kernel Σ_m exp(−‖a − b‖²/σ_m).

    Raises:
        ModelError: FS-1661 when σ̄ is not a finite number above 0.
    """
    if not (math.isfinite(mean_square) and mean_square > 0):
        raise _unusable(f"a mean squared distance of {mean_square}", "features that differ from each other")
    return tuple(mean_square * 2.0**power / 4 for power in range(KERNELS))


def lmmd(source: Tensor, labels: Tensor, target: Tensor, probabilities: Tensor) -> Tensor:
    """L_LMMD of one batch: Σ over the active classes of the class-weighted discrepancy, over their number.

    A class is active when the source holds it and some target row is most probably of it. Kernels are summed, not
    averaged, and the bandwidth carries no gradient.

    Args:
        source: (n, d) adapted features of the labelled records.
        labels: (n,) int64 in 0 … K − 1.
        target: (m, d) features of the unlabelled records.
        probabilities: (m, K) soft labels of the target, rows summing to 1; carry no gradient.

    Returns:
        0-d; zero where no class is active or a kernel entry is not a number.

    Raises:
        ModelError: FS-1661 for shapes that do not fit.
    """
    classes = probabilities.shape[-1]
    if source.shape[1:] != target.shape[1:] or len(labels) != len(source) or len(probabilities) != len(target):
        raise _unusable(
            f"source {tuple(source.shape)}, labels {tuple(labels.shape)}, target {tuple(target.shape)} and "
            f"probabilities {tuple(probabilities.shape)}",
            "(n, d), (n,), (m, d) and (m, K)",
        )
    every = torch.cat([source, target])
    squares = torch.cdist(every, every).square()
    spread = mean_square_distance(every.detach())
    kernel = torch.stack([torch.exp(-squares / (spread * 2.0**power / 4)) for power in range(KERNELS)]).sum(0)
    zero = source.sum() * 0
    held = torch.nn.functional.one_hot(labels, classes).to(source)
    expected = torch.nn.functional.one_hot(probabilities.argmax(-1), classes).to(source)
    active = (held.sum(0) > 0) & (expected.sum(0) > 0)
    if not active.any() or torch.isnan(kernel).any():
        return torch.nan_to_num(zero)
    ours = (held / held.sum(0).clamp(min=1))[:, active]
    theirs = probabilities.detach().to(source)
    theirs = (theirs / theirs.sum(0).clamp(min=torch.finfo(theirs.dtype).tiny))[:, active]
    # Each class's source weights and minus its target weights, end to end: the three kernel sums in one product.
    weights = torch.cat([ours, -theirs])
    return (weights * (kernel @ weights)).sum() / active.sum()


@dataclass(frozen=True, slots=True, eq=False)
class FourierFeatures:
    """φ(z) = M^(−1/2)·[cos ωz, sin ωz] with ‖φ(z)‖ = 1 and ⟨φ(a), φ(b)⟩ ≈ k(a, b)/5.

    Attributes:
        frequencies: (M, d) float64, public.
    """

    frequencies: Float64

    @classmethod
    def draw(cls, widths: tuple[float, ...], *, dimension: int, count: int, seed: int) -> FourierFeatures:
        """``count`` frequencies ω ~ N(0, (2/σ)·I), σ drawn uniformly from ``widths``, from a public seed.

        Raises:
            ModelError: FS-1661 for a width that is not above 0, or a count below 1.
        """
        if count < 1 or not widths or any(not (math.isfinite(width) and width > 0) for width in widths):
            raise _unusable(f"{count} frequencies for bandwidths {widths}", "one or more of each, above 0")
        generator = np.random.default_rng(seed)
        chosen = generator.choice(np.asarray(widths, np.float64), size=count)
        normal = generator.standard_normal((count, dimension))
        return cls(frequencies=normal * np.sqrt(2 / chosen)[:, None])

    @property
    def width(self) -> int:
        """2M, the length of φ."""
        return 2 * len(self.frequencies)

    def of(self, features: Float64) -> Float64:
        """φ of (n, d) rows: (n, 2M) float64."""
        angles = features @ self.frequencies.T
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) / math.sqrt(len(self.frequencies))


@dataclass(frozen=True, slots=True, eq=False)
class Witness:
    """The discrepancy's witness function, one row per class: ℓ(i) = weight_y·⟨φ(z_i), difference_y⟩.

    Attributes:
        features: φ.
        difference: (K, 2M) float64, mean embedding of the source minus that of the target; released or public.
        weights: (K,) float64, λ·2·5/(K·π_y), its 1/(K·π_y) at most 3.

    Raises:
        ModelError: FS-1661 for shapes that do not fit or values that are not finite.
    """

    features: FourierFeatures
    difference: Float64
    weights: Float64

    def __post_init__(self) -> None:
        fits = self.difference.shape == (len(self.weights), self.features.width)
        if not fits or not (np.isfinite(self.difference).all() and np.isfinite(self.weights).all()):
            raise _unusable(
                f"a witness of shape {self.difference.shape} with {len(self.weights)} class weights",
                f"finite numbers, one row of {self.features.width} for each class",
            )

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """(n,) losses of (n, d) adapted unit features; each depends on its own row only."""
        omega = torch.as_tensor(self.features.frequencies).to(features)
        angles = features @ omega.T
        embedded = torch.cat([angles.cos(), angles.sin()], dim=-1) / math.sqrt(len(omega))
        rows = torch.as_tensor(self.difference).to(features)[labels]
        return torch.as_tensor(self.weights).to(features)[labels] * (embedded * rows).sum(-1)

    def slope(self, features: Tensor, labels: Tensor) -> Tensor:
        """∂ℓ/∂z of :meth:`loss`: (n, d), in closed form."""
        omega = torch.as_tensor(self.features.frequencies).to(features)
        angles = features @ omega.T
        rows = torch.as_tensor(self.difference).to(features)[labels] / math.sqrt(len(omega))
        cosine, sine = rows[:, : len(omega)], rows[:, len(omega) :]
        scale = torch.as_tensor(self.weights).to(features)[labels]
        inward: Tensor = (angles.cos() * sine - angles.sin() * cosine) @ omega
        return scale[:, None] * inward


def witness(
    features: FourierFeatures,
    *,
    source: Float64 | None,
    target: Float64,
    probabilities: Float64,
    shares: Float64,
    strength: float = 1.0,
) -> Witness:
    """The witness between released source embeddings and a public, soft-labelled target.

    Args:
        features: φ.
        source: (K, 2M) mean embeddings of the source's classes, released with noise; None attracts only.
        target: (m, d) public adapted features.
        probabilities: (m, K) soft labels of the target under the current adapter.
        shares: (K,) public class shares π > 0.
        strength: λ ≥ 0.

    Raises:
        ModelError: FS-1661 as :class:`Witness`; also for a share that is not above 0.
    """
    classes = probabilities.shape[-1]
    if len(target) != len(probabilities) or shares.shape != (classes,) or not (shares > 0).all():
        raise _unusable(
            f"{len(target)} target rows, soft labels {probabilities.shape}, shares {shares.shape}",
            "a soft label for each target row and a share above 0 for each class",
        )
    totals = np.maximum(probabilities.sum(axis=0), np.finfo(np.float64).tiny)
    aim = (probabilities / totals).T @ features.of(target)
    difference = -aim if source is None else source - aim
    weights = strength * 2 * KERNELS * np.minimum(1 / (classes * shares), LARGEST_CLASS_WEIGHT)
    return Witness(features=features, difference=difference, weights=weights)


def _unusable(found: str, expected: str) -> ModelError:
    return ModelError(
        "FS-1661", found, expected=expected, cure="give the alignment features of the run's encoder and classes"
    )
