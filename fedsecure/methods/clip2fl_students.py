"""The students that CLIP2FL (AAAI 2024) trains here: what each is, and what its features are.

A student is features z, d wide, under a classifier W that starts at the run's class texts P, W = τ/√d·P. ``linear`` has
nothing to learn below it: z = √d·a, a being the unit input of every head. ``features`` learns z = x + A x + b with
x = √d·a; round 0 of both is zero-shot. ``resnet8`` learns z from 32×32 pixels; it starts from a public seed, at chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsecure.config import RunSettings
from fedsecure.errors import ConfigError
from fedsecure.learning.adapters import AdapterKind, AdapterSpec, Float32, Vector
from fedsecure.learning.classifier import Classifier
from fedsecure.learning.features import Inputs
from fedsecure.learning.objective import Distillation, Objective
from fedsecure.learning.student_spec import StudentTensors, resnet8_spec
from fedsecure.learning.task import HeadTask, unit_rows
from fedsecure.learning.units import UnitFeatures
from fedsecure.methods.base import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """The residual head: logits = τ·a·Pᵀ + a·Dᵀ; class gradients are made of a = z/√d.

    Attributes:
        kind: of its tensors.
        inputs: what its records are.
    """

    kind: AdapterKind = "linear"
    inputs: Inputs = "features"

    def spec(self, settings: RunSettings) -> AdapterSpec:
        """Its tensors."""
        return AdapterSpec(self.kind, settings.encoder.dimension, len(settings.classes))

    def task(self, settings: RunSettings, head: HeadTask, taught: Distillation | None = None) -> Any:
        """The student as sites evaluate and keep it; with ``taught`` as they train it.

        Args:
            settings: of the run.
            head: zero-shot with the run's texts, public mean and temperature.
            taught: β and T of the teacher.
        """
        objective = Objective(distillation=taught)
        return HeadTask(self.spec(settings), head.text, head.centre, head.temperature, objective=objective)

    def scale(self, dimension: int) -> float:
        """z over what :meth:`rows` gives."""
        return math.sqrt(dimension)

    def rows(self, task: Any, tensors: Mapping[str, Tensor], units: UnitFeatures) -> Vector:
        """(U, m, d) of a site's records, of which class gradients are made.

        Args:
            task: from :meth:`task`.
            tensors: of :meth:`spec`.
            units: the site's.
        """
        # As fedsecure.learning.modules.centred_inputs has them.
        rows = unit_rows(np.asarray(units.features, np.float64))
        return unit_rows(rows - task.centre) if task.centre.any() else rows

    def of_texts(self, head: HeadTask, tensors: Mapping[str, Tensor]) -> Vector:
        """(K, d): z of the class texts, where federated features begin."""
        return math.sqrt(head.spec.dimension) * head.prior

    def residual(self, classifier: Classifier, head: HeadTask) -> Float32:
        """D of a classifier on z: τ·a·Pᵀ + a·Dᵀ = W·√d·a."""
        weight = np.asarray(classifier.weight, np.float64) * math.sqrt(head.spec.dimension)
        return np.asarray(weight - head.scale * head.prior, np.float32)


@dataclass(frozen=True, slots=True)
class OnFeatures(Linear):
    """The affine map under its classifier: logits = τ/√d·z·Pᵀ + z·Dᵀ; class gradients are made of z/√d."""

    kind: AdapterKind = "affine"

    def rows(self, task: Any, tensors: Mapping[str, Tensor], units: UnitFeatures) -> Vector:
        width = math.sqrt(task.spec.dimension)
        return _mapped(width * Linear.rows(self, task, tensors, units), tensors) / width

    def of_texts(self, head: HeadTask, tensors: Mapping[str, Tensor]) -> Vector:
        return _mapped(Linear.of_texts(self, head, tensors), tensors)

    def residual(self, classifier: Classifier, head: HeadTask) -> Float32:
        return Linear.residual(self, classifier, head) / np.float32(math.sqrt(head.spec.dimension))


@dataclass(frozen=True, slots=True)
class OnImages(OnFeatures):
    """ResNet-8 and an affine map under the same classifier.

    Class gradients are made of z itself, which is a few units long, so that clipping brings all records to one length,
    whatever the network does. Texts do not go through it: federated features begin at the classifier's own.
    """

    inputs: Inputs = "thumbnails"

    def spec(self, settings: RunSettings) -> StudentTensors:
        options, dimension = settings.method.clip2fl, settings.encoder.dimension
        return resnet8_spec(classes=len(settings.classes), dimension=dimension, width=options.width)

    def task(self, settings: RunSettings, head: HeadTask, taught: Distillation | None = None) -> Any:
        from fedsecure.learning.student_module import resnet8_task

        return resnet8_task(self.spec(settings), head=head, taught=taught)

    def scale(self, dimension: int) -> float:
        return 1.0

    def rows(self, task: Any, tensors: Mapping[str, Tensor], units: UnitFeatures) -> Vector:
        from fedsecure.learning.student_module import student_features

        return student_features(task, tensors, units)

    def of_texts(self, head: HeadTask, tensors: Mapping[str, Tensor]) -> Vector:
        return Linear.of_texts(self, head, tensors)


def _mapped(rows: Vector, tensors: Mapping[str, Tensor]) -> Vector:
    """x + A x + b of (…, d) rows x."""
    matrix, offset = (np.asarray(tensors[name], np.float64) for name in ("A", "b"))
    return np.asarray(rows + rows @ matrix.T + offset, np.float64)


def check_images(settings: RunSettings) -> None:
    """Refuse what a convolutional student cannot train on: ConfigError FS-1020."""
    privacy, views = settings.privacy, settings.method.views
    records = privacy.max_records_per_unit if privacy.unit == "patient" else 1
    if settings.encoder.model == "features" or records * views > 1:
        raise ConfigError(
            "FS-1020",
            f"student = {settings.method.clip2fl.student!r} with encoder {settings.encoder.model!r}, {records} records "
            f"a unit and {views} views",
            expected="an encoder of images, and one image a unit: convolutions would see a unit's images apart",
            cure="set max_records_per_unit = 1 and views = 1, or train the student on features",
        )


STUDENTS: Mapping[str, Linear] = {"linear": Linear(), "features": OnFeatures(), "resnet8": OnImages()}
