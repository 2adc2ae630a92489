"""Distilling CLIP into a student, record by record: the client's loss of CLIP2FL (AAAI 2024, §3, equation 1).

The teacher is frozen zero-shot CLIP on the un-augmented image, so its logits are one constant a record, computed once.
The loss is Hinton's (arXiv 1503.02531): cross-entropy + β·T²·KL(softmax(q/T) ‖ softmax(s/T)). Prompts and CLIP are
public and each term looks at one record alone, so clipping per record stays valid and distillation costs no privacy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import Float32
from fedsecure.learning.losses import classification_loss, distillation_term
from fedsecure.learning.objective import CROSS_ENTROPY, TEACHER_SCALE, Distillation, Objective


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
    return loss + distillation_term(logits, teacher, how)


__all__ = ["Distillation", "check_classes", "distillation_loss", "teacher_logits"]
