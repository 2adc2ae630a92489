"""A method for the simulated world: every answer is a vector of its own, so that a sum says what is in it.

Site i of n answers with 1 at coordinate i and a number that is given out once at coordinate n + i. An exact sum then
tells who was counted, how often, and which of a site's answers it was. Nothing is trained, so no torch is needed; the
door, the ledger and the charge are those of any other method with local noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedsecure.config import RunSettings
from fedsecure.messages import Aggregate, Answer, Query, Segment, SiteState
from fedsecure.methods.base import Cohort, Release, ServerState, Tensor
from fedsecure.methods.descent import AdapterDescent
from fedsecure.privacy.grid import exact_segment
from fedsecure.privacy.plan import PrivacyPlan

Vector = npt.NDArray[np.float64]


class Book(Protocol):
    """Keeps what was answered and what was summed."""

    def answered(self, site: str, query: Query) -> int:
        """A number for this answer, never given out before."""

    def absorbed(self, step: int, sum: Vector, survivors: int) -> None:
        """A sum came out."""


class Blank:
    """Keeps nothing; numbers are zero."""

    def answered(self, site: str, query: Query) -> int:
        return 0

    def absorbed(self, step: int, sum: Vector, survivors: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class BasisVectors(AdapterDescent):
    """Sums vectors that name their sender."""

    book: Book = field(default_factory=Blank)

    def segment(self, settings: RunSettings, cohort: Cohort, plan: PrivacyPlan, *, step: int = 0) -> Segment:
        return exact_segment("change", self.spec(settings).parameters, grid=1.0, sites=cohort.sites)

    def absorb(self, settings: RunSettings, cohort: Cohort, state: ServerState, aggregate: Aggregate) -> ServerState:
        self.book.absorbed(state.step, aggregate.values["change"], aggregate.survivors)
        return AdapterDescent.absorb(self, settings, cohort, state, aggregate)

    def answer(self, inputs: Mapping[str, Tensor], state: SiteState, release: Release) -> tuple[Answer, SiteState]:
        units = release.units("train")
        assert units is not None
        # The one declared local step; its noisy sum goes nowhere.
        release.privatise(np.zeros(1), release.settings.privacy.max_grad_norm)
        cohort = release.query.cohort
        number = self.book.answered(release.site, release.query)
        vector = vector_of(cohort, release.site, number, length=self.spec(release.settings).parameters)
        return Answer(values={"change": vector}, units={"change": len(units)}), state


def vector_of(cohort: tuple[str, ...], site: str, number: int, *, length: int) -> Vector:
    """The answer ``number`` of a site."""
    vector = np.zeros(length)
    vector[cohort.index(site)] = 1.0
    vector[len(cohort) + cohort.index(site)] = number
    return vector
