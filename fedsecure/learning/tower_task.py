"""A method inside a tower as a task for Opacus: its module, and the constants that round 0 and prediction share.

Images are compared with texts exactly as the adapters do (``task``): the same centring, the same temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import AdapterSpec, Float32
from fedsecure.learning.opacus_engine import ModuleTask
from fedsecure.learning.task import HeadTask
from fedsecure.learning.towers import TowerSpec


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TowerTask(ModuleTask):
    """A module in a tower, with what evaluation and the kept file need.

    Attributes:
        spec: its tensors; ``dimension`` is the width of a record.
        head: zero-shot with the run's texts, public mean and temperature.
        texts: parameters → the (K, d) unit texts that features are compared with, where only these change.
    """

    spec: TowerSpec
    head: HeadTask
    texts: Callable[[Mapping[str, Any]], Float32] | None = None

    @property
    def text(self) -> Float32:
        """(K, d) zero-shot texts."""
        return self.head.text

    @property
    def centre(self) -> Float32:
        """(d,) public mean, or zeros."""
        return self.head.centre

    @property
    def temperature(self) -> float:
        """τ."""
        return self.head.temperature


def zero_shot_head(text: Float32, centre: Float32, *, temperature: float) -> HeadTask:
    """The head whose logits the towers' methods start from: K texts of width d."""
    return HeadTask(AdapterSpec("linear", text.shape[1], text.shape[0]), text, centre, temperature)


def record_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each record, (U, m); nothing in it couples two records (facmic.md §5.4-1)."""
    return functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")


def load_exactly(parameters: Sequence[tuple[str, nn.Parameter]], values: dict[str, Any]) -> None:
    """Copy values into parameters of the same names and shapes, and read them back.

    Torch and PEFT both pass over tensors whose names do not fit, for instance those that were saved from a wrapped
    module: training would go on from the initial values, and nobody would notice (Opacus issue 820).

    Args:
        parameters: (name in the task, parameter) in the module's order.
        values: name → array or tensor, in any order: off the wire and out of files they come in that of their names.

    Raises:
        ModelError: FS-1672 when names or shapes differ, or a value read back is not the one that was written.
    """
    found = {name: tuple(value.shape) for name, value in values.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in parameters}
    if found != expected:
        odd = dict(found.items() - expected.items()) or dict(expected.items() - found.items())
        raise _corrupt(f"tensors that do not fit the module: {odd!s:.160}")
    with torch.no_grad():
        for name, parameter in parameters:
            given = values[name]
            # A copy: arrays off the wire are read-only, which torch warns of.
            value = (given.detach() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))).to(parameter)
            parameter.copy_(value)
            if not (bool(torch.isfinite(value).all()) and torch.equal(parameter, value)):
                raise _corrupt(f"tensor {name} that is not finite, or that reads back otherwise than written")


def _corrupt(found: str) -> ModelError:
    return ModelError(
        "FS-1672",
        found,
        expected="every trainable tensor, by its own name and shape, in the module bit for bit",
        cure="use tensors of the same federation settings; with Opacus, read them from the module inside the wrapper",
    )
