"""The round engine: what a run does next, from waiting for its sites to its end (:mod:`fedsecure.aggregator.states`).

No sockets, threads or clock. What it does is on the disk before anybody is told (:mod:`fedsecure.aggregator.account`),
so that a process killed anywhere leaves a run that the next one takes up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from hmac import compare_digest
from typing import Any

from fedsecure.aggregator.account import Account, suspects
from fedsecure.aggregator.alarm import check_sum
from fedsecure.aggregator.drawing import Drawing
from fedsecure.aggregator.happenings import Listener
from fedsecure.aggregator.openings import Broadcast, Openings
from fedsecure.aggregator.rounds import Attempt, SetUp, decode
from fedsecure.aggregator.schedule import Schedule
from fedsecure.aggregator.sessions import Sessions
from fedsecure.aggregator.states import RunState
from fedsecure.aggregator.step_worker import StepWorker
from fedsecure.aggregator.store import RunStore, Wanted, stopped
from fedsecure.config import FederationConfig
from fedsecure.errors import EnvironmentProblem, FedsecureError, ProtocolError, RunError
from fedsecure.identity.provision import Identity
from fedsecure.methods.agenda import asked_at
from fedsecure.methods.base import Cohort
from fedsecure.methods.cohorts import check_roles, cohort_of
from fedsecure.methods.registry import load_method, load_training_method
from fedsecure.secagg.draw import Draw
from fedsecure.secagg.phases import Phase
from fedsecure.wire import federation_pb2 as pb

# Sites named in a reason: every site that waits is told it.
_NAMED = 20
# Ends that a new process does not take for the run's: sites may come, a machine may have time.
_NOT_FINAL = ("FS-1701", "FS-1722")
log = logging.getLogger("fedsecure.aggregator")


class Engine:
    """One run's state machine, from the beginning or from where a process before this one left it.

    Args and raises: as :class:`~fedsecure.aggregator.coordinator.Coordinator`.

    Attributes:
        sessions: who is there.
        account: where the run stands, and what it has done.
        progress: the method's state after the last sum.
        attempt, set_up, drawing, worker: what is going on, if anything of the kind is.
        broadcast: the tensors that may be fetched now.
        outcome: how the run ended, or None; ``failure`` is why, where it did not complete.
        ended: what its sites are told then.
    """

    def __init__(
        self,
        config: FederationConfig,
        identity: Identity,
        *,
        store: RunStore,
        now: float,
        listener: Listener = lambda happening: None,
        gone: Collection[str] = (),
    ) -> None:
        self.config = config
        self._gone = frozenset(gone)
        self.run = store.run
        self.settings = config.settings()
        check_roles(self.settings, identity.roster)
        self.outcome: dict[str, Any] | None = None
        self.failure: RunError | None = None
        self.sessions = Sessions(silence_seconds=config.rounds.silence_seconds)
        self.openings = Openings(self.settings, identity, self.run, store)
        self.schedule = Schedule(self.settings, load_training_method(config.method.name), load_method("evaluate"))
        standing = store.take_up()
        self.account = Account.take_up(self.settings, store, listener, standing)
        self.progress = standing.progress or self.schedule.start()
        self.broadcast = Broadcast.of({})
        self.attempt: Attempt | None = None
        self.worker: StepWorker | None = None
        self.set_up: SetUp | None = None
        self.epochs = standing.epochs
        self.drawing = (
            Drawing(
                self.settings,
                run=self.run,
                roster=identity.roster,
                folder=store.folder,
                sessions=self.sessions,
                alarm=self.account.alarm,
            )
            if self.settings.draws
            else None
        )
        self._wanted: Wanted = "run"
        self.waiting_since = now
        self.first_round = True
        self.ended: pb.Finished | None = None
        self.ended_at = now
        if standing.outcome is not None:
            # The process that ended the run may have been killed before it said so; twice is better than never.
            self.failure = _failure_of(standing.outcome)
            self._tell_the_end(standing.outcome, reason=self.failure.found if self.failure else "")
            self._say_the_end(standing.outcome, now)

    def tick(self, now: float) -> None:
        """Do whatever is due: end phases, start attempts, give up."""
        while self.outcome is None and self._step(now):
            pass

    def obey(self, wanted: Wanted, now: float) -> None:
        """Pause after the attempt in progress, go on, or stop at once: every site is told why."""
        if self.outcome is not None or wanted == self._wanted:
            return
        self._wanted = wanted
        if wanted == "stop":
            self._give_up(stopped(), now)
        self.tick(now)

    def reason(self, now: float) -> str:
        """What is being waited for, in words."""
        if self.outcome is not None and self.ended is None:
            return f"this aggregator cannot go on, another process can: {self.failure}"
        if self.outcome is not None:
            return "the run is over"
        if self.worker is not None:
            return f"the aggregator computes after round {self.account.round - 1}"
        if self.account.state is RunState.PAUSED:
            return "the operator has paused the run"
        if self.tossing is not None:
            return self.tossing.reason(now)
        cohort, _ = self.cohort()
        running = self.set_up if self.preparing else self.attempt
        missing = list(running.waiting_for() if running else (s for s in cohort if not self.sessions.ready(s, now)))
        seen = [self.sessions.last_seen(site, now) for site in missing[:_NAMED]]
        seen += [f"and {len(missing) - _NAMED} more"] if len(missing) > _NAMED else []
        what = f"{running.phase.name.lower()} of round {self.account.round}" if running else "joining"
        return f"{what}: waiting for {len(missing)} of {len(cohort)} sites" + (": " + ", ".join(seen) if seen else "")

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def preparing(self) -> bool:
        """Keys for later rounds are being set up."""
        return self.set_up is not None and self.set_up.phase in (Phase.ADVERTISE, Phase.SHARES)

    @property
    def tossing(self) -> Drawing | None:
        """The draw, while a toss for it goes on."""
        return self.drawing if self.drawing is not None and self.drawing.stage else None

    @property
    def draw(self) -> Draw | None:
        return self.drawing.draw if self.drawing is not None else None

    def receive(self, site: str, message: pb.PhaseMessage) -> None:
        """A small message of what goes on: the toss, a set-up of keys, or the attempt; RunError FS-1706 of none."""
        if self.tossing is not None and compare_digest(self.tossing.ctx, message.ctx):
            self.tossing.receive(site, message.payload)
        elif self.preparing and self.set_up is not None and compare_digest(self.set_up.ctx, message.ctx):
            self.set_up.receive(site, message.payload)
        else:
            self.current(message.ctx).receive(site, message.payload)

    def current(self, ctx: bytes) -> Attempt:
        """The attempt in progress, if that is the one; RunError FS-1706 otherwise."""
        if self.attempt is None or not compare_digest(self.attempt.ctx, ctx):
            raise RunError(
                "FS-1706",
                "a message for an attempt that is over",
                expected="the context of the attempt in progress",
                cure="none needed; the next attempt brings new keys",
            )
        return self.attempt

    def cohort(self) -> tuple[tuple[str, ...], Cohort]:
        """Who the next question asks, once the run's draw is there; before, whom it may ask."""
        pool, numbers = cohort_of(self.settings, trainers_only=self.progress.stage == "training")
        drawn = self.drawing is None or self.draw is not None
        return asked_at(self.settings, self.account.round, draw=self.draw) if drawn else pool, numbers

    def _step(self, now: float) -> bool:
        try:
            if self.worker is not None:
                return self._compute(self.worker, now)
            if self.tossing is not None:
                return self.tossing.advance(now)
            if self.preparing and self.set_up is not None:
                return self._prepare(self.set_up, now)
            if self.attempt is not None:
                return self._advance(self.attempt, now)
            if self.schedule.due(self.progress):
                self._begin_computing(now)
                return True
            return not self._hold(now) and self._open(now)
        except FedsecureError as error:
            failure = error if isinstance(error, RunError) else _run_failure(error.code, error.found, error)
        except Exception as error:
            log.exception("the run fails")
            failure = _run_failure("", type(error).__name__, error)
        self._give_up(failure, now)
        return False

    def _hold(self, now: float) -> bool:
        """Whether the operator wants the run to be paused; no wait for sites runs out meanwhile."""
        account = self.account
        if self._wanted == "pause":
            if account.state is not RunState.PAUSED:
                account.move(RunState.PAUSED)
                account.tell("run-paused")
            self.waiting_since = now
            return True
        if account.state is RunState.PAUSED:
            account.move(RunState.WAITING)
            account.tell("run-continued")
        return False

    def _advance(self, attempt: Attempt, now: float) -> bool:
        ctx, cohort = attempt.ctx, attempt.query.cohort
        try:
            step = attempt.advance(now, lambda site: self.sessions.takes_part(site, ctx, now))
        except ProtocolError as error:
            attempt.abort()
            self.attempt = None
            self._failed(error, now, cohort=cohort, ctx=ctx, started=attempt.started)
            return True
        if step is None:
            return False
        if step.result is None:
            self.account.move(RunState(step.phase))
            self.sessions.relay(ctx, step.phase, step.relays)
            return True
        survivors, seconds = step.result.survivors, round(now - attempt.started, 3)
        odd, alarm = suspects(step.result), check_sum(attempt.query, step.result, settings=self.settings)
        if alarm is not None:
            self.account.alarm(alarm.error())
            if self.settings.rounds.on_alarm == "stop":
                raise alarm.error()
            odd["alarm"] = alarm.error().found
        progress = self.schedule.absorb(self.progress, decode(attempt.query, step.result))
        epsilon = self.schedule.planned_epsilon(progress)
        self.account.summed(survivors, progress, seconds=seconds, suspects=odd, epsilon=epsilon)
        self.attempt, self.progress, self.waiting_since = None, progress, now
        self.sessions.relay(ctx, step.phase, step.relays)
        self._left_out(cohort, survivors, ctx, reason="the round ended without this site")
        return True

    def _begin_computing(self, now: float) -> None:
        """The method's computation, in a process of its own; the sum it starts from is on disk already."""
        config = self.config
        self.account.move(RunState.COMPUTING)
        self.worker = StepWorker(
            self.settings,
            self.progress.state,
            encoder_file=config.encoder_file,
            target_file=config.target_file,
            deadline=now + config.rounds.training_seconds,
        )

    def _compute(self, worker: StepWorker, now: float) -> bool:
        """Whether the method's computation is done."""
        state = worker.poll(now)
        if state is None:
            return False
        self.worker = None
        progress = replace(self.progress, state=state)
        self.account.computed(progress, epsilon=self.schedule.planned_epsilon(progress))
        self.progress, self.waiting_since = progress, now
        return True

    def _open(self, now: float) -> bool:
        ask = self.schedule.ask(self.progress)
        if ask is None:
            self._finish(now)
            return False
        self._require_attempts_left()
        if self.drawing is not None and self.draw is None:
            live = self._gathered(self.drawing.candidates(), self.drawing.required, now)
            if live is not None:
                self.drawing.begin(live, now)
            return False
        sites, cohort = self.cohort()
        live = self._gathered(sites, cohort.min_survivors, now)
        if live is None:
            return False
        self.first_round = False
        present = self.sessions.tokens(live)
        prepared = ask.trainers_only and self.settings.rounds.prepared_rounds > 0
        if prepared and (self.set_up is None or not self.set_up.serves(sites, present)):
            self._begin_set_up(present, now)
            return False
        keys = self.set_up if prepared else None
        self.broadcast = Broadcast.of(ask.inputs)
        account = self.account
        query = self.openings.query(
            ask, round=account.round, attempt=account.attempt, inputs=self.broadcast.hashes, draw=self.draw
        )
        attempt, descriptor = self.openings.attempt(
            query, trainers_only=ask.trainers_only, keys=keys, now=now, draw=self.draw
        )
        account.open(
            RunState(attempt.phase.name.lower()),
            stage=self.progress.stage,
            cohort=query.cohort,
            ctx=descriptor.ctx,
        )
        self.attempt = attempt
        asked = live if keys is None else [site for site in live if site in keys.holders]
        directive = pb.Ask(query_json=query.to_json(), descriptor=descriptor.canonical())
        self.sessions.ask(asked, descriptor.ctx, ask=directive)
        return False

    def _gathered(self, sites: tuple[str, ...], least: int, now: float) -> list[str] | None:
        """Which of these sites are there, once they are enough; RunError FS-1701 where that takes too long."""
        live = [site for site in sites if self.sessions.ready(site, now)]
        patient = now - self.waiting_since < self.config.rounds.start_seconds
        # The first question of a process waits for everybody who may come; later ones for those it cannot do without.
        expected = max(least, len(set(sites) - self._gone))
        if len(live) >= (expected if self.first_round and patient else least):
            return live
        if not patient:
            raise RunError(
                "FS-1701",
                self.reason(now),
                expected=f"at least {least} of {len(sites)} sites",
                cure="bring the missing sites back and start `fedsecure serve` again: the run goes on",
            )
        return None

    def _begin_set_up(self, present: Mapping[str, bytes], now: float) -> None:
        if self.set_up is not None:
            self.set_up.abort()
        self.account.begin_keys(self.epochs + 1)
        self.set_up, descriptor = self.openings.set_up(self.epochs, tokens=present, now=now)
        self.epochs += 1
        self.sessions.ask(present, self.set_up.ctx, prepare=pb.Prepare(descriptor=descriptor))

    def _prepare(self, keys: SetUp, now: float) -> bool:
        """Advance the set-up of keys; one that fails counts as a failed attempt of the round it was for."""
        try:
            step = keys.advance(now, lambda site: self.sessions.takes_part(site, keys.ctx, now))
        except ProtocolError as error:
            keys.abort()
            self.set_up = None
            self._failed(error, now, cohort=keys.cohort, ctx=keys.ctx, started=keys.started)
            return True
        if step is None:
            return False
        self.account.move(RunState.KEYS if self.preparing else RunState.WAITING)
        self.sessions.relay(keys.ctx, step.phase, step.relays)
        if not self.preparing:
            self.account.tell("keys-prepared", epoch=self.epochs - 1, holders=list(keys.holders))
            self._left_out(keys.cohort, keys.holders, keys.ctx, reason="the keys were set up without this site")
        return True

    # --- endings ----------------------------------------------------------------------------------------------------

    def _left_out(self, cohort: tuple[str, ...], others: tuple[str, ...], ctx: bytes, *, reason: str) -> None:
        self.sessions.tell_asked(set(cohort) - set(others), ctx, code="FS-1707", reason=reason)

    def _failed(self, error: ProtocolError, now: float, *, cohort: tuple[str, ...], ctx: bytes, started: float) -> None:
        """Record an attempt, or a set-up, that ended without a sum; the next one follows or the run ends."""
        reason = "; ".join([f"{error.code}: {error.found}", *self.sessions.departures()])
        log.warning("attempt aborted: %s", reason)
        seconds, stage = round(now - started, 3), self.progress.stage
        self.account.aborted(reason, error.code, stage=stage, cohort=cohort, ctx=ctx, seconds=seconds)
        self.sessions.tell_asked(cohort, ctx, code=error.code, reason=reason)
        self.waiting_since = now

    def _require_attempts_left(self) -> None:
        account = self.account
        if account.attempt < self.config.rounds.max_attempts:
            return
        last = str(account.attempts[-1]["aborted"])
        raise RunError(
            "FS-1702",
            f"round {account.round} failed {account.attempt} times, last: {last}",
            expected="a round that ends within its attempts",
            cure="see the reasons: fedsecure runs show",
        )

    def _finish(self, now: float) -> None:
        outcome = {"complete": True, **self.account.summary(self.progress)}
        self.account.end(outcome)
        self._tell_the_end(outcome)
        self._say_the_end(outcome, now)

    def _give_up(self, error: RunError, now: float) -> None:
        self.failure = error
        if self.worker is not None:
            self.worker.stop()
            self.worker = None
        attempt, self.attempt = self.attempt, None
        try:
            if attempt is not None:
                attempt.abort()
        except FedsecureError as worse:
            log.warning("the attempt's transcript is not sealed: %s", worse)
        # What this process cannot do, on this disk or without those sites, the next one may.
        error.final = final = error.code not in _NOT_FINAL and not _of_this_machine(error.__cause__)
        summary = self.account.summary(self.progress)
        outcome = {"complete": False, "code": error.code, "error": str(error), **summary}
        if attempt is not None and not final:
            reason = f"{error.code}: {error.found}"
            self.sessions.tell_asked(attempt.query.cohort, attempt.ctx, code=error.code, reason=reason)
        if final:
            try:
                if attempt is not None:
                    cohort, ctx = attempt.query.cohort, attempt.ctx
                    self.account.aborted(
                        str(error),
                        error.code,
                        stage=self.progress.stage,
                        cohort=cohort,
                        ctx=ctx,
                        seconds=round(now - attempt.started, 3),
                    )
                self.account.end(outcome)
            except FedsecureError as worse:
                log.warning("the end of the run is not in the database: %s", worse)
        try:
            self._tell_the_end(outcome, reason=error.found, final=final)
        except FedsecureError as worse:
            log.warning("the end of the run is not in the audit log: %s", worse)
        if final:
            self._say_the_end(outcome, now)
        else:
            # To the sites it is a line that breaks: they join the next process of this run again.
            self.outcome, self.ended_at = outcome, now

    def _tell_the_end(self, outcome: Mapping[str, Any], *, reason: str = "", final: bool = True) -> None:
        if outcome["complete"]:
            self.account.tell("run-ended", complete=True)
        else:
            self.account.tell("run-ended", complete=False, code=outcome["code"], reason=reason, final=final)

    def _say_the_end(self, outcome: dict[str, Any], now: float) -> None:
        if outcome["complete"]:
            self.broadcast = Broadcast.of(self.progress.state.tensors)
        outputs = self.broadcast.hashes if outcome["complete"] else {}
        self.outcome, self.ended_at = outcome, now
        text = json.dumps(outcome, sort_keys=True)
        self.ended = pb.Finished(complete=outcome["complete"], summary_json=text, outputs=outputs)
        self.sessions.tell_all(finished=self.ended)


def _of_this_machine(cause: BaseException | None) -> bool:
    """Whether a failure is one of memory, disk, database or permissions (FS-1349: the spool)."""
    spool = isinstance(cause, FedsecureError) and cause.code == "FS-1349"
    return spool or isinstance(cause, EnvironmentProblem | OSError)


def _failure_of(outcome: Mapping[str, Any]) -> RunError | None:
    """Why a run did not complete that a process before this one ended; None where it did."""
    if outcome["complete"]:
        return None
    code = str(outcome["code"])
    failure = RunError(
        code,
        str(outcome["error"]).removeprefix(f"{code}: ").partition(". Expected ")[0],
        expected="a run that completes",
        cure="see the run's audit log; what was charged stays charged",
    )
    failure.final = True
    return failure


def _run_failure(code: str, found: str, error: Exception) -> RunError:
    """What ends the run where nothing else could: the aggregator's own disk, or a method that fails."""
    failure = RunError(
        "FS-1716",
        f"the aggregator cannot go on ({code + ': ' if code else ''}{found})",
        expected="a step without errors",
        cure="see the aggregator's log; the sites' charges stand",
    )
    failure.__cause__ = error
    return failure


__all__ = ["Engine"]
