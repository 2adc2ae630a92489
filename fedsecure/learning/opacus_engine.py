"""Clipped sums of per-unit gradients through Opacus's ghost clipping, for any module (privacy.md §1.1, "Engines").

Opacus supplies per-unit gradient norms and nothing else: it draws no noise and keeps no books. The guards refuse what
it accepts silently (defects P9, P10, double wrapping); a unit with a non-finite gradient counts for nothing (P3).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsecure.errors import ModelError, PrivacyError
from fedsecure.learning.adapters import Vector
from fedsecure.learning.closed_form import CANCELLED, SAFETY
from fedsecure.learning.modules import build_trained, record_loss
from fedsecure.learning.task import TINY, HeadTask
from fedsecure.learning.units import UnitFeatures

RecordLoss = Callable[[Tensor, Tensor], Tensor]

_COUPLED = (nn.modules.batchnorm._BatchNorm,)
_PROBE_UNITS = 3
# Filters of warnings are the process's, and the sites of a simulation are its threads.
_FILTERS = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class ModuleTask:
    """A module of the user's own, trained through Opacus.

    Attributes:
        shapes: parameter name → shape, in the order of the module's trainable ``named_parameters``.
        build: makes a fresh module from the parameters; called for every clipped sum.
        loss: (outputs for (U, m, d) features, (U, m) int64 labels) → (U, m) losses, one a record, each depending on
            that record alone. Padded records are zeros with label 0 and are ignored.
        chunk: records in activations at a time, where the module is too large for the engine's own number.
    """

    shapes: Mapping[str, tuple[int, ...]]
    build: Callable[[Mapping[str, Any]], nn.Module]
    loss: RecordLoss
    chunk: int | None = None


def clipped_sum(
    task: HeadTask | ModuleTask,
    parameters: Mapping[str, Any],
    units: UnitFeatures,
    *,
    max_grad_norm: float,
    device: torch.device,
    chunk: int,
) -> Vector:
    """Same contract as :func:`fedsecure.learning.engines.clipped_sum`; float64 throughout.

    Raises:
        PrivacyError: FS-1234 to FS-1237 and FS-1248 when the module or its loss would break the per-unit bound.
        ModelError: FS-1642 when the module's trainable parameters are not those of ``task.shapes``.
    """
    if isinstance(task, HeadTask):
        module = build_trained(task, parameters, device=device, dtype=torch.float64)
        loss = record_loss(task, device)
    else:
        module = task.build(parameters).to(device, torch.float64)
        loss = task.loss
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    check_module(module)
    if not isinstance(task, HeadTask):
        check_shapes(trainable, task.shapes)
    module.train()
    check_per_unit(module, loss, records=units.mask.shape[1], dimension=units.dimension, device=device)
    total = torch.zeros(sum(p.numel() for p in trainable), dtype=torch.float64, device=device)
    if len(units) == 0:
        return np.asarray(total.cpu().numpy(), np.float64)
    wrapped = _wrap(module)
    if not isinstance(task, HeadTask):
        check_norms(wrapped, loss, trainable, records=units.mask.shape[1], dimension=units.dimension, device=device)
    for start in range(0, len(units), chunk):
        part = units.select(slice(start, start + chunk))
        features = torch.from_numpy(part.features).to(device, torch.float64)
        weights = torch.from_numpy(part.weights).to(device)
        labels = torch.from_numpy(part.labels).to(device)
        features[~torch.from_numpy(part.mask).to(device)] = 0.0
        bad = ~torch.isfinite(features).all(-1).all(-1)
        norms = torch.zeros(len(part), dtype=torch.float64, device=device)
        # A non-finite gradient times a coefficient of 0 is NaN, so such units are blanked and the chunk is redone.
        while True:
            features[bad], weights[bad] = 0.0, 0.0
            module.zero_grad()
            losses = (loss(wrapped(features), labels) * weights).sum(1)
            _backward(losses.sum())
            norms = wrapped.get_norm_sample().detach()
            if part.mask.shape[1] > 1:
                # Records of a unit may cancel: what rounding hides counts as length (see closed_form.CANCELLED).
                lengths = _record_lengths(wrapped, loss, features, labels=labels, weights=weights)
                norms = torch.maximum(norms, CANCELLED**0.5 * lengths)
            worse = ~torch.isfinite(norms) & ~bad
            if not bool(worse.any()):
                break
            bad = bad | worse
        scale = (max_grad_norm * SAFETY / norms.clamp_min(TINY)).clamp(max=1.0)
        scale = torch.where(bad, torch.zeros_like(scale), scale)
        module.zero_grad()
        wrapped.disable_hooks()
        _backward((losses * scale).sum())
        wrapped.enable_hooks()
        total += torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trainable])
    wrapped.remove_hooks()
    return np.asarray(total.cpu().numpy(), np.float64)


def _record_lengths(wrapped: Any, loss: RecordLoss, features: Tensor, *, labels: Tensor, weights: Tensor) -> Tensor:
    """(U,): the gradient norms of a unit's records, added up; each record is passed as a unit of its own."""
    units, records, width = features.shape
    wrapped.zero_grad()
    alone = loss(wrapped(features.reshape(-1, 1, width)), labels.reshape(-1, 1)) * weights.reshape(-1, 1)
    _backward(alone.sum())
    norms: Tensor = wrapped.get_norm_sample().detach()
    wrapped.zero_grad()
    return norms.reshape(units, records).sum(1)


