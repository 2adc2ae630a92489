"""FACMIC's feature attention module, trained in its DP-valid form, with its domain alignment where there is a target.

Wu, Desrosiers, Chaddad: FACMIC, MICCAI 2024 (arXiv 2410.14707). Per-sample cross-entropy against fixed text embeddings
instead of the in-batch loss, LayerNorm instead of BatchNorm (or, with ``facmic.normalisation = "public"``, the public
target's statistics in place of a batch's), and an output layer that starts at zero, so that
round 0 equals zero-shot CLIP (facmic.md §5.4).

``method.alignment`` adds the local discrepancy to a public target as a witness, one loss a record: sites compute it
from the round's adapter, the target and, with ``prototypes``, class prototypes of the sources, which the first
round releases in place of a gradient and at its price. With ``at = "aggregator"`` the sites train on the
labels alone and the aggregator takes as many alignment steps after the last sum, on prototypes and target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedsecure.config import RunSettings
from fedsecure.errors import ConfigError
from fedsecure.learning.adapters import AdapterSpec, Float32, Vector
from fedsecure.learning.features import SiteFeatures
from fedsecure.learning.moments import Moments, moment_sum, read_moments
from fedsecure.learning.objective import Negatives
from fedsecure.learning.task import HeadTask, unit_rows
from fedsecure.messages import Aggregate, Answer, Segment, SiteState
from fedsecure.methods.base import Ask, Cohort, Release, ServerState, Tensor
from fedsecure.methods.cohorts import cohort_of, refuse_draw
from fedsecure.methods.descent import AdapterDescent
from fedsecure.methods.first_release import first_answer, first_segment, first_sum, in_place_of
from fedsecure.privacy.plan import PrivacyPlan

PROTOTYPES = "prototypes"
PURPOSE = "class prototypes"
# A tensor beside the adapter's: prototypes as unit rows, times how far their noise lets them be trusted.
SOURCE = "alignment.source"
_ALIGNED = "aligned"
FREQUENCIES = 128
# Public images that normalise: so many are enough for means and variances, and each step passes them through W1.
NORMALISING = 256


@dataclass(frozen=True, slots=True)
class Facmic(AdapterDescent):
    """Descent on the attention module, aligned if the settings say so."""

    aligns: ClassVar[bool] = True

    # --- the aggregator's half --------------------------------------------------------------------------------------

    def start(self, settings: RunSettings, cohort: Cohort) -> ServerState:
        if settings.method.alignment.prototypes:
            refuse_draw(settings)
            self.prototypes_segment(settings, cohort, self.plan(settings, cohort))
        return AdapterDescent.start(self, settings, cohort)

    def ask(self, settings: RunSettings, cohort: Cohort, state: ServerState) -> Ask | None:
        ask = AdapterDescent.ask(self, settings, cohort, state)
        if ask is None or not settings.method.alignment.prototypes:
            return ask
        if state.step == 0:
            segment = self.prototypes_segment(settings, cohort, self.plan(settings, cohort))
            return in_place_of(ask, segment, purpose=PURPOSE)
        if settings.method.alignment.at == "aggregator":
            return ask
        # Zeros where a site works out the question from the start: its name and shape are what counts there.
        source = state.tensors.get(SOURCE, np.zeros(self._layout(settings)[:2], np.float32))
        return replace(ask, inputs={**ask.inputs, SOURCE: source})

    def absorb(self, settings: RunSettings, cohort: Cohort, state: ServerState, aggregate: Aggregate) -> ServerState:
        if not settings.method.alignment.prototypes:
            return AdapterDescent.absorb(self, settings, cohort, state, aggregate)
        if state.step == 0:
            source = self._read_prototypes(settings, cohort, aggregate.values[PROTOTYPES])
            return replace(state, step=1, tensors={**state.tensors, SOURCE: source})
        following = AdapterDescent.absorb(self, settings, cohort, state, aggregate)
        over = following.step == settings.method.rounds and settings.method.alignment.at == "sites"
        return following if over else replace(following, tensors={**following.tensors, SOURCE: state.tensors[SOURCE]})

    def computes(self, settings: RunSettings) -> bool:
        return settings.method.alignment.at == "aggregator"

    def due(self, settings: RunSettings, state: ServerState) -> bool:
        """After the last sum, where the aggregator aligns."""
        last = state.step == settings.method.rounds
        return self.computes(settings) and last and _ALIGNED not in state.facts

    def compute(self, settings: RunSettings, state: ServerState, features: SiteFeatures) -> ServerState:
        """As many alignment steps as the sites took, each no longer than a step on which all units agree."""
        from fedsecure.learning.alignment import align

        _, cohort = cohort_of(settings, trainers_only=True)
        rate, _ = self.rate(settings, cohort)
        spec = self.spec(settings)
        task = self.task(settings, features)
        tensors: Mapping[str, Tensor] = {name: state.tensors[name] for name in spec.shapes}
        for _ in range(settings.method.rounds):
            tensors = align(
                task,
                tensors,
                target=_target_of(features),
                source=state.tensors[SOURCE],
                frequencies=_frequencies(settings, task, features),
                strength=settings.method.alignment.weight,
                step=rate * settings.privacy.max_grad_norm,
            )
        return ServerState(state.step, tensors, {**state.facts, _ALIGNED: True})

    # --- a site's half ----------------------------------------------------------------------------------------------

    def answer(self, inputs: Mapping[str, Tensor], state: SiteState, release: Release) -> tuple[Answer, SiteState]:
        settings = release.settings
        own = {name: inputs[name] for name in self.spec(settings).shapes}
        if release.query.segments[0].name == PROTOTYPES:
            task, layout = self.task(settings, release.features), Moments(*self._layout(settings))
            return first_answer(PROTOTYPES, release, lambda units: moment_sum(task, units, layout)), state
        aligned = self._aligned(settings, release.features, own, inputs.get(SOURCE))
        return AdapterDescent.answer(aligned, inputs, state, release)

    def _aligned(
        self, settings: RunSettings, features: SiteFeatures, adapter: Mapping[str, Tensor], source: Tensor | None
    ) -> Facmic:
        """This method with the round's objective, of released and public values alone."""
        alignment, objective = settings.method.alignment, self.objective
        if alignment.weight > 0 and alignment.at == "sites":
            from fedsecure.learning.alignment import witness_of

            task = self.task(settings, features)
            witness = witness_of(
                task,
                adapter,
                target=_target_of(features),
                source=source,
                frequencies=_frequencies(settings, task, features),
                strength=alignment.weight,
            )
            objective = replace(objective, alignment=witness)
        if alignment.negatives > 0:
            from fedsecure.learning.alignment import negatives_of

            totals = negatives_of(self.task(settings, features), adapter, target=_target_of(features))
            objective = replace(objective, negatives=Negatives(totals, strength=alignment.negatives))
        return replace(self, objective=objective)

    # --- what both halves compute alike from public numbers ---------------------------------------------------------

    def spec(self, settings: RunSettings) -> AdapterSpec:
        spec = AdapterDescent.spec(self, settings)
        return spec if settings.method.facmic.normalisation == "layer" else replace(spec, kind="facmic_plain")

    def task(self, settings: RunSettings, features: SiteFeatures) -> HeadTask:
        task = AdapterDescent.task(self, settings, features)
        public = settings.method.facmic.normalisation == "public"
        return replace(task, public=normalising(_target_of(features))) if public else task

    def plan(self, settings: RunSettings, cohort: Cohort) -> PrivacyPlan:
        """As :meth:`AdapterDescent.plan`; also ConfigError FS-1023, normalisation by a target that there is not."""
        if settings.method.facmic.normalisation == "public" and not settings.method.alignment.target:
            raise ConfigError(
                "FS-1023",
                'method.facmic.normalisation = "public" without a target',
                expected="the hash of a file of public images as method.alignment.target",
                cure="write a target and name it there, or leave normalisation out under [method.facmic]",
            )
        return AdapterDescent.plan(self, settings, cohort)

    def prototypes_segment(self, settings: RunSettings, cohort: Cohort, plan: PrivacyPlan) -> Segment:
        """The layout of the prototypes' vector: class sums and two counts, as in one release.

        Raises:
            PrivacyError: FS-1206, FS-1211 the ring does not hold them.
        """
        length = Moments(*self._layout(settings)).length
        return first_segment(PROTOTYPES, length, settings=settings, cohort=cohort, plan=plan)

    def _layout(self, settings: RunSettings) -> tuple[int, int]:
        return len(settings.classes), settings.encoder.dimension

    def _read_prototypes(self, settings: RunSettings, cohort: Cohort, values: Vector) -> Float32:
        noise = self.plan(settings, cohort).sum_noise_multiplier
        return prototypes_of(first_sum(values, settings), Moments(*self._layout(settings)), noise=noise)


