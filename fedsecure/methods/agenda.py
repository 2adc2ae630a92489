"""What a run asks, in order: evaluation before, the method's training rounds, evaluation after (architecture.md §1).

A pure function of the public settings, so that a site does not believe a question: it works out for itself what the
settings call for at this point, and compares.
"""

from __future__ import annotations

from dataclasses import replace

from fedsecure.config import RunSettings
from fedsecure.errors import ProtocolError
from fedsecure.methods.base import Ask, ServerState
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.registry import load_method, load_training_method
from fedsecure.secagg.draw import Draw


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
    step = training_step(settings, round)
    if step is not None:
        _, cohort = cohort_of(settings, trainers_only=True)
        return load_training_method(settings.method.name).ask(settings, cohort, replace(start, step=step))
    before, after = evaluates(settings, "before"), evaluates(settings, "after")
    if (before and round == 0) or (after and round == settings.method.rounds + before):
        return _evaluation(settings, start)
    return None


def training_step(settings: RunSettings, round: int) -> int | None:
    """Which training round question number ``round`` is, counted from 0; ``None`` where it is none."""
    step = round - evaluates(settings, "before")
    return step if 0 <= step < settings.method.rounds else None


def asked_at(settings: RunSettings, round: int, *, draw: Draw | None) -> tuple[str, ...]:
    """Who question number ``round`` is asked, in protocol order.

    Raises:
        ProtocolError: FS-1397 the run draws its cohorts, and there is no draw yet.
    """
    step = training_step(settings, round)
    sites, _ = cohort_of(settings, trainers_only=step is not None)
    if step is None or not settings.draws:
        return sites
    if draw is None:
        raise ProtocolError(
            "FS-1397",
            f"training round {step} of a run that draws its cohorts, before the draw",
            expected="the draw before the first question",
            cure="do not go on with this aggregator; report it",
        )
    return draw.cohort(step)


def _evaluation(settings: RunSettings, start: ServerState) -> Ask | None:
    _, cohort = cohort_of(settings, trainers_only=False)
    return load_method("evaluate").ask(settings, cohort, start)
