"""Layer A of the audit (privacy.md §4) in the ring of 16 bits, where every unit is rounded by itself (secagg.md §4.1).

Rounding draws coins. They are a unit's own, so one unit more or less leaves the others' as they are; the replay gives
each unit fixed ones, and what is left to see is how far a unit moves the sum of whole steps: at most Δ, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedsecure.learning.adapters import Vector
from fedsecure.learning.audit_material import CLIP
from fedsecure.learning.engines import clipped_units
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Segment
from fedsecure.privacy.audit import Check, check_sensitivity
from fedsecure.privacy.grid import round_to_grid
from fedsecure.privacy.noise import SeededRng
from fedsecure.privacy.ring16 import aligned_units, ring16_segment, sum_records
from fedsecure.secagg.thresholds import Thresholds

_ENGINES: tuple[Literal["closed-form", "opacus"], ...] = ("closed-form", "opacus")
# A unit's share of the sum does not depend on the noise; this much leaves every adapter a segment.
_NOISE = 1.0


def replay_narrow(
    task: HeadTask, parameters: Mapping[str, Any], units: UnitFeatures, *, sites: int, unit: str
) -> Iterator[Check]:
    """The sum of a site's units on the grid, with each of ten of them left out, over both engines.

    Args:
        task: a known adapter.
        parameters: its tensors.
        units: chosen to break a clip.
        sites: n of the federation that the segment is for.
        unit: word for the check's name.
    """
    segment = narrow_segment(task.spec.parameters, sites=sites, units=len(units))
    for engine in _ENGINES:
        vectors = clipped_units(task, parameters, units, max_grad_norm=CLIP, engine=engine, device="cpu")
        rows = np.stack([_rounded(vector, segment, coins=row) for row, vector in enumerate(vectors)])

        def total(present: npt.NDArray[np.bool_], rows: Vector = rows) -> Vector:
            return np.asarray(np.clip(rows[present].sum(axis=0), -segment.clamp, segment.clamp), np.float64)

        name = f"sensitivity in the ring of 16 bits: {unit}, {engine}"
        yield check_sensitivity(total, len(units), bound=segment.bound, name=name, probes=range(10))


def narrow_segment(length: int, *, sites: int, units: int) -> Segment:
    """The segment of a run in the ring of 16 bits."""
    chosen = Thresholds.choose(sites)
    sizes: Any = {
        "noise_multiplier": _NOISE, "honest": chosen.min_survivors - chosen.colluders, "sites": sites
    }  # fmt: skip
    return ring16_segment(
        "gradient",
        length,
        clip_norm=CLIP,
        units=aligned_units(length, units=units, rounding="record", **sizes),
        rotation_seed=bytes(32),
        rounding="record",
        **sizes,
    )


def _rounded(vector: Vector, segment: Segment, *, coins: int) -> Vector:
    """One unit's vector in whole steps, before any clamp."""
    values = sum_records([vector], segment, rng=SeededRng(coins))
    return round_to_grid(values, replace(segment, clamp=1 << 62)).astype(np.float64)
