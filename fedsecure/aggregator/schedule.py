"""What is asked in a run, in order: evaluation before, the method's training rounds, evaluation after.

A pure step function over a state that can be saved: the coordinator saves it after every sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from fedsecure.config import RunSettings
from fedsecure.messages import Aggregate
from fedsecure.methods.agenda import evaluates
from fedsecure.methods.base import Ask, ComputingMethod, Method, ServerState, TrainingMethod
from fedsecure.methods.cohorts import cohort_of

STAGES = ("before", "training", "after", "done")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: the stage, the method's own state, and the evaluation sums so far."""

    stage: str
    state: ServerState
    evaluations: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The questions of one run."""

    settings: RunSettings
    method: TrainingMethod
    evaluate: Method
    _asked: list[tuple[Progress, Ask | None]] = field(default_factory=list, compare=False, repr=False)

    def start(self) -> Progress:
        _, cohort = cohort_of(self.settings, trainers_only=True)
        state = self.method.start(self.settings, cohort)
        return self._skip(Progress("before", state, {}))

    def ask(self, progress: Progress) -> Ask | None:
        """The next question, or None when the run is over."""
        # Wanted at every call of every site while a round waits for enough of them; a plan takes milliseconds.
        if not self._asked or self._asked[0][0] is not progress:
            self._asked[:] = [(progress, self._question(progress))]
        return self._asked[0][1]

    def _question(self, progress: Progress) -> Ask | None:
        if progress.stage == "done":
            return None
        if progress.stage == "training":
            _, cohort = cohort_of(self.settings, trainers_only=True)
            return self.method.ask(self.settings, cohort, progress.state)
        _, cohort = cohort_of(self.settings, trainers_only=False)
        return self.evaluate.ask(self.settings, cohort, progress.state)

    def absorb(self, progress: Progress, aggregate: Aggregate) -> Progress:
        """The progress after the sum of the question just asked."""
        if progress.stage == "training":
            _, cohort = cohort_of(self.settings, trainers_only=True)
            state = self.method.absorb(self.settings, cohort, progress.state, aggregate)
            return self._skip(replace(progress, state=state))
        _, cohort = cohort_of(self.settings, trainers_only=False)
        counted = self.evaluate.absorb(self.settings, cohort, progress.state, aggregate)
        evaluations = {**progress.evaluations, progress.stage: dict(counted.facts)}
        following = STAGES[STAGES.index(progress.stage) + 1]
        return self._skip(replace(progress, stage=following, evaluations=evaluations))

    def planned_epsilon(self, progress: Progress) -> float | None:
        """What the plan has a training site pay for the rounds that are done
        (:meth:`~fedsecure.privacy.plan.PrivacyPlan.epsilon_after`); None in a run without privacy."""
        if self.settings.privacy.no_privacy:
            return None
        _, cohort = cohort_of(self.settings, trainers_only=True)
        return self.method.plan(self.settings, cohort).epsilon_after(progress.state.step)

    def due(self, progress: Progress) -> bool:
        """Whether the method has something to compute before the next question, or before the end."""
        method = self.method
        return hasattr(method, "due") and cast(ComputingMethod, method).due(self.settings, progress.state)

    def _skip(self, progress: Progress) -> Progress:
        """Passes over stages that have nothing to ask."""
        if progress.stage in ("before", "after"):
            if not evaluates(self.settings, progress.stage):
                progress = replace(progress, stage=STAGES[STAGES.index(progress.stage) + 1])
                return self._skip(progress)
        elif progress.stage == "training" and self.ask(progress) is None:
            return self._skip(replace(progress, stage="after"))
        return progress
