"""Clipped sums of per-unit gradients in closed form, for the linear head and FACMIC's attention.

Privacy.md §3.4 and §6, facmic.md §5.4-7: forward, one backward to the activations, norms from Gram products, one
weighted product per weight. All in float64: a float32 sum over many units would move by more than the clip norm when
one unit changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsecure.learning.adapters import Vector
from fedsecure.learning.modules import centred_inputs, to_tensors
from fedsecure.learning.task import TINY, HeadTask
from fedsecure.learning.units import UnitFeatures

SAFETY = 1 - 1e-5
LAYER_NORM_EPSILON = 1e-5
LEAKY_SLOPE = 0.01
# A Gram product over 2^16 entries errs by at most 2^-36 of the records' lengths squared, so above 2^-20 of them the
# norm is right within SAFETY.
CANCELLED = 2.0**-20


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
) -> Vector:
    """Σ over units of clip_C(∇ of the mean cross-entropy over the unit's records), flat, in the spec's order.

    See :func:`fedsecure.learning.engines.clipped_sum` for the contract. ``plant`` is for the audit alone
    (:mod:`fedsecure.learning.canaries`); labels past the last class are then its to replace.
    """
    tensors = to_tensors(task.spec, parameters, device=device, dtype=torch.float64)
    prior = torch.from_numpy(task.prior * task.scale).to(device)
    log_prior = None if task.log_prior is None else torch.as_tensor(task.log_prior).to(device, torch.float64)
    total = torch.zeros(task.spec.parameters, dtype=torch.float64, device=device)
    for start in range(0, len(units), chunk):
        part = units.select(slice(start, start + chunk))
        mask = torch.from_numpy(part.mask).to(device)
        features = torch.from_numpy(part.features).to(device)[mask].double()
        weights = torch.from_numpy(part.weights).to(device)[mask]
        labels = torch.from_numpy(part.labels).to(device)[mask]
        backward = _linear if task.spec.kind == "linear" else _attention
        known = labels if plant is None else labels.clamp(max=task.spec.classes - 1)
        factors = backward(centred_inputs(task, features), known, weights, tensors, prior, log_prior)
        if plant is not None:
            factors = plant(factors, labels)
        total += _clip_and_sum(factors, mask, max_grad_norm)
    return np.asarray(total.cpu().numpy(), np.float64)


def _output_gradient(logits: Tensor, labels: Tensor, weights: Tensor, log_prior: Tensor | None) -> Tensor:
    if log_prior is not None:
        logits = logits + log_prior
    probabilities = torch.softmax(logits, dim=-1)
    probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
    return probabilities * weights[:, None]


def _linear(
    inputs: Tensor,
    labels: Tensor,
    weights: Tensor,
    tensors: Mapping[str, Tensor],
    prior: Tensor,
    log_prior: Tensor | None,
) -> Sequence[Factor]:
    error = _output_gradient(inputs @ (prior + tensors["D"]).T, labels, weights, log_prior)
    return [Outer(error, inputs, bias=False)]


def _attention(
    inputs: Tensor,
    labels: Tensor,
    weights: Tensor,
    tensors: Mapping[str, Tensor],
    prior: Tensor,
    log_prior: Tensor | None,
) -> Sequence[Factor]:
    scaled = inputs * math.sqrt(inputs.shape[-1])
    hidden = torch.addmm(tensors["b1"], scaled, tensors["W1"].T)
    hidden = hidden - hidden.mean(dim=-1, keepdim=True)
    spread = (hidden.square().mean(dim=-1, keepdim=True) + LAYER_NORM_EPSILON).sqrt()
    normalised = hidden / spread
    affine = normalised * tensors["gamma"] + tensors["beta"]
    active = functional.leaky_relu(affine, LEAKY_SLOPE)
    gate = torch.softmax(torch.addmm(tensors["b2"], active, tensors["W2"].T), dim=-1)
    gated = gate * inputs
    length = gated.norm(dim=-1, keepdim=True).clamp_min(TINY)
    adapted = gated / length

    toward = _output_gradient(adapted @ prior.T, labels, weights, log_prior) @ prior
    to_gated = (toward - adapted * (adapted * toward).sum(-1, keepdim=True)) / length
    to_gate = to_gated * inputs
    to_output = gate * (to_gate - (gate * to_gate).sum(-1, keepdim=True))
    to_affine = to_output @ tensors["W2"]
    to_affine = torch.where(affine > 0, to_affine, LEAKY_SLOPE * to_affine)
    to_normalised = to_affine * tensors["gamma"]
    to_hidden = (
        to_normalised
        - to_normalised.mean(dim=-1, keepdim=True)
        - normalised * (to_normalised * normalised).mean(dim=-1, keepdim=True)
    ) / spread
    return [
        Outer(to_hidden, scaled, bias=True),
        to_affine * normalised,
        to_affine,
        Outer(to_output, active, bias=True),
    ]


def _clip_and_sum(factors: Sequence[Factor], mask: Tensor, max_grad_norm: float) -> Tensor:
    """Σ_u c_u g_u with c_u = min(1, C(1−1e-5)/‖g_u‖), from factors whose rows are the masked records."""
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
    norms = torch.maximum(squares, floor).sqrt()
    scale = (max_grad_norm * SAFETY / norms.clamp_min(TINY)).clamp(max=1.0)
    finite = torch.isfinite(norms)
    keep = finite[:, None].expand_as(mask)[mask]
    rows = scale[:, None].expand_as(mask)[mask][keep, None]
    parts: list[Tensor] = []
    for factor in factors:
        if isinstance(factor, Outer):
            left = factor.left[keep] * rows
            parts.append((left.T @ factor.right[keep]).flatten())
            if factor.bias:
                parts.append(left.sum(0))
        else:
            parts.append((factor[keep] * rows).sum(0))
    return torch.cat(parts)


def _pad(rows: Tensor, mask: Tensor) -> Tensor:
    padded = torch.zeros((*mask.shape, rows.shape[-1]), dtype=rows.dtype, device=rows.device)
    padded[mask] = rows
    return padded


def _gram(rows: Tensor, mask: Tensor) -> Tensor:
    padded = _pad(rows, mask)
    return padded @ padded.transpose(1, 2)
