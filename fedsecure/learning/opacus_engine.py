"""Clipped sums of per-unit gradients through Opacus, for any module (privacy.md §1.1, "Engines").

Opacus supplies per-unit gradient norms (ghost clipping, in float64) or the gradients themselves, and nothing else: it
draws no noise and keeps no books. The guards refuse what it accepts silently (defects P9, P10, double wrapping); a
unit with a non-finite gradient counts for nothing (P3).

Gradients that are held one by one may be float32: the clip bounds whatever they are, and float64 adds them up, as long
as a unit's are that unit's alone. That its bits depend on nothing else is looked at on this machine first.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
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
# (records a unit, width of a record, units at a time, device, threads) → whether units stand alone.
Seen = dict[tuple[int, int, int, torch.device, int], bool]

_COUPLED = (nn.modules.batchnorm._BatchNorm,)
_PROBE_UNITS = 3
# Held one by one: of a unit at most so many numbers, so many of all, and on a CPU no more units than a core's cache
# holds the activations of.
_HELD_PARAMETERS, _HELD_NUMBERS, _HELD_UNITS = 2**21, 2**25, 16
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
        single: whether units may go through in float32, their gradients held one by one, as pays where a record costs
            far more than its gradient is long: inside towers, and up to two million parameters. Parameters and
            features are then float32 in ``loss`` and in the module, which has to follow ``float()``. On a GPU
            convolutions may take TF32, which changes what a gradient is and not what bounds it.
        architecture: equal for tasks whose ``build`` and ``loss`` differ in numbers only, and which share what the
            engine has seen of them: a run makes a task each round.
    """

    shapes: Mapping[str, tuple[int, ...]]
    build: Callable[[Mapping[str, Any]], nn.Module]
    loss: RecordLoss
    chunk: int | None = None
    single: bool = False
    architecture: Hashable = None
    _seen: Seen = field(default_factory=dict, repr=False, init=False)

    @property
    def seen(self) -> Seen:
        """What is known of how its units stand."""
        return self._seen if self.architecture is None else _seen_of(self.architecture)


@functools.cache
def _seen_of(architecture: Hashable) -> Seen:
    return {}


def clipped_sum(
    task: HeadTask | ModuleTask,
    parameters: Mapping[str, Any],
    units: UnitFeatures,
    *,
    max_grad_norm: float,
    device: torch.device,
    chunk: int,
) -> Vector:
    """Same contract as :func:`fedsecure.learning.engines.clipped_sum`; float64 throughout, but for ``task.single``.

    Raises:
        PrivacyError: FS-1234 to FS-1237 and FS-1248 when the module or its loss would break the per-unit bound.
        ModelError: FS-1642 when the module's trainable parameters are not those of ``task.shapes``.
    """
    records, dimension = units.mask.shape[1], units.dimension
    held_rows = _held_rows(task, chunk, device)
    # Before the module is built that is trained: a user's build may hand out one module again and again.
    alone = held_rows > 0 and len(units) > 0 and _stand_alone(task, parameters, units, rows=held_rows, device=device)
    if isinstance(task, HeadTask):
        module = build_trained(task, parameters, device=device, dtype=torch.float64)
        loss = record_loss(task, device)
    else:
        module = task.build(parameters).to(device, torch.float64)
        loss = task.loss
    trainable = _checked(task, module, loss, units, device)
    size = sum(parameter.numel() for parameter in trainable)
    if len(units) == 0:
        return np.zeros(size)
    if alone:
        held = _Held(module, loss, trainable, rows=held_rows)
        check_gradients(held, records=records, dimension=dimension, device=device)
        return held.clipped_sum(units, max_grad_norm=max_grad_norm, device=device)
    total = torch.zeros(size, dtype=torch.float64, device=device)
    wrapped = _wrap(module)
    if not isinstance(task, HeadTask):
        check_norms(wrapped, loss, trainable, records=records, dimension=dimension, device=device)
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


