"""The students of CLIP2FL (AAAI 2024): a small convolutional network on images, and a small head on CLIP's features.

ResNet-8 is CReFF's (IJCAI 2022): a convolution and three stages of one basic block (He et al., CVPR 2016), four times
as wide as usual. CLIP2FL puts one affine map to CLIP's width behind it (called an MLP there) and the classifier on top;
CReFF has the classifier alone. Batch statistics couple the records of a batch and would leave a site without noise, so
that private training takes group normalisation (Wu & He, ECCV 2018), and its Opacus engine refuses the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import Float32
from fedsecure.learning.student_spec import SIDE, STAGES

Kind = Literal["resnet8", "features"]
Norm = Literal["batch", "group"]
# CIFAR-10's, which the released programs use for CIFAR-100 as well.
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_GROUPS = 8


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """What a student looks like.

    Attributes:
        kind: ``resnet8`` on 32×32 images, ``features`` on image embeddings.
        classes: C ≥ 2.
        inputs: d, width of the embeddings; ignored by ``resnet8``.
        width: multiplier of ResNet-8's 16, 32 and 64 channels; 4 in the papers.
        norm: ``batch`` as in the papers, or ``group``.
        projection: width of the affine map under the classifier, CLIP's 512; 0 for none, as in CReFF.

    Raises:
        ModelError: FS-1692 an unknown kind or an impossible number.
    """

    kind: Kind
    classes: int
    inputs: int = 512
    width: int = 4
    norm: Norm = "batch"
    projection: int = 512

    def __post_init__(self) -> None:
        known = self.kind in ("resnet8", "features") and self.norm in ("batch", "group")
        if not known or self.classes < 2 or self.inputs < 2 or self.width < 1 or self.projection < 0:
            raise ModelError(
                "FS-1692",
                f"a student {self.kind!r} of {self.classes} classes, {self.inputs} inputs, width {self.width}, "
                f"normalisation {self.norm!r} and projection {self.projection}",
                expected="resnet8 or features, batch or group, two classes or more, and positive widths",
                cure="correct the student's settings",
            )


class Student(nn.Module):
    """A feature extractor and a linear classifier; ``forward`` gives both, z not normalised.

    Attributes:
        head: the classifier, φ; all other parameters are θ.
    """

    head: nn.Linear

    def features(self, inputs: Tensor) -> Tensor:
        """z: (n, d)."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) features and (n, C) logits of (n, …) inputs."""
        features = self.features(inputs)
        return features, self.head(features)


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(norm, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), _norm(norm, after))

    def forward(self, inputs: Tensor) -> Tensor:
        inner = functional.relu(self.norm1(self.conv1(inputs)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(inputs))


class ResNet8(Student):
    """(n, 3, 32, 32) normalised images → mean of the last stage (n, 64·width) → projection → classifier."""

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        channels = [stage * spec.width for stage in STAGES]
        self.conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.norm = _norm(spec.norm, channels[0])
        before = (channels[0], *channels[:-1])
        strides = (1, 2, 2)
        self.stages = nn.Sequential(
            *(_Block(b, a, s, spec.norm) for b, a, s in zip(before, channels, strides, strict=True))
        )
        self.projection: nn.Module = nn.Identity()
        if spec.projection:
            self.projection = nn.Linear(channels[-1], spec.projection)
        self.head = nn.Linear(spec.projection or channels[-1], spec.classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                # He's initialisation by the number of outputs, as released.
                fan = part.kernel_size[0] * part.kernel_size[1] * part.out_channels
                nn.init.normal_(part.weight, 0.0, math.sqrt(2 / fan))

    def features(self, inputs: Tensor) -> Tensor:
        found = self.stages(functional.relu(self.norm(self.conv(inputs))))
        pooled: Tensor = self.projection(found.mean(dim=(2, 3)))
        return pooled


class FeatureStudent(Student):
    """A small head on frozen embeddings: z = x + A x + b with x = √d · unit(embedding), and the classifier on z.

    A and b start at zero, so that z begins as CLIP's own feature, in the space of its texts. x is as long as a draw of
    N(0, I), the start of the federated features.
    """

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        self.adapter = nn.Linear(spec.inputs, spec.inputs)
        nn.init.zeros_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)
        self.head = nn.Linear(spec.inputs, spec.classes)

    def features(self, inputs: Tensor) -> Tensor:
        scaled = functional.normalize(inputs, dim=-1) * math.sqrt(inputs.shape[-1])
        moved: Tensor = scaled + self.adapter(scaled)
        return moved


def _norm(norm: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(min(_GROUPS, channels), channels)


def build_student(spec: StudentSpec, *, seed: int) -> Student:
    """A fresh student: PyTorch's and He's initial values under a public seed, the same at every site."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet8(spec) if spec.kind == "resnet8" else FeatureStudent(spec)


def initial(spec: StudentSpec, *, seed: int) -> dict[str, Float32]:
    """The trainable tensors of :func:`build_student` by name, in the module's order, float32."""
    named = build_student(spec, seed=seed).named_parameters()
    return {name: value.detach().numpy().astype(np.float32, copy=True) for name, value in named}


def normalise(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(n, 3, 32, 32) uint8 images as float32 with CIFAR-10's mean and standard deviation taken out.

    Raises:
        ModelError: FS-1693 another shape or dtype.
    """
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (3, SIDE, SIDE):
        raise ModelError(
            "FS-1693",
            f"images {pixels.dtype} of shape {pixels.shape}",
            expected=f"uint8 of shape (n, 3, {SIDE}, {SIDE})",
            cure="read them with fedsecure.data.cifar.read_pixels",
        )
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def check_single(records: Tensor) -> None:
    """Refuse (U, m, …) units of several records: ModelError FS-1693."""
    if records.shape[1] != 1:
        raise ModelError(
            "FS-1693",
            f"units of {records.shape[1]} records",
            expected="one record a unit",
            cure='convolutions see one image a unit: set privacy.unit = "record"',
        )
