"""Whether a sum can be one of honest sites: a broken one shows, since its masked values are anything.

Every site's door keeps each segment within units × Δ, and the noise in a sum of s sites has a norm with a known tail.
With x = 40·ln 2 and d coordinates of variance s·σ², ‖noise‖² > s·σ²·(d + 2√(d·x) + 2x) has probability at most 2^-40:
Laurent and Massart, Annals of Statistics 2000, lemma 1, for the Gaussian; Hsu, Kakade and Zhang, ECP 2012, theorem 2.1,
for all that is sub-Gaussian, as the discrete Gaussian is with its own σ (Canonne, Kamath and Steinke, NeurIPS 2020).
So an honest sum is longer than the bounds together with probability at most 2^-40 a segment.

What a site does within its bound, a wrong label or a gradient turned around, no norm of a sum can show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsecure.config import RunSettings
from fedsecure.errors import ProtocolError
from fedsecure.messages import Query, Segment
from fedsecure.secagg.server import SecAggResult

_TAIL = 40 * math.log(2)
# Of a sum of squares in float64, far above its error.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Alarm:
    """A segment of a sum that no honest sites can have made.

    Attributes:
        segment: its name.
        norm, limit: in grid steps; ``norm`` is L2, or the largest coordinate where the segment has no noise from the
            door.
    """

    segment: str
    norm: float
    limit: float

    def error(self) -> ProtocolError:
        """What ends a run that stops on it."""
        return ProtocolError(
            "FS-1364",
            f"segment {self.segment!r} of the sum is {self.norm:.4g} grid steps long",
            expected=f"at most {self.limit:.4g}, as far as honest sites can get",
            cure="look for a broken site: leave one after the other out, or have each check its data and release",
        )


def check_sum(query: Query, result: SecAggResult, *, settings: RunSettings) -> Alarm | None:
    """The first segment of a sum that is out of range, or ``None``.

    Args:
        query: what was asked.
        result: the sum and whose vectors are in it.
        settings: the run's public settings, for the declared units.
    """
    survivors = result.survivors
    training = any(event.population == "train" for event in query.events)
    entries = [settings.sites[site] for site in survivors]
    units = sum(entry.max_units if training else entry.evaluation_units for entry in entries)
    offset = 0
    for segment in query.segments:
        part = result.total[offset : offset + segment.length].astype(np.float64)
        offset += segment.length
        norm, limit = measure(part, segment, units=units, survivors=len(survivors))
        if norm > limit:
            return Alarm(segment.name, norm, limit)
    return None


def measure(part: npt.NDArray[np.float64], segment: Segment, *, units: int, survivors: int) -> tuple[float, float]:
    """How long a segment of a sum is, and how long it may be, in grid steps.

    Args:
        part: the sum's values there.
        segment: its layout.
        units: privacy units of the survivors, at most.
        survivors: sites in the sum.
    """
    if segment.noise_variance == 0:
        # Noised by the sites, or public: only the clamp is known.
        return float(np.abs(part).max()), float(survivors * segment.clamp)
    d, variance = segment.length, survivors * float(segment.noise_variance)
    noise = math.sqrt(variance * (d + 2 * math.sqrt(d * _TAIL) + 2 * _TAIL))
    return float(np.linalg.norm(part)), (units * segment.bound + noise) * (1 + _ROUNDING)


__all__ = ["Alarm", "check_sum", "measure"]