def _checked(
    task: HeadTask | ModuleTask, module: nn.Module, loss: RecordLoss, units: UnitFeatures, device: torch.device
) -> list[nn.Parameter]:
    """The module's trainable parameters, once the guards have let it pass; it is in training mode then."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    check_module(module)
    if not isinstance(task, HeadTask):
        check_shapes(trainable, task.shapes)
    module.train()
    check_per_unit(module, loss, records=units.mask.shape[1], dimension=units.dimension, device=device)
    return trainable


def _held_rows(task: HeadTask | ModuleTask, chunk: int, device: torch.device) -> int:
    """How many units' gradients may be held at a time; 0 for a task whose are not."""
    if isinstance(task, HeadTask) or not task.single:
        return 0
    size = sum(math.prod(shape) for shape in task.shapes.values())
    most = _HELD_UNITS if device.type == "cpu" else chunk
    return min(chunk, most, max(1, _HELD_NUMBERS // max(size, 1))) if size <= _HELD_PARAMETERS else 0


def _stand_alone(
    task: HeadTask | ModuleTask, parameters: Mapping[str, Any], units: UnitFeatures, *, rows: int, device: torch.device
) -> bool:
    """Whether a unit's gradient is the same bits wherever it stands and whatever stands beside it.

    A kernel's operations do not depend on the numbers it is given, so two blocks of public noise show it, once for
    each size. Noise is in the parameters too: where some are zero, gradients of others are, and those show nothing.
    """
    assert isinstance(task, ModuleTask)
    records, dimension = units.mask.shape[1], units.dimension
    key = (records, dimension, rows, device, torch.get_num_threads())
    if key not in task.seen:
        generator = torch.Generator().manual_seed(0)
        noisy = {}
        for name, value in parameters.items():
            start = (value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))).cpu().double()
            noisy[name] = (start + 0.1 * torch.randn(start.shape, generator=generator, dtype=torch.float64)).numpy()
        module = task.build(noisy).to(device, torch.float64)
        held = _Held(module, task.loss, _checked(task, module, task.loss, units, device), rows=rows)
        check_gradients(held, records=records, dimension=dimension, device=device)
        with torch.random.fork_rng(devices=[]):
            task.seen[key] = held.alone(*_probe(records, dimension, device, units=2 * rows))
        held.wrapped.remove_hooks()
    return task.seen[key]


