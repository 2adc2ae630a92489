"""Dirac canaries through the real kernels: units whose clipped gradient is C in one coordinate (privacy.md §4 B).

A canary is a record whose input to the adapter is the unit vector e_c and whose loss is a large multiple of output r
of the first layer. Its gradient is then e_r ⊗ e_c, a hundred times or more longer than C, so it goes through clipping,
summation and noise as any unit does. Labels past the last class name r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning import closed_form, opacus_engine
from fedsecure.learning.adapters import Vector
from fedsecure.learning.closed_form import SAFETY
from fedsecure.learning.gradients import Factor, Outer
from fedsecure.learning.modules import build_module
from fedsecure.learning.opacus_engine import ModuleTask
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures

_GAIN = 1e3
_CHUNK = 512


@dataclass(frozen=True, slots=True, eq=False)
class Canaries:
    """m canaries of one adapter.

    Attributes:
        units: m units; the first record of each is the canary, the others are padding.
        coordinates: (m,) distinct positions in the adapter's flat gradient.
        amplitude: what each adds to its coordinate after clipping, over C.
    """

    units: UnitFeatures
    coordinates: npt.NDArray[np.int64]
    amplitude: float

    def __len__(self) -> int:
        return len(self.coordinates)


def make_canaries(task: HeadTask, count: int, *, records: int = 1) -> Canaries:
    """Up to ``count`` canaries, spread over the first weight.

    Args:
        task: the adapter; the rows of its first weight are K for linear and d for facmic.
        count: m wanted; no more than the first weight has entries.
        records: m of the units they are to stand beside.

    Raises:
        ModelError: FS-1643 when the public mean is as long as a feature, so that no record has input e_c.
    """
    rows, d = next(iter(task.spec.shapes.values()))
    count = min(count, rows * d)
    coordinates = np.arange(count, dtype=np.int64) * (rows * d) // count
    centre = np.asarray(task.centre, np.float64)
    left = 1 - float(centre @ centre)
    if left <= 0:
        raise ModelError(
            "FS-1643",
            f"a public mean of length {float(np.linalg.norm(centre)):.3f}",
            expected="a mean of unit features, shorter than 1",
            cure="use the mean of L2-normalised features",
        )
    # unit(x) = centre + t·e_c has length 1 for this t, and centring it leaves the direction e_c.
    along = np.sqrt(centre**2 + left) - centre
    column = coordinates % d
    features = np.zeros((count, records, d), np.float32)
    features[:, 0] = centre
    features[np.arange(count), 0, column] += along[column]
    labels = np.zeros((count, records), np.int64)
    labels[:, 0] = task.spec.classes + coordinates // d
    mask = np.zeros((count, records), np.bool_)
    mask[:, 0] = True
    # FACMIC's first layer sees √d·e_c and has a bias, whose gradient takes its part of the norm.
    share = 1.0 if task.spec.kind == "linear" else float(np.sqrt(d / (d + 1)))
    return Canaries(UnitFeatures(features, labels, mask), coordinates, SAFETY * share)


def audited_sum(
    task: HeadTask,
    parameters: Mapping[str, Any],
    units: UnitFeatures,
    *,
    max_grad_norm: float,
    engine: Literal["closed-form", "opacus"],
) -> Vector:
    """As :func:`fedsecure.learning.engines.clipped_sum` on the CPU, for units among which there are canaries."""
    rows = max(1, _CHUNK // units.mask.shape[1])
    device = torch.device("cpu")
    if engine == "closed-form":
        plant = _planter(task.spec.classes, _GAIN * max_grad_norm)
        sums = closed_form.ClippedSums(task, units, device=device, chunk=rows)
        return sums.at(parameters, max_grad_norm=max_grad_norm, plant=plant)
    own = _module_task(task, _GAIN * max_grad_norm)
    return opacus_engine.clipped_sum(own, parameters, units, max_grad_norm=max_grad_norm, device=device, chunk=rows)


def _planter(classes: int, gain: float) -> closed_form.Plant:
    def plant(factors: Sequence[Factor], labels: Tensor) -> Sequence[Factor]:
        planted = labels >= classes
        rows = torch.nonzero(planted).flatten()
        for index, factor in enumerate(factors):
            target = factor.left if isinstance(factor, Outer) else factor
            target[planted] = 0.0
            if index == 0:
                target[rows, labels[rows] - classes] = gain
        return factors

    return plant


class _Tap(nn.Module):
    """A layer that keeps its last output. Taken outside the layer: a hook on it would bypass Opacus's own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.seen: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(inputs)
        self.seen = output
        return output


class _WithFirstLayer(nn.Module):
    """The adapter's own module; its outputs are logits and, behind them, what its first layer gave."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        name, first = next((n, layer) for n, layer in head.named_children() if isinstance(layer, nn.Linear))
        setattr(head, name, _Tap(first))
        self.head, self._first = head, name

    def forward(self, features: Tensor) -> Tensor:
        logits = self.head(features)
        seen: Tensor = getattr(self.head, self._first).seen
        return torch.cat([logits, seen], dim=-1)


def _module_task(task: HeadTask, gain: float) -> ModuleTask:
    classes = task.spec.classes
    log_prior = None if task.log_prior is None else torch.as_tensor(task.log_prior).double()

    def build(parameters: Mapping[str, Any]) -> nn.Module:
        return _WithFirstLayer(build_module(task, parameters, device=torch.device("cpu"), dtype=torch.float64))

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        logits, first = outputs[..., :classes], outputs[..., classes:]
        if log_prior is not None:
            logits = logits + log_prior
        planted = labels >= classes
        real = functional.cross_entropy(logits.movedim(-1, 1), labels.clamp(max=classes - 1), reduction="none")
        row = (labels - classes).clamp(min=0)[..., None]
        return torch.where(planted, gain * first.gather(-1, row)[..., 0], real)

    return ModuleTask(task.spec.shapes, build, loss)
