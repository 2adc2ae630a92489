"""Prediction, and accuracy as counts that can be released: bounded per unit, summed over sites, robust to their noise.

Evaluation on private sets is a release like any other (privacy.md, head "Evaluation", and §3.5). No torch at import:
an aggregator reads accuracies from counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import Vector
from fedsecure.learning.engines import check_fit
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures

if TYPE_CHECKING:
    from fedsecure.learning.tower_task import TowerTask

COUNT_SENSITIVITY = math.sqrt(2)
_ROWS = 1024


def predict(
    task: HeadTask | TowerTask, parameters: Mapping[str, Any], features: npt.NDArray[Any], *, device: str = "auto"
) -> tuple[npt.NDArray[np.int64], Vector]:
    """Most likely class and class probabilities of each record, without the task's ``log_prior``.

    Args:
        task, parameters: the adapter.
        features: (n, d) real values; scale does not matter.

    Returns:
        (n,) int64 labels and (n, K) float64 probabilities; rows sum to 1. A record whose features are not finite gets
        the uniform distribution and class 0.

    Raises:
        ModelError: FS-1638 for features of another width.
    """
    if features.ndim != 2 or features.shape[1] != task.spec.dimension:
        raise ModelError(
            "FS-1638",
            f"features of shape {features.shape}",
            expected=f"(n, {task.spec.dimension})",
            cure="use features of the encoder the adapter was trained on",
        )
    import torch

    from fedsecure.learning.modules import build_module, resolve_device

    where = resolve_device(device)
    if isinstance(task, HeadTask):
        module = build_module(task, parameters, device=where, dtype=torch.float64).eval()
    else:
        module = task.build(parameters).to(where, torch.float64).eval()
    held = _ROWS if isinstance(task, HeadTask) or task.chunk is None else task.chunk
    probabilities = np.full((len(features), task.spec.classes), 1 / task.spec.classes)
    with torch.no_grad():
        for start in range(0, len(features), held):
            rows = torch.from_numpy(np.asarray(features[start : start + held], np.float64)).to(where)
            values = torch.softmax(module(rows), dim=-1).cpu().numpy()
            good = np.isfinite(values).all(axis=1)
            probabilities[start : start + held][good] = values[good]
    return probabilities.argmax(axis=1).astype(np.int64), probabilities


def counts(
    task: HeadTask | TowerTask, parameters: Mapping[str, Any], units: UnitFeatures, *, device: str = "auto"
) -> tuple[Vector, Vector]:
    """Hits and totals per class, each unit counting 1 in all: a record of a unit of r records counts 1/r.

    With h_k ≤ t_k the unit's share of class k's hits and totals, Σ t_k ≤ 1, so the unit moves the concatenation
    (hits, totals) by √(Σ h_k² + Σ t_k²) ≤ √(2 Σ t_k²) ≤ √2 · Σ t_k ≤ √2 = ``COUNT_SENSITIVITY`` in L2 norm.

    Returns:
        (K,) float64 hits and (K,) float64 totals.

    Raises:
        ModelError: FS-1638 for features of another width or labels outside the class list.
    """
    check_fit(task, units)
    k = task.spec.classes
    flat = units.features[units.mask]
    labels = units.labels[units.mask]
    weights = units.weights[units.mask]
    found, _ = predict(task, parameters, flat, device=device)
    totals = np.bincount(labels, weights=weights, minlength=k)
    hits = np.bincount(labels, weights=weights * (found == labels), minlength=k)
    return hits.astype(np.float64), totals.astype(np.float64)


def accuracy(hits: npt.ArrayLike, totals: npt.ArrayLike) -> float:
    """Share of units classified rightly, Σ hits / Σ totals, clamped to [0, 1].

    NaN where the (possibly noisy) totals sum to less than 1: there is nothing to divide by.
    """
    hit, total = float(np.sum(hits)), float(np.sum(totals))
    return float(np.clip(hit / total, 0.0, 1.0)) if total >= 1 else math.nan


def balanced_accuracy(hits: npt.ArrayLike, totals: npt.ArrayLike, *, floor: float = 1.0) -> float:
    """Mean of the classes' recalls, each clamped to [0, 1].

    Args:
        hits, totals: (K,) counts, possibly noisy, negative or fractional.
        floor: classes whose total is below it are left out, since noise over a tiny count says nothing; with noisy
            totals pass about twice the noise's standard deviation. NaN where no class is left.
    """
    hit, total = np.asarray(hits, np.float64), np.asarray(totals, np.float64)
    kept = total >= max(floor, 1e-9)
    return float(np.clip(hit[kept] / total[kept], 0.0, 1.0).mean()) if kept.any() else math.nan
