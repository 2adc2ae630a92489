"""CLIP2FL's convolutional student (AAAI 2024) as shapes and numbers without torch, for an aggregator that starts it.

ResNet-8 of CReFF (IJCAI 2022), group-normalised, and one affine map to CLIP's width. The classifier above is W = τ/√d·P
+ D with P the run's class texts, which an aggregator does not have, and D trained from zero: so the features learn to
stand where the texts do, and federated features can be drawn to them. The forward pass is in ``student_module``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsecure.learning.adapters import Float32
from fedsecure.learning.towers import TowerSpec

SIDE = 32
PIXELS = 3 * SIDE * SIDE
STAGES = (16, 32, 64)
KIND = "resnet8"


@dataclass(frozen=True, slots=True)
class StudentTensors(TowerSpec):
    """The tensors of a student that starts at random, but for the scales of its normalisations, which start at one."""

    def initial(self, seed: bytes) -> dict[str, Float32]:
        """Tensors at round 0, from SHAKE-256 of the public ``seed``."""
        tensors = TowerSpec.initial(self, seed)
        scales = {name for name, shape in self.layout if name.endswith(".weight") and len(shape) == 1}
        return {name: np.ones_like(value) if name in scales else value for name, value in tensors.items()}


def resnet8_spec(*, classes: int, dimension: int, width: int) -> StudentTensors:
    """ResNet-8 ×``width``, an affine map to ``dimension``, and D.

    Convolutions start from N(0, 2/(k²·out)) as released, the affine map with the spread of PyTorch's own start. A
    record is 32×32 pixels and then the ``dimension`` values of its CLIP feature, for the teacher.

    Args:
        classes: K.
        dimension: d of CLIP's features and of the student's.
        width: times 16, 32 and 64 channels.
    """
    layout: list[tuple[str, tuple[int, ...]]] = []

    def add(convolution: str, norm: str, shape: Sequence[int]) -> None:
        layout.append((f"{convolution}.weight", tuple(shape)))
        layout.extend((f"{norm}.{part}", (shape[0],)) for part in ("weight", "bias"))

    before = STAGES[0] * width
    add("conv", "norm", (before, 3, 3, 3))
    for stage, channels in enumerate(STAGES):
        name, after = f"stages.{stage}", channels * width
        add(f"{name}.conv1", f"{name}.norm1", (after, before, 3, 3))
        add(f"{name}.conv2", f"{name}.norm2", (after, after, 3, 3))
        if stage:
            add(f"{name}.shortcut.0", f"{name}.shortcut.1", (after, before, 1, 1))
        before = after
    layout += [
        ("projection.weight", (dimension, before)),
        ("projection.bias", (dimension,)),
        ("D", (classes, dimension)),
    ]
    spread = {name: math.sqrt(2 / (shape[0] * shape[2] * shape[3])) for name, shape in layout if len(shape) == 4}
    spread["projection.weight"] = 1 / math.sqrt(3 * before)
    return StudentTensors(kind=KIND, dimension=PIXELS + dimension, classes=classes, layout=tuple(layout), spread=spread)
