"""Distilling CLIP into a student, record by record: the client's loss of CLIP2FL (AAAI 2024, §3, equation 1).

The teacher is frozen zero-shot CLIP on the un-augmented image, so its logits are one constant a record, computed once.
The loss is Hinton's (arXiv 1503.02531): cross-entropy + β·T²·KL(softmax(q/T) ‖ softmax(s/T)). Prompts and CLIP are
public and each term looks at one record alone, so clipping per record stays valid and distillation costs no privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import Float32
from fedsecure.learning.losses import classification_loss
from fedsecure.learning.objective import CROSS_ENTROPY, Objective

# exp(logit_scale) of OpenAI's models, by which the released program multiplies cosines.
TEACHER_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class Distillation:
    """How much, and how softly, the teacher speaks.

    Attributes:
        strength: β ≥ 0; 0 is plain training. The released program's is 1.
        temperature: T > 0; the released program's is 3. The paper's equation has none.

    Raises:
        ModelError: FS-1690 a value out of range.
    """

    strength: float = 1.0
    temperature: float = 3.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise _out_of_range(f"distillation strength {self.strength}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise _out_of_range(f"distillation temperature {self.temperature}")


def teacher_logits(features: npt.NDArray[Any], text: npt.NDArray[Any], *, scale: float = TEACHER_SCALE) -> Float32:
    """q = scale · cos(x, t_c): (n, C) float32 for (n, d) image features and (C, d) text embeddings of any length.

    Raises:
        ModelError: FS-1638 features of another width than the texts.
    """
    if features.ndim != 2 or text.ndim != 2 or features.shape[1] != text.shape[1]:
        raise ModelError(
            "FS-1638",
            f"image features of shape {features.shape} and text embeddings of shape {text.shape}",
            expected="(n, d) and (C, d)",
            cure="encode images and prompts with one encoder",
        )
    images, rows = (np.asarray(values, np.float64) for values in (features, text))
    images = images / np.maximum(np.linalg.norm(images, axis=1, keepdims=True), 1e-12)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return np.asarray(scale * images @ rows.T, np.float32)


def check_classes(teacher: tuple[str, ...], student: tuple[str, ...]) -> None:
    """Refuse a teacher that was prompted with another class list, or another order of it: ModelError FS-1691."""
    if teacher != student:
        odd = next((pair for pair in zip(teacher, student, strict=False) if pair[0] != pair[1]), ("", ""))
        raise ModelError(
            "FS-1691",
            f"a teacher of {len(teacher)} classes and a student of {len(student)}; the first that differ: "
            f"{odd[0]!r} and {odd[1]!r}",
            expected="the same classes in the same order",
            cure="prompt the teacher with the federation's class list",
        )


def distillation_loss(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    how: Distillation,
    objective: Objective = CROSS_ENTROPY,
) -> Tensor:
    """Cross-entropy + β·T²·KL(teacher ‖ student) of each record; no record's loss depends on another.

    Args:
        logits: (…, C) of the student.
        teacher: (…, C) logits of the teacher, constants.
        labels: (…,) int64.
        how: β and T.
        objective: what stands in place of plain cross-entropy, such as a focal loss.

    Returns:
        (…,); the caller averages, over the expected batch where batches are Poisson samples.

    Raises:
        ModelError: FS-1691 teacher and student have different numbers of classes.
    """
    if teacher.shape != logits.shape:
        raise ModelError(
            "FS-1691",
            f"teacher logits of shape {tuple(teacher.shape)} for student logits of shape {tuple(logits.shape)}",
            expected="the same records and classes",
            cure="prompt the teacher with the federation's class list",
        )
    loss = classification_loss(objective, logits, labels)
    if how.strength == 0:
        return loss
    soft = functional.log_softmax(teacher / how.temperature, dim=-1)
    own = functional.log_softmax(logits / how.temperature, dim=-1)
    apart = (soft.exp() * (soft - own)).sum(-1)
    return loss + how.strength * how.temperature**2 * apart


def _out_of_range(found: str) -> ModelError:
    return ModelError(
        "FS-1690",
        found,
        expected="a finite strength of 0 or more, and a finite temperature above 0",
        cure="the released program's are strength 1 and temperature 3",
    )
