"""Methods of one release: one bounded vector a unit, one noisy sum, and a residual head computed from it.

Privacy.md §2.4: there is nothing to compose and no learning rate, and the head is post-processing, which is free. With
``noise="distributed"`` the door's shares add up inside the secure sum; with ``"local"`` a site noises its own sum
as a single step. The result is a ``linear`` adapter, so that everything that reads adapters reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedsecure.config import RunSettings
from fedsecure.errors import ConfigError
from fedsecure.learning.adapters import AdapterSpec, Vector
from fedsecure.learning.features import SiteFeatures
from fedsecure.learning.moments import Moments, Statistics, moment_sum, read_moments
from fedsecure.learning.shrinkage import class_signal, weight, zero_shot_error
from fedsecure.learning.task import HeadTask
from fedsecure.messages import Aggregate, Answer, Segment, SiteState
from fedsecure.methods.base import Ask, Cohort, Release, ServerState, Tensor
from fedsecure.methods.cohorts import cohort_of, refuse_draw, refuse_prior, refuse_target
from fedsecure.privacy.grid import distributed_segment, exact_segment
from fedsecure.privacy.plan import Privacy, PrivacyPlan
from fedsecure.privacy.ring16 import RING_BITS

# (statistics, declared units) → a direction for each class, (K, d), of length about 1.
Directions = Callable[[Statistics, float], Vector]

_TEMPERATURE = 25.0
# Only to set the temperature, which is needed before the release tells how often zero-shot errs.
_TYPICAL_ERROR = 0.3


@dataclass(frozen=True, slots=True)
class OneRelease:
    """A method that asks once.

    Attributes:
        name, version: of the method.
        gram_share: of :class:`fedsecure.learning.moments.Moments`.
        directions: what is made of the statistics.
    """

    name: str
    version: str
    gram_share: float
    directions: Directions

    # --- the aggregator's half --------------------------------------------------------------------------------------

    def start(self, settings: RunSettings, cohort: Cohort) -> ServerState:
        self.plan(settings, cohort)
        return ServerState(step=0, tensors=self.spec(settings).initial(seed=settings.name.encode()))

    def ask(self, settings: RunSettings, cohort: Cohort, state: ServerState) -> Ask | None:
        if state.step >= 1:
            return None
        plan = self.plan(settings, cohort)
        segment = self.segment(settings, cohort, plan)
        return Ask(self.name, self.version, state.tensors, (segment,), plan.round_events, trainers_only=True)

    def absorb(self, settings: RunSettings, cohort: Cohort, state: ServerState, aggregate: Aggregate) -> ServerState:
        """D = τ·η·directions: the head that the release is worth (:mod:`fedsecure.learning.shrinkage`)."""
        layout = self.layout(settings)
        noise = self.plan(settings, cohort).sum_noise_multiplier
        units = sum(settings.declared_units().values())
        values = aggregate.values["statistics"] / settings.privacy.max_grad_norm
        statistics = read_moments(values, layout, noise=noise)
        far = weight(class_signal(layout, units=units, noise=noise), zero_shot_error(statistics, units=units))
        head = self.temperature(settings, cohort) * far * self.directions(statistics, units)
        return replace(state, step=state.step + 1, tensors=self.spec(settings).unflatten(head.ravel()))

    # --- a site's half ----------------------------------------------------------------------------------------------

    def answer(self, inputs: Mapping[str, Tensor], state: SiteState, release: Release) -> tuple[Answer, SiteState]:
        settings = release.settings
        units = release.units("train")
        assert units is not None, "only training sites are asked"
        norm = settings.privacy.max_grad_norm
        values = norm * moment_sum(self.task(settings, release.features), units, self.layout(settings))
        if settings.privacy.noise == "local":
            values = release.privatise(values, norm)
        return Answer(values={"statistics": values}, units={"statistics": len(units)}), state

    # --- what both halves compute alike from public numbers ---------------------------------------------------------

    def spec(self, settings: RunSettings) -> AdapterSpec:
        return AdapterSpec(kind="linear", dimension=settings.encoder.dimension, classes=len(settings.classes))

    def layout(self, settings: RunSettings) -> Moments:
        """Which statistics are summed."""
        return Moments(len(settings.classes), settings.encoder.dimension, self.gram_share)

    def task(self, settings: RunSettings, features: SiteFeatures) -> HeadTask:
        """The adapter with the run's constants, as sites evaluate it."""
        _, cohort = cohort_of(settings, trainers_only=True)
        temperature = self.temperature(settings, cohort)
        return HeadTask(spec=self.spec(settings), text=features.text, centre=features.centre, temperature=temperature)

    def plan(self, settings: RunSettings, cohort: Cohort) -> PrivacyPlan:
        """The run's privacy plan; its parameters are the released numbers.

        Raises:
            ConfigError: FS-1014 settings of a method of many steps, or of the ring of 16 bits; FS-1018 a target, or
                shares of the classes; FS-1050 a drawn cohort.
            PrivacyError: as :meth:`fedsecure.privacy.plan.Privacy.plan`.
        """
        refuse_target(settings)
        refuse_prior(settings)
        refuse_draw(settings)
        method, privacy = settings.method, settings.privacy
        rate = min(settings.sampling_rates().values())
        found = (method.rounds, method.local_steps, rate, method.learning_rate)
        if found != (1, 1, 1.0, "auto"):
            raise ConfigError(
                "FS-1014",
                f"method {self.name!r} with rounds = {found[0]}, local_steps = {found[1]}, "
                f"sampling_rate = {found[2]:g} and learning_rate = {found[3]}",
                expected='rounds = 1, local_steps = 1, sampling_rate = 1 and learning_rate = "auto": it asks once',
                cure="set rounds = 1 under [method], and leave the others out",
            )
        if privacy.ring_bits == RING_BITS:
            raise ConfigError(
                "FS-1014",
                f"method {self.name!r} with ring_bits = {privacy.ring_bits}",
                expected="the ring of 32 bits: the statistics of a site are rounded as one sum, not unit by unit",
                cure="leave ring_bits out",
            )
        return Privacy(**privacy.model_dump()).plan(
            parameters=self.layout(settings).length, units=settings.declared_units(), rounds=1, cohort=cohort
        )

    def temperature(self, settings: RunSettings, cohort: Cohort) -> float:
        """τ, as set, or the lower the longer the head is predicted to be; it moves probabilities, never the answer."""
        if settings.method.temperature != "auto":
            return settings.method.temperature
        noise = self.plan(settings, cohort).sum_noise_multiplier
        units = sum(settings.declared_units().values())
        signal = class_signal(self.layout(settings), units=units, noise=noise)
        return _TEMPERATURE / (1 + weight(signal, _TYPICAL_ERROR) / 4)

    def segment(self, settings: RunSettings, cohort: Cohort, plan: PrivacyPlan) -> Segment:
        length, norm = self.layout(settings).length, settings.privacy.max_grad_norm
        units = max(settings.declared_units().values())
        if settings.privacy.noise == "distributed":
            return distributed_segment(
                "statistics",
                length,
                clip_norm=norm,
                noise_multiplier=plan.noise_multiplier,
                honest=cohort.honest,
                sites=cohort.sites,
                units=units,
            )
        # A site's own noisy sum: room for every unit along one coordinate and for ten standard deviations.
        room = norm * (units + 10 * plan.noise_multiplier)
        grid = 2.0 ** math.ceil(math.log2(room * cohort.sites / (1 << 30)))
        return exact_segment("statistics", length, grid=grid, sites=cohort.sites)
