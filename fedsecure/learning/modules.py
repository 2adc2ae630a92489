"""The adapters as torch modules of plain layers that Opacus knows, for Opacus and for prediction.

``named_parameters`` come in the order of ``AdapterSpec.shapes``, so a flat gradient has the layout of a flat adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import AdapterKind, AdapterSpec, Float32
from fedsecure.learning.losses import classification_loss, contrast_loss, distillation_term
from fedsecure.learning.objective import TEACHER_SCALE
from fedsecure.learning.task import TINY, HeadTask

# Of LayerNorm and of BatchNorm alike.
VARIANCE_EPSILON = 1e-5


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


def hidden_statistics(
    task: HeadTask, tensors: Mapping[str, Any], *, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Mean and 1/√(variance + 1e-5) of each coordinate of W1 a√d + b1 over the task's public images.

    (d,) float64 each; None where the task has no such images. They follow from the adapter and public features alone,
    and are constants: no gradient goes through them.
    """
    if task.public is None:
        return None
    weight, bias = (torch.as_tensor(tensors[name]).detach().to(device, torch.float64) for name in ("W1", "b1"))
    inputs = centred_inputs(task, torch.as_tensor(task.public).to(device, torch.float64))
    hidden = functional.linear(inputs * math.sqrt(task.spec.dimension), weight, bias)
    variance, mean = torch.var_mean(hidden, dim=0, correction=0)
    return mean, (variance + VARIANCE_EPSILON).rsqrt()


def without_public(task: HeadTask, tensors: Mapping[str, Any]) -> tuple[HeadTask, dict[str, Float32]]:
    """The same adapter for a machine without the task's public images: their statistics are in γ and β.

    Predictions are the same but for the rounding of γ/σ and β − γμ/σ to float32.
    """
    held = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    statistics = hidden_statistics(task, tensors, device=torch.device("cpu"))
    if statistics is not None:
        mean, inverse = (value.numpy() for value in statistics)
        slope = np.asarray(tensors["gamma"], np.float64) * inverse
        shift = np.asarray(tensors["beta"], np.float64) - slope * mean
        held |= {"gamma": slope.astype(np.float32), "beta": shift.astype(np.float32)}
    return replace(task, public=None), held


class _Head(nn.Module):
    """What all adapters share: τ·P as a constant."""

    prior: Tensor

    def __init__(self, task: HeadTask) -> None:
        super().__init__()
        self.task = task
        self.register_buffer("prior", torch.from_numpy(task.prior * task.scale), persistent=False)


