"""CLIP2FL's convolutional student (AAAI 2024) under its text classifier, as a task for Opacus, evaluation and the file.

Rows are those of :mod:`fedsecure.learning.thumbnails`. In training the teacher's logits stand beside the student's own,
and the loss of a record is cross-entropy + β·T²·KL, which looks at that record alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsecure.learning.adapters import Vector
from fedsecure.learning.distillation import distillation_loss
from fedsecure.learning.modules import centred_inputs, resolve_device
from fedsecure.learning.objective import TEACHER_SCALE, Distillation
from fedsecure.learning.student_spec import PIXELS, SIDE, STAGES
from fedsecure.learning.students import StudentSpec, build_student, check_single
from fedsecure.learning.task import HeadTask
from fedsecure.learning.tower_task import TowerTask, load_exactly, record_loss
from fedsecure.learning.towers import TowerSpec
from fedsecure.learning.units import UnitFeatures

# Images in activations at a time. Of a ResNet-8 ×1 a core's cache holds so many: in evaluation, in float64, twice as
# fast as four times as many; a GPU would like more.
_IMAGES = 16


class TextStudent(nn.Module):
    """(n, w) or (U, 1, w) rows → as many logits; with ``teaches`` the teacher's K behind the student's own.

    Args:
        head: zero-shot with the run's texts, public mean and temperature.
        width: of ResNet-8.
        teaches: whether the teacher's logits are wanted.
    """

    prior: Tensor

    def __init__(self, head: HeadTask, *, width: int, teaches: bool) -> None:
        super().__init__()
        classes, dimension = head.text.shape
        spec = StudentSpec("resnet8", classes, width=width, norm="group", projection=dimension)
        self.body: Any = build_student(spec, seed=0)
        del self.body.head
        self.residual = nn.Linear(dimension, classes, bias=False)
        self.register_buffer("prior", torch.from_numpy(head.prior), persistent=False)
        self.head, self.teaches = head, teaches

    def features(self, rows: Tensor) -> Tensor:
        """z: (n, d) of (n, w) rows."""
        found: Tensor = self.body.features(rows[:, :PIXELS].reshape(-1, 3, SIDE, SIDE))
        return found

    def forward(self, rows: Tensor) -> Tensor:
        if rows.ndim == 3:
            check_single(rows)
        flat = rows.reshape(-1, rows.shape[-1])
        features = self.features(flat)
        prior = self.prior.to(features)
        outputs = self.residual(features) + features @ prior.T * (self.head.scale / math.sqrt(prior.shape[1]))
        if self.teaches:
            teacher = centred_inputs(self.head, flat[:, PIXELS:]) @ prior.T * TEACHER_SCALE
            outputs = torch.cat([outputs, teacher], dim=-1)
        shaped: Tensor = outputs.reshape(*rows.shape[:-1], -1)
        return shaped


def resnet8_task(spec: TowerSpec, *, head: HeadTask, taught: Distillation | None = None) -> TowerTask:
    """The student for the Opacus engine and for evaluation; with ``taught`` for training by the teacher as well.

    Args:
        spec: from :func:`fedsecure.learning.student_spec.resnet8_spec`.
        head: texts, public mean and temperature.
        taught: β and T; without, the loss is cross-entropy and the outputs are the student's logits alone.

    Raises:
        ModelError: FS-1672 in ``build`` for tensors that do not fit, FS-1693 for a unit of several records.
    """
    classes = spec.classes

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        if taught is None:
            return record_loss(outputs, labels)
        return distillation_loss(outputs[..., :classes], outputs[..., classes:], labels, how=taught)

    build = partial(_build, head, spec, taught is not None)
    architecture = (spec.kind, spec.dimension, spec.layout, bool(head.centre.any()), taught is not None)
    return TowerTask(
        shapes=spec.shapes,
        build=build,
        loss=loss,
        spec=spec,
        head=head,
        chunk=_IMAGES,
        single=True,
        architecture=architecture,
    )


def _build(head: HeadTask, spec: TowerSpec, teaches: bool, parameters: Mapping[str, Any]) -> TextStudent:
    # Layers are filled from torch's global generator and then overwritten, so its state is put back.
    with torch.random.fork_rng(devices=[]):
        width = spec.shapes["conv.weight"][0] // STAGES[0]
        student = TextStudent(head, width=width, teaches=teaches).double()
    named = dict(student.named_parameters())
    named["body.D"] = named.pop("residual.weight")
    trained = {name.removeprefix("body."): value for name, value in named.items()}
    load_exactly(list(trained.items()), dict(parameters))
    return student


def student_features(
    task: TowerTask, parameters: Mapping[str, Any], units: UnitFeatures, *, device: str = "auto"
) -> Vector:
    """z of every record: (U, m, d) float64, where class gradients are taken; values at padded records mean nothing."""
    where = resolve_device(device)
    student: Any = task.build(parameters).to(where, torch.float64).eval()
    rows = torch.from_numpy(units.features).flatten(0, 1)
    found = np.empty((len(rows), task.head.text.shape[1]))
    with torch.no_grad():
        for start in range(0, len(rows), _IMAGES):
            part = slice(start, start + _IMAGES)
            found[part] = student.features(rows[part].to(where, torch.float64)).cpu().numpy()
    return found.reshape(*units.mask.shape, -1)
