"""Gradients of records in every known adapter, in closed form: as factors, whose products nobody has to form.

Privacy.md §6, facmic.md §5.4-7: forward, and one backward to the activations. Factors have the activations' precision,
float64 or float32; losses' gradients in the logits are taken in float64 in any case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fedsecure.learning.adapters import AdapterKind
from fedsecure.learning.losses import classification_slope, contrast_slope, distillation_slope
from fedsecure.learning.modules import VARIANCE_EPSILON
from fedsecure.learning.objective import Objective
from fedsecure.learning.task import TINY

LEAKY_SLOPE = 0.01


@dataclass(frozen=True, slots=True)
class Outer:
    """A weight whose gradient for record i is left_i ⊗ right_i; with a bias whose gradient is left_i."""

    left: Tensor
    right: Tensor
    bias: bool


Factor = Outer | Tensor
Affine = Callable[[Tensor], Tensor]


def _affine(weight: Tensor, bias: Tensor | None = None) -> Affine:
    """x ↦ x·Wᵀ + b for (n, d) rows.

    In float32 on a CPU by oneDNN, which uses the widest vector instructions of any maker's processor; the library
    behind torch's own products does not, and takes twice the time there.
    """
    if weight.dtype == torch.float32 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        product = torch.ops.mkldnn._linear_pointwise
        return lambda rows: product(rows, weight, bias, "none", [], "")
    return lambda rows: functional.linear(rows, weight, bias)


@dataclass(frozen=True, slots=True)
class Weights:
    """An adapter's parameters, and its layers as products: W1·x + b1, W2·x + b2 and, on the way back, W2ᵀ·g.

    ``statistics``: mean and inverse deviation that normalise the hidden layer, where the task has public images.
    """

    tensors: Mapping[str, Tensor]
    layers: Mapping[str, Affine]
    statistics: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], statistics: tuple[Tensor, Tensor] | None = None) -> Weights:
        if "W1" not in tensors:
            return cls(tensors, {})
        hidden, output = _affine(tensors["W1"], tensors["b1"]), _affine(tensors["W2"], tensors["b2"])
        layers = {"hidden": hidden, "output": output, "back": _affine(tensors["W2"].T)}
        if statistics is not None:
            mean, inverse = statistics
            statistics = mean.to(tensors["W1"]), inverse.to(tensors["W1"])
        return cls(tensors, layers, statistics)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values())).dtype


@dataclass(frozen=True, slots=True)
class Slopes:
    """Gradients of records' losses, times their weights, in what an adapter gives out."""

    objective: Objective
    labels: Tensor
    weights: Tensor
    prior: Tensor
    log_prior: Tensor | None
    poles: Sequence[Tensor]
    # (n, K) logits of the teacher, where there is a distillation.
    teacher: Tensor | None

    def in_logits(self, logits: Tensor) -> Tensor:
        """(n, K) for (n, K) logits, float64."""
        shifted = logits if self.log_prior is None else logits + self.log_prior
        slope = classification_slope(self.objective, shifted, self.labels)
        if self.objective.distillation is not None and self.teacher is not None:
            slope += distillation_slope(logits, self.teacher, self.objective.distillation)
        return slope.mul_(self.weights[:, None])

    def in_feature(self, adapted: Tensor) -> Tensor:
        """(n, d) for (n, d) adapted unit features z, whose logits are τ·z·Pᵀ."""
        prior = self.prior.to(adapted.dtype)
        # A confident record's gradient is a small difference of probabilities, so these are float64 in any case.
        toward = self.in_logits(_narrow(adapted, prior).double()).to(adapted.dtype) @ prior
        alignment, contrast = self.objective.alignment, self.objective.contrast
        if alignment is not None:
            toward += alignment.slope(adapted, self.labels) * self.weights[:, None]
        if contrast is not None:
            slope = contrast_slope(adapted, *self.poles, temperature=contrast.temperature)
            toward += slope * (contrast.strength * self.weights[:, None])
        return toward


def _narrow(rows: Tensor, weight: Tensor) -> Tensor:
    """rows·weightᵀ for a few outputs; in this order the product takes half the time."""
    return (weight @ rows.T).T.contiguous()


def _linear(inputs: Tensor, weights: Weights, slopes: Slopes) -> Sequence[Factor]:
    classifier = (slopes.prior + weights.tensors["D"]).to(inputs.dtype)
    error = slopes.in_logits(_narrow(inputs, classifier).double())
    return [Outer(error.to(inputs.dtype), inputs, bias=False)]


# (hidden layer, weights) → the layer normalised, and the way from ∂ℓ/∂(γ ⊙ n + β) back to ∂ℓ/∂h.
Norm = Callable[[Tensor, Weights], tuple[Tensor, Callable[[Tensor], Tensor]]]


