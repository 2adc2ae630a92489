"""Students and distillation: shapes as published, a loss that stands alone, and private steps with group norms only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsecure.errors import FedsecureError, ModelError
from fedsecure.learning.distillation import Distillation, check_classes, distillation_loss, teacher_logits
from fedsecure.learning.students import (
    SIDE,
    StudentSpec,
    build_student,
    initial,
    normalise,
)

CLIP2FL = Distillation()


def refused(kind: type[FedsecureError], code: str, act: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        act()
    assert caught.value.code == code


def pixels(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, SIDE, SIDE), dtype=np.uint8)


@pytest.mark.parametrize(
    ("classes", "projection", "count"),
    [(10, 0, 1_227_594), (100, 0, 1_250_724), (10, 512, 1_361_738), (100, 512, 1_407_908)],
)
def test_resnet8_has_the_published_size(classes: int, projection: int, count: int) -> None:
    student = build_student(StudentSpec("resnet8", classes, projection=projection), seed=0)
    assert sum(p.numel() for p in student.parameters()) == count
    assert sum(b.numel() for name, b in student.named_buffers() if "running" in name) == 2 * 1344


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_shapes_at_width_four(norm: Any) -> None:
    student = build_student(StudentSpec("resnet8", 7, norm=norm), seed=0).eval()
    with torch.no_grad():
        features, logits = student(normalise(pixels(2)))
    assert (features.shape, logits.shape) == ((2, 512), (2, 7))
    assert torch.equal(student.head(features), logits)


def test_the_feature_student_starts_as_clip() -> None:
    student = build_student(StudentSpec("features", 5, inputs=16), seed=3)
    values = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    features, logits = student(values)
    assert torch.allclose(features, 4 * functional.normalize(values, dim=-1))
    assert logits.shape == (4, 5)


def test_one_seed_one_start() -> None:
    spec = StudentSpec("resnet8", 3, width=1)
    one, two, other = initial(spec, seed=1), initial(spec, seed=1), initial(spec, seed=2)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["conv.weight"], other["conv.weight"])


def test_the_loss_is_hintons_and_each_records_own() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    found = distillation_loss(logits, teacher, labels, how=Distillation(0.5, 3.0))
    divergence = functional.kl_div(
        functional.log_softmax(logits / 3, -1), functional.softmax(teacher / 3, -1), reduction="none"
    ).sum(-1)
    expected = functional.cross_entropy(logits, labels, reduction="none") + 0.5 * 9 * divergence
    assert torch.allclose(found, expected)
    alone = [distillation_loss(logits[i], teacher[i], labels[i], how=Distillation(0.5, 3.0)) for i in range(6)]
    assert torch.allclose(found, torch.stack(alone))
    plain = distillation_loss(logits, teacher, labels, how=Distillation(0.0))
    assert torch.allclose(plain, functional.cross_entropy(logits, labels, reduction="none"))


def test_teacher_logits() -> None:
    features, text = np.array([[3.0, 4.0]]), np.array([[2.0, 0.0], [0.0, 5.0]])
    assert teacher_logits(features, text) == pytest.approx(np.array([[60.0, 80.0]]))


def test_bad_teachers() -> None:
    for strength, temperature in ((1.0, 0.0), (1.0, -3.0), (-1.0, 3.0), (float("nan"), 3.0), (1.0, float("inf"))):
        refused(ModelError, "FS-1690", lambda s=strength, t=temperature: Distillation(s, t))  # type: ignore[misc]
    refused(ModelError, "FS-1638", lambda: teacher_logits(np.ones((2, 3)), np.ones((2, 4))))
    refused(ModelError, "FS-1691", lambda: check_classes(("a", "b"), ("b", "a")))
    refused(ModelError, "FS-1691", lambda: check_classes(("a", "b"), ("a", "b", "c")))
    check_classes(("a", "b"), ("a", "b"))
    labels = torch.zeros(2, dtype=torch.int64)
    refused(
        ModelError,
        "FS-1691",
        lambda: distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4), labels, how=CLIP2FL),
    )


def test_bad_students() -> None:
    refused(ModelError, "FS-1692", lambda: StudentSpec("resnet8", 1))
    refused(ModelError, "FS-1692", lambda: StudentSpec("resnet8", 3, width=0))
    refused(ModelError, "FS-1692", lambda: StudentSpec("vgg", 3))  # type: ignore[arg-type]
    refused(ModelError, "FS-1693", lambda: normalise(np.zeros((2, 3, 28, 28), np.uint8)))