def _backward(loss: Tensor) -> None:
    with _quiet_hooks():
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]


@contextmanager
def _quiet_hooks() -> Iterator[None]:
    with _FILTERS, warnings.catch_warnings():
        # The first layer's inputs need no gradient; Opacus's hooks only read gradients of outputs.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def check_module(module: nn.Module) -> None:
    """Refuse modules whose per-unit gradients are not a unit's own.

    Raises:
        PrivacyError: FS-1234 batch normalisation in any mode, frozen too; FS-1237 Opacus hooks already attached.
    """
    for name, part in module.named_modules():
        if isinstance(part, _COUPLED):
            raise PrivacyError(
                "FS-1234",
                f"{type(part).__name__} at {name or 'the top'}",
                expected="layers that treat every record by itself",
                cure="use LayerNorm or GroupNorm; batch statistics mix patients, frozen or not",
            )
        if hasattr(part, "autograd_grad_sample_hooks") or type(part).__module__.startswith("opacus.grad_sample"):
            raise PrivacyError(
                "FS-1237",
                f"{type(part).__name__} at {name or 'the top'} already carries Opacus hooks",
                expected="a bare module",
                cure="return a fresh, unwrapped module from build",
            )


def check_shapes(trainable: Sequence[nn.Parameter], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a module whose trainable parameters are not laid out as the task says: ModelError FS-1642."""
    found, expected = [tuple(parameter.shape) for parameter in trainable], list(shapes.values())
    if found != expected:
        raise ModelError(
            "FS-1642",
            f"trainable parameters of shapes {found!s:.160}",
            expected=f"{expected!s:.160}, as the task's shapes say, in this order",
            cure="list every trainable parameter in shapes, and freeze the others with requires_grad_(False)",
        )


def _probe(records: int, dimension: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Public noise as features, and labels 0 and 1 in turn, of three units."""
    generator = torch.Generator().manual_seed(0)
    shape = (_PROBE_UNITS, max(records, 1), dimension)
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    labels = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    labels[1] = 1
    return features, labels


def check_per_unit(module: nn.Module, loss: RecordLoss, *, records: int, dimension: int, device: torch.device) -> None:
    """Run module and loss on fixed public noise with one unit changed, relabelled and left out: the others must not
    notice, nor may the module remember anything.

    Raises:
        PrivacyError: FS-1235 when a forward pass in training mode changes a buffer, or the next pass in any way;
            FS-1236 when the loss has another shape than (U, m) or a unit's loss depends on another unit or on how
            many there are.
    """
    features, labels = _probe(records, dimension, device)
    others, relabelled = features.flip(0).clone(), labels.clone()
    others[:-1] = features[:-1]
    relabelled[-1] = 1
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def run(features: Tensor, labels: Tensor) -> Tensor:
        torch.manual_seed(0)
        return loss(module(features), labels)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, *changed = (run(f, y) for f, y in ((features, labels), (others, labels), (features, relabelled)))
        again = run(features, labels)
        # Without dropout, whose masks follow the size of the batch.
        module.eval()
        whole, fewer = run(features, labels), run(features[:-1], labels[:-1])
        module.train()
    for name, buffer in module.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise PrivacyError(
                "FS-1235",
                f"buffer {name} changes in a forward pass",
                expected="no state that records write to",
                cure="switch running statistics off; they would leave the site without noise",
            )
    if first.shape != labels.shape:
        raise PrivacyError(
            "FS-1236",
            f"a loss of shape {tuple(first.shape)}",
            expected=f"one value per record, shape {tuple(labels.shape)}",
            cure="use reduction='none'",
        )
    if not torch.equal(first, again):
        raise PrivacyError(
            "FS-1235",
            "a module or loss that remembers earlier records",
            expected="the same losses for the same records, whatever came before",
            cure="keep no running averages, queues or memory banks of features",
        )
    pairs = [(first[:-1], value[:-1]) for value in changed] + [(whole[:-1], fewer)]
    if not all(torch.allclose(one, two, rtol=1e-9, atol=1e-12) for one, two in pairs):
        raise PrivacyError(
            "FS-1236",
            "a unit's loss that depends on another unit's records, on their labels or on the size of the batch",
            expected="a loss of one unit and public constants only",
            cure="replace contrastive, MMD, MixUp, class-balanced or batch-prototype terms by per-record ones "
            "(facmic.md §5.4)",
        )


def check_norms(
    wrapped: Any,
    loss: RecordLoss,
    trainable: Sequence[nn.Parameter],
    *,
    records: int,
    dimension: int,
    device: torch.device,
) -> None:
    """Compare the norms that Opacus's hooks report on public noise with those of the gradients themselves.

    They differ where a weight is used outside its layer's call, by two layers, or twice in a pass; such a unit would
    be clipped too little or not at all.

    Raises:
        PrivacyError: FS-1248.
    """
    features, labels = _probe(records, dimension, device)
    cure = "use each weight in one call of its own layer: no tied weights, no functional use, no hooks on layers"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            losses = loss(wrapped(features), labels).mean(1)
        except NotImplementedError as error:
            raise PrivacyError(
                "FS-1248",
                f"a weight that is used more than once ({error!s:.80})",
                expected="one use of each weight in a pass",
                cure=cure,
            ) from error
        wrapped.disable_hooks()
        true = []
        with _quiet_hooks():
            for value in losses:
                parts = torch.autograd.grad(value, list(trainable), retain_graph=True, allow_unused=True)
                true.append(torch.sqrt(torch.stack([g.square().sum() for g in parts if g is not None]).sum()))
        wrapped.enable_hooks()
        _backward(losses.sum())
    reported, expected = wrapped.get_norm_sample().detach(), torch.stack(true)
    if not torch.allclose(reported, expected, rtol=1e-6, atol=1e-12):
        raise PrivacyError(
            "FS-1248",
            f"Opacus reports a unit's gradient norm as {float(reported[0]):.4g} and it is {float(expected[0]):.4g}",
            expected="the norm of the whole gradient, or clipping bounds nothing",
            cure=cure,
        )


def _wrap(module: nn.Module) -> Any:
    with _FILTERS, warnings.catch_warnings():
        # Opacus imports raise deprecation warnings of their own dependencies.
        warnings.simplefilter("ignore")
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
            GradSampleModuleFastGradientClipping,
        )

        # strict only forbids buffers, which check_per_unit judges by what they do.
        return GradSampleModuleFastGradientClipping(module, loss_reduction="sum", strict=False, use_ghost_clipping=True)
