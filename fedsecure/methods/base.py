"""What a federated method is: a server half and a site half, side by side in one file.

The server half is a pure step function over a serialisable state: ``ask`` says what to ask next, ``absorb`` takes
the sum. The site half answers one query from the units the door lets it read. Torch is imported inside the site
half only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fedsecure.config import RunSettings
from fedsecure.messages import Aggregate, Answer, Event, Population, Query, Segment, SiteState

if TYPE_CHECKING:
    from fedsecure.learning.engines import EngineName
    from fedsecure.learning.features import SiteFeatures
    from fedsecure.learning.task import HeadTask
    from fedsecure.learning.tower_task import TowerTask
    from fedsecure.learning.units import UnitFeatures
    from fedsecure.privacy.plan import PrivacyPlan

Tensor = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """What the server half wants to ask; the aggregator turns it into a ``Query``.

    ``inputs`` are the tensors to broadcast; ``trainers_only`` chooses the cohort: training sites, or all;
    ``ring_bits`` is the ring of the sum, 32 or 16.
    """

    method: str
    version: str
    inputs: Mapping[str, Tensor]
    segments: tuple[Segment, ...]
    events: tuple[Event, ...]
    trainers_only: bool
    ring_bits: int = 32


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that a server half carries from round to round: tensors, and facts that fit in JSON."""

    step: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cohort:
    """The public numbers of secure aggregation a plan depends on: sites, c and u_min (secagg.md §3.5)."""

    sites: int
    colluders: int
    min_survivors: int

    @property
    def honest(self) -> int:
        """Honest sites that any released sum is sure to contain: u_min − c."""
        return self.min_survivors - self.colluders


class Release(Protocol):
    """The capability a site half gets from the door: units of the charged population, and the noise it has paid for."""

    @property
    def query(self) -> Query: ...

    @property
    def site(self) -> str:
        """This site's id."""

    @property
    def settings(self) -> RunSettings:
        """The run's public settings, as hashed into ctx."""

    @property
    def features(self) -> SiteFeatures:
        """Public constants of the run: text embeddings, public mean, feature width."""

    @property
    def device(self) -> str: ...

    @property
    def engine(self) -> EngineName: ...

    def units(self, population: Population) -> UnitFeatures | None:
        """The population's units, or None where this site holds none."""

    def sample(self, count: int) -> npt.NDArray[np.bool_]:
        """Which of ``count`` units take part in this local step: Poisson at the event's sampling rate."""

    def privatise(self, clipped_sum: npt.NDArray[np.float64], clip_norm: float) -> npt.NDArray[np.float64]:
        """A local step's clipped sum on the fine grid with its Gaussian noise; once per declared step."""

    def sum_units(self, segment: str, vectors: Iterable[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        """The sum of units' vectors, each rounded by itself to at most the segment's bound: what a noised segment of
        the ring of 16 bits is answered with, unchanged, and once."""


class Method(Protocol):
    """An installed method; found by entry point."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def start(self, settings: RunSettings, cohort: Cohort) -> ServerState:
        """Initial state; its tensors are the adapter."""

    def ask(self, settings: RunSettings, cohort: Cohort, state: ServerState) -> Ask | None:
        """The next question, or None when training is over, after ``settings.method.rounds`` questions.

        Sites call it too: method, version, segments and events must follow from the settings and ``state.step``
        alone, and inputs must keep the names, types and shapes of the start (:mod:`fedsecure.methods.agenda`).
        """

    def absorb(self, settings: RunSettings, cohort: Cohort, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The state after the sum of the last question has come."""

    def answer(self, inputs: Mapping[str, Tensor], state: SiteState, release: Release) -> tuple[Answer, SiteState]:
        """A site's answer; everything it returns goes through the door."""


class TrainingMethod(Method, Protocol):
    """A method that trains an adapter, and says so in numbers before any record is read."""

    def plan(self, settings: RunSettings, cohort: Cohort) -> PrivacyPlan:
        """The run's privacy plan, from public numbers only."""

    def task(self, settings: RunSettings, features: SiteFeatures) -> HeadTask | TowerTask:
        """The adapter with the run's constants, as sites train, evaluate and keep it; built once at joining too."""


class ComputingMethod(TrainingMethod, Protocol):
    """A method whose server half has something long to compute after a sum. ``absorb`` only takes the sum in; what
    follows runs in a process of its own (:mod:`fedsecure.aggregator.step_worker`), where torch may be imported, while
    the aggregator answers its sites."""

    def computes(self, settings: RunSettings) -> bool:
        """Whether ``compute`` will have to run at all in a run with these settings."""

    def due(self, settings: RunSettings, state: ServerState) -> bool:
        """Whether ``compute`` has to run before the next question."""

    def compute(self, settings: RunSettings, state: ServerState, features: SiteFeatures) -> ServerState:
        """The state that the next question starts from: a pure function, post-processing of what was released."""
