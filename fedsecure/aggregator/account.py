"""The run's account of itself: a change is on the disk first, then told to whoever listens, and only then acted on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsecure.aggregator.happenings import Happening, Kind, Listener
from fedsecure.aggregator.schedule import Progress
from fedsecure.aggregator.states import FOLLOWING, RunState
from fedsecure.aggregator.store import RunStore, Standing
from fedsecure.config import RunSettings
from fedsecure.errors import FedsecureError, RunError
from fedsecure.secagg.server import SecAggResult

log = logging.getLogger("fedsecure.aggregator")


@dataclass(slots=True)
class Account:
    """Keeps one run's state and its attempts, on disk and for the summary.

    Attributes:
        state: what the run is doing; :meth:`move` and the others change it by the rules of
            :mod:`fedsecure.aggregator.states`.
        round, attempt: the question in progress, or the next one.
        attempts: all that are over, as the summary has them.
        alarms: ``round``, ``code`` and ``reason`` of those raised in this process.
    """

    settings: RunSettings
    store: RunStore
    listener: Listener
    state: RunState = RunState.WAITING
    round: int = 0
    attempt: int = 0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    _open: dict[str, Any] | None = None
    _bytes_up: int = 0
    _bytes_down: int = 0

    @staticmethod
    def take_up(settings: RunSettings, store: RunStore, listener: Listener, standing: Standing) -> Account:
        """The account of a run as a process before this one left it."""
        state = RunState.WAITING if standing.outcome is None else RunState.OVER
        account = Account(settings, store, listener, state, standing.round, standing.attempt, standing.attempts)
        if standing.fresh:
            account.tell(
                "run-started", sites=list(settings.sites), method=settings.method.name, rounds=settings.method.rounds
            )
            return account
        # A process killed between a commit and its telling has told nobody: the next one says what stands last.
        last = standing.attempts[-1] if standing.attempts else {}
        last = {name: value for name, value in last.items() if name not in ("cohort", "method")}
        account.tell("run-resumed", round=standing.round, attempt=standing.attempt, last=last)
        return account

    def tell(self, kind: Kind, **facts: Any) -> None:
        """Tell whoever listens."""
        self.listener(Happening(kind, self.store.run.hex(), self.store.clock(), facts))

    def alarm(self, error: FedsecureError) -> None:
        """Something is odd, and the run goes on, or its settings have it stop."""
        reason = f"{error.found}; expected {error.expected}"
        log.warning("alarm in round %d: %s: %s", self.round, error.code, reason)
        self.alarms.append({"round": self.round, "code": error.code, "reason": reason})
        self.tell("alarm", code=error.code, reason=reason)

    def carried(self, *, up: int = 0, down: int = 0) -> None:
        """So many bytes came from sites, and went to them; told with the attempt that they were for."""
        self._bytes_up, self._bytes_down = self._bytes_up + up, self._bytes_down + down

    def _carried(self) -> dict[str, int]:
        told = {"bytes_up": self._bytes_up, "bytes_down": self._bytes_down}
        self._bytes_up = self._bytes_down = 0
        return told

    def move(self, state: RunState) -> None:
        """The run is in ``state`` from here on."""
        self._check(state)
        self.store.move(state, round=self.round, attempt=self.attempt)
        self.state = state
        if state in (RunState.SHARES, RunState.MASKED, RunState.SURVIVORS, RunState.UNMASK):
            self.tell("phase-closed", round=self.round, attempt=self.attempt, phase=state.value)

    def begin_keys(self, epochs: int) -> None:
        """The ``epochs``-th set-up of keys begins."""
        self._check(RunState.KEYS)
        self.store.begin_keys(round=self.round, attempt=self.attempt, epochs=epochs)
        self.state = RunState.KEYS

    def open(self, state: RunState, *, stage: str, cohort: tuple[str, ...], ctx: bytes) -> None:
        """An attempt begins in ``state``; from here on its number is used up."""
        self._check(state)
        self._open = self._record(stage, cohort, ctx)
        self.store.open_attempt(state, self._open)
        self.state = state
        self.tell("attempt-opened", **self._open)

    def summed(
        self,
        survivors: tuple[str, ...],
        progress: Progress,
        *,
        seconds: float,
        suspects: Mapping[str, Any],
        epsilon: float | None,
    ) -> None:
        """The attempt in progress gave its sum, and ``progress`` is the state after it.

        ``suspects`` stand in the database only: who may have lied is for the operator, and no part of the summary.
        ``epsilon``, planned so far, is told only.

        Raises:
            RunError: FS-1717 the sum ruins the model: the run ends here, instead of at every site.
        """
        self._check(RunState.WAITING)
        self._check_finite(progress)
        record, outcome = self._opened(), {"survivors": list(survivors)}
        self.store.sum_attempt(record, outcome, progress, seconds=seconds, suspects=suspects)
        self.attempts.append({**record, "seconds": seconds, **outcome})
        self._open, self.state = None, RunState.WAITING
        where = {"round": self.round, "attempt": self.attempt, "stage": record["stage"]}
        told = {**where, **outcome, "seconds": seconds, "suspects": dict(suspects), **self._carried()}
        self.tell("attempt-summed", **told)
        self._tell_saved(self.round, progress, epsilon)
        if record["stage"] != "training":
            self.tell("evaluated", stage=record["stage"], **progress.evaluations[record["stage"]])
        self.round, self.attempt = self.round + 1, 0

    def aborted(
        self, reason: str, code: str, *, stage: str, cohort: tuple[str, ...], ctx: bytes, seconds: float
    ) -> None:
        """An attempt, or a set-up of keys in its place, ended without a sum; the next attempt has the next number."""
        self._check(RunState.WAITING)
        record = self._open or self._record(stage, cohort, ctx)
        self.store.abort_attempt(record, {"aborted": reason, "code": code}, seconds=seconds)
        self.attempts.append({**record, "seconds": seconds, "aborted": reason, "code": code})
        self._open, self.state = None, RunState.WAITING
        where = {"round": self.round, "attempt": self.attempt, "stage": stage}
        self.tell("attempt-aborted", **where, code=code, reason=reason, seconds=seconds, **self._carried())
        self.attempt += 1

    def computed(self, progress: Progress, *, epsilon: float | None) -> None:
        """The method's own work is done; raises as :meth:`summed`."""
        self._check(RunState.WAITING)
        self._check_finite(progress)
        self.store.computed(progress, round=self.round)
        self.state = RunState.WAITING
        self._tell_saved(self.round - 1, progress, epsilon)

    def end(self, outcome: Mapping[str, Any]) -> None:
        """The run is over for good."""
        self._check(RunState.OVER)
        self.store.end(outcome, round=self.round, attempt=self.attempt)
        self.state = RunState.OVER

    def summary(self, progress: Progress) -> dict[str, Any]:
        """What the run did, for its sites and its operator."""
        return {
            "run": self.store.run.hex(),
            "federation": self.settings.name,
            "method": self.settings.method.name,
            "rounds": progress.state.step,
            "attempts": self.attempts,
            "evaluations": {stage: dict(facts) for stage, facts in progress.evaluations.items()},
        }

    def _tell_saved(self, round: int, progress: Progress, epsilon: float | None) -> None:
        planned = {} if epsilon is None else {"epsilon": epsilon}
        self.tell("round-saved", round=round, stage=progress.stage, step=progress.state.step, **planned)

    def _check(self, state: RunState) -> None:
        assert state in FOLLOWING[self.state], f"{state} cannot follow {self.state}"

    def _record(self, stage: str, cohort: tuple[str, ...], ctx: bytes) -> dict[str, Any]:
        return {
            "round": self.round,
            "attempt": self.attempt,
            "stage": stage,
            "method": "evaluate" if stage != "training" else self.settings.method.name,
            "cohort": list(cohort),
            "context": ctx.hex(),
        }

    def _opened(self) -> dict[str, Any]:
        assert self._open is not None
        return self._open

    def _check_finite(self, progress: Progress) -> None:
        broken = [name for name, value in progress.state.tensors.items() if not np.isfinite(value).all()]
        if broken:
            raise RunError(
                "FS-1717",
                f"round {self.round} left values in {', '.join(broken)} that are not finite",
                expected="finite tensors after every step",
                cure="lower the learning rate; if it is modest, a site has sent extreme values",
            )


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