class _Held:
    """A module whose units' gradients are held one by one.

    Args:
        module: checked, float64; it is wrapped, and made float32 by the first call but :meth:`collect`.
        loss: of its task.
        trainable: its parameters.
        rows: units at a time, always so many: the last ones have empty places beside them.
    """

    def __init__(self, module: nn.Module, loss: RecordLoss, trainable: Sequence[nn.Parameter], *, rows: int) -> None:
        self.module, self.loss, self.trainable, self.rows = module, loss, trainable, rows
        self.wrapped, self.warns = _wrap(module, ghost=False), True

    def alone(self, features: Tensor, labels: Tensor) -> bool:
        """Whether the gradients of twice as many rows are the same bits in four orders, those of one half in every
        second place among the other's."""
        self.module.float()
        one, two = zip(features.float().chunk(2), labels.chunk(2), strict=True)
        odd, usual = torch.arange(self.rows, device=labels.device) % 2 == 1, torch.arange(self.rows)
        rows, classes = (torch.where(odd.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(one, two, strict=True))
        apart = torch.where(odd[:, None], self.gradients(*two), self.gradients(*one))
        orders = (usual, usual.roll(1), usual.roll(self.rows // 3 + 1), usual.flip(0))
        return all(torch.equal(self.gradients(rows[order], classes[order]), apart[order]) for order in orders)

    def gradients(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """(U, P) of (U, m, d) features, (U, m) labels and weights of the records, all 1 by default."""
        # Torch warns of hooks on layers whose inputs have no gradient.
        losses = self.loss(self.wrapped(features.requires_grad_()), labels)
        return self.collect(losses if weights is None else losses * weights)

    def collect(self, losses: Tensor) -> Tensor:
        """(U, P) of (U, m) or (U,) losses."""
        for parameter in self.trainable:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        quiet: AbstractContextManager[list[Any]] = _quiet_hooks() if self.warns else nullcontext([])
        with quiet as told:
            losses.sum().backward()  # type: ignore[no-untyped-call]
        # Filters are all threads', so they are touched only for a module that has torch warn.
        self.warns = bool(told)
        parts: list[Any] = [parameter.grad_sample for parameter in self.trainable]  # type: ignore[attr-defined]
        shaped = zip(parts, self.trainable, strict=True)
        return torch.cat([p.new_zeros(len(losses), p.numel()) if g is None else g.flatten(1) for g, p in shaped], 1)

    def clipped_sum(self, units: UnitFeatures, *, max_grad_norm: float, device: torch.device) -> Vector:
        """The sum of these units, float64; the hooks are gone afterwards."""
        self.module.float()
        total: Tensor | float = 0.0
        for start in range(0, len(units), self.rows):
            part = units.select(slice(start, start + self.rows))
            missing = self.rows - len(part)
            features, labels, weights, mask = (
                torch.from_numpy(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))).to(device)
                for values in (part.features, part.labels, part.weights, part.mask)
            )
            features = features.float()
            features[~mask] = 0.0
            bad = ~torch.isfinite(features).all(-1).all(-1)
            features[bad], weights[bad] = 0.0, 0.0
            gradients = self.gradients(features, labels, weights.float()).double()
            norms = torch.linalg.vector_norm(gradients, dim=1)
            finite = torch.isfinite(norms)
            gradients[~finite] = 0.0
            scale = (max_grad_norm * SAFETY / norms.clamp_min(TINY)).clamp(max=1.0)
            total = total + torch.where(finite, scale, 0.0) @ gradients
        self.wrapped.remove_hooks()
        assert isinstance(total, Tensor)
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
def _quiet_hooks() -> Iterator[list[warnings.WarningMessage]]:
    """Nothing is said of inputs without gradients, which Opacus's hooks do not read; what else is, is said at the end.

    Yields:
        what torch would have said of them, filled as it does.
    """
    silenced: list[warnings.WarningMessage] = []
    with _FILTERS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield silenced
        others = [one for one in caught if "Full backward hook is firing" not in str(one.message)]
        silenced += [one for one in caught if one not in others]
    for one in others:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


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


def _probe(records: int, dimension: int, device: torch.device, *, units: int = _PROBE_UNITS) -> tuple[Tensor, Tensor]:
    """Public noise as features, and labels 0 and 1 in turn."""
    generator = torch.Generator().manual_seed(0)
    shape = (units, max(records, 1), dimension)
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    labels = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    labels[1::2] = 1
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


_ONE_USE = "use each weight in one call of its own layer: no tied weights, no functional use, no hooks on layers"


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = _losses(wrapped, loss, features, labels)
        expected = _true_gradients(wrapped, losses, trainable).norm(dim=1)
        _backward(losses.sum())
    reported = wrapped.get_norm_sample().detach()
    if not torch.allclose(reported, expected, rtol=1e-6, atol=1e-12):
        raise PrivacyError(
            "FS-1248",
            f"Opacus reports a unit's gradient norm as {float(reported[0]):.4g} and it is {float(expected[0]):.4g}",
            expected="the norm of the whole gradient, or clipping bounds nothing",
            cure=_ONE_USE,
        )


def check_gradients(held: _Held, *, records: int, dimension: int, device: torch.device) -> None:
    """:func:`check_norms` of gradients that are held one by one, number by number: PrivacyError FS-1248."""
    features, labels = _probe(records, dimension, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = _losses(held.wrapped, held.loss, features.requires_grad_(), labels)
        expected = _true_gradients(held.wrapped, losses, held.trainable)
        found = held.collect(losses)
    apart = (found - expected).norm(dim=1) > 1e-6 * expected.norm(dim=1) + 1e-12
    if bool(apart.any()):
        row = int(apart.nonzero()[0])
        raise PrivacyError(
            "FS-1248",
            f"Opacus's gradient of a unit has norm {float(found[row].norm()):.4g}; "
            f"the true one has {float(expected[row].norm()):.4g}",
            expected="the whole gradient, or training goes astray",
            cure=_ONE_USE,
        )


def _losses(wrapped: Any, loss: RecordLoss, features: Tensor, labels: Tensor) -> Tensor:
    """(U,): of units, with a weight used twice refused where Opacus itself notices."""
    try:
        return loss(wrapped(features), labels).mean(1)
    except NotImplementedError as error:
        raise PrivacyError(
            "FS-1248",
            f"a weight that is used more than once ({error!s:.80})",
            expected="one use of each weight in a pass",
            cure=_ONE_USE,
        ) from error


def _true_gradients(wrapped: Any, losses: Tensor, trainable: Sequence[nn.Parameter]) -> Tensor:
    """(U, P): of each loss by itself, without Opacus."""
    wrapped.disable_hooks()
    rows = []
    with _quiet_hooks():
        for value in losses:
            parts = torch.autograd.grad(value, list(trainable), retain_graph=True, allow_unused=True)
            pairs = zip(parts, trainable, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    wrapped.enable_hooks()
    return torch.stack(rows)


def _wrap(module: nn.Module, *, ghost: bool = True) -> Any:
    with _FILTERS, warnings.catch_warnings():
        # Opacus imports raise deprecation warnings of their own dependencies.
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
            GradSampleModuleFastGradientClipping,
        )

        # strict only forbids buffers, which check_per_unit judges by what they do.
        how: Any = {"loss_reduction": "sum", "strict": False}
        if ghost:
            return GradSampleModuleFastGradientClipping(module, use_ghost_clipping=True, **how)
        return GradSampleModule(module, **how)
