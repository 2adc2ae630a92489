"""A linear classifier over features, and its re-training on balanced federated features, in numpy.

CReFF (Shang, Lu, Cao, Wang: IJCAI 2022, arXiv 2204.13399) and CLIP2FL (Shi, Zheng, Yin, Lu, Huang, Cao, Chen: AAAI
2024, arXiv 2312.08648) mend the head of a model that was trained on long-tailed data: a second head is trained on
features of which every class has the same number. An aggregator does that, so nothing here needs torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import Float32

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """s = W z + b.

    Attributes:
        weight: W, (K, d).
        bias: b, (K,), or None for a classifier without.

    Raises:
        ModelError: FS-1681 shapes that do not fit, values that are not finite, or fewer than two classes.
    """

    weight: Floats
    bias: Floats | None = None

    def __post_init__(self) -> None:
        shaped = self.weight.ndim == 2 and len(self.weight) >= 2
        fits = self.bias is None or self.bias.shape == self.weight.shape[:1]
        parts = (self.weight,) if self.bias is None else (self.weight, self.bias)
        if not (shaped and fits and all(bool(np.isfinite(part).all()) for part in parts)):
            bias = None if self.bias is None else self.bias.shape
            raise unfit(f"a classifier of shape {self.weight.shape} with bias {bias}", "finite (K, d) and (K,), K >= 2")

    @classmethod
    def zero(cls, classes: int, dimension: int, *, bias: bool = True) -> Classifier:
        """The classifier that holds all classes for equally likely; float32."""
        return cls(np.zeros((classes, dimension), np.float32), np.zeros(classes, np.float32) if bias else None)

    @property
    def classes(self) -> int:
        """K."""
        return int(self.weight.shape[0])

    @property
    def dimension(self) -> int:
        """d."""
        return int(self.weight.shape[1])

    def probabilities(self, features: Floats) -> Floats:
        """softmax(W z + b) over the last axis: (…, K) for (…, d), in the wider type of the two."""
        logits = features @ self.weight.T
        if self.bias is not None:
            logits += self.bias
        logits -= logits.max(axis=-1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=-1, keepdims=True)
        return logits


@dataclass(frozen=True, slots=True)
class Retraining:
    """How the classifier is trained: plain SGD on cross-entropy.

    Attributes:
        epochs: passes over the features, ≥ 1.
        batch: features a step, ≥ 1; a last smaller batch is a step of its own.
        rate: learning rate > 0.
    """

    epochs: int = 300
    batch: int = 32
    rate: float = 0.01

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not (math.isfinite(self.rate) and self.rate > 0):
            raise unfit(f"{self}", "at least one epoch, one feature a batch and a finite rate above 0")


def fresh_classifier(classes: int, dimension: int, *, bias: bool = True, seed: int) -> Classifier:
    """A classifier with all entries from U(−1/√d, 1/√d), PyTorch's default, from a public seed; float32."""
    generator, reach = np.random.default_rng(seed), 1 / math.sqrt(dimension)
    weight = generator.uniform(-reach, reach, (classes, dimension)).astype(np.float32)
    return Classifier(weight, generator.uniform(-reach, reach, classes).astype(np.float32) if bias else None)


def retrain(features: Float32, start: Classifier, how: Retraining, *, seed: int) -> Classifier:
    """Train a classifier on federated features, m of each class: 300·⌈K·m/32⌉ steps with the published settings.

    Post-processing: what comes out says no more of any record than what went in.

    Args:
        features: (K, m, d) float32, class by class.
        start: the classifier to go on from: fresh in the published code, the last one in the paper's text.
        how: epochs, batch and rate.
        seed: public; orders the features in each epoch.

    Returns:
        float32, with a bias where ``start`` has one.

    Raises:
        ModelError: FS-1681 features that do not fit the classifier or are not finite.
    """
    classes, each, dimension = check_features(features, start)
    count, order = classes * each, np.random.default_rng(seed)
    rows = np.ascontiguousarray(features, np.float32).reshape(count, dimension)
    weight = np.array(start.weight, np.float32)
    bias = None if start.bias is None else np.array(start.bias, np.float32)
    labels = np.repeat(np.arange(classes), each)
    logits = np.empty((how.batch, classes), np.float32)
    change, places = np.empty_like(weight), np.arange(how.batch)
    for _ in range(how.epochs):
        shuffled = order.permutation(count)
        aims = labels[shuffled]
        for at in range(0, count, how.batch):
            # A few rows at a time stay in the cache; a shuffled copy of all would not.
            batch, aim = rows[shuffled[at : at + how.batch]], aims[at : at + how.batch]
            error = np.dot(batch, weight.T, out=logits[: len(batch)])
            if bias is not None:
                error += bias
            error -= error.max(axis=1, keepdims=True)
            np.exp(error, out=error)
            error *= (-how.rate / len(batch)) / error.sum(axis=1, keepdims=True)
            error[places[: len(batch)], aim] += how.rate / len(batch)
            weight += np.dot(error.T, batch, out=change)
            if bias is not None:
                bias += error.sum(axis=0)
    return replace(start, weight=weight, bias=bias)


def check_features(features: npt.NDArray[np.generic], classifier: Classifier) -> tuple[int, int, int]:
    """K, m and d of federated features that fit a classifier; ModelError FS-1681 otherwise."""
    expected = (classifier.classes, classifier.dimension)
    shape = features.shape
    fits = features.ndim == 3 and shape[1] >= 1 and (shape[0], shape[2]) == expected
    if not (fits and bool(np.isfinite(features).all())):
        raise unfit(f"federated features of shape {shape}", f"finite ({expected[0]}, m, {expected[1]}), m >= 1")
    return int(shape[0]), int(shape[1]), int(shape[2])


def unfit(found: str, expected: str) -> ModelError:
    """FS-1681."""
    return ModelError(
        "FS-1681", found, expected=expected, cure="use features, texts and gradients of one federation's classes"
    )