def prototypes_of(values: Vector, layout: Moments, *, noise: float) -> Float32:
    """(K, d) class prototypes, each as long as it can be trusted, from a noisy sum of moments.

    Args:
        values: float64, shape (layout.length,).
        layout: of the sum.
        noise: standard deviation of each entry's noise, for a contribution of length 1.
    """
    found = read_moments(values, layout, noise=noise)
    squares = np.square(found.class_sums).sum(axis=1, keepdims=True)
    # Of a row's squared length its noise makes d·σ²: what is left of it is the share to be trusted.
    trusted = np.clip(1 - layout.dimension * found.class_noise**2 / np.maximum(squares, 1e-300), 0.0, 1.0)
    return np.asarray(unit_rows(found.class_sums) * np.sqrt(trusted), np.float32)


def _target_of(features: SiteFeatures) -> Float32:
    assert features.target is not None, "settings that use a target name one, which is read at joining"
    return features.target


def normalising(target: Float32) -> Float32:
    """The public images that normalise, of (m, d) a target's: at most ``NORMALISING``, evenly spaced, the same for
    all."""
    if len(target) <= NORMALISING:
        return target
    return target[np.linspace(0, len(target) - 1, NORMALISING).astype(np.int64)]


def _frequencies(settings: RunSettings, task: HeadTask, features: SiteFeatures) -> Vector:
    """The same at every site: from the target's own spread, and a seed of the federation's name."""
    from fedsecure.learning.alignment import frequencies_of

    seed = int.from_bytes(hashlib.sha256(b"fedsecure/alignment/v1\0" + settings.name.encode()).digest()[:8], "big")
    return frequencies_of(task, _target_of(features), count=FREQUENCIES, seed=seed)


METHOD = Facmic(name="facmic", version="2", kind="facmic")
