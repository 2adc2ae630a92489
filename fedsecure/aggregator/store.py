"""What an aggregator keeps of its runs: rows in the database, and one folder a run for what is large or for people.

<state>/address                     host:port the service listens on
<state>/aggregator.db               runs, attempts and transitions, unless `database` names another place
<state>/runs/<run>/federation.json  the public settings of the run
<state>/runs/<run>/roster.json      the signed roster that it began with
<state>/runs/<run>/model-<n>.safetensors   the method's tensors after the last sum; n counts the sums
<state>/runs/<run>/status.json      what is going on, for people and progress bars

A file is written whole before the row that names it, so the database never names what is not there; the file it named
before goes only afterwards. Each method of :class:`RunStore` is one transaction.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedsecure.aggregator.database import AttemptRow, Database, RunRow, TransitionRow
from fedsecure.aggregator.schedule import Progress
from fedsecure.aggregator.states import RunState
from fedsecure.config import FederationConfig, RunSettings
from fedsecure.errors import RunError
from fedsecure.files import appending, make_folder, write_whole
from fedsecure.identity.keys import read
from fedsecure.methods.base import ServerState

Wanted = Literal["run", "pause", "stop"]
Clock = Callable[[], float]
RESTARTED = dict(aborted="the aggregator ended in the middle of this attempt", code="FS-1730")
_MAX_MODEL_BYTES = 1 << 32


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands.

    Attributes:
        fresh: no process has served the run before.
        round, attempt: the question that comes next; an attempt that a process ended in counts as over.
        epochs: set-ups of keys begun so far.
        progress: after the last sum; None before the first.
        outcome: how the run ended, or None.
        attempts: all that are over, as the summary has them.
    """

    fresh: bool
    round: int
    attempt: int
    epochs: int
    progress: Progress | None
    outcome: dict[str, Any] | None
    attempts: list[dict[str, Any]]


