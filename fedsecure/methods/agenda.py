"""What a run asks, in order: evaluation before, the method's training rounds, evaluation after (architecture.md §1).

A pure function of the public settings, so that a site does not believe a question: it works out for itself what the
settings call for at this point, and compares.
"""

from __future__ import annotations

from dataclasses import replace

from fedsecure.config import RunSettings
from fedsecure.methods.base import Ask, ServerState
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.registry import load_method, load_training_method


def evaluates(settings: RunSettings, stage: str) -> bool:
    """Whether the run counts hits in stage ``"before"`` or ``"after"``."""
    has_units = any(entry.evaluation_units > 0 for entry in settings.sites.values())
    return has_units and stage in settings.evaluation.when


def starting_state(settings: RunSettings) -> ServerState:
    """The method's state before the first question; its tensors have the names, types and shapes of all later ones."""
    _, cohort = cohort_of(settings, trainers_only=True)
    return load_training_method(settings.method.name).start(settings, cohort)


def question(settings: RunSettings, round: int, *, start: ServerState) -> Ask | None:
    """Question number ``round`` of a run.

    Args:
        settings: the run's public settings.
        round: counted from 0 over all stages, as in ``Query.round``.
        start: :func:`starting_state` of these settings.

    Returns:
        The question, its inputs being those of round 0: only names, types and shapes hold for later rounds. ``None``
        where the run has no such question.
    """
    if round < 0:
        return None
    step = round
    if evaluates(settings, "before"):
        if round == 0:
            return _evaluation(settings, start)
        step -= 1
    if step < settings.method.rounds:
        _, cohort = cohort_of(settings, trainers_only=True)
        return load_training_method(settings.method.name).ask(settings, cohort, replace(start, step=step))
    if step == settings.method.rounds and evaluates(settings, "after"):
        return _evaluation(settings, start)
    return None


def _evaluation(settings: RunSettings, start: ServerState) -> Ask | None:
    _, cohort = cohort_of(settings, trainers_only=False)
    return load_method("evaluate").ask(settings, cohort, start)
