"""A site's side of a run: the embedding API.

    with fedsecure.Client.from_config("site.toml") as client:
        for query in client.queries():
            client.answer(query, dataset)
        print(client.privacy_report())

The client dials out only, believes nothing it can recompute, and lets nothing out but through :mod:`fedsecure.release`.
Its pieces are the modules of :mod:`fedsecure.site`.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsecure.config import SiteConfig, load
from fedsecure.data.dataset import Dataset
from fedsecure.errors import FedsecureError, IdentityError, RoundAborted, RunError
from fedsecure.extras import require
from fedsecure.files import make_folder
from fedsecure.identity import certificates
from fedsecure.identity.provision import Identity, load_identity
from fedsecure.logs import done, work_on
from fedsecure.messages import Query
from fedsecure.methods.base import Tensor, TrainingMethod
from fedsecure.privacy.ledger import Ledger
from fedsecure.privacy.noise import PrivacyRng, SeededRng
from fedsecure.privacy.plan import PrivacyPlan
from fedsecure.secagg.client import SecAggClient
from fedsecure.secagg.coin import is_record, is_toss
from fedsecure.secagg.latch import FileLatch
from fedsecure.site import rosters
from fedsecure.site.diary import Diary
from fedsecure.site.draws import Draws
from fedsecure.site.line import Line, Moment, Progress
from fedsecure.site.membership import Membership, accept_welcome, check_identity
from fedsecure.site.questions import Question, accept, accept_set_up, rehearse
from fedsecure.site.results import RunFolder, final_hashes, signed_report
from fedsecure.site.rounds import Rounds
from fedsecure.site.sources import Sources
from fedsecure.transport.base import Transport
from fedsecure.transport.summary import read_summary
from fedsecure.wire import federation_pb2 as pb

log = logging.getLogger("fedsecure.client")
STOPPED = "FS-1720"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one answer.

    Attributes:
        round, attempt: which question.
        released: the sum with this site's contribution was published; else ``reason`` says why not.
        reservation: the ledger entries that paid, empty where no private record was read.
    """

    round: int
    attempt: int
    released: bool
    reservation: str = ""
    reason: str = ""