class RunStore:
    """One run's rows and files.

    Args:
        database: open.
        state: the aggregator's folder.
        run: the run's id, 16 bytes; its row is there already.
    """

    def __init__(self, database: Database, state: Path, run: bytes, *, clock: Clock = time.time) -> None:
        self.run = run
        self.folder = make_folder(state / "runs" / run.hex())
        self.clock = clock
        self._database = database
        self._id = run.hex()

    # --- what happened ----------------------------------------------------------------------------------------------

    def move(self, state: RunState, *, round: int, attempt: int) -> None:
        """The run is in ``state`` now."""
        with self._database.session() as session:
            self._move(session, state, round=round, attempt=attempt)

    def begin_keys(self, *, round: int, attempt: int, epochs: int) -> None:
        """A set-up of keys begins, the ``epochs``-th."""
        with self._database.session() as session:
            self._move(session, RunState.KEYS, round=round, attempt=attempt).epochs = epochs

    def open_attempt(self, state: RunState, record: Mapping[str, Any]) -> None:
        """An attempt begins in ``state``; its number is used up from here on."""
        with self._database.session() as session:
            self._move(session, state, round=record["round"], attempt=record["attempt"])
            session.add(AttemptRow(run=self._id, opened=self.clock(), outcome={}, suspects={}, **record))

    def abort_attempt(self, record: Mapping[str, Any], outcome: Mapping[str, Any], *, seconds: float) -> None:
        """An attempt, or a set-up of keys in its place, ended without a sum."""
        with self._database.session() as session:
            self._over(session, record, outcome, seconds=seconds, suspects={})
            self._move(session, RunState.WAITING, round=record["round"], attempt=record["attempt"] + 1)

    def sum_attempt(
        self,
        record: Mapping[str, Any],
        outcome: Mapping[str, Any],
        progress: Progress,
        *,
        seconds: float,
        suspects: Mapping[str, Any],
    ) -> None:
        """An attempt gave its sum, and this is the state after it: both, or neither."""
        name = self._write_model(progress.state)
        with self._database.session() as session:
            self._over(session, record, outcome, seconds=seconds, suspects=suspects)
            self._progress(session, progress, *name)
            self._move(session, RunState.WAITING, round=record["round"] + 1, attempt=0)
        self._forget_models(but=name[0])

    def computed(self, progress: Progress, *, round: int) -> None:
        """The state after the method's own computation."""
        name = self._write_model(progress.state)
        with self._database.session() as session:
            self._progress(session, progress, *name)
            self._move(session, RunState.WAITING, round=round, attempt=0)
        self._forget_models(but=name[0])

    def end(self, outcome: Mapping[str, Any], *, round: int, attempt: int) -> None:
        """The run is over for good."""
        with self._database.session() as session:
            self._move(session, RunState.OVER, round=round, attempt=attempt).outcome = dict(outcome)

    def close(self) -> None:
        """Its sites have heard the end, or have had the time to."""
        with self._database.session() as session:
            self._row(session).closed = True

    def status(self, status: Mapping[str, Any]) -> None:
        """A snapshot for people."""
        write_whole(self.folder / "status.json", json.dumps(status, sort_keys=True).encode())

    def transcript(self, name: str) -> Callable[[bytes | memoryview], object]:
        """Where the transcript of an attempt, or of a set-up of keys, is appended to; it and what it returns raise
        EnvironmentProblem FS-1802."""
        return appending(make_folder(self.folder / "transcripts") / name)

    # --- what is there ----------------------------------------------------------------------------------------------

    def roster(self, newest: bytes) -> bytes:
        """The signed roster that the run began with; ``newest`` from here on where it has none yet.

        Keys, contexts and signatures of a run are those of one roster: a member that was taken out since is refused at
        every call, and does not keep the others from going on.
        """
        if not self.begun:
            write_whole(self._roster, newest, mode=0o644)
        return read(self._roster)

    @property
    def begun(self) -> bool:
        """Whether a process has served the run."""
        return self._roster.exists()

    @property
    def _roster(self) -> Path:
        return self.folder / "roster.json"

    def wanted(self) -> Wanted:
        """What the operator asks for."""
        with self._database.session() as session:
            return self._row(session).wanted  # type: ignore[return-value]

    def attempts(self) -> list[dict[str, Any]]:
        """All attempts that are over, oldest first, with who may have lied in them."""
        with self._database.session() as session:
            return [{**_record(row), **row.suspects} for row in self._attempt_rows(session) if row.outcome]

    def take_up(self) -> Standing:
        """Where the run stands, for a new process: an attempt left open is recorded as aborted (FS-1730).

        Raises:
            RunError: FS-1731 the model's file is missing, or not the one that was written.
        """
        with self._database.session() as session:
            row = self._row(session)
            moves = select(func.count()).select_from(TransitionRow).where(TransitionRow.run == self._id)
            fresh = session.scalar(moves) == 1
            for left in self._attempt_rows(session):
                if not left.outcome:
                    left.outcome, left.seconds = RESTARTED, round(self.clock() - left.opened, 3)
                    row.attempt = left.attempt + 1
            if row.outcome is None:
                self._move(session, RunState.WAITING, round=row.round, attempt=row.attempt)
            tensors = self._read_model(row.model, row.model_hash) if row.model else {}
            state = ServerState(row.step, tensors, row.facts)
            return Standing(
                fresh=fresh,
                round=row.round,
                attempt=row.attempt,
                epochs=row.epochs,
                progress=Progress(row.stage, state, row.evaluations) if row.model else None,
                outcome=row.outcome,
                attempts=[_record(one) for one in self._attempt_rows(session)],
            )

    # --- inside -----------------------------------------------------------------------------------------------------

    def _row(self, session: Session) -> RunRow:
        return session.get_one(RunRow, self._id)

    def _attempt_rows(self, session: Session) -> list[AttemptRow]:
        return list(session.scalars(select(AttemptRow).where(AttemptRow.run == self._id).order_by(AttemptRow.id)))

    def _move(self, session: Session, state: RunState, *, round: int, attempt: int) -> RunRow:
        row, now = self._row(session), self.clock()
        row.state, row.round, row.attempt, row.changed = state, round, attempt, now
        session.add(TransitionRow(run=self._id, at=now, state=state, round=round, attempt=attempt))
        return row

    def _over(
        self,
        session: Session,
        record: Mapping[str, Any],
        outcome: Mapping[str, Any],
        *,
        seconds: float,
        suspects: Mapping[str, Any],
    ) -> None:
        same = (AttemptRow.run == self._id, AttemptRow.round == record["round"])
        row = session.scalar(select(AttemptRow).where(*same, AttemptRow.attempt == record["attempt"]))
        if row is None:  # a set-up of keys that failed is recorded in the place of the attempt it was for
            row = AttemptRow(run=self._id, opened=self.clock() - seconds, **record)
            session.add(row)
        row.outcome, row.suspects, row.seconds = dict(outcome), dict(suspects), seconds

    def _progress(self, session: Session, progress: Progress, name: str, digest: str) -> None:
        row = self._row(session)
        row.stage, row.step, row.facts = progress.stage, progress.state.step, dict(progress.state.facts)
        row.evaluations = {stage: dict(found) for stage, found in progress.evaluations.items()}
        row.model, row.model_hash = name, digest

    def _write_model(self, state: ServerState) -> tuple[str, str]:
        numbers = [int(file.stem.partition("-")[2]) for file in self._models()]
        name = f"model-{max(numbers, default=-1) + 1:05}.safetensors"
        data = save_tensors({key: np.ascontiguousarray(value) for key, value in state.tensors.items()})
        write_whole(self.folder / name, data)
        return name, hashlib.sha256(data).hexdigest()

    def _read_model(self, name: str, digest: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            if file.stat().st_size > _MAX_MODEL_BYTES:
                raise ValueError("too large")
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("other bytes than were written")
            return load_tensors(data)
        except (OSError, ValueError, SafetensorError) as error:
            raise RunError(
                "FS-1731",
                f"{file} cannot be taken up ({error})",
                expected="the model as it was after the last sum",
                cure="put the state folder back from a backup, or end the run: fedsecure runs stop",
            ) from error

    def _models(self) -> list[Path]:
        return sorted(self.folder.glob("model-[0-9]*.safetensors"))

    def _forget_models(self, *, but: str) -> None:
        for file in self._models():
            if file.name != but:
                file.unlink(missing_ok=True)


def begin(database: Database, config: FederationConfig, run: bytes, *, clock: Clock = time.time) -> RunStore:
    """A new run's store."""
    settings, now = config.settings(), clock()
    store = RunStore(database, config.state, run, clock=clock)
    write_whole(store.folder / "federation.json", settings.canonical().encode())
    with database.session() as session:
        session.add(
            RunRow(
                id=run.hex(),
                federation=settings.name,
                settings=settings.canonical(),
                begun=now,
                changed=now,
                state=RunState.WAITING,
                wanted="run",
                stage="",
                round=0,
                attempt=0,
                epochs=0,
                step=0,
                facts={},
                evaluations={},
                model="",
                model_hash="",
                outcome=None,
                closed=False,
            )
        )
        session.flush()
        session.add(TransitionRow(run=run.hex(), at=now, state=RunState.WAITING, round=0, attempt=0))
    return store


def unfinished(database: Database, config: FederationConfig, *, clock: Clock = time.time) -> RunStore | None:
    """The federation's run that is not over, or whose sites have not heard so; None where there is none.

    Raises:
        RunError: FS-1732 it has other settings than ``federation.toml`` has now.
    """
    settings = config.settings()
    with database.session() as session:
        found = session.scalar(
            select(RunRow)
            .where(RunRow.federation == settings.name, RunRow.closed.is_(False))
            .order_by(RunRow.begun.desc())
            .limit(1)
        )
        if found is not None and found.wanted == "stop" and found.outcome is None:
            # Stopped while no aggregator served it: nobody is there to be told.
            end = stopped()
            found.state, found.closed = RunState.OVER, True
            found.outcome = {"complete": False, "code": end.code, "error": str(end), "run": found.id}
            return None
    if found is None:
        return None
    if found.settings != settings.canonical():
        over = found.outcome is not None
        cure = (
            "put them back and start it once, without other runs: it ends at once, and the next start begins a new run"
            if over
            else f"put them back and the run goes on, or end it: fedsecure runs stop --config FILE {found.id[:8]}"
        )
        raise RunError(
            "FS-1732",
            f"run {found.id[:8]} of {settings.name!r} is {'over but not closed' if over else 'not over'}, and"
            " federation.toml has changed since it began",
            expected=f"the settings of the run, as in {config.state / 'runs' / found.id / 'federation.json'}",
            cure=cure,
        )
    return RunStore(database, config.state, bytes.fromhex(found.id), clock=clock)


def stopped() -> RunError:
    """What ends a run that the operator stops."""
    return RunError(
        "FS-1734",
        "the operator stopped the run",
        expected="a run that ends by itself",
        cure="none needed; what was charged stays charged",
    )


def runs_of(database: Database) -> list[RunRow]:
    """All runs, the newest first."""
    with database.session() as session:
        return list(session.scalars(select(RunRow).order_by(RunRow.begun.desc())))


def described(row: RunRow) -> dict[str, Any]:
    """A run as people and scripts see it; ``ended`` is empty while it is not over."""
    ended = "" if row.outcome is None else "complete" if row.outcome["complete"] else str(row.outcome["code"])
    return {
        "run": row.id,
        "federation": row.federation,
        "begun": row.begun,
        "changed": row.changed,
        "state": row.state,
        "wanted": row.wanted,
        "stage": row.stage,
        "round": row.round,
        "attempt": row.attempt,
        "step": row.step,
        "evaluations": row.evaluations,
        "ended": ended,
    }


def pick(database: Database, run: str, settings: RunSettings) -> RunRow:
    """The federation's run whose id begins with ``run``; its newest where that is empty.

    Raises:
        RunError: FS-1733 there is none, or more than one.
    """
    matching = [r for r in runs_of(database) if r.id.startswith(run) and (run or r.federation == settings.name)]
    if not matching or (run and len(matching) > 1):
        raise RunError(
            "FS-1733",
            f"{len(matching)} runs begin with {run!r}" if run else f"no run of {settings.name!r}",
            expected="the first digits of one run's id",
            cure="see `fedsecure runs list`",
        )
    return matching[0]


def want(database: Database, run: str, wanted: Wanted, settings: RunSettings) -> RunRow:
    """Ask the aggregator that serves the run to pause it, to go on with it or to stop it; it looks once a second.

    Args:
        run, settings: as for :func:`pick`.

    Raises:
        RunError: FS-1733 no such run, more than one, or it is over.
    """
    row = pick(database, run, settings)
    if row.outcome is not None:
        raise RunError(
            "FS-1733",
            f"run {row.id[:8]} is over",
            expected="a run that is not over",
            cure="see `fedsecure runs list`",
        )
    with database.session() as session:
        session.get_one(RunRow, row.id).wanted = wanted
    return row


def _record(row: AttemptRow) -> dict[str, Any]:
    return {
        "round": row.round,
        "attempt": row.attempt,
        "stage": row.stage,
        "method": row.method,
        "cohort": list(row.cohort),
        "context": row.context,
        "seconds": row.seconds,
        **row.outcome,
    }


__all__ = [
    "RunStore",
    "Standing",
    "Wanted",
    "begin",
    "described",
    "pick",
    "runs_of",
    "stopped",
    "unfinished",
    "want",
]
