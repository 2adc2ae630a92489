"""The trainable adapters as shapes and numbers, without torch: an aggregator sizes, starts and steps them.

``linear`` is the zero-initialised residual linear head of privacy.md §0.3; ``facmic`` is the feature attention
module of FACMIC (MICCAI 2024) with LayerNorm in place of BatchNorm (facmic.md §1.2 and §5.4-3), ``facmic_plain`` the
same with constants in its place, the statistics of public images or none; ``fedclip`` is the
Tanh gate of FedCLIP (Lu et al. 2023, arXiv 2302.13485); ``bottleneck`` is a residual two-layer perceptron as in
CLIP-Adapter (Gao et al. 2021, arXiv 2110.04544); ``affine`` is a residual affine map under a classifier that starts at
the texts, CLIP2FL's student (arXiv 2312.08648) on features. ``FORMS`` is the one list of them; a kind's forward pass is
in ``modules``, its gradients in ``closed_form`` and its learning rates in ``training``, each in a table by kind.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedsecure.errors import ModelError

AdapterKind = Literal["linear", "facmic", "facmic_plain", "fedclip", "bottleneck", "affine"]
Float32 = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]
Shapes = Mapping[str, tuple[int, ...]]

# Width of the bottleneck; features that are narrower still keep their own.
BOTTLENECK = 64


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """The tensors of one kind of adapter; what is neither uniform nor one starts at zero.

    Attributes:
        shapes: (d, K) → tensor name → shape, in the order of the module's parameters.
        uniform: tensors that start at random, from U(−1/√d, 1/√d), PyTorch's default.
        ones: tensors that start at one.
        constants: whether its hidden layer is normalised by constants, which ``HeadTask.public`` decides.
    """

    shapes: Callable[[int, int], Shapes]
    uniform: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    constants: bool = False


def _two_layers(inner: int, d: int) -> Shapes:
    return {"W1": (inner, d), "b1": (inner,), "W2": (d, inner), "b2": (d,)}


_ATTENTION = AdapterForm(
    lambda d, k: {"W1": (d, d), "b1": (d,), "gamma": (d,), "beta": (d,), "W2": (d, d), "b2": (d,)},
    uniform=("W1", "b1"),
    ones=("gamma",),
)

FORMS: Mapping[AdapterKind, AdapterForm] = {
    "linear": AdapterForm(lambda d, k: {"D": (k, d)}),
    "facmic": _ATTENTION,
    "facmic_plain": replace(_ATTENTION, constants=True),
    "fedclip": AdapterForm(lambda d, k: _two_layers(d, d), uniform=("W1", "b1")),
    "bottleneck": AdapterForm(lambda d, k: _two_layers(min(BOTTLENECK, d), d), uniform=("W1", "b1")),
    "affine": AdapterForm(lambda d, k: {"A": (d, d), "b": (d,), "D": (k, d)}),
}


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Which adapter, and its size.

    Attributes:
        kind: one of ``FORMS``.
        dimension: feature width d ≥ 2.
        classes: K ≥ 2.

    Raises:
        ModelError: FS-1631 for a kind or a size that does not exist.
    """

    kind: AdapterKind
    dimension: int
    classes: int

    def __post_init__(self) -> None:
        if self.kind not in FORMS or self.dimension < 2 or self.classes < 2:
            raise ModelError(
                "FS-1631",
                f"adapter {self.kind!r} with d = {self.dimension} and K = {self.classes}",
                expected=f"kind {', '.join(FORMS)}; d >= 2 and K >= 2",
                cure="mend method.name, encoder.dimension or the federation's class list",
            )

    @property
    def shapes(self) -> Shapes:
        """Tensor name → shape, in the fixed order in which :meth:`flatten` lays them out."""
        return FORMS[self.kind].shapes(self.dimension, self.classes)

    @property
    def parameters(self) -> int:
        """Number of trainable values: K·d for ``linear``, 2d² + 4d for ``facmic`` and ``facmic_plain`` (526,336 at
        d = 512), 2d² + 2d for ``fedclip``, 2rd + r + d for ``bottleneck`` with r = 64, d² + d + K·d for ``affine``."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def initial(self, seed: bytes) -> dict[str, Float32]:
        """Tensors at round 0; every kind then predicts exactly as zero-shot does, since its last layer is zero.

        Random ones come from SHAKE-256 of the public ``seed``. Public initialisation: it protects nothing.
        """
        form = FORMS[self.kind]
        tensors = {
            name: (np.ones if name in form.ones else np.zeros)(shape, np.float32) for name, shape in self.shapes.items()
        }
        for name in form.uniform:
            raw = hashlib.shake_256(b"fedsecure/initial/v1\0" + name.encode() + b"\0" + seed)
            words = np.frombuffer(raw.digest(4 * tensors[name].size), dtype="<u4").astype(np.float64)
            uniform = ((words + 0.5) / 2**31 - 1) / math.sqrt(self.dimension)
            tensors[name] = uniform.reshape(self.shapes[name]).astype(np.float32)
        return tensors

    def flatten(self, tensors: Mapping[str, npt.NDArray[Any]]) -> Vector:
        """The tensors end to end in the order of :attr:`shapes`, as one float64 vector.

        Raises:
            ModelError: FS-1632 when a tensor is missing, foreign or of another shape.
        """
        self._check(tensors)
        return np.concatenate([np.asarray(tensors[name], np.float64).ravel() for name in self.shapes])

    def unflatten(self, vector: npt.NDArray[np.floating[Any]]) -> dict[str, Float32]:
        """Inverse of :meth:`flatten`; float32 tensors.

        Raises:
            ModelError: FS-1632 when the length is not :attr:`parameters`.
        """
        if vector.shape != (self.parameters,):
            raise ModelError(
                "FS-1632",
                f"a vector of shape {vector.shape}",
                expected=f"({self.parameters},) for the {self.kind} adapter",
                cure="use tensors of the same federation settings",
            )
        tensors: dict[str, Float32] = {}
        start = 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            tensors[name] = vector[start : start + size].reshape(shape).astype(np.float32)
            start += size
        return tensors

    def _check(self, tensors: Mapping[str, Any]) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != dict(self.shapes):
            raise ModelError(
                "FS-1632",
                f"tensors {found}",
                expected=f"{dict(self.shapes)} for the {self.kind} adapter",
                cure="use tensors of the same federation settings",
            )
