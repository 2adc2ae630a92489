"""The run's account of itself: every attempt with its outcome, the state after every sum, the summary at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsecure.aggregator.schedule import Progress
from fedsecure.aggregator.store import RunStore
from fedsecure.config import RunSettings
from fedsecure.errors import RunError
from fedsecure.secagg.server import SecAggResult

log = logging.getLogger("fedsecure.aggregator")


@dataclass(slots=True)
class Account:
    """Keeps the attempts of one run, on disk and for the summary."""

    settings: RunSettings
    run: bytes
    store: RunStore
    attempts: list[dict[str, Any]] = field(default_factory=list)

    def attempt(
        self,
        *,
        round: int,
        attempt: int,
        stage: str,
        cohort: tuple[str, ...],
        ctx: bytes,
        seconds: float,
        suspects: Mapping[str, Any] | None = None,
        **outcome: Any,
    ) -> None:
        """Record an attempt that is over: ``survivors``, or ``aborted`` and ``code``.

        ``suspects`` stand in the round log only: who may have lied is for the operator, and no part of the summary.
        """
        record = {
            "round": round,
            "attempt": attempt,
            "stage": stage,
            "method": "evaluate" if stage != "training" else self.settings.method.name,
            "cohort": list(cohort),
            "context": ctx.hex(),
            "seconds": seconds,
            **outcome,
        }
        self.attempts.append(record)
        self.store.attempt({**record, **(suspects or {})})

    def save(self, round: int, progress: Progress) -> None:
        """The state after a sum.

        Raises:
            RunError: FS-1717 the sum ruins the model: the run ends here, instead of at every site.
        """
        state = progress.state
        broken = [name for name, value in state.tensors.items() if not np.isfinite(value).all()]
        if broken:
            raise RunError(
                "FS-1717",
                f"round {round} left values in {', '.join(broken)} that are not finite",
                expected="finite tensors after every step",
                cure="lower the learning rate; if it is modest, a site has sent extreme values",
            )
        facts = {**state.facts, "evaluations": progress.evaluations}
        self.store.progress(round=round, stage=progress.stage, step=state.step, tensors=state.tensors, facts=facts)

    def summary(self, progress: Progress) -> dict[str, Any]:
        """What the run did, for its sites and its operator."""
        evaluations: Mapping[str, Mapping[str, Any]] = progress.evaluations
        return {
            "run": self.run.hex(),
            "federation": self.settings.name,
            "method": self.settings.method.name,
            "rounds": progress.state.step,
            "attempts": self.attempts,
            "evaluations": {stage: dict(facts) for stage, facts in evaluations.items()},
        }


def suspects(result: SecAggResult) -> dict[str, Any]:
    """Who may have lied about a share in a round that gave its sum all the same, for the operator; mostly nobody."""
    found: dict[str, Any] = {}
    if result.bad_shares:
        found["bad_shares"] = [list(group) for group in result.bad_shares]
        log.warning("shares that do not fit; of each group one at least has lied: %s", found["bad_shares"])
    if result.unopened:
        found["unopened"] = {site: list(senders) for site, senders in result.unopened.items()}
        log.warning("shares that did not open, site and senders: %s", found["unopened"])
    return found


__all__ = ["Account", "suspects"]
