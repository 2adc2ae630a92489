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
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from fedsecure.learning.adapters import Float32, Vector
from fedsecure.learning.class_gradients import ClassGradients
from fedsecure.learning.classifier import Classifier, Floats, check_features, unfit
from fedsecure.secagg.parallel import cores

# In the cosines' denominator, as published: rows of no length then cost a constant 1 and pull nowhere.
COSINE_EPSILON = 1e-6
_CHUNK = 256
_Result = TypeVar("_Result")
# The loss of some classes' features and its slope in them, both arguments for the same classes.
_OfClasses = Callable[[Floats, slice], tuple[float, Floats]]
# Classes at a time, whatever the number of cores, so that the result does not depend on it.
_BLOCK = 10


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
    matched = _matching_of(features, classifier, target, layout, cosine=cosine, clear=clear, basis=basis)
    return _over_classes(features, matched)


def _matching_of(
    features: Floats,
    classifier: Classifier,
    target: Floats,
    layout: ClassGradients,
    *,
    cosine: Literal["rows", "matrix"],
    clear: npt.NDArray[np.bool_] | None,
    basis: Floats | None,
) -> _OfClasses:
    """:func:`matching_loss` of some classes, its arguments checked once."""
    classes, _, dimension = check_features(features, classifier)
    width = dimension if basis is None else len(basis)
    biased = layout.bias == (classifier.bias is not None)
    if (layout.classes, layout.dimension) != (classes, width) or target.size != layout.length or not biased:
        raise unfit(f"a target of {target.size} values for {layout}", f"{classes} classes of width {width}")
    if not bool(np.isfinite(target).all()):
        raise unfit("a target gradient that is not finite", "finite gradients")
    aim = np.asarray(target.reshape(layout.shape), features.dtype)

    def matched(rows: Floats, some: slice) -> tuple[float, Floats]:
        kept = None if clear is None else clear[some]
        return _matched(rows, some.start, classifier, aim[some], layout, cosine=cosine, clear=kept, basis=basis)

    return matched


def _in_blocks(classes: int, work: Callable[[slice], _Result]) -> list[_Result]:
    """Of all classes, some at a time and a thread a core: numpy computes outside the interpreter's lock."""

    state = np.geterr()

    def as_here(some: slice) -> _Result:
        # A thread has error states of its own.
        with np.errstate(**state):
            return work(some)

    blocks = [slice(start, min(start + _BLOCK, classes)) for start in range(0, classes, _BLOCK)]
    with ThreadPoolExecutor(min(cores(), len(blocks))) as pool:
        return list(pool.map(as_here, blocks))


