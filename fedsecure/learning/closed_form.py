"""Clipped sums of per-unit gradients in closed form, for every known adapter.

Privacy.md §3.4 and §6, facmic.md §5.4-7: forward, one backward to the activations, norms from Gram products, one
weighted product per weight. Norms and sums are taken in float64: a float32 sum over many units would move by more than
the clip norm when one unit changes. A record's own factors may be taken in float32, since the clip bounds whatever
they are, as long as they are that record's alone: that a row's bits depend on nothing but the row is checked on this
machine before it is relied on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedsecure.learning.adapters import AdapterKind, AdapterSpec, Vector
from fedsecure.learning.engines import Precision
from fedsecure.learning.losses import classification_slope, contrast_slope, distillation_slope
from fedsecure.learning.modules import FeatureAdapter, build_poles, centred_inputs, to_tensors
from fedsecure.learning.objective import TEACHER_SCALE, Objective
from fedsecure.learning.task import TINY, HeadTask
from fedsecure.learning.units import UnitFeatures

SAFETY = 1 - 1e-5
LAYER_NORM_EPSILON = 1e-5
LEAKY_SLOPE = 0.01
# A Gram product over 2^16 entries errs by at most 2^-36 of the records' lengths squared, so above 2^-20 of them the
# norm is right within SAFETY.
CANCELLED = 2.0**-20
# Records go through all but the linear head at most 256 at a time, so that a core's cache holds their activations, and
# always a multiple of 64, so that products have few shapes.
BLOCK, STEP = 256, 64


@dataclass(frozen=True, slots=True)
class Outer:
    """A weight whose gradient for record i is left_i ⊗ right_i; with a bias whose gradient is left_i."""

    left: Tensor
    right: Tensor
    bias: bool


Factor = Outer | Tensor
# (factors, labels) → factors, before clipping: how an audit plants gradients of its own.
Plant = Callable[[Sequence[Factor], Tensor], Sequence[Factor]]


def clipped_sum(
    task: HeadTask,
    parameters: Mapping[str, Any],
    units: UnitFeatures,
    *,
    max_grad_norm: float,
    device: torch.device,
    chunk: int,
    plant: Plant | None = None,
    precision: Precision = "float64",
) -> Vector:
    """Σ over units of clip_C(∇ of the mean loss over the unit's records), flat, in the spec's order.

    See :func:`fedsecure.learning.engines.clipped_sum` for the contract. ``plant`` is for the audit alone
    (:mod:`fedsecure.learning.canaries`); labels past the last class are then its to replace. ``precision="float32"``
    takes an adapter's activations in float32, where their rows are seen to stand alone: gradients then err by about
    1e-6 of their length, and the bound C holds as before. Objectives other than cross-entropy stay in float64.
    """
    records = units.mask.shape[1]
    in_blocks = task.spec.kind != "linear"
    if in_blocks:
        chunk = min(chunk, max(1, BLOCK // max(records, 1)))
    adapter = _Adapter.of(task, parameters, device=device)
    if in_blocks and precision == "float32" and task.objective.plain:
        largest = _padded(chunk * records)
        if _rows_stand_alone(task.spec, largest, device, torch.get_num_threads()):
            adapter = adapter.in_float32()
    total = torch.zeros(task.spec.parameters, dtype=torch.float64, device=device)
    onto = _views(task.spec, total)
    for start in range(0, len(units), chunk):
        part = units.select(slice(start, start + chunk))
        mask = torch.from_numpy(part.mask).to(device)
        count = int(mask.sum())
        rows = _padded(count) if in_blocks else count

        def block(values: npt.NDArray[Any], rows: int = rows, mask: Tensor = mask) -> Tensor:
            kept = torch.from_numpy(values).to(device)[mask]
            padded: Tensor = functional.pad(kept, [0, 0] * (kept.ndim - 1) + [0, rows - len(kept)])
            return padded

        features, weights, labels = block(part.features), block(part.weights), block(part.labels)
        known = labels if plant is None else labels.clamp(max=task.spec.classes - 1)
        factors: Sequence[Factor] = [_first(factor, count) for factor in adapter.factors(features, known, weights)]
        if plant is not None:
            factors = plant(factors, labels[:count])
        _clip_and_sum(factors, mask, max_grad_norm, onto=onto)
    return np.asarray(total.cpu().numpy(), np.float64)


def _views(spec: AdapterSpec, flat: Tensor) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in spec.shapes.values()]
    return [part.view(shape) for part, shape in zip(torch.split(flat, sizes), spec.shapes.values(), strict=True)]


def _first(factor: Factor, count: int) -> Factor:
    if isinstance(factor, Outer):
        return Outer(factor.left[:count], factor.right[:count], factor.bias)
    return factor[:count]


@dataclass(frozen=True, slots=True)
class _Adapter:
    """A task's constants in float64, and its parameters in the precision of the records' factors."""

    task: HeadTask
    tensors: Mapping[str, Tensor]
    prior: Tensor
    log_prior: Tensor | None
    # The two released adapters of a contrast.
    poles: Sequence[FeatureAdapter]

    @classmethod
    def of(cls, task: HeadTask, parameters: Mapping[str, Any], *, device: torch.device) -> _Adapter:
        tensors = to_tensors(task.spec, parameters, device=device, dtype=torch.float64)
        log_prior = None if task.log_prior is None else torch.as_tensor(task.log_prior).to(device, torch.float64)
        prior = torch.from_numpy(task.prior * task.scale).to(device)
        return cls(task, tensors, prior, log_prior, build_poles(task, device=device))

    def in_float32(self) -> _Adapter:
        return replace(self, tensors={name: tensor.float() for name, tensor in self.tensors.items()})

    def factors(self, features: Tensor, labels: Tensor, weights: Tensor) -> Sequence[Factor]:
        """What the gradients of (n, d) records with these labels are made of, each times its weight."""
        inputs = centred_inputs(self.task, features.to(next(iter(self.tensors.values())).dtype))
        with torch.no_grad():
            poles = [pole.adapt(features.double()) for pole in self.poles]
        teacher = None
        if self.task.objective.distillation is not None:
            teacher = inputs.double() @ self.prior.T * (TEACHER_SCALE / self.task.scale)
        slopes = _Slopes(self.task.objective, labels, weights, self.prior, self.log_prior, poles, teacher)
        return BACKWARD[self.task.spec.kind](inputs, self.tensors, slopes)


@dataclass(frozen=True, slots=True)
class _Slopes:
    """Gradients of records' losses, times their weights, in what an adapter gives out; float64."""

    objective: Objective
    labels: Tensor
    weights: Tensor
    prior: Tensor
    log_prior: Tensor | None
    poles: Sequence[Tensor]
    # (n, K) logits of the teacher, where there is a distillation.
    teacher: Tensor | None

    def in_logits(self, logits: Tensor) -> Tensor:
        """(n, K) for (n, K) logits."""
        shifted = logits if self.log_prior is None else logits + self.log_prior
        slope = classification_slope(self.objective, shifted, self.labels)
        if self.objective.distillation is not None and self.teacher is not None:
            slope += distillation_slope(logits, self.teacher, self.objective.distillation)
        return slope.mul_(self.weights[:, None])

    def in_feature(self, adapted: Tensor) -> Tensor:
        """(n, d) for (n, d) adapted unit features z, whose logits are τ·z·Pᵀ."""
        toward = self.in_logits(adapted @ self.prior.T) @ self.prior
        alignment, contrast = self.objective.alignment, self.objective.contrast
        if alignment is not None:
            toward += alignment.slope(adapted, self.labels) * self.weights[:, None]
        if contrast is not None:
            slope = contrast_slope(adapted, *self.poles, temperature=contrast.temperature)
            toward += slope * (contrast.strength * self.weights[:, None])
        return toward


def _padded(count: int) -> int:
    return -(-count // STEP) * STEP


@functools.cache
def _rows_stand_alone(spec: AdapterSpec, rows: int, device: torch.device, threads: int) -> bool:
    """Whether in float32 a record's factors are the same bits wherever it stands in a block of up to ``rows`` records,
    whatever stands beside it and however many. A kernel's operations do not depend on the numbers it is given, so one
    block of public noise, in several orders and sizes, shows it."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    d, k = spec.dimension, spec.classes
    centre = (0.1 / math.sqrt(d) * noise(d)).float().cpu().numpy()
    task = HeadTask(spec, noise(k, d).float().cpu().numpy(), centre, 10.0)
    parameters = {name: noise(*shape) / math.sqrt(d) for name, shape in spec.shapes.items()}
    adapter = _Adapter.of(task, parameters, device=device).in_float32()
    features, weights = noise(rows, d), noise(rows).abs()
    labels = torch.arange(rows, device=device) % k

    def run(order: Tensor) -> list[Tensor]:
        factors = adapter.factors(features[order], labels[order], weights[order])
        return [part for f in factors for part in ((f.left, f.right) if isinstance(f, Outer) else (f,))]

    usual = torch.arange(rows, device=device)
    orders = [usual.flip(0), usual.roll(rows // 3 + 1), *(usual[-size:] for size in range(STEP, rows, STEP))]
    whole = run(usual)
    return all(torch.equal(a[order], b) for order in orders for a, b in zip(whole, run(order), strict=True))


def _linear(inputs: Tensor, tensors: Mapping[str, Tensor], slopes: _Slopes) -> Sequence[Factor]:
    error = slopes.in_logits(inputs @ (slopes.prior + tensors["D"]).T)
    return [Outer(error, inputs, bias=False)]


def _attention(inputs: Tensor, tensors: Mapping[str, Tensor], slopes: _Slopes) -> Sequence[Factor]:
    scaled = inputs * math.sqrt(inputs.shape[-1])
    hidden = torch.addmm(tensors["b1"], scaled, tensors["W1"].T)
    hidden -= hidden.mean(dim=-1, keepdim=True)
    rstd = (hidden.square().mean(dim=-1, keepdim=True) + LAYER_NORM_EPSILON).rsqrt_()
    normalised = hidden.mul_(rstd)
    affine = torch.addcmul(tensors["beta"], normalised, tensors["gamma"])
    active = functional.leaky_relu_(affine, LEAKY_SLOPE)
    to_output = _gated(inputs, active, tensors, slopes)
    to_affine = torch.ops.aten.leaky_relu_backward(to_output @ tensors["W2"], active, LEAKY_SLOPE, True)
    to_hidden = to_affine * tensors["gamma"]
    along = (to_hidden * normalised).mean(dim=-1, keepdim=True)
    to_hidden -= to_hidden.mean(dim=-1, keepdim=True)
    to_hidden.addcmul_(normalised, along, value=-1).mul_(rstd)
    return [
        Outer(to_hidden.double(), scaled.double(), bias=True),
        (to_affine * normalised).double(),
        to_affine.double(),
        Outer(to_output.double(), active.double(), bias=True),
    ]


def _tanh_gate(inputs: Tensor, tensors: Mapping[str, Tensor], slopes: _Slopes) -> Sequence[Factor]:
    scaled = inputs * math.sqrt(inputs.shape[-1])
    active = torch.addmm(tensors["b1"], scaled, tensors["W1"].T).tanh_()
    to_output = _gated(inputs, active, tensors, slopes)
    to_hidden = (to_output @ tensors["W2"]).mul_(1 - active.square())
    return _two_layers(to_hidden, scaled, to_output, active)


def _bottleneck(inputs: Tensor, tensors: Mapping[str, Tensor], slopes: _Slopes) -> Sequence[Factor]:
    scaled = inputs * math.sqrt(inputs.shape[-1])
    active = torch.addmm(tensors["b1"], scaled, tensors["W1"].T).relu_()
    mixed = torch.addmm(tensors["b2"], active, tensors["W2"].T).add_(inputs)
    to_output = _to_direction(mixed, slopes)
    to_hidden = (to_output @ tensors["W2"]).mul_(active > 0)
    return _two_layers(to_hidden, scaled, to_output, active)


def _two_layers(to_hidden: Tensor, scaled: Tensor, to_output: Tensor, active: Tensor) -> Sequence[Factor]:
    return [
        Outer(to_hidden.double(), scaled.double(), bias=True),
        Outer(to_output.double(), active.double(), bias=True),
    ]


def _gated(inputs: Tensor, active: Tensor, tensors: Mapping[str, Tensor], slopes: _Slopes) -> Tensor:
    """∂ℓ/∂(W2 r + b2) of the gate z = unit(softmax(W2 r + b2) ⊙ a)."""
    gate = torch.softmax(torch.addmm(tensors["b2"], active, tensors["W2"].T), dim=-1)
    to_gate = _to_direction(gate * inputs, slopes).mul_(inputs)
    return to_gate.sub_((gate * to_gate).sum(-1, keepdim=True)).mul_(gate)


def _to_direction(mixed: Tensor, slopes: _Slopes) -> Tensor:
    """∂ℓ/∂u of z = unit(u); ``mixed`` is u and is overwritten by z."""
    length = mixed.norm(dim=-1, keepdim=True).clamp_min_(TINY)
    adapted = mixed.div_(length)
    # A confident record's gradient is a small difference of probabilities, so these are float64 in any case.
    toward = slopes.in_feature(adapted.double()).to(mixed.dtype)
    return toward.addcmul_(adapted, (adapted * toward).sum(-1, keepdim=True), value=-1).div_(length)


Backward = Callable[[Tensor, Mapping[str, Tensor], _Slopes], Sequence[Factor]]
# Looked up by kind whenever it is used.
BACKWARD: dict[AdapterKind, Backward] = {
    "linear": _linear,
    "facmic": _attention,
    "fedclip": _tanh_gate,
    "bottleneck": _bottleneck,
}


def _clip_and_sum(factors: Sequence[Factor], mask: Tensor, max_grad_norm: float, *, onto: Sequence[Tensor]) -> None:
    """Add Σ_u c_u g_u with c_u = min(1, C(1−1e-5)/‖g_u‖), from factors whose rows are the masked records.

    ``onto`` holds one float64 tensor a parameter.
    """
    norms = _record_norms(factors) if mask.shape[1] == 1 else _unit_norms(factors, mask)
    scale = (max_grad_norm * SAFETY / norms.clamp_min(TINY)).clamp(max=1.0)
    finite = torch.isfinite(norms)
    if mask.shape[1] > 1:
        scale, finite = (of_unit[:, None].expand_as(mask)[mask] for of_unit in (scale, finite))
    keep = slice(None) if bool(finite.all()) else finite
    scale = scale[keep]
    place = iter(onto)
    for factor in factors:
        if isinstance(factor, Outer):
            left = factor.left[keep] * scale[:, None]
            next(place).addmm_(left.T, factor.right[keep])
            if factor.bias:
                next(place).add_(left.sum(0))
        else:
            next(place).addmv_(factor[keep].T, scale)


def _record_norms(factors: Sequence[Factor]) -> Tensor:
    """‖l ⊗ r‖² = ‖l‖²‖r‖²: the gradient norms where every unit is one record."""
    squares: Tensor | float = 0.0
    for factor in factors:
        if isinstance(factor, Outer):
            right = factor.right.square().sum(-1)
            squares = squares + factor.left.square().sum(-1) * (right + 1 if factor.bias else right)
        else:
            squares = squares + factor.square().sum(-1)
    return torch.as_tensor(squares).sqrt()


def _unit_norms(factors: Sequence[Factor], mask: Tensor) -> Tensor:
    """(U,): the norm of each unit's gradient, the sum over its records."""
    squares = torch.zeros(mask.shape[0], dtype=torch.float64, device=mask.device)
    of_records = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    for factor in factors:
        if isinstance(factor, Outer):
            # ‖Σ_t l_t r_tᵀ‖² = Σ_{t,t'} ⟨l_t, l_t'⟩⟨r_t, r_t'⟩: no gradient is ever materialised.
            right = _gram(factor.right, mask)
            products = _gram(factor.left, mask) * (right + 1 if factor.bias else right)
            squares += products.sum((1, 2))
            of_records += products.diagonal(dim1=1, dim2=2)
        else:
            padded = _pad(factor, mask)
            squares += padded.sum(1).square().sum(-1)
            of_records += padded.square().sum(-1)
    # Records of a unit may cancel, and the aggregator chooses how large they are: what rounding hides counts as length.
    floor = CANCELLED * of_records.clamp_min(0).sqrt().sum(1).square()
    return torch.maximum(squares, floor).sqrt()


def _pad(rows: Tensor, mask: Tensor) -> Tensor:
    padded = torch.zeros((*mask.shape, rows.shape[-1]), dtype=rows.dtype, device=rows.device)
    padded[mask] = rows
    return padded


def _gram(rows: Tensor, mask: Tensor) -> Tensor:
    padded = _pad(rows, mask)
    return padded @ padded.transpose(1, 2)
