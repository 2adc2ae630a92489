"""Clipped sums of per-unit gradients in closed form, for every known adapter.

Privacy.md §3.4 and §6, facmic.md §5.4-7: forward, one backward to the activations, norms from Gram products, one
weighted product per weight. Norms and sums are taken in float64: a float32 sum over many units would move by more than
the clip norm when one unit changes. A record's own factors may be taken in float32, since the clip bounds whatever
they are, as long as they are that record's alone: that a row's bits depend on nothing but the row is checked on this
machine before it is relied on.
Where every unit is one record, sums of a block may be float32 as well (:mod:`fedsecure.learning.narrow`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedsecure.learning.adapters import FORMS, AdapterSpec, Vector
from fedsecure.learning.gradients import BACKWARD, Factor, Outer, Slopes, Weights
from fedsecure.learning.modules import FeatureAdapter, build_poles, centred_inputs, hidden_statistics, to_tensors
from fedsecure.learning.narrow import BLOCK, LEAST_SQUARE, WIDEST, Precision
from fedsecure.learning.objective import TEACHER_SCALE
from fedsecure.learning.task import TINY, HeadTask
from fedsecure.learning.units import UnitFeatures

SAFETY = 1 - 1e-5
# A Gram product over 2^16 entries errs by at most 2^-36 of the records' lengths squared, so above 2^-20 of them the
# norm is right within SAFETY.
CANCELLED = 2.0**-20
# Records go through all but the linear head at most BLOCK at a time, so that a core's cache holds their activations,
# and always a multiple of 64, so that products have few shapes.
STEP = 64

# Features that are kept from sum to sum take at most so many bytes.
KEPT_BYTES = 2**28

# (factors, labels) → factors, before clipping: how an audit plants gradients of its own.
Plant = Callable[[Sequence[Factor], Tensor], Sequence[Factor]]


@dataclass(frozen=True, slots=True)
class Block:
    """Records that go through an adapter together, and what of them no parameter changes.

    Attributes:
        inputs: (n, d) a, in the precision of the activations; rows past the last record are padding.
        labels, weights: (n,).
        poles: the records' features under a contrast's two adapters.
        mask: (U, m), where the units have records.
    """

    inputs: Tensor
    labels: Tensor
    weights: Tensor
    poles: Sequence[Tensor]
    mask: Tensor

    @classmethod
    def of(
        cls, task: HeadTask, units: UnitFeatures, *, poles: Sequence[FeatureAdapter], like: Tensor, step: int
    ) -> Block:
        """``like`` is an empty tensor where and as activations are to be; ``step`` what n is a multiple of."""
        mask = torch.from_numpy(units.mask).to(like.device)
        count = int(units.mask.sum())
        missing = -count % step

        def rows(values: npt.NDArray[Any]) -> Tensor:
            held = torch.from_numpy(values).to(like.device)
            kept = held.flatten(0, 1) if count == units.mask.size else held[mask]
            return functional.pad(kept, [0, 0] * (kept.ndim - 1) + [0, missing]) if missing else kept

        features = rows(units.features)
        with torch.no_grad():
            fixed = [pole.adapt(features.double()) for pole in poles]
        return cls(centred_inputs(task, features.to(like)), rows(units.labels), rows(units.weights), fixed, mask)


class ClippedSums:
    """Σ over units of clip_C(∇ of the mean loss over the unit's records), flat, in the spec's order, at any parameters.

    See :func:`fedsecure.learning.engines.clipped_sum` for the contract. ``precision="float32"`` takes an adapter's
    activations in float32, where their rows are seen to stand alone: gradients then err by about 1e-6 of their length,
    and the bound C holds as before. Objectives other than cross-entropy stay in float64. ``narrow``: what is clipped to
    leaves room for sums in float32 too, where every unit is one record; a CPU then takes them so.
    """

    def __init__(
        self,
        task: HeadTask,
        units: UnitFeatures,
        *,
        device: torch.device,
        chunk: int,
        precision: Precision = "float64",
        keep: bool = False,
        narrow: bool = False,
    ) -> None:
        self.task, self.units, self.chunk, self.step = task, units, chunk, 1
        dtype, records = torch.float64, max(units.mask.shape[1], 1)
        # A linear head's products are faster in one piece; only float32 sums need blocks.
        single = precision == "float32" and task.objective.plain and (task.spec.kind != "linear" or narrow)
        if task.spec.kind != "linear" or single:
            self.step, self.chunk = STEP, min(chunk, max(1, BLOCK // records))
            largest = -(-self.chunk * records // STEP) * STEP
            if single and _rows_stand_alone(task.spec, largest, device, torch.get_num_threads()):
                dtype = torch.float32
        widest = max(map(max, task.spec.shapes.values()))
        self.narrow = narrow and dtype == torch.float32 and device.type == "cpu" and widest <= WIDEST
        self.like = torch.empty(0, dtype=dtype, device=device)
        self.adapter, self.poles = _Adapter.of(task, device), build_poles(task, device=device)
        self.keep = keep and units.features.size * self.like.element_size() <= KEPT_BYTES
        self.kept: list[Block] = []

    def at(self, parameters: Mapping[str, Any], *, max_grad_norm: float, plant: Plant | None = None) -> Vector:
        """The sum at these parameters, C = ``max_grad_norm``.

        ``plant`` is for the audit alone (:mod:`fedsecure.learning.canaries`); labels past the last class are then its
        to replace.
        """
        device, dtype = self.like.device, self.like.dtype
        tensors = to_tensors(self.task.spec, parameters, device=device, dtype=dtype)
        weights = Weights.of(tensors, hidden_statistics(self.task, parameters, device=device))
        total = _Total.of(self.task.spec, device)
        narrow = self.narrow and plant is None
        for block in self._blocks():
            count = int(block.mask.sum())
            if count == 0:
                continue
            known = block.labels if plant is None else block.labels.clamp(max=self.task.spec.classes - 1)
            factors: Sequence[Factor] = [
                _rows(factor, slice(count)) for factor in self.adapter.factors(weights, block, known)
            ]
            if not narrow:
                factors = [_widened(factor) for factor in factors]
            if plant is not None:
                factors = plant(factors, block.labels[:count])
            _clip_and_sum(factors, block.mask, max_grad_norm, onto=total)
        if not total.started:
            total.flat.zero_()
        return np.asarray(total.flat.cpu().numpy(), np.float64)

    def _blocks(self) -> Iterator[Block]:
        for number, start in enumerate(range(0, len(self.units), self.chunk)):
            if number < len(self.kept):
                yield self.kept[number]
                continue
            part = self.units.select(slice(start, start + self.chunk))
            block = Block.of(self.task, part, poles=self.poles, like=self.like, step=self.step)
            if self.keep:
                self.kept.append(block)
            yield block


@dataclass(slots=True)
class _Total:
    """The sum, float64, with a view of every parameter's part; undefined until something is added."""

    flat: Tensor
    parts: Sequence[Tensor]
    started: bool = False

    @classmethod
    def of(cls, spec: AdapterSpec, device: torch.device) -> _Total:
        flat = torch.empty(spec.parameters, dtype=torch.float64, device=device)
        pieces = torch.split(flat, [math.prod(shape) for shape in spec.shapes.values()])
        return cls(flat, [piece.view(shape) for piece, shape in zip(pieces, spec.shapes.values(), strict=True)])

    def add(self, factors: Sequence[Factor], scale: Tensor) -> None:
        """Add Σ_i scale_i · (the gradient that the factors' row i stands for)."""
        part, kept = iter(self.parts), int(self.started)
        for factor in factors:
            if isinstance(factor, Outer):
                left = factor.left * scale[:, None]
                _add_product(next(part), left.T, factor.right, kept=kept)
                if factor.bias:
                    _add_weighted(next(part), factor.left, scale, kept=kept)
            else:
                _add_weighted(next(part), factor, scale, kept=kept)
        self.started = True


def _add_product(onto: Tensor, left: Tensor, right: Tensor, *, kept: int) -> None:
    """``onto`` ← kept·onto + left·right. On a CPU a wide product is NumPy's: its library is a fifth faster in float64
    than torch's on other makers' processors than that was made for."""
    if left.dtype != onto.dtype:
        _add(onto, torch.from_numpy(left.numpy() @ right.numpy()), kept=kept)
    elif onto.device.type != "cpu" or onto.shape[0] < STEP:
        onto.addmm_(left, right, beta=kept)
    elif kept:
        onto += torch.from_numpy(left.numpy() @ right.numpy())
    else:
        np.matmul(left.numpy(), right.numpy(), out=onto.numpy())


def _add_weighted(onto: Tensor, rows: Tensor, scale: Tensor, *, kept: int) -> None:
    if rows.dtype != onto.dtype:
        _add(onto, scale @ rows, kept=kept)
    else:
        onto.addmv_(rows.T, scale, beta=kept)


def _add(onto: Tensor, narrow: Tensor, *, kept: int) -> None:
    if kept:
        onto += narrow
    else:
        onto.copy_(narrow)


def _widened(factor: Factor) -> Factor:
    if isinstance(factor, Outer):
        return Outer(factor.left.double(), factor.right.double(), factor.bias)
    return factor.double()


def _rows(factor: Factor, which: slice | Tensor) -> Factor:
    if isinstance(factor, Outer):
        return Outer(factor.left[which], factor.right[which], factor.bias)
    return factor[which]


@dataclass(frozen=True, slots=True)
class _Adapter:
    """A task with its constants in float64, where activations are computed."""

    task: HeadTask
    prior: Tensor
    log_prior: Tensor | None

    @classmethod
    def of(cls, task: HeadTask, device: torch.device) -> _Adapter:
        log_prior = None if task.log_prior is None else torch.as_tensor(task.log_prior).to(device, torch.float64)
        # Copied to where torch aligns it, so that products with it are the same bits in every process.
        return cls(task, torch.from_numpy(task.prior * task.scale).to(device).clone(), log_prior)

    def factors(self, weights: Weights, block: Block, labels: Tensor) -> Sequence[Factor]:
        """What the gradients of the block's records with these labels are made of, each times its weight."""
        teacher = None
        if self.task.objective.distillation is not None:
            teacher = block.inputs.double() @ self.prior.T * (TEACHER_SCALE / self.task.scale)
        slopes = Slopes(self.task.objective, labels, block.weights, self.prior, self.log_prior, block.poles, teacher)
        return BACKWARD[self.task.spec.kind](block.inputs, weights, slopes)


@functools.cache
def _rows_stand_alone(spec: AdapterSpec, rows: int, device: torch.device, threads: int) -> bool:
    """Whether in float32 a record's factors are the same bits wherever it stands in a block of up to ``rows`` records,
    whatever stands beside it and however many. A kernel's operations do not depend on the numbers it is given, so one
    block of public noise, in several orders and sizes, shows it."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    d, k = spec.dimension, spec.classes
    centre = (0.1 / math.sqrt(d) * noise(d)).float().numpy()
    public = noise(STEP, d).float().numpy() if FORMS[spec.kind].constants else None
    task = HeadTask(spec, noise(k, d).float().numpy(), centre, 10.0, public=public)
    parameters = {name: noise(*shape) / math.sqrt(d) for name, shape in spec.shapes.items()}
    like = torch.empty(0, dtype=torch.float32, device=device)
    adapter = _Adapter.of(task, device)
    tensors = to_tensors(spec, parameters, device=device, dtype=torch.float32)
    weights = Weights.of(tensors, hidden_statistics(task, parameters, device=device))
    features, labels = noise(rows, 1, d).float(), torch.arange(rows)[:, None] % k

    def run(order: Tensor) -> list[Tensor]:
        units = UnitFeatures(features[order].numpy(), labels[order].numpy(), np.ones((len(order), 1), np.bool_))
        block = Block.of(task, units, poles=(), like=like, step=STEP)
        factors = adapter.factors(weights, block, block.labels)
        return [part.cpu() for f in factors for part in ((f.left, f.right) if isinstance(f, Outer) else (f,))]

    usual = torch.arange(rows)
    orders = [usual.flip(0), usual.roll(rows // 3 + 1), *(usual[-size:] for size in range(STEP, rows, STEP))]
    whole = run(usual)
    return all(torch.equal(a[order], b) for order in orders for a, b in zip(whole, run(order), strict=True))


def _clip_and_sum(factors: Sequence[Factor], mask: Tensor, max_grad_norm: float, *, onto: _Total) -> None:
    """Add Σ_u c_u g_u with c_u = min(1, C(1−1e-5)/‖g_u‖), from factors whose rows are the masked records."""
    norms = _record_norms(factors) if mask.shape[1] == 1 else _unit_norms(factors, mask)
    scale = (max_grad_norm * SAFETY / norms.clamp_min(TINY)).clamp(max=1.0)
    finite = torch.isfinite(norms)
    if mask.shape[1] > 1:
        scale, finite = (of_unit[:, None].expand_as(mask)[mask] for of_unit in (scale, finite))
    if not bool(finite.all()):
        factors, scale = [_rows(factor, finite) for factor in factors], scale[finite]
    onto.add(factors, scale)


def _record_norms(factors: Sequence[Factor]) -> Tensor:
    """‖l ⊗ r‖² = ‖l‖²‖r‖²: the gradient norms where every unit is one record."""
    squares: Tensor | float = 0.0
    for factor in factors:
        if isinstance(factor, Outer):
            right = _squared_lengths(factor.right)
            squares = squares + _squared_lengths(factor.left) * (right + 1 if factor.bias else right)
        else:
            squares = squares + _squared_lengths(factor)
    return torch.as_tensor(squares).sqrt()


def _squared_lengths(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    squares = lengths.square_()
    return squares if squares.dtype == torch.float64 else squares.clamp_min_(LEAST_SQUARE)


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
