"""The one interface to per-unit clipped gradient sums, over two engines tested equal (privacy.md, "Engines").

No torch at import: the engine is loaded by the call that needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fedsecure.errors import ModelError, PrivacyError
from fedsecure.learning.adapters import Vector
from fedsecure.learning.narrow import NARROW, Precision, sums_narrowly
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures

if TYPE_CHECKING:
    from fedsecure.learning.opacus_engine import ModuleTask
    from fedsecure.learning.tower_task import TowerTask

EngineName = Literal["auto", "opacus", "closed-form"]
CHUNK = 512


def choose_engine(engine: EngineName, task: HeadTask | ModuleTask) -> Literal["opacus", "closed-form"]:
    """``"auto"`` takes the closed form for the two known adapters and Opacus for everything else.

    Raises:
        ModelError: FS-1637 for an unknown engine, or the closed form asked for a module it does not know.
    """
    known = isinstance(task, HeadTask)
    if engine == "auto":
        return "closed-form" if known else "opacus"
    if engine == "opacus" or (engine == "closed-form" and known):
        return engine
    raise ModelError(
        "FS-1637",
        f"engine {engine!r} for {'a known adapter' if known else 'a module of your own'}",
        expected="auto, opacus, or closed-form for the linear and facmic adapters",
        cure='set engine = "auto"',
    )


def clipped_sum(
    task: HeadTask | ModuleTask,
    parameters: Mapping[str, Any],
    units: UnitFeatures,
    *,
    max_grad_norm: float,
    engine: EngineName = "auto",
    device: str = "auto",
    chunk: int = CHUNK,
    precision: Precision = "float64",
) -> Vector:
    """Σ over units of clip_C(∇ mean over the unit's records of the loss), C = ``max_grad_norm``.

    Each unit's gradient over all parameters together is scaled by min(1, C(1 − 1e-5)/‖g‖); a unit with a
    non-finite gradient, or without records, adds zero; no units give zeros. Adding a unit, or replacing it by zero,
    moves the result by at most C in L2 norm; with ``"float32"``, replacing it by one without records in its place.

    Args:
        task: a known adapter, or a module of the user's own.
        parameters: name → array or tensor, as in ``task.spec.shapes`` or ``task.shapes``.
        units: U units of up to m records of d features.
        max_grad_norm: C > 0, finite.
        engine: ``"auto"``, ``"opacus"`` or ``"closed-form"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``…
        chunk: records held in activations at a time; it bounds memory and does not change the result, but for last
            bits where gradients are held in float32 (``ModuleTask.single``).
        precision: of activations in the closed form. With ``"float32"``, where every unit is one record, sums of up to
            256 of them are float32 too, and the clip is C′ < C in either engine (:mod:`fedsecure.learning.narrow`).

    Returns:
        float64 vector, the parameters end to end.

    Raises:
        ModelError: FS-1632, FS-1637, FS-1638 or FS-1639 when something does not fit.
        PrivacyError: FS-1234 to FS-1237 and FS-1248 from Opacus's guards; FS-1238 for a bad C.
    """
    at = clipped_sums(
        task, units, max_grad_norm=max_grad_norm, engine=engine, device=device, chunk=chunk, precision=precision
    )
    return at(parameters)


def clipped_sums(
    task: HeadTask | ModuleTask,
    units: UnitFeatures,
    *,
    max_grad_norm: float,
    engine: EngineName = "auto",
    device: str = "auto",
    chunk: int = CHUNK,
    precision: Precision = "float64",
    keep: bool = False,
) -> Callable[[Mapping[str, Any]], Vector]:
    """:func:`clipped_sum` of these units as a function of the parameters, for one step after another.

    Args and errors as there. ``keep``: what no parameter changes is computed once, as far as it fits into memory; it
    does not change the result.
    """
    if not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
        raise PrivacyError(
            "FS-1238",
            f"max_grad_norm = {max_grad_norm}",
            expected="a finite value above 0",
            cure="set privacy.max_grad_norm, for instance to 0.1",
        )
    if isinstance(task, HeadTask):
        check_fit(task, units)
    name = choose_engine(engine, task)
    records = units.mask.shape[1]
    narrow = (
        isinstance(task, HeadTask)
        and task.objective.plain
        and sums_narrowly(precision, records=records, max_grad_norm=max_grad_norm)
    )
    if narrow:
        max_grad_norm *= NARROW
    from fedsecure.learning.modules import resolve_device

    where = resolve_device(device)
    if not isinstance(task, HeadTask) and task.chunk is not None:
        chunk = min(chunk, task.chunk)
    rows = max(1, chunk // max(units.mask.shape[1], 1))
    if name == "closed-form":
        from fedsecure.learning import closed_form

        assert isinstance(task, HeadTask)
        sums = closed_form.ClippedSums(
            task, units, device=where, chunk=rows, precision=precision, keep=keep, narrow=narrow
        )
        return partial(sums.at, max_grad_norm=max_grad_norm)
    from fedsecure.learning import opacus_engine

    return partial(opacus_engine.clipped_sum, task, units=units, max_grad_norm=max_grad_norm, device=where, chunk=rows)


def clipped_units(
    task: HeadTask | ModuleTask,
    parameters: Mapping[str, Any],
    units: UnitFeatures,
    *,
    max_grad_norm: float,
    engine: EngineName = "auto",
    device: str = "auto",
) -> Iterator[Vector]:
    """The vectors that :func:`clipped_sum` adds up, one unit after the other.

    For rounding each of them by itself (secagg.md §4.1): a unit's vector is the clipped sum of that unit alone, by
    whichever engine, so nothing of another unit can be in it.

    Args and errors as for :func:`clipped_sum`.

    Yields:
        float64, the parameters end to end, of norm at most C.
    """
    for row in range(len(units)):
        yield clipped_sum(
            task,
            parameters,
            units.select(slice(row, row + 1)),
            max_grad_norm=max_grad_norm,
            engine=engine,
            device=device,
            chunk=1,
        )


def check_fit(task: HeadTask | TowerTask, units: UnitFeatures) -> None:
    """Refuse units of another width or with labels outside the class list: ModelError FS-1638."""
    d, k = task.spec.dimension, task.spec.classes
    labels = units.labels[units.mask]
    if units.dimension != d or (labels.size and not (labels.min() >= 0 and labels.max() < k)):
        top = int(labels.max()) if labels.size else 0
        raise ModelError(
            "FS-1638",
            f"features of width {units.dimension} with labels up to {top}",
            expected=f"width {d} and labels from 0 to {k - 1}",
            cure="use features of the federation's encoder and its class list",
        )
