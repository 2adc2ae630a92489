"""The adapters as torch modules of plain ``nn.Linear`` and ``nn.LayerNorm``, for Opacus and for prediction.

``named_parameters`` come in the order of ``AdapterSpec.shapes``, so a flat gradient has the layout of a flat adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.task import TINY, HeadTask


def resolve_device(device: str) -> torch.device:
    """``"auto"`` takes the GPU where there is one.

    Raises:
        ModelError: FS-1639 when the device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            "FS-1639",
            f"device {device!r} cannot be used ({str(error).splitlines()[0]:.120})",
            expected="auto, cpu, or a CUDA device of this machine",
            cure='set device = "auto"',
        ) from error


def to_tensors(
    spec: AdapterSpec, tensors: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Arrays or tensors as torch tensors in the order of ``spec.shapes``; ModelError FS-1632 on a misfit."""
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != dict(spec.shapes):
        raise ModelError(
            "FS-1632",
            f"tensors {found}",
            expected=f"{dict(spec.shapes)} for the {spec.kind} adapter",
            cure="use tensors of the same federation settings",
        )
    return {name: torch.as_tensor(tensors[name]).detach().to(device, dtype) for name in spec.shapes}


def centred_inputs(task: HeadTask, features: Tensor) -> Tensor:
    """a = unit(unit(x) − centre) over the last axis; zero rows stay zero where there is no centre."""
    unit = functional.normalize(features, dim=-1, eps=TINY)
    if not task.centre.any():
        return unit
    centre = torch.as_tensor(np.asarray(task.centre)).to(features)
    return functional.normalize(unit - centre, dim=-1, eps=TINY)


class LinearHead(nn.Module):
    """logits = τ·a·Pᵀ + a·Dᵀ for (…, d) features; D is the weight of one bias-free ``nn.Linear``."""

    prior: Tensor

    def __init__(self, task: HeadTask) -> None:
        super().__init__()
        self.task = task
        self.residual = nn.Linear(task.spec.dimension, task.spec.classes, bias=False)
        self.register_buffer("prior", torch.from_numpy(task.prior * task.scale), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        inputs = centred_inputs(self.task, features)
        logits: Tensor = self.residual(inputs) + inputs @ self.prior.T
        return logits


class AttentionModule(nn.Module):
    """FACMIC's feature attention with LayerNorm: logits = τ·unit(softmax(W2 r + b2) ⊙ a)·Pᵀ for (…, d) features."""

    prior: Tensor

    def __init__(self, task: HeadTask) -> None:
        super().__init__()
        d = task.spec.dimension
        self.task = task
        self.hidden = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d)
        self.output = nn.Linear(d, d)
        self.register_buffer("prior", torch.from_numpy(task.prior * task.scale), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        inputs = centred_inputs(self.task, features)
        hidden = self.norm(self.hidden(inputs * math.sqrt(self.task.spec.dimension)))
        gate = torch.softmax(self.output(functional.leaky_relu(hidden, 0.01)), dim=-1)
        adapted = functional.normalize(gate * inputs, dim=-1, eps=TINY)
        logits: Tensor = adapted @ self.prior.T
        return logits


def build_module(task: HeadTask, tensors: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The task's module holding ``tensors``, on ``device`` in ``dtype``. Logits are without ``log_prior``."""
    # Torch fills new layers from its global generator; these values are overwritten, so its state is put back.
    with torch.random.fork_rng(devices=[]):
        module = LinearHead(task) if task.spec.kind == "linear" else AttentionModule(task)
    module = module.to(device, dtype)
    values = to_tensors(task.spec, tensors, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values.values(), strict=True):
            parameter.copy_(value)
    return module
