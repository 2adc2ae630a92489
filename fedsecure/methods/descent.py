"""Federated DP gradient descent on an adapter over frozen features: the conversation that adapter methods share.

With ``noise="distributed"`` (privacy.md §3.10) every round is one full-batch or Poisson step: a site answers with
the sum of its units' clipped gradients, the doors' noise shares add up inside the secure sum, and the aggregator
takes the step; in the ring of 16 bits each unit's gradient is rounded by itself (secagg.md §4.1). With
``noise="local"`` a site takes all of a round's noisy steps itself and answers with its weighted change of the adapter.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from fedsecure.config import RunSettings
from fedsecure.errors import ConfigError
from fedsecure.learning.adapters import AdapterKind, AdapterSpec, Float32, Vector
from fedsecure.learning.engines import check_fit, clipped_sum, clipped_units
from fedsecure.learning.features import Inputs, SiteFeatures
from fedsecure.learning.objective import CROSS_ENTROPY, Contrast, Objective
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import IMAGE_PRIOR, prior_of_images, suggest, train_locally
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Aggregate, Answer, Segment, SiteState
from fedsecure.methods.base import Ask, Cohort, Release, ServerState, Tensor
from fedsecure.methods.class_counts import COUNTS, PURPOSE, SHARES, class_counts, releases_counts, shares_of
from fedsecure.methods.cohorts import cohort_of, refuse_draw, refuse_prior, refuse_target
from fedsecure.methods.first_release import GRID, first_answer, first_segment, first_sum, in_place_of
from fedsecure.privacy.grid import distributed_segment, exact_segment
from fedsecure.privacy.plan import LastReleases, Privacy, PrivacyPlan
from fedsecure.privacy.ring16 import RING_BITS, aligned_units, ring16_segment

_MEAN = "mean."


@dataclass(frozen=True, slots=True)
class AdapterDescent:
    """A method that trains one kind of adapter.

    Attributes:
        name, version: of the method.
        kind: of the adapter.
        objective: the loss of a record, beside what the run's settings add.
        proximal: ρ of FedProx's term (:func:`fedsecure.learning.training.train_locally`).
        contrast: μ of MOON's term; a site keeps its last adapter for it.
        local_only: why it runs with ``noise = "local"`` only; empty: it runs with either.
        aligns: whether it knows what to do with ``method.alignment``.
        weighs: whether it knows what to do with ``method.class_prior``.
        inputs: what its records are.
    """

    name: str
    version: str
    kind: AdapterKind
    objective: Objective = CROSS_ENTROPY
    proximal: float = 0.0
    contrast: float = 0.0
    local_only: str = ""
    aligns: ClassVar[bool] = False
    weighs: ClassVar[bool] = True
    inputs: ClassVar[Inputs] = "features"

    # --- the aggregator's half --------------------------------------------------------------------------------------

    def start(self, settings: RunSettings, cohort: Cohort) -> ServerState:
        spec = self.spec(settings)
        # A ring that is too narrow for the run is refused here, before anybody is asked.
        self.segment(settings, cohort, self.plan(settings, cohort))
        if releases_counts(settings):
            refuse_draw(settings)
            self._counts_segment(settings, cohort)
        return ServerState(step=0, tensors=spec.initial(seed=settings.name.encode()))

    def ask(self, settings: RunSettings, cohort: Cohort, state: ServerState) -> Ask | None:
        if state.step >= settings.method.rounds:
            return None
        plan = self.plan(settings, cohort)
        ask = Ask(
            method=self.name,
            version=self.version,
            inputs={name: state.tensors[name] for name in self.spec(settings).shapes},
            segments=(self.segment(settings, cohort, plan, step=state.step),),
            events=plan.round_events,
            trainers_only=True,
            ring_bits=settings.privacy.ring_bits,
        )
        if not releases_counts(settings):
            return ask
        if state.step == 0:
            return in_place_of(ask, self._counts_segment(settings, cohort), purpose=PURPOSE)
        # Zeros where a site works out the question from the start: its name and shape are what counts there.
        shares = state.tensors.get(SHARES, np.zeros(len(settings.classes), np.float32))
        return replace(ask, inputs={**ask.inputs, SHARES: shares})

    def absorb(self, settings: RunSettings, cohort: Cohort, state: ServerState, aggregate: Aggregate) -> ServerState:
        if releases_counts(settings) and state.step == 0:
            counts = first_sum(aggregate.values[COUNTS], settings)
            shares = shares_of(counts, noise=self.plan(settings, cohort).sum_noise_multiplier)
            return replace(state, step=1, tensors={**state.tensors, SHARES: shares})
        spec = self.spec(settings)
        current = spec.flatten({name: state.tensors[name] for name in spec.shapes})
        if settings.privacy.noise == "distributed":
            rate, _ = self.rate(settings, cohort)
            rates, declared = settings.sampling_rates(), settings.declared_units()
            expected = sum(rates[site] * declared[site] for site in aggregate.asked or declared)
            following = current - rate * aggregate.values["gradient"] / expected
        else:
            following = current + aggregate.values["change"]
        tensors: Mapping[str, Tensor] = spec.unflatten(following)
        if settings.method.average:
            tensors = averaged(state, tensors, rounds=settings.method.rounds)
        if SHARES in state.tensors and state.step + 1 < settings.method.rounds:
            tensors = {**tensors, SHARES: state.tensors[SHARES]}
        return ServerState(step=state.step + 1, tensors=tensors, facts=state.facts)

    # --- a site's half ----------------------------------------------------------------------------------------------

    def answer(self, inputs: Mapping[str, Tensor], state: SiteState, release: Release) -> tuple[Answer, SiteState]:
        settings, classes = release.settings, len(release.settings.classes)
        if releases_counts(settings) and release.query.segments[0].name == COUNTS:
            head = self.task(settings, release.features)

            def counted(units: UnitFeatures) -> Vector:
                check_fit(head, units)
                return class_counts(units, classes)

            return first_answer(COUNTS, release, counted), state
        units = release.units("train")
        assert units is not None, "only training sites are asked"
        _, cohort = cohort_of(settings, trainers_only=True)
        spec = self.spec(settings)
        rate, _ = self.rate(settings, cohort)
        task = self._training_task(settings, release, inputs, state)
        inputs = {name: inputs[name] for name in spec.shapes}
        norm, own_rate = settings.privacy.max_grad_norm, settings.sampling_rates()[release.site]
        if settings.privacy.noise == "distributed":
            drawn = units if own_rate == 1 else units.select(release.sample(len(units)))
            how: Any = {"max_grad_norm": norm, "engine": release.engine, "device": release.device}
            if settings.privacy.ring_bits == RING_BITS:
                values = release.sum_units("gradient", clipped_units(task, inputs, drawn, **how))
            else:
                values = clipped_sum(task, inputs, drawn, **how)
            return Answer(values={"gradient": values}, units={"gradient": len(drawn)}), state
        declared = settings.declared_units()
        own = declared[release.site]
        change = train_locally(
            task,
            inputs,
            units,
            steps=settings.method.local_steps,
            learning_rate=rate,
            max_grad_norm=norm,
            normaliser=own * own_rate,
            sample=release.sample,
            privatise=release.privatise,
            proximal=self.proximal,
            engine=release.engine,
            device=release.device,
        )
        if self.contrast:
            state = SiteState({name: (inputs[name] + change[name]).astype(np.float32) for name in spec.shapes})
        weight = own / sum(declared[site] for site in release.query.cohort)
        return Answer(values={"change": weight * spec.flatten(change)}, units={"change": len(units)}), state

    def _training_task(
        self, settings: RunSettings, release: Release, inputs: Mapping[str, Tensor], state: SiteState
    ) -> HeadTask:
        """The task with this round's objective, of released and public values alone."""
        task, objective = self.task(settings, release.features), self.objective
        # Before a site's first round there is nothing to be pushed from.
        if self.contrast and state.tensors:
            sent = {name: inputs[name] for name in self.spec(settings).shapes}
            objective = replace(objective, contrast=Contrast(sent, state.tensors, strength=self.contrast))
        return replace(task, objective=objective, log_prior=log_prior_of(settings, inputs.get(SHARES)))

    # --- what both halves compute alike from public numbers ---------------------------------------------------------

    def spec(self, settings: RunSettings) -> AdapterSpec:
        return AdapterSpec(kind=self.kind, dimension=settings.encoder.dimension, classes=len(settings.classes))

    def inputs_of(self, settings: RunSettings) -> Inputs:
        """What a site's records are."""
        return self.inputs

    def task(self, settings: RunSettings, features: SiteFeatures) -> HeadTask:
        """The adapter with the run's constants, as sites train and evaluate it."""
        temperature = self.temperature(settings, features)
        return HeadTask(self.spec(settings), text=features.text, centre=features.centre, temperature=temperature)

    def temperature(self, settings: RunSettings, features: SiteFeatures) -> float:
        """τ of the logits with these texts."""
        _, cohort = cohort_of(settings, trainers_only=True)
        _, temperature = self.rate(settings, cohort)
        if self.spec(settings).kind in ("linear", "affine") and settings.method.temperature == "auto":
            temperature *= IMAGE_PRIOR if prior_of_images(features.text, features.centre) else 1.0
        return temperature

    def plan(self, settings: RunSettings, cohort: Cohort) -> PrivacyPlan:
        """The run's privacy plan; the aggregator and every site compute the same.

        Raises:
            ConfigError: FS-1016 distributed noise for a method that is made of local steps, FS-1018 a target to
                align with, or shares of the classes, for a method that knows nothing of them.
        """
        if not self.aligns:
            refuse_target(settings)
        if not self.weighs:
            refuse_prior(settings)
        if self.local_only and settings.privacy.noise != "local":
            raise ConfigError(
                "FS-1016",
                f'method {self.name!r} with privacy.noise = "{settings.privacy.noise}": {self.local_only}',
                expected='privacy.noise = "local", with method.local_steps',
                cure='set noise = "local" under [privacy], or train the same adapter with a method of single steps',
            )
        return plan_of(settings.canonical(), cohort, self.spec(settings).parameters)

    def rate(self, settings: RunSettings, cohort: Cohort) -> tuple[float, float]:
        """Learning rate and temperature, as set or by the predicted signal-to-noise."""
        rate, temperature = suggest(
            self.spec(settings).kind,
            mu_total=self.plan(settings, cohort).sum_mu,
            units=sum(settings.declared_units().values()),
            classes=len(settings.classes),
            dimension=settings.encoder.dimension,
            steps=settings.method.rounds * settings.method.local_steps,
            max_grad_norm=settings.privacy.max_grad_norm,
        )
        chosen = settings.method
        return (
            rate if chosen.learning_rate == "auto" else chosen.learning_rate,
            temperature if chosen.temperature == "auto" else chosen.temperature,
        )

    def _counts_segment(self, settings: RunSettings, cohort: Cohort) -> Segment:
        plan = self.plan(settings, cohort)
        return first_segment(COUNTS, len(settings.classes), settings=settings, cohort=cohort, plan=plan)

    def segment(self, settings: RunSettings, cohort: Cohort, plan: PrivacyPlan, *, step: int = 0) -> Segment:
        """The layout of one round's vector; only the rotation of the ring of 16 bits depends on ``step``.

        Raises:
            PrivacyError: FS-1206, FS-1211, FS-1214 the ring does not hold this run's sums and noise.
        """
        length, privacy = self.spec(settings).parameters, settings.privacy
        if privacy.noise == "distributed":
            units = max(settings.declared_units().values())
            sizes: Any = {
                "noise_multiplier": plan.noise_multiplier, "honest": cohort.honest, "sites": cohort.sites
            }  # fmt: skip
            if privacy.ring_bits == RING_BITS:
                return ring16_segment(
                    "gradient",
                    length,
                    clip_norm=privacy.max_grad_norm,
                    units=aligned_units(length, units=units, rounding="record", **sizes),
                    rotation_seed=_rotation_seed(settings, step),
                    rounding="record",
                    **sizes,
                )
            return distributed_segment("gradient", length, clip_norm=privacy.max_grad_norm, units=units, **sizes)
        return exact_segment("change", length, grid=GRID, sites=cohort.sites)