class Client:
    """One site in one run. Use as a context manager.

    Args:
        config: the site's configuration.
        identity: its keys and the pinned roster; read from ``config.identity`` by default.
        transport: how to reach the aggregator; gRPC over mutual TLS by default.
        progress: called with a :class:`Moment` now and then, from the calling thread.
        simulation_seed: draws all noise from this seed. The report is stamped "NO PRIVACY (seeded)".

    Raises:
        IdentityError, ConfigError, EnvironmentProblem: before anything is sent.
    """

    _line: Line
    _member: Membership
    _sources: Sources
    _rounds: Rounds
    _draws: Draws

    def __init__(
        self,
        config: SiteConfig,
        *,
        identity: Identity | None = None,
        transport: Transport | None = None,
        progress: Progress | None = None,
        simulation_seed: int | None = None,
    ) -> None:
        self.config = config
        self._identity = identity or load_identity(config.identity)
        check_identity(self._identity, config)
        self._notices = certificates.Notices(self._identity.certificate, self._identity.ca)
        self._warn()
        make_folder(config.state)
        self._transport = transport
        self._progress = progress or (lambda moment: None)
        self._rng = PrivacyRng() if simulation_seed is None else SeededRng(f"{simulation_seed}/{config.site}".encode())
        self._diary = Diary(config.state, self._identity.signing_key)
        self._pending: Question | None = None
        self._receipts: list[Receipt] = []
        self.outcome: dict[str, Any] | None = None
        self.outputs: Mapping[str, Tensor] = {}

    @classmethod
    def from_config(cls, path: Path | str, **options: Any) -> Client:
        """A client from ``site.toml``; options as for the constructor."""
        return cls(load(path, SiteConfig), **options)

    # --- session ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Client:
        require("torch")
        self.ledger = Ledger(self.config.ledger)
        try:
            self._line = Line(
                self._dialled(),
                wait_seconds=self.config.wait_seconds,
                progress=self._progress,
                federation=self.config.federation,
            )
        except BaseException:
            self.ledger.close()
            raise
        try:
            self._join()
        except BaseException as error:
            self._line.say_why(error)
            self._diary.not_joined(error)
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        if stopped:
            log.warning("stopped before the run was over; what is charged stays charged")
        if self.outcome is None and (stopped or kind is None or issubclass(kind, Exception)):
            self._line.leave(code=STOPPED)
        if self.outcome is None:
            self._diary.left(exception[0] if exception and isinstance(exception[0], BaseException) else None)
        self.close()

    def close(self) -> None:
        """End the session and wipe keys that no round has used; nothing that was charged is given back."""
        if "_rounds" in vars(self):  # not where joining failed
            self._rounds.epochs.abort()
        self._line.close()
        self.ledger.close()
        done()

    @property
    def transport(self) -> Transport:
        if self._transport is None:
            raise RunError(
                "FS-1708",
                "the client has no session",
                expected="use inside `with Client(...) as client:`",
                cure="enter the context manager first",
            )
        return self._transport

    @property
    def run_id(self) -> bytes:
        """The run's id, 16 bytes, once joined."""
        return self._member.run

    @property
    def method(self) -> TrainingMethod:
        """The run's training method, once joined."""
        return self._member.method

    @property
    def plan(self) -> PrivacyPlan:
        """The run's privacy plan, once joined."""
        return self._member.plan

    def _dialled(self) -> Transport:
        if self._transport is None:
            from fedsecure.transport.channel import GrpcTransport

            self._transport = GrpcTransport(
                self.config.aggregator, self._identity, connect_seconds=self.config.connect_seconds
            )
        return self._transport

    def _join(self) -> None:
        reply = self._welcome()
        self._member = accept_welcome(
            reply, config=self.config, identity=self._identity, ledger=self.ledger, progress=self._progress
        )
        rehearse(
            self._member.settings,
            start=self._member.start,
            run=self.run_id,
            roster=self._identity.roster,
            config=self.config,
        )
        self._folder = RunFolder(make_folder(self.config.state / "runs" / self.run_id.hex()))
        latch = FileLatch(self.config.state / "latch.json")
        rosters.keep(self._folder.path, self._identity, folder=self.config.identity)
        self._diary.joined(self._member)
        work_on(run=self.run_id.hex(), site=self.config.site)
        self._rounds = Rounds.begin(self._member, self._line, folder=self._folder, latch=latch, diary=self._diary)
        self._draws = Draws.begin(self._member, self._line, folder=self._folder)
        self._sources = Sources(self._member, self.ledger, self._rng, self._progress)
        self._line.start_pulse()

    def _welcome(self) -> pb.JoinReply:
        """By the newest roster, or by that of a run in progress in which this site has taken part."""
        try:
            return self._line.join(self._identity.roster.hash)
        except IdentityError as refusal:
            if refusal.code != "FS-1452":
                raise
            for roster, runs in rosters.kept(self.config.state / "runs", self._identity):
                try:
                    reply = self._line.join(roster.hash)
                except IdentityError:
                    continue
                if bytes(reply.run) not in runs:
                    break
                log.info("goes on with run %s by its own roster, version %d", reply.run.hex()[:8], roster.version)
                self._identity = replace(self._identity, roster=roster)
                return reply
            raise

    # --- questions and answers --------------------------------------------------------------------------------------

    def queries(self) -> Iterator[Query]:
        """The run's questions as they come; ends when the run does.

        Raises:
            RunError: FS-1709 the run was given up by the aggregator, with its reason, FS-1711 for
                ``wait_seconds`` nothing was asked and the run did not move.
            TransportError: FS-1501 the aggregator is gone.
        """
        give_up = self._line.deadline()
        while self.outcome is None:
            self._warn()
            directive = self._line.next(give_up)
            kind = directive.WhichOneof("kind")
            if kind == "ask":
                try:
                    self._pending = accept(directive.ask, self._member, draw=self._draws.draw)
                except FedsecureError as error:
                    self._line.say_why(error)
                    self._diary.refused(error)
                    raise
                self._diary.accepted(self._pending.query, self._pending.descriptor.ctx)
                yield self._pending.query
                give_up = self._line.deadline()
            elif kind == "prepare":
                self._prepare(directive.prepare)
            elif kind == "finished":
                self._finish(directive.finished)

    def answer(self, query: Query, dataset: Dataset | None = None, *, evaluation: Dataset | None = None) -> Receipt:
        """Answer one question: reserve → answer → bound → noise → mask → sign → send.

        Args:
            query: the question just yielded by :meth:`queries`.
            dataset: training records; the ``[train]`` section of the site's file by default.
            evaluation: evaluation records; the ``[evaluation]`` section by default.

        Returns:
            A receipt. An attempt that the aggregator aborts is no error here: the next question is the next attempt.

        Raises:
            PrivacyError: the site's policy or budget refuses; nothing was read. FS-1228 the data set given is not the
                one that the site's file declares; FS-1229 patients or records are to be trained on and evaluated.
            DataError: FS-1126 the data set's classes are not the run's; others, charged since some records were read:
                they cannot be used.
        """
        if self._pending is None or self._pending.query is not query:
            raise RunError(
                "FS-1710",
                "this query is not the one in progress",
                expected="the query just yielded by queries()",
                cure="answer each query before taking the next",
            )
        asked, self._pending = self._pending, None
        work_on(round=query.round, attempt=query.attempt)
        session: SecAggClient | None = None
        try:
            door = self._sources.door(dataset, evaluation, told=lambda made: self._diary.charged(query, made))
            door.check(query)
            session = self._rounds.session(asked.descriptor)
            reservation = self._rounds.converse(asked, session, door=door)
            self._diary.released(query)
            receipt = Receipt(query.round, query.attempt, True, reservation)
        except RoundAborted as error:
            log.warning("attempt aborted: %s", error)
            self._diary.aborted(query, error)
            receipt = Receipt(query.round, query.attempt, False, reason=str(error))
        except BaseException as error:
            self._line.say_why(error)
            self._diary.failed(query, error)
            raise
        finally:
            if session is not None:
                session.abort()
        self._receipts.append(receipt)
        return receipt

    def run(self, dataset: Dataset | None = None, *, evaluation: Dataset | None = None) -> dict[str, Any]:
        """Take part until the run ends; returns its summary. The same as the loop over :meth:`queries`.

        SIGTERM ends it like Ctrl-C, with exit status 143, unless the program handles that signal itself.
        """
        rounds = self._member.settings.method.rounds
        with _sigterm_unwinds():
            for query in self.queries():
                self._progress(Moment(query.method, query.round, rounds))
                self.answer(query, dataset, evaluation=evaluation)
        assert self.outcome is not None
        self._progress(Moment("finished", rounds, rounds))
        return self.outcome

    def privacy_report(self) -> dict[str, Any]:
        """This site's privacy report, recomputed from the ledger's events (see docs/privacy-report.md)."""
        return signed_report(self._member, self.ledger, outcome=self.outcome, seeded=self._rng.seeded)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _warn(self) -> None:
        """Say, once a day, that the site's certificate or the federation's ends soon."""
        for sentence in self._notices.due():
            log.warning("%s", sentence)

    def _prepare(self, asked: pb.Prepare) -> None:
        """What comes ahead of rounds: keys for them, the toss for the run's draw, or its record."""
        raw = asked.descriptor
        try:
            if is_toss(raw):
                self._draws.toss(raw)
            elif is_record(raw):
                self._draws.learn(raw)
            else:
                self._rounds.set_up(accept_set_up(asked, self._member))
        except FedsecureError as error:
            self._line.say_why(error)
            raise

    def _finish(self, finished: pb.Finished) -> None:
        outcome = read_summary(finished.summary_json)
        self._diary.finished(complete=finished.complete, code=str(outcome.get("code") or ""))
        if not finished.complete:
            self.outcome = outcome
            self._line.farewell()
            raise RunError(
                "FS-1709",
                f"the run was given up: {outcome.get('error') or 'no reason given'}",
                expected="a run that completes",
                cure="see the reason; what was charged stays charged",
            )
        self.outputs = self._line.fetch(final_hashes(finished, self._member), self._member.start.tensors)
        self.outcome = outcome
        self._line.farewell()
        self._folder.write_results(
            self._member,
            report=self.privacy_report(),
            outcome=outcome,
            outputs=self.outputs,
            transport=self._line.transport,
            seeded=self._rng.seeded,
        )


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Turns SIGTERM into SystemExit(143), so that the session is closed and the operator told; in the main thread."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


__all__ = ["Client", "Moment", "Receipt"]