class LinearHead(_Head):
    """logits = τ·a·Pᵀ + a·Dᵀ for (…, d) features; D is the weight of one bias-free ``nn.Linear``."""

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        self.residual = nn.Linear(task.spec.dimension, task.spec.classes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        inputs = centred_inputs(self.task, features)
        logits: Tensor = self.residual(inputs) + inputs @ self.prior.T
        return logits


class FeatureAdapter(_Head):
    """An adapter between the image's feature and the class texts: logits = τ·z·Pᵀ with z = ``adapt(features)``."""

    norm_layer: ClassVar[type[nn.Module]] = nn.Identity

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        shapes = task.spec.shapes
        d, inner = task.spec.dimension, shapes["W1"][0]
        self.hidden = nn.Linear(d, inner)
        self.norm = self.norm_layer(inner)
        self.output = nn.Linear(inner, d)

    def layers(self, inputs: Tensor) -> Tensor:
        """W2 r + b2, r the activation of W1 a√d + b1."""
        hidden = self.hidden(inputs * math.sqrt(self.task.spec.dimension))
        output: Tensor = self.output(self.activation(self.normalised(hidden)))
        return output

    def normalised(self, hidden: Tensor) -> Tensor:
        normal: Tensor = self.norm(hidden)
        return normal

    def activation(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def mixed(self, inputs: Tensor) -> Tensor:
        """What z is the direction of."""
        return torch.softmax(self.layers(inputs), dim=-1) * inputs

    def adapt(self, features: Tensor) -> Tensor:
        """z: unit rows for (…, d) features."""
        return self.from_inputs(centred_inputs(self.task, features))

    def from_inputs(self, inputs: Tensor) -> Tensor:
        """z for unit inputs a, (…, d), that are centred already."""
        return functional.normalize(self.mixed(inputs), dim=-1, eps=TINY)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.adapt(features) @ self.prior.T
        return logits


class AffineStudent(_Head):
    """z = x + A x + b with x = √d·a, and a classifier on z: logits = τ/√d·z·Pᵀ + z·Dᵀ."""

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        d = task.spec.dimension
        self.map = nn.Linear(d, d)
        self.residual = nn.Linear(d, task.spec.classes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        width = math.sqrt(self.task.spec.dimension)
        inputs = centred_inputs(self.task, features) * width
        adapted = inputs + self.map(inputs)
        logits: Tensor = self.residual(adapted) + adapted @ self.prior.T / width
        return logits


class AttentionModule(FeatureAdapter):
    """FACMIC's feature attention with LayerNorm: z = unit(softmax(W2 LeakyReLU(LayerNorm(h)) + b2) ⊙ a)."""

    norm_layer: ClassVar[type[nn.Module]] = nn.LayerNorm

    def activation(self, hidden: Tensor) -> Tensor:
        return functional.leaky_relu(hidden, 0.01)


class Scaling(nn.Module):
    """γ ⊙ x + β."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.weight + self.bias


class PlainAttention(AttentionModule):
    """FACMIC's feature attention with γ ⊙ (h − μ)/σ + β: μ and σ are constants of the step, or 0 and 1."""

    norm_layer = Scaling
    mean: Tensor
    inverse: Tensor

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        # Beside the layer that holds γ and β: Opacus takes the gradients of such a layer only where it has no buffer.
        self.register_buffer("mean", torch.zeros(task.spec.dimension), persistent=False)
        self.register_buffer("inverse", torch.ones(task.spec.dimension), persistent=False)

    def normalised(self, hidden: Tensor) -> Tensor:
        return super().normalised((hidden - self.mean) * self.inverse)


class TanhGate(FeatureAdapter):
    """FedCLIP's adapter: z = unit(softmax(W2 tanh(h) + b2) ⊙ a)."""

    def activation(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden)


class Bottleneck(FeatureAdapter):
    """A residual perceptron of width 64: z = unit(a + W2 relu(h) + b2)."""

    def activation(self, hidden: Tensor) -> Tensor:
        return torch.relu(hidden)

    def mixed(self, inputs: Tensor) -> Tensor:
        return inputs + self.layers(inputs)


MODULES: Mapping[AdapterKind, type[_Head]] = {
    "linear": LinearHead,
    "facmic": AttentionModule,
    "facmic_plain": PlainAttention,
    "fedclip": TanhGate,
    "bottleneck": Bottleneck,
    "affine": AffineStudent,
}


def build_module(task: HeadTask, tensors: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The task's module holding ``tensors``, on ``device`` in ``dtype``. Logits are without ``log_prior``."""
    # Torch fills new layers from its global generator; these values are overwritten, so its state is put back.
    with torch.random.fork_rng(devices=[]):
        module = MODULES[task.spec.kind](task)
    module = module.to(device, dtype)
    values = to_tensors(task.spec, tensors, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values.values(), strict=True):
            parameter.copy_(value)
    statistics = hidden_statistics(task, tensors, device=device)
    if statistics is not None:
        module.mean, module.inverse = (value.to(dtype) for value in statistics)
    return module


def build_poles(task: HeadTask, *, device: torch.device) -> Sequence[FeatureAdapter]:
    """The frozen adapters of a contrast, anchor first, in float64; none without one."""
    contrast = task.objective.contrast
    if contrast is None:
        return ()
    held = (contrast.anchor, contrast.previous)
    poles = [build_module(task, tensors, device=device, dtype=torch.float64) for tensors in held]
    return [pole.requires_grad_(False) for pole in poles if isinstance(pole, FeatureAdapter)]


class WithFeatures(nn.Module):
    """An adapter of features whose outputs are what its task's objective looks at, end to end: logits, z and, with a
    contrast, z under each of its poles."""

    def __init__(self, task: HeadTask, adapter: nn.Module, poles: Sequence[FeatureAdapter]) -> None:
        super().__init__()
        assert isinstance(adapter, FeatureAdapter)
        self.adapter = adapter
        # Not registered: they are constants, and privacy engines would look for their gradients.
        self._poles = tuple(pole.adapt for pole in poles)

    def forward(self, features: Tensor) -> Tensor:
        adapted = self.adapter.adapt(features)
        fixed = [adapt(features) for adapt in self._poles]
        return torch.cat([adapted @ self.adapter.prior.T, adapted, *fixed], dim=-1)


class WithTeacher(nn.Module):
    """A module with the run's zero-shot logits, scaled as CLIP's own, at the end of its outputs."""

    prior: Tensor

    def __init__(self, task: HeadTask, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained
        self.task = task
        parameter = next(trained.parameters())
        self.register_buffer("prior", torch.from_numpy(task.prior * TEACHER_SCALE).to(parameter), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        teacher = centred_inputs(self.task, features) @ self.prior.T
        return torch.cat([self.trained(features), teacher], dim=-1)


def build_trained(task: HeadTask, tensors: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """As :func:`build_module`, with the outputs that :func:`record_loss` takes."""
    module = build_module(task, tensors, device=device, dtype=dtype)
    if task.objective.of_features:
        module = WithFeatures(task, module, build_poles(task, device=device))
    return module if task.objective.distillation is None else WithTeacher(task, module)


def record_loss(task: HeadTask, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The task's loss of each record, from outputs of :func:`build_trained` (…, w) and labels (…,); float64.

    The task's log prior is added to the logits.
    """
    log_prior = None if task.log_prior is None else torch.as_tensor(task.log_prior).to(device, torch.float64)
    classes, width, objective = task.spec.classes, task.spec.dimension, task.objective
    taught = 0 if objective.distillation is None else classes

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        outputs, teacher = torch.split(outputs, [outputs.shape[-1] - taught, taught], dim=-1)
        logits, rest = outputs[..., :classes], outputs[..., classes:]
        total = classification_loss(objective, logits if log_prior is None else logits + log_prior, labels)
        adapted, *poles = torch.split(rest, width, dim=-1) if objective.of_features else (rest,)
        if objective.alignment is not None:
            rows = objective.alignment.loss(adapted.reshape(-1, width), labels.reshape(-1))
            total = total + rows.reshape(labels.shape)
        if objective.contrast is not None:
            apart = contrast_loss(adapted, *poles, temperature=objective.contrast.temperature)
            total = total + objective.contrast.strength * apart
        if objective.distillation is not None:
            total = total + distillation_term(logits, teacher, objective.distillation)
        return total

    return loss
