"""What an adapter is trained for: a per-record loss against fixed text embeddings (facmic.md §5.4-1).

With a unit input a = unit(unit(x) − centre), prior rows P and τ = ``scale`` the logits are

* linear (accuracy.md, "The best configuration"): τ·a·Pᵀ + a·Dᵀ; D = 0 is zero-shot;
* facmic (facmic.md §1.2): z0 = a·√d, h = W1 z0 + b1, r = LeakyReLU(LayerNorm(h)), s = softmax(W2 r + b2),
  z = unit(s ⊙ a), τ·z·Pᵀ (+ log prior); W2 = b2 = 0 makes s constant, so this too is zero-shot;
* facmic_plain: the same with γ ⊙ (h − μ)/σ + β in LayerNorm's place, where μ and σ² − 1e-5 are mean and variance of
  each coordinate of h over public images (facmic.md §5.4-3), constants of a step; or 0 and 1, where there are none;
* fedclip: the same with r = tanh(h); bottleneck: z = unit(a + W2 relu(h) + b2), with W1 of 64 rows;
* affine: x = a·√d, z = x + A x + b, τ/√d·z·Pᵀ + z·Dᵀ; with A, b and D at 0 zero-shot again. z is not normalised.

``centre`` is a public mean of image features. Where there is one, the text rows are centred by their own mean, since
images and texts live in different cones, and scaled back to unit length; where there is none (zeros) nothing is centred
and round 0 is plain CLIP. Every term depends on one record and public constants only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import FORMS, AdapterSpec, Float32, Vector
from fedsecure.learning.objective import CROSS_ENTROPY, Objective

TINY = 1e-12
# Over the classes of one image, uncentred cosines spread less than centred ones: by 2.0 with the image priors of the
# UCF101 features and by 2.9 with the texts of the Caltech101 ones (CLIP ViT-B/32); this lies between.
UNCENTRED = 2.5


@dataclass(frozen=True, slots=True, eq=False)
class HeadTask:
    """A known adapter with its public constants.

    Attributes:
        spec: kind, d and K.
        text: (K, d) float32 text embeddings; rows are brought to unit length where they are used.
        centre: (d,) float32 public mean of unit image features, or zeros.
        temperature: > 0, for centred cosines; ``scale`` is what the logits get.
        log_prior: (K,) float32 added to the logits in training only (facmic.md §5.4-1), or None.
        objective: the loss in training; cross-entropy unless said otherwise.
        public: (m, d) float32 features of m ≥ 2 public images, by whose statistics under the current W1 and b1 the
            hidden layer of ``facmic_plain`` is normalised; None normalises by nothing.

    Raises:
        ModelError: FS-1633 when a constant has another shape, is not finite, or is of no use to the adapter, or τ ≤ 0;
            FS-1647 for an objective in adapted features with the linear head, which has none.
    """

    spec: AdapterSpec
    text: Float32
    centre: Float32
    temperature: float
    log_prior: Float32 | None = None
    objective: Objective = CROSS_ENTROPY
    public: Float32 | None = None

    def __post_init__(self) -> None:
        d, k = self.spec.dimension, self.spec.classes
        expected = {"text": (k, d), "centre": (d,), "log_prior": (k,)}
        for name, shape in expected.items():
            value = getattr(self, name)
            if name == "log_prior" and value is None:
                continue
            if value.shape != shape or not bool(np.isfinite(value).all()):
                raise ModelError(
                    "FS-1633",
                    f"{name} of shape {value.shape}",
                    expected=f"finite values of shape {shape}",
                    cure="use text embeddings and a public mean of the encoder and classes of this federation",
                )
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise ModelError(
                "FS-1633",
                f"temperature {self.temperature}",
                expected="a finite value above 0",
                cure="set method.temperature to auto or to a positive number",
            )
        self._check_public()
        if self.objective.of_features and "D" in self.spec.shapes:
            raise ModelError(
                "FS-1647",
                f"alignment or contrast with the {self.spec.kind} adapter",
                expected="an adapter of features: it is the adapted feature that is aligned or contrasted",
                cure="set method.alignment = 0, or choose facmic, fedclip or bottleneck",
            )

    def _check_public(self) -> None:
        if self.public is None:
            return
        shape = self.public.shape
        fits = len(shape) == 2 and shape[0] >= 2 and shape[1] == self.spec.dimension
        if not (fits and np.isfinite(self.public).all() and FORMS[self.spec.kind].constants):
            raise ModelError(
                "FS-1633",
                f"public images of shape {shape} to normalise the {self.spec.kind} adapter by",
                expected=f"finite features of two images or more, (m, {self.spec.dimension}), and facmic_plain",
                cure="use a target of this federation's encoder",
            )

    @property
    def scale(self) -> float:
        """τ of the logits: ``temperature``, times 2.5 where there is no public mean to centre by."""
        return self.temperature * (1.0 if self.centre.any() else UNCENTRED)

    @property
    def prior(self) -> Vector:
        """P: (K, d) float64 unit rows, centred where the images are."""
        rows = unit_rows(np.asarray(self.text, np.float64))
        return unit_rows(rows - rows.mean(axis=0)) if self.centre.any() else rows


def unit_rows(rows: npt.NDArray[np.float64]) -> Vector:
    """Rows divided by their L2 norm; a zero row stays zero."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), TINY), np.float64)
