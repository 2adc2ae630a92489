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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import Float32
from fedsecure.learning.modules import FeatureAdapter, build_module, centred_inputs
from fedsecure.learning.task import HeadTask, unit_rows

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


def witness_of(
    task: HeadTask,
    tensors: Mapping[str, Any],
    *,
    target: Float32,
    source: npt.NDArray[Any] | None,
    frequencies: Float64,
    strength: float,
) -> Witness:
    """The witness of a round, from released and public values alone (facmic.md §5.4-4 and 5).

    Target features are the raw ones, as in the released program; their soft labels are those of the round's adapter.
    Source embeddings are those of adapted class prototypes, each as much as it can be trusted.

    Args:
        task: an adapter of features, and its constants.
        tensors: the round's adapter.
        target: (m, d) public features.
        source: (K, d) released prototypes of centred unit features, of length at most 1; None attracts only.
        frequencies: of :func:`frequencies_of`.
        strength: λ > 0.
    """
    features = FourierFeatures(frequencies)
    module, raw, logits = _adapted(task, tensors, target)
    embedded = None
    if source is not None:
        length = np.linalg.norm(np.asarray(source, np.float64), axis=1, keepdims=True)
        with torch.no_grad():
            moved = module.from_inputs(torch.from_numpy(unit_rows(np.asarray(source, np.float64))))
        embedded = length * features.of(moved.numpy())
    return witness(
        features,
        source=embedded,
        target=raw,
        probabilities=torch.softmax(logits, dim=-1).numpy(),
        shares=_shares(task),
        strength=strength,
    )


def _shares(task: HeadTask) -> Float64:
    """π_c that the run has: equal ones where it names none."""
    if task.log_prior is None:
        return np.full(task.spec.classes, 1 / task.spec.classes)
    shares = np.exp(np.asarray(task.log_prior, np.float64))
    return np.asarray(shares / shares.sum(), np.float64)


def negatives_of(task: HeadTask, tensors: Mapping[str, Any], *, target: Float32) -> Float64:
    """(K,): log Σ exp(logit of class c) over the target's images that the adapter takes for another class; −∞ → −1e30.

    What stands for the other images of a batch in the image's row of the text-to-image half (facmic.md §5.4-2), with
    public images, so that a record meets no other record.
    """
    _, _, logits = _adapted(task, tensors, target)
    mine = torch.nn.functional.one_hot(logits.argmax(-1), task.spec.classes).bool()
    totals = torch.logsumexp(logits.masked_fill(mine, -torch.inf), dim=0)
    return np.asarray(totals.clamp_min(-1e30).numpy(), np.float64)


def align(
    task: HeadTask,
    tensors: Mapping[str, Any],
    *,
    target: Float32,
    source: npt.NDArray[Any],
    frequencies: Float64,
    strength: float,
    step: float,
) -> dict[str, Float32]:
    """One alignment step on the prototypes alone, of length at most ``step``: post-processing (facmic.md §5.4-8).

    Args:
        task, tensors, target, source, frequencies, strength: as for :func:`witness_of`.
        step: how far a gradient of length 1 or more leads.
    """
    found = witness_of(task, tensors, target=target, source=source, frequencies=frequencies, strength=strength)
    rows = np.asarray(source, np.float64)
    trusted = torch.from_numpy(np.linalg.norm(rows, axis=1))
    module, _, _ = _adapted(task, tensors, target)
    adapted = module.from_inputs(torch.from_numpy(unit_rows(rows)))
    losses = found.loss(adapted, torch.arange(task.spec.classes))
    parts = torch.autograd.grad((trusted * losses).mean(), list(module.parameters()))
    length = float(torch.sqrt(torch.stack([part.square().sum() for part in parts]).sum()))
    moved = zip(task.spec.shapes, module.parameters(), parts, strict=True)
    return {name: (value - step / max(1.0, length) * part).detach().float().numpy() for name, value, part in moved}


def frequencies_of(task: HeadTask, target: Float32, *, count: int, seed: int) -> Float64:
    """(count, d) frequencies for the target's own bandwidths; everybody draws the same."""
    rows = centred_rows(task, target)
    total = len(rows)
    # Σ over ordered pairs of ‖a − b‖², without the pairs.
    spread = 2 * (total * float(np.square(rows).sum()) - float(np.square(rows.sum(axis=0)).sum()))
    widths = bandwidths(spread / (total * total - total))
    return FourierFeatures.draw(widths, dimension=rows.shape[1], count=count, seed=seed).frequencies


def centred_rows(task: HeadTask, features: npt.NDArray[Any]) -> Float64:
    """a = unit(unit(x) − centre) for (n, d) features, float64."""
    return np.asarray(centred_inputs(task, torch.from_numpy(np.asarray(features, np.float64))).numpy())


def _adapted(task: HeadTask, tensors: Mapping[str, Any], target: Float32) -> tuple[FeatureAdapter, Float64, Tensor]:
    """The round's adapter in float64, the target's (m, d) raw unit features, and its (m, K) logits."""
    module = build_module(task, tensors, device=torch.device("cpu"), dtype=torch.float64).eval()
    assert isinstance(module, FeatureAdapter), "a task refuses alignment where nothing is adapted"
    raw = centred_rows(task, target)
    with torch.no_grad():
        logits = module.from_inputs(torch.from_numpy(raw)) @ module.prior.T
    return module, raw, logits


def _unusable(found: str, expected: str) -> ModelError:
    return ModelError(
        "FS-1661", found, expected=expected, cure="give the alignment features of the run's encoder and classes"
    )
