"""Federated features: vectors of each class whose gradients look like the sites' own, in numpy.

CReFF (IJCAI 2022, arXiv 2204.13399) finds them by gradient matching, CLIP2FL (AAAI 2024, arXiv 2312.08648, equations 5
to 8) also draws them to their class's text embedding. The classifier is linear, so the gradient of the features of all
classes at once is G_c = 1/m Σ_i (p_i − e_c) ⊗ [v_i; 1], and what is descended on has first derivatives only, written
out here. Memory is O(K·m·K + K·m·d), never (K·m)², and nothing needs torch. All of it is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedsecure.learning.adapters import Float32, Vector
from fedsecure.learning.class_gradients import ClassGradients
from fedsecure.learning.classifier import Classifier, Floats, check_features, unfit
from fedsecure.secagg.parallel import cores

# In the cosines' denominator, as published: rows of no length then cost a constant 1 and pull nowhere.
COSINE_EPSILON = 1e-6
_CHUNK = 256
# Classes at a time, whatever the number of cores, so that the result does not depend on it.
_BLOCK = 25


@dataclass(frozen=True, slots=True)
class Matching:
    """How features are found.

    Attributes:
        steps: full-batch gradient steps, ≥ 0.
        rate: their length, > 0.
        cosine: ``"rows"``: one cosine for each row of a class's matrix and one for its bias, as published;
            ``"matrix"``: one for the whole.
    """

    steps: int = 100
    rate: float = 0.1
    cosine: Literal["rows", "matrix"] = "rows"

    def __post_init__(self) -> None:
        if self.steps < 0 or not (math.isfinite(self.rate) and self.rate > 0) or self.cosine not in ("rows", "matrix"):
            raise unfit(f"{self}", 'steps >= 0, a finite rate above 0 and cosine "rows" or "matrix"')


@dataclass(frozen=True, slots=True)
class PrototypeContrast:
    """The contrastive term.

    Attributes:
        strength: η ≥ 0. The published 0.001 goes with the mean and is then numerically nothing.
        temperature: τ > 0.
        negatives: ``"text"``: other classes' texts, as the published code has it; ``"features"``: other federated
            features, as the paper's equation 7 has it.
        reduction: over all features; the code takes the mean and the paper the sum.
    """

    strength: float = 0.001
    temperature: float = 0.1
    negatives: Literal["text", "features"] = "text"
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        ranged = all(math.isfinite(x) for x in (self.strength, self.temperature)) and self.strength >= 0
        known = self.negatives in ("text", "features") and self.reduction in ("mean", "sum")
        if not (ranged and known and self.temperature > 0):
            raise unfit(f"{self}", "a finite strength >= 0 and temperature > 0, text or features, mean or sum")


@dataclass(frozen=True, slots=True)
class Found:
    """Federated features and what led there.

    Attributes:
        features: (K, m, d) float32.
        matching, contrast: the two losses before the first and after the last step.
        moved_by_matching, moved_by_contrast: length of the sum of each term's steps: which of the two does anything.
    """

    features: Float32
    matching: tuple[float, float]
    contrast: tuple[float, float]
    moved_by_matching: float
    moved_by_contrast: float


def fresh_features(classes: int, each: int, dimension: int, *, seed: int) -> Float32:
    """V⁰: (K, m, d) standard normal float32 from a public seed.

    Raises:
        ModelError: FS-1681 a size below 1.
    """
    if min(classes, each, dimension) < 1:
        raise unfit(f"{each} features of width {dimension} for each of {classes} classes", "at least 1 of each")
    return np.random.default_rng(seed).standard_normal((classes, each, dimension), dtype=np.float32)


def matching_loss(
    features: Floats,
    classifier: Classifier,
    target: Floats,
    layout: ClassGradients,
    *,
    cosine: Literal["rows", "matrix"] = "rows",
    clear: npt.NDArray[np.bool_] | None = None,
    basis: Floats | None = None,
) -> tuple[float, Floats]:
    """Σ over the classes of how far their features' gradient points from the target's, and its slope in the features.

    With ``"rows"`` Σ_j [1 − ⟨G_cj, T_cj⟩/(‖G_cj‖‖T_cj‖ + 1e-6)], plus the same once for the bias. Only directions
    matter, so targets may be sums or means.

    Args:
        features: (K, m, d) v.
        classifier: φ, held fixed.
        target: (layout.length,) or ``layout.shape``, the sites' gradients at the same classifier.
        layout: which rows are compared, and whether with bias; its dimension is d, or the basis's rows.
        cosine: of rows or of the whole matrix.
        clear: (K,) classes to match; all of them if not given. A class without target costs a constant anyway.
        basis: of :func:`fedsecure.learning.class_gradients.span_basis`, where the target's features were projected.

    Returns:
        The loss, and its gradient (K, m, d) in the features' type.

    Raises:
        ModelError: FS-1681 shapes that do not fit, or a target that is not finite.
    """
    classes, _, dimension = check_features(features, classifier)
    width = dimension if basis is None else len(basis)
    biased = layout.bias == (classifier.bias is not None)
    if (layout.classes, layout.dimension) != (classes, width) or target.size != layout.length or not biased:
        raise unfit(f"a target of {target.size} values for {layout}", f"{classes} classes of width {width}")
    if not bool(np.isfinite(target).all()):
        raise unfit("a target gradient that is not finite", "finite gradients")
    aim = np.asarray(target.reshape(layout.shape), features.dtype)

    def matched(some: slice) -> tuple[float, Floats]:
        kept = None if clear is None else clear[some]
        first = some.start
        return _matched(features[some], first, classifier, aim[some], layout, cosine=cosine, clear=kept, basis=basis)

    return _over_classes(classes, matched)


def _over_classes(classes: int, work: Callable[[slice], tuple[float, Floats]]) -> tuple[float, Floats]:
    """The sum of the losses and the slopes of all classes, a block of them at a time and a thread a core: numpy
    computes outside the interpreter's lock."""
    blocks = [slice(start, min(start + _BLOCK, classes)) for start in range(0, classes, _BLOCK)]
    with ThreadPoolExecutor(min(cores(), len(blocks))) as pool:
        found = list(pool.map(work, blocks))
    return math.fsum(loss for loss, _ in found), np.concatenate([slope for _, slope in found])