def _layer_norm(hidden: Tensor, weights: Weights) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    norm = [hidden.shape[-1]]
    gamma, beta = weights.tensors["gamma"], weights.tensors["beta"]
    normalised, mean, rstd = torch.native_layer_norm(hidden, norm, None, None, VARIANCE_EPSILON)

    def back(to_affine: Tensor) -> Tensor:
        to_hidden: Tensor = torch.ops.aten.native_layer_norm_backward(
            to_affine, hidden, norm, mean, rstd, gamma, beta, [True, False, False]
        )[0]
        return to_hidden

    return normalised, back


def _by_constants(hidden: Tensor, weights: Weights) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    gamma = weights.tensors["gamma"]
    if weights.statistics is None:
        return hidden, lambda to_affine: to_affine * gamma
    mean, inverse = weights.statistics
    slope = gamma * inverse
    return hidden.sub_(mean).mul_(inverse), lambda to_affine: to_affine * slope


def _attention(inputs: Tensor, weights: Weights, slopes: Slopes, *, norm: Norm) -> Sequence[Factor]:
    scaled = inputs * math.sqrt(inputs.shape[-1])
    normalised, back = norm(weights.layers["hidden"](scaled), weights)
    gamma, beta = weights.tensors["gamma"], weights.tensors["beta"]
    active = functional.leaky_relu_(torch.addcmul(beta, normalised, gamma), LEAKY_SLOPE)
    to_output = _gated(inputs, active, weights, slopes)
    to_affine = torch.ops.aten.leaky_relu_backward(weights.layers["back"](to_output), active, LEAKY_SLOPE, True)
    return [
        Outer(back(to_affine), scaled, bias=True),
        normalised.mul_(to_affine),
        to_affine,
        Outer(to_output, active, bias=True),
    ]


def _tanh_gate(inputs: Tensor, weights: Weights, slopes: Slopes) -> Sequence[Factor]:
    scaled = inputs * math.sqrt(inputs.shape[-1])
    active = weights.layers["hidden"](scaled).tanh_()
    to_output = _gated(inputs, active, weights, slopes)
    to_hidden = weights.layers["back"](to_output).mul_(1 - active.square())
    return [Outer(to_hidden, scaled, bias=True), Outer(to_output, active, bias=True)]


def _bottleneck(inputs: Tensor, weights: Weights, slopes: Slopes) -> Sequence[Factor]:
    scaled = inputs * math.sqrt(inputs.shape[-1])
    active = weights.layers["hidden"](scaled).relu_()
    mixed = weights.layers["output"](active).add_(inputs)
    to_output = _to_direction(mixed, slopes)
    to_hidden = weights.layers["back"](to_output).mul_(active > 0)
    return [Outer(to_hidden, scaled, bias=True), Outer(to_output, active, bias=True)]


def _affine_student(inputs: Tensor, weights: Weights, slopes: Slopes) -> Sequence[Factor]:
    scaled = inputs * math.sqrt(inputs.shape[-1])
    adapted = _affine(weights.tensors["A"], weights.tensors["b"])(scaled).add_(scaled).double()
    classifier = weights.tensors["D"] + slopes.prior / math.sqrt(inputs.shape[-1])
    error = slopes.in_logits(_narrow(adapted, classifier))
    to_adapted, adapted = (error @ classifier).to(inputs.dtype), adapted.to(inputs.dtype)
    return [Outer(to_adapted, scaled, bias=True), Outer(error.to(inputs.dtype), adapted, bias=False)]


def _gated(inputs: Tensor, active: Tensor, weights: Weights, slopes: Slopes) -> Tensor:
    """∂ℓ/∂o of the gate z = unit(u), u = softmax(o) ⊙ a, o = W2 r + b2.

    z does not change with the length of u, hence not with the softmax's denominator either, which scales a whole row.
    What is left is ∂ℓ/∂o = u ⊙ ∂ℓ/∂u.
    """
    mixed = torch.softmax(weights.layers["output"](active), dim=-1).mul_(inputs)
    direction, toward, _ = _tangent(mixed, slopes)
    return toward.mul_(direction)


def _to_direction(mixed: Tensor, slopes: Slopes) -> Tensor:
    """∂ℓ/∂u of z = unit(u); ``mixed`` is u and is overwritten by z."""
    _, toward, length = _tangent(mixed, slopes)
    return toward.div_(length)


def _tangent(mixed: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor, Tensor]:
    """z = unit(u), |u|·∂ℓ/∂u, and |u|; ``mixed`` is u and is overwritten by z."""
    length = mixed.norm(dim=-1, keepdim=True).clamp_min_(TINY)
    direction = mixed.div_(length)
    toward = slopes.in_feature(direction)
    return direction, toward.addcmul_(direction, torch.linalg.vecdot(direction, toward)[:, None], value=-1), length


Backward = Callable[[Tensor, Weights, Slopes], Sequence[Factor]]
# Looked up by kind whenever it is used.
BACKWARD: dict[AdapterKind, Backward] = {
    "linear": _linear,
    "facmic": partial(_attention, norm=_layer_norm),
    "facmic_plain": partial(_attention, norm=_by_constants),
    "fedclip": _tanh_gate,
    "bottleneck": _bottleneck,
    "affine": _affine_student,
}