def _over_classes(features: Floats, work: _OfClasses) -> tuple[float, Floats]:
    """The sum of the losses and the slopes of all classes."""
    found = _in_blocks(len(features), lambda some: work(features[some], some))
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
        error = probabilities / each
        error[here, :, own] -= 1 / each
    else:
        error = (probabilities[here, :, own][:, :, None] - 1) / each
    shown = features if basis is None else features @ np.asarray(basis, features.dtype).T
    found, biases = error.swapaxes(1, 2) @ shown, error.sum(axis=1)[..., None]
    pulls = biases[..., :0]
    if cosine == "matrix":
        both = np.concatenate([found, biases], axis=-1) if layout.bias else found
        losses, slope = _apart(both, aim, flat=True)
        slope, pulls = slope[..., :width], slope[..., width:]
    else:
        losses, slope = _apart(found, aim[..., :width], flat=False)
        if layout.bias:
            more, pulls = _apart(biases, aim[..., width:], flat=True)
            losses = losses + more
    if clear is not None:
        losses, slope, pulls = (np.where(clear.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in (losses, slope, pulls))
    to_error = shown @ slope.swapaxes(1, 2)
    if layout.bias:
        to_error += pulls.swapaxes(1, 2)
    to_error /= each
    onto = error @ slope
    if basis is not None:
        onto = onto @ np.asarray(basis, features.dtype)
    if layout.rows == "full":
        to_error -= (probabilities * to_error).sum(axis=-1, keepdims=True)
        to_error *= probabilities
    else:
        # Only the own class's probability is in the error: ∂p_c/∂s = p_c·(e_c − p).
        weighted = to_error[..., 0] * probabilities[here, :, own]
        to_error = -weighted[..., None] * probabilities
        to_error[here, :, own] += weighted
    onto += to_error @ np.asarray(classifier.weight, features.dtype)
    return float(losses.sum(dtype=np.float64)), onto


def _apart(found: Floats, aim: Floats, *, flat: bool) -> tuple[Floats, Floats]:
    """(K,) Σ of 1 − cos over the cosines of a class, and its slope in ``found``, both (K, R, d): a cosine for each row,
    or with ``flat`` one for the class's whole matrix."""
    over = "crd,crd->c" if flat else "crd,crd->cr"
    shaped = (-1, 1, 1) if flat else (*found.shape[:2], 1)
    lengths, aims = (np.sqrt(np.einsum(over, one, one)).reshape(shaped) for one in (found, aim))
    inner, below = np.einsum(over, found, aim).reshape(shaped), lengths * aims + COSINE_EPSILON
    # A row of no length has no direction to turn.
    slope = found * (inner * aims / (np.maximum(lengths, 1e-30) * below**2))
    slope -= aim * (1 / below)
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
    contrasted = _contrast_of(features, text, how)
    if how.negatives == "text":
        return _over_classes(features, contrasted)
    return contrasted(features, slice(0, len(features)))


def _contrast_of(features: Floats, text: Floats, how: PrototypeContrast) -> _OfClasses:
    """:func:`contrast_loss` of some classes, which with features as negatives have to be all."""
    classes, each, dimension = features.shape
    if text.shape != (classes, dimension) or not bool(np.isfinite(text).all()):
        raise unfit(f"texts of shape {text.shape}", f"finite ({classes}, {dimension}), one row for each class")
    aims = np.asarray(text, features.dtype)
    scale = how.strength / (classes * each if how.reduction == "mean" else 1)

    def contrasted(rows: Floats, some: slice) -> tuple[float, Floats]:
        flat = rows.reshape(-1, dimension)
        if how.negatives == "text":
            loss, slope = _against_texts(flat, aims, each, how.temperature, first=some.start)
        else:
            loss, slope = _against_features(flat, aims, each, how.temperature)
        slope *= scale / how.temperature
        return scale * loss, slope.reshape(rows.shape)

    return contrasted


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
    match = _matching_of(features, classifier, target, layout, cosine=matching.cosine, clear=clear, basis=basis)
    pull = _contrast_of(features, text, contrast) if contrast is not None and text is not None else None
    # What goes to infinity is refused at the end.
    with np.errstate(all="ignore"):
        if contrast is None or contrast.negatives == "text":
            # No class sees another one's features: each block goes all the way by itself, in the cache of its core.
            traces = _in_blocks(len(features), lambda some: _descend(features[some], some, match, pull, matching))
        else:
            whole = slice(0, len(features))
            traces = [_descend(features, whole, lambda rows, _: _over_classes(rows, match), pull, matching)]
    check_features(features, classifier)
    first, last, squares = np.sum([(trace.first, trace.last, trace.moved) for trace in traces], axis=0).tolist()
    return Found(features, (first[0], last[0]), (first[1], last[1]), math.sqrt(squares[0]), math.sqrt(squares[1]))


@dataclass(frozen=True, slots=True)
class _Trace:
    """Of matching and contrast, (2,) each: the loss before the first and after the last step, and the squared length of
    the sum of all steps."""

    first: Vector
    last: Vector
    moved: Vector


def _descend(features: Float32, some: slice, match: _OfClasses, pull: _OfClasses | None, how: Matching) -> _Trace:
    """Move the features of some classes, in place."""
    terms = [match] if pull is None else [match, pull]
    moves = np.zeros((2, *features.shape), np.float32)
    losses = np.zeros((how.steps + 1, 2))
    for step in range(how.steps + 1):
        found = [term(features, some) for term in terms]
        losses[step, : len(terms)] = [loss for loss, _ in found]
        if step == how.steps:
            break
        for move, (_, slope) in zip(moves, found, strict=False):
            slope *= -how.rate
            move += slope
            features += slope
    return _Trace(losses[0], losses[-1], np.square(moves).sum(axis=(1, 2, 3), dtype=np.float64))