def _matched(
    features: Floats,
    first: int,
    classifier: Classifier,
    aim: Floats,
    layout: ClassGradients,
    *,
    cosine: Literal["rows", "matrix"],
    clear: npt.NDArray[np.bool_] | None,
    basis: Floats | None,
) -> tuple[float, Floats]:
    """:func:`matching_loss` of the classes from ``first`` on, as many as there are features and aims of."""
    classes, each, dimension = features.shape
    width = dimension if basis is None else len(basis)
    probabilities = classifier.probabilities(features)
    here, own = np.arange(classes), np.arange(first, first + classes)
    if layout.rows == "full":
        error = probabilities.copy()
        error[here, :, own] -= 1
    else:
        error = probabilities[here, :, own][:, :, None] - 1
    shown = features if basis is None else features @ np.asarray(basis, features.dtype).T
    found, biases = error.swapaxes(1, 2) @ shown / each, error.mean(axis=1)[..., None]
    pulls = biases[..., :0]
    if cosine == "matrix":
        both = np.concatenate([found, biases], axis=-1) if layout.bias else found
        losses, slope = _apart(both, aim, axes=(-2, -1))
        slope, pulls = slope[..., :width], slope[..., width:]
    else:
        losses, slope = _apart(found, aim[..., :width], axes=(-1,))
        if layout.bias:
            more, pulls = _apart(biases, aim[..., width:], axes=(-2, -1))
            losses = losses + more
    if clear is not None:
        losses, slope, pulls = (np.where(clear.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in (losses, slope, pulls))
    to_error = shown @ (slope.swapaxes(1, 2) / each)
    if layout.bias:
        to_error += pulls.swapaxes(1, 2) / each
    onto = error @ (slope / each)
    if basis is not None:
        onto = onto @ np.asarray(basis, features.dtype)
    if layout.rows == "full":
        to_error -= (probabilities * to_error).sum(axis=-1, keepdims=True)
        to_error *= probabilities
    else:
        # Only the own class's probability is in the error: ∂p_c/∂s = p_c·(e_c − p).
        weighted = to_error * (error + 1)
        to_error = -weighted * probabilities
        to_error[here, :, own] += weighted[..., 0]
    onto += to_error @ np.asarray(classifier.weight, features.dtype)
    return float(losses.sum(dtype=np.float64)), onto


def _apart(found: Floats, aim: Floats, *, axes: tuple[int, ...]) -> tuple[Floats, Floats]:
    """(K,) Σ of 1 − cos over the cosines of a class, each taken along ``axes``, and its slope in ``found``."""
    lengths = np.sqrt(np.square(found).sum(axis=axes, keepdims=True))
    aims = np.sqrt(np.square(aim).sum(axis=axes, keepdims=True))
    inner, below = (found * aim).sum(axis=axes, keepdims=True), lengths * aims + COSINE_EPSILON
    # A row of no length has no direction to turn.
    slope = found * (inner * aims / (np.maximum(lengths, 1e-30) * below**2))
    slope -= aim / below
    return (1 - inner / below).sum(axis=(-2, -1)), slope


def contrast_loss(features: Floats, text: Floats, how: PrototypeContrast) -> tuple[float, Floats]:
    """η times the prototype contrast of all features, and its slope in them.

    With text negatives, m times as many as classes and the anchor's own place left out,

        ℓ_i = −s_ic + log(m·Σ_c' e^{s_ic'} − e^{s_ic}),   s_ic' = ⟨v_i, t_c'⟩/τ,

    the closed form of a (K·m)² masked matrix; m = 1 leaves no positive among the negatives. With features
    ℓ_i = −s_ic + log Σ_{j≠i} e^{⟨v_i, v_j⟩/τ}, taken a block of rows at a time. Features are not normalised.

    Args:
        features: (K, m, d).
        text: (K, d) unit text embeddings.
        how: strength, temperature, negatives and reduction.

    Raises:
        ModelError: FS-1681 texts of other classes or width.
    """
    classes, each, dimension = features.shape
    if text.shape != (classes, dimension) or not bool(np.isfinite(text).all()):
        raise unfit(f"texts of shape {text.shape}", f"finite ({classes}, {dimension}), one row for each class")
    rows, aims = features.reshape(-1, dimension), np.asarray(text, features.dtype)
    scale = how.strength / (len(rows) if how.reduction == "mean" else 1)
    if how.negatives == "text":

        def against(some: slice) -> tuple[float, Floats]:
            part = rows[some.start * each : some.stop * each]
            return _against_texts(part, aims, each, how.temperature, first=some.start)

        loss, slope = _over_classes(classes, against)
    else:
        loss, slope = _against_features(rows, aims, each, how.temperature)
    return scale * loss, (scale / how.temperature * slope).reshape(features.shape)


def _against_texts(rows: Floats, text: Floats, each: int, temperature: float, *, first: int) -> tuple[float, Floats]:
    """Of the features of the classes from ``first`` on."""
    logits = rows @ text.T
    logits /= temperature
    places, own = np.arange(len(rows)), first + np.arange(len(rows)) // each
    positive = logits[places, own]
    # The anchor's own class is there m − 1 times and every other one m times.
    log_counts = np.log(np.array([each - 1, each], np.float64), where=[each > 1, True], out=np.full(2, -np.inf))
    logits += np.asarray(log_counts[1], rows.dtype)
    logits[places, own] = positive + np.asarray(log_counts[0], rows.dtype)
    top = logits.max(axis=1, keepdims=True)
    logits -= top
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    loss = (np.log(total[:, 0]) + top[:, 0] - positive).sum(dtype=np.float64)
    logits /= total
    logits[places, own] -= 1
    return float(loss), logits @ text


def _against_features(rows: Floats, text: Floats, each: int, temperature: float) -> tuple[float, Floats]:
    own = np.repeat(np.arange(len(text)), each)
    slope, loss = -text[own], -float((rows * text[own]).sum(dtype=np.float64)) / temperature
    if len(rows) < 2:
        raise unfit("one federated feature against others", "two or more, or text negatives")
    for start in range(0, len(rows), _CHUNK):
        some = rows[start : start + _CHUNK]
        logits = some @ rows.T
        logits /= temperature
        logits[np.arange(len(some)), start + np.arange(len(some))] = -np.inf
        top = logits.max(axis=1, keepdims=True)
        logits -= top
        np.exp(logits, out=logits)
        total = logits.sum(axis=1, keepdims=True)
        loss += float((np.log(total) + top).sum(dtype=np.float64))
        logits /= total
        slope[start : start + _CHUNK] += logits @ rows
        slope += logits.T @ some
    return loss, slope


def find_features(
    start: Float32,
    classifier: Classifier,
    target: Vector,
    layout: ClassGradients,
    *,
    matching: Matching,
    contrast: PrototypeContrast | None = None,
    text: Floats | None = None,
    clear: npt.NDArray[np.bool_] | None = None,
    basis: Floats | None = None,
) -> Found:
    """Descend on L_grad + η·L_pcl (equation 8) from ``start``; the sites' gradients and the classifier stay fixed.

    A class that is not ``clear`` is led by its text alone, which no noise touches; without contrast it stays where it
    is.

    Args:
        start: (K, m, d), V of the round before.
        classifier, target, layout, clear, basis: as for :func:`matching_loss`.
        matching: steps, rate and cosine.
        contrast: the contrastive term, or None, which is CReFF.
        text: (K, d), where there is a contrast.

    Raises:
        ModelError: FS-1681 as the two losses; also a contrast without texts, and features that have gone to infinity.
    """
    if contrast is not None and text is None:
        raise unfit("a contrast without texts", "one text embedding for each class")
    features = np.array(start, np.float32)
    matched, contrasted = np.zeros_like(features), np.zeros_like(features)
    at: list[tuple[float, float]] = []
    for step in range(matching.steps + 1):
        loss, slope = matching_loss(
            features, classifier, target, layout, cosine=matching.cosine, clear=clear, basis=basis
        )
        pulled = np.zeros_like(features[:0])
        second = 0.0
        if contrast is not None and text is not None:
            second, pulled = contrast_loss(features, text, contrast)
        at.append((loss, second))
        if step == matching.steps:
            break
        slope *= -matching.rate
        matched += slope
        features += slope
        if pulled.size:
            pulled *= -matching.rate
            contrasted += pulled
            features += pulled
    lengths = float(np.linalg.norm(matched)), float(np.linalg.norm(contrasted))
    return Found(features, (at[0][0], at[-1][0]), (at[0][1], at[-1][1]), *lengths)
