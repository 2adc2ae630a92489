"""What the first round of a descent may release in place of a gradient, with the noise and at the price of a round.

One bounded sum over units that training needs from then on: class prototypes to align with, or class counts. What
follows from it is post-processing (facmic.md §5.4-1 and §5.4-5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedsecure.config import RunSettings
from fedsecure.learning.adapters import Vector
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Answer, Segment
from fedsecure.methods.base import Ask, Cohort, Release
from fedsecure.privacy.grid import distributed_segment, exact_segment
from fedsecure.privacy.plan import PrivacyPlan

# What a site noises itself, sums over all declared units and changes of an adapter, are real numbers of order 1
# or less: 2^-24 keeps rounding far below the noise they carry.
GRID = 2.0**-24


def first_segment(name: str, length: int, *, settings: RunSettings, cohort: Cohort, plan: PrivacyPlan) -> Segment:
    """The layout of the sum's vector.

    Raises:
        PrivacyError: FS-1206, FS-1211 the ring does not hold it.
    """
    if settings.privacy.noise == "local":
        return exact_segment(name, length, grid=GRID, sites=cohort.sites)
    return distributed_segment(
        name,
        length,
        clip_norm=settings.privacy.max_grad_norm,
        noise_multiplier=plan.noise_multiplier,
        honest=cohort.honest,
        sites=cohort.sites,
        units=max(settings.declared_units().values()),
    )


def in_place_of(ask: Ask, segment: Segment, *, purpose: str) -> Ask:
    """The round's question with this sum in place of the gradient; ``purpose`` stands in ledger and report."""
    events = tuple(replace(event, purpose=purpose, steps=1) for event in ask.events)
    return replace(ask, segments=(segment,), events=events)


def first_answer(name: str, release: Release, sum_of: Callable[[UnitFeatures], Vector]) -> Answer:
    """A site's answer.

    Args:
        name: of the segment.
        release: the door's capability.
        sum_of: the sum over units, each of whose contributions has length 1 at most.
    """
    settings = release.settings
    units = release.units("train")
    assert units is not None, "only training sites are asked"
    drawn, norm = units, settings.privacy.max_grad_norm
    if release.query.events[0].sampling_rate < 1:
        drawn = units.select(release.sample(len(units)))
    values = norm * sum_of(drawn)
    if settings.privacy.noise == "local":
        values = release.privatise(values, norm) / _declared(settings)
    return Answer(values={name: values}, units={name: len(drawn)})


def first_sum(values: Vector, settings: RunSettings) -> Vector:
    """The sum over the sites' units, of contributions of length 1 at most; the noise of an entry has the plan's
    ``sum_noise_multiplier`` as its standard deviation."""
    scale = _declared(settings) if settings.privacy.noise == "local" else 1
    return values * (scale / settings.privacy.max_grad_norm)


def _declared(settings: RunSettings) -> int:
    return sum(settings.declared_units().values())