def averaged(state: ServerState, following: Mapping[str, Tensor], *, rounds: int) -> Mapping[str, Tensor]:
    """The tensors of the next state: the step's own and, beside them, their mean since half of the rounds; the mean
    alone after the last (Polyak and Juditsky 1992, over the tail as in Jain et al. 2018). Post-processing.
    """
    taken = state.step - rounds // 2
    if taken < 0:
        return following
    mean = {}
    for name, value in following.items():
        before = state.tensors[_MEAN + name] if taken else value
        mean[name] = before + (value - before) / (taken + 1)
    if state.step + 1 == rounds:
        return mean
    return {**following, **{_MEAN + name: value for name, value in mean.items()}}


def log_prior_of(settings: RunSettings, released: Tensor | None) -> Float32 | None:
    """(K,) logarithm of the classes' shares, public or released, which training adds to the logits (facmic.md §5.4-1).

    Args:
        released: (K,) shares that the first round has released, or None.
    """
    shares = np.asarray(settings.method.class_prior if released is None else released, np.float64)
    return np.asarray(np.log(shares / shares.sum()), np.float32) if shares.size else None


def _rotation_seed(settings: RunSettings, step: int) -> bytes:
    """32 public bytes, others for each round; everybody computes them, so nobody chooses them."""
    return hashlib.sha256(b"fedsecure/descent/rotation/v1\0" + settings.digest() + struct.pack(">Q", step)).digest()


@lru_cache(maxsize=16)
def plan_of(canonical: str, cohort: Cohort, parameters: int, *, last: LastReleases | None = None) -> PrivacyPlan:
    """The plan of ``rounds`` noisy rounds of a run's canonical settings, with further releases in the last ones."""
    # Calibration under Poisson sampling takes seconds, and every round asks.
    settings = RunSettings.parse(canonical)
    return Privacy(**settings.privacy.model_dump()).plan(
        parameters=parameters,
        units=settings.declared_units(),
        rounds=settings.method.rounds,
        local_steps=settings.method.local_steps,
        cohort=cohort,
        sampling_rates=settings.sampling_rates(),
        asked=settings.rounds_asked(),
        last=last,
    )
