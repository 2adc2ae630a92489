"""Accuracy as a release: per class, how many evaluation units an adapter gets right, and how many there are.

One unit moves the 2K counts by at most √2 in L2 norm. Sites without an evaluation set, training sites among them,
answer zeros. Sets declared public are counted exactly; a site that holds a private set adds the whole noise itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedsecure.config import RunSettings
from fedsecure.learning.evaluation import COUNT_SENSITIVITY, accuracy, balanced_accuracy, counts
from fedsecure.learning.targets import check_apart
from fedsecure.messages import Aggregate, Answer, Event, Segment, SiteState
from fedsecure.methods.base import Ask, Cohort, Release, ServerState, Tensor
from fedsecure.methods.registry import load_training_method
from fedsecure.privacy.grid import distributed_segment, exact_segment
from fedsecure.privacy.plan import evaluation_noise_multiplier

# A patient's hits are fractions of at most 256 images; 2^-12 of a hit is far below one.
COUNT_GRID = 2.0**-12


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Counts hits of the method named in the run's settings."""

    name: str = "evaluate"
    version: str = "1"

    # --- the aggregator's half --------------------------------------------------------------------------------------

    def start(self, settings: RunSettings, cohort: Cohort) -> ServerState:
        return ServerState()

    def ask(self, settings: RunSettings, cohort: Cohort, state: ServerState) -> Ask | None:
        segment, events = self._segment(settings, cohort)
        return Ask(self.name, self.version, state.tensors, (segment,), events, trainers_only=False)

    def absorb(self, settings: RunSettings, cohort: Cohort, state: ServerState, aggregate: Aggregate) -> ServerState:
        segment, _ = self._segment(settings, cohort)
        hits, totals = np.split(aggregate.values["counts"], 2)
        # A class whose count is within two standard deviations of the noise says nothing about its recall.
        floor = max(1.0, 2 * segment.noise_std * segment.grid)
        overall, balanced = accuracy(hits, totals), balanced_accuracy(hits, totals, floor=floor)
        return ServerState(
            facts={
                "hits": hits.tolist(),
                "totals": totals.tolist(),
                "accuracy": None if math.isnan(overall) else overall,
                "balanced_accuracy": None if math.isnan(balanced) else balanced,
            }
        )

    def _segment(self, settings: RunSettings, cohort: Cohort) -> tuple[Segment, tuple[Event, ...]]:
        length = 2 * len(settings.classes)
        events = count_events(settings)
        if not events:
            return exact_segment("counts", length, grid=COUNT_GRID, sites=cohort.sites), ()
        noise = events[0].noise_multiplier
        # honest=1: whoever holds a private set adds the whole noise, since other sites hold none of its units.
        segment = distributed_segment(
            "counts",
            length,
            clip_norm=COUNT_SENSITIVITY,
            noise_multiplier=noise,
            honest=1,
            sites=cohort.sites,
            units=max(entry.evaluation_units for entry in settings.sites.values()),
        )
        return segment, events

    # --- a site's half ----------------------------------------------------------------------------------------------

    def answer(self, inputs: Mapping[str, Tensor], state: SiteState, release: Release) -> tuple[Answer, SiteState]:
        settings = release.settings
        classes = len(settings.classes)
        units = release.units("evaluation")
        if units is None:
            return Answer(values={"counts": np.zeros(2 * classes)}, units={"counts": 0}), state
        if release.features.target is not None and not settings.method.alignment.transductive:
            check_apart(release.features.target, units)
        trained = load_training_method(settings.method.name)
        task = trained.task(settings, release.features)
        hits, totals = counts(task, inputs, units, device=release.device)
        return Answer(values={"counts": np.concatenate([hits, totals])}, units={"counts": len(units)}), state


def count_events(settings: RunSettings) -> tuple[Event, ...]:
    """What one evaluation of a private set costs; nothing where all sets are public."""
    if not any(s.evaluation_units > 0 and not s.evaluation_public for s in settings.sites.values()):
        return ()
    noise = evaluation_noise_multiplier(
        settings.evaluation.target_epsilon,
        settings.privacy.delta,
        releases=len(settings.evaluation.when) + settings.privacy.spare_attempts,
    )
    return (Event("evaluation", "evaluation counts", noise, noise),)


METHOD = Evaluation()
