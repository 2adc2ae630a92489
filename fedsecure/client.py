"""A site's side of a run: the embedding API.

    with fedsecure.Client.from_config("site.toml") as client:
        for query in client.queries():
            client.answer(query, dataset)
        print(client.privacy_report())

The client dials out only, believes nothing it can recompute, and lets nothing out but through :mod:`fedsecure.release`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file
from safetensors.numpy import save as save_tensors

from fedsecure.config import DatasetConfig, RunSettings, SiteConfig, load
from fedsecure.data.dataset import Dataset
from fedsecure.data.loading import open_dataset
from fedsecure.errors import (
    ConfigError,
    DataError,
    FedsecureError,
    PrivacyError,
    ProtocolError,
    RoundAborted,
    RunError,
)
from fedsecure.extras import require
from fedsecure.files import make_folder, write_whole
from fedsecure.identity import keys
from fedsecure.identity.provision import Identity, load_identity
from fedsecure.learning.artefact import AdapterMetadata, save_adapter
from fedsecure.learning.engines import choose_engine
from fedsecure.learning.features import SiteFeatures, load_site_features, load_units
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Population, Query, SiteState
from fedsecure.methods.agenda import question, starting_state
from fedsecure.methods.base import Ask, Method, Tensor
from fedsecure.methods.cohorts import check_roles, cohort_of
from fedsecure.methods.registry import load_method, load_training_method
from fedsecure.privacy.ledger import Ledger
from fedsecure.privacy.noise import PrivacyRng, SeededRng
from fedsecure.privacy.plan import PrivacyPlan
from fedsecure.privacy.report import site_report
from fedsecure.privacy.report_verify import PURPOSE, sign_report
from fedsecure.release import Door, Source
from fedsecure.secagg.client import MaskedInput, SecAggClient, State
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch import Epochs
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.latch import FileLatch
from fedsecure.secagg.policy import RoundPolicy, check, check_epoch
from fedsecure.transport.base import Transport
from fedsecure.transport.status import printable
from fedsecure.transport.summary import read_summary
from fedsecure.transport.tensors import check_like, unpack_tensor
from fedsecure.wire import federation_pb2 as pb

log = logging.getLogger("fedsecure.client")
PROTOCOL = 1
RUN_BYTES = 16
# Four bytes each; what a broadcast may hold at most (fedsecure.transport.tensors).
MAX_PARAMETERS = 1 << 28
# The attempt, or its phase, is over at the aggregator: what becomes of it comes as the next directive.
_OVER = ("FS-1325", "FS-1706")
# Reasons that have nothing to do with any record, so others may hear them.
STOPPED = "FS-1720"
GOODBYE_SECONDS = 2.0
_PUBLIC_REASONS = ("FS-10", "FS-120", "FS-122", "FS-13", "FS-14")
# But for these, which are about values or patients.
_PRIVATE_REASONS = ("FS-1207", "FS-1229")


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


@dataclass(frozen=True, slots=True)
class Moment:
    """A sign of progress for whoever shows it: what is going on, and how far the run is."""

    what: str
    round: int = 0
    rounds: int = 0


Progress = Callable[[Moment], None]


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
        if self._identity.site != config.site:
            raise ConfigError(
                "FS-1005",
                f"site = {config.site!r} with the identity of {self._identity.site!r}",
                expected="the site's own identity folder",
                cure="correct `site` or `identity` in the site's file",
            )
        make_folder(config.state)
        self._transport = transport
        self._progress = progress or (lambda moment: None)
        self._rng = PrivacyRng() if simulation_seed is None else SeededRng(f"{simulation_seed}/{config.site}".encode())
        self._session = os.urandom(16)
        self._joined = False
        self._left = False
        self._seen = 0
        self._pulse: threading.Event | None = None
        self._pending: tuple[Query, RoundDescriptor, Ask] | None = None
        self._held: pb.Directive | None = None
        self._loaded: dict[Population, tuple[Dataset | None, UnitFeatures]] = {}
        self._hashes: dict[Population, tuple[Dataset | None, Sequence[bytes]]] = {}
        self._patients: dict[Population, frozenset[str]] = {}
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
            if self._transport is None:
                from fedsecure.transport.channel import GrpcTransport

                self._transport = GrpcTransport(
                    self.config.aggregator, self._identity, connect_seconds=self.config.connect_seconds
                )
            self._join()
        except BaseException as error:
            self._say_why(error)
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        if stopped:
            log.warning("stopped before the run was over; what is charged stays charged")
        if self.outcome is None and (stopped or kind is None or issubclass(kind, Exception)):
            self._leave(code=STOPPED)
        self.close()

    def close(self) -> None:
        """End the session; nothing that was charged is given back."""
        if self._pulse is not None:
            self._pulse.set()
        if self._transport is not None:
            self._transport.close()
        self.ledger.close()

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

    def _join(self) -> None:
        reply = self.transport.join(
            pb.JoinRequest(
                protocol=PROTOCOL,
                session=self._session,
                roster_hash=self._identity.roster.hash,
                software="fedsecure",
            )
        )
        self._joined = True
        self._settings = RunSettings.parse(reply.settings_json)
        self.run_id = bytes(reply.run)
        if len(self.run_id) != RUN_BYTES:
            raise ProtocolError(
                "FS-1377",
                f"a run id of {len(self.run_id)} bytes",
                expected=f"{RUN_BYTES} random bytes",
                cure="install the same fedsecure release on both sides",
            )
        self._folder = make_folder(self.config.state / "runs" / self.run_id.hex())
        self._latch = FileLatch(self.config.state / "latch.json")
        self._epochs = Epochs(
            site=self.config.site,
            signing_key=self._identity.signing_key,
            roster=self._identity.roster,
            latch=self._latch,
        )
        entry = self._settings.sites.get(self.config.site)
        if entry is None:
            raise ConfigError(
                "FS-1006",
                f"the run's settings do not name {self.config.site!r}",
                expected="an entry under [sites]",
                cure="ask the coordinator to add this site",
            )
        self._entry = entry
        self._check_settings()
        self.method = load_training_method(self._settings.method.name)
        self.plan = self._checked_plan()
        self._start = starting_state(self._settings)
        self._progress(Moment(f"joined {self._settings.name}"))
        self._features = load_site_features(
            self._settings.encoder,
            self._settings.classes,
            file=self.config.encoder_file,
            device=self.config.device,
        )
        self._start_pulse()

    def _check_settings(self) -> None:
        """What a site does not take from an aggregator, whatever method and budget say."""
        check_roles(self._settings, self._identity.roster)
        section, source = self.config.evaluation, self._settings.encoder.pretrained
        if section is not None and self._entry.evaluation_public and not section.public:
            raise ConfigError(
                "FS-1011",
                f"the run counts {section.name!r} exactly, as a public set, and this site's file does not say public",
                expected="the same declaration on both sides",
                cure="ask the coordinator for evaluation_public = false; declare the set public only if it is",
            )
        if os.sep in source or source.startswith(("~", ".")):
            raise ConfigError(
                "FS-1012",
                f"the run names a file of this machine as its encoder ({source!r})",
                expected='an open_clip tag, "bundled" or "file"',
                cure='ask the coordinator for pretrained = "file", and name your own copy in encoder_file',
            )

    def _checked_plan(self) -> PrivacyPlan:
        """The run's plan, refused before anything is charged if it cannot fit this site's budget."""
        _, cohort = cohort_of(self._settings, trainers_only=True)
        plan = self.method.plan(self._settings, cohort)
        if plan.parameters > MAX_PARAMETERS:
            raise ConfigError(
                "FS-1013",
                f"an adapter of {plan.parameters:,} parameters",
                expected=f"at most {MAX_PARAMETERS:,}",
                cure="ask the coordinator for a smaller adapter",
            )
        train = self.config.train
        if self._entry.role == "train":
            if train is None:
                raise ConfigError(
                    "FS-1007",
                    f"{self.config.site!r} is a training site without a [train] data set",
                    expected="a [train] section",
                    cure="add it to the site's file",
                )
            # After a restart in the middle of a run, the rounds charged before are spent, not ahead.
            mine = {e.round for e in self.ledger.history(train.name, "train") if e.run == self.run_id.hex()}
            ahead = plan.round_events * max(0, self._settings.method.rounds - len(mine))
            self.ledger.afford(
                dataset=train.name,
                population="train",
                events=ahead,
                limit_epsilon=self.config.policy.max_epsilon,
                delta=self.config.policy.delta,
            )
        return plan

    def _start_pulse(self) -> None:
        stop = self._pulse = threading.Event()
        transport, token = self.transport, self._session

        def beat() -> None:
            while not stop.is_set():
                try:
                    transport.beat(pb.BeatRequest(session=token))
                except (FedsecureError, ValueError):
                    stop.wait(1.0)

        threading.Thread(target=beat, name="fedsecure-pulse", daemon=True).start()

    # --- questions and answers --------------------------------------------------------------------------------------

    def queries(self) -> Iterator[Query]:
        """The run's questions as they come; ends when the run does.

        Raises:
            RunError: FS-1709 the run was given up by the aggregator, with its reason, FS-1711 nothing was asked
                within ``wait_seconds``.
            TransportError: FS-1501 the aggregator is gone.
        """
        give_up = time.monotonic() + self.config.wait_seconds
        while self.outcome is None:
            directive = self._next(give_up)
            kind = directive.WhichOneof("kind")
            if kind == "ask":
                try:
                    self._pending = self._accept(directive.ask)
                except FedsecureError as error:
                    self._say_why(error)
                    raise
                yield self._pending[0]
                give_up = time.monotonic() + self.config.wait_seconds
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
                one that the site's file declares; FS-1229 patients to train on are in a private evaluation set too.
            DataError: FS-1126 the data set's classes are not the run's; others, charged since some records were read:
                they cannot be used.
        """
        if self._pending is None or self._pending[0] is not query:
            raise RunError(
                "FS-1710",
                "this query is not the one in progress",
                expected="the query just yielded by queries()",
                cure="answer each query before taking the next",
            )
        (_, descriptor, ask), self._pending = self._pending, None
        session: SecAggClient | None = None
        try:
            door = self._door(dataset, evaluation)
            door.check(query)
            session = self._session_of(descriptor)
            reservation = self._converse(query, ask, session, door)
            receipt = Receipt(query.round, query.attempt, True, reservation)
        except RoundAborted as error:
            log.warning("attempt aborted: %s", error)
            receipt = Receipt(query.round, query.attempt, False, reason=str(error))
        except BaseException as error:
            self._say_why(error)
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
        with _sigterm_unwinds():
            for query in self.queries():
                self._progress(Moment(query.method, query.round, self._settings.method.rounds))
                self.answer(query, dataset, evaluation=evaluation)
        assert self.outcome is not None
        self._progress(Moment("finished", self._settings.method.rounds, self._settings.method.rounds))
        return self.outcome

    def privacy_report(self) -> dict[str, Any]:
        """This site's privacy report, recomputed from the ledger's events (see docs/privacy-report.md)."""
        train, evaluation = self.config.train, self.config.evaluation
        report = site_report(
            site=self.config.site,
            role=self._entry.role,
            run=self.run_id.hex(),
            settings=self._settings,
            ledger=self.ledger,
            train_dataset=train.name if train and self._entry.role == "train" else None,
            evaluation_dataset=evaluation.name if evaluation and not self._evaluation_public() else None,
            delta=self._settings.privacy.delta,
            plan=self.plan,
            outcome=self.outcome,
            seeded=self._rng.seeded,
        )
        key = self._identity.signing_key
        return sign_report(report, lambda body: keys.sign(key, PURPOSE, body), site=self.config.site)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _next(self, give_up: float) -> pb.Directive:
        """The next directive; waits say what for, and end at ``give_up``."""
        if self._held is not None:
            held, self._held = self._held, None
            return held
        reason = "the aggregator sends nothing of use"
        while time.monotonic() <= give_up:
            directive = self.transport.next(pb.NextRequest(session=self._session, after=self._seen))
            kind = directive.WhichOneof("kind")
            if kind == "wait":
                reason = printable(directive.wait.reason)
                self._progress(Moment(reason))
                continue
            if kind is None or directive.sequence <= self._seen:
                raise ProtocolError(
                    "FS-1375",
                    f"directive {directive.sequence} of kind {kind} after directive {self._seen}",
                    expected="a directive of this release with the next number",
                    cure="install the same fedsecure release on both sides",
                )
            self._seen = directive.sequence
            return directive
        raise RunError(
            "FS-1711",
            f"nothing to do for {self.config.wait_seconds:g} s: {reason}",
            expected="a question within wait_seconds",
            cure="see the named sites, or raise wait_seconds",
        )

    def _accept(self, asked: pb.Ask) -> tuple[Query, RoundDescriptor, Ask]:
        """Parse a question and recompute all of it; the aggregator chooses nothing the site cannot veto."""
        try:
            query = Query.from_json(asked.query_json)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, AssertionError, RecursionError) as e:
            raise ProtocolError(
                "FS-1371",
                "a query that cannot be parsed",
                expected="the canonical form of this release",
                cure="install the same fedsecure release on both sides",
            ) from e
        ask = question(self._settings, query.round, start=self._start)
        called_for = None if ask is None else (ask.method, ask.version, ask.segments, ask.events, set(ask.inputs))
        found = (query.method, query.version, query.segments, query.events, set(query.inputs))
        sized = all(len(digest) == 32 for digest in query.inputs.values())
        if ask is None or found != called_for or not sized or query.attempt >= self._settings.rounds.max_attempts:
            raise ProtocolError(
                "FS-1373",
                f"question {query.round}, attempt {query.attempt}, is not what the run's settings call for there",
                expected="the method, segments, events and inputs that this site computes from the same settings",
                cure="do not go on with this aggregator, unless its release of the method is another; report it",
            )
        sites, cohort = cohort_of(self._settings, trainers_only=ask.trainers_only)
        # Which prepared keys a round uses is the aggregator's to say; whether they are there and unused, this site's.
        claimed = RoundDescriptor.parse(asked.descriptor)
        descriptor = RoundDescriptor.from_query(
            query,
            roster=self._identity.roster,
            config_hash=self._settings.digest(),
            base_hash=bytes.fromhex(self._features.fingerprint),
            colluders=cohort.colluders,
            min_survivors=cohort.min_survivors,
            epoch=claimed.epoch,
            slot=claimed.slot,
        )
        if descriptor.canonical() != asked.descriptor or query.cohort != sites or query.run != self.run_id:
            raise ProtocolError(
                "FS-1372",
                "the round's context is not what this site computes from the same public settings",
                expected="equal descriptors on both sides",
                cure="do not go on with this aggregator; report it",
            )
        check(
            descriptor,
            query,
            policy=self._round_policy(),
            roster=self._identity.roster,
            site=self.config.site,
            config_hash=self._settings.digest(),
            base_hash=bytes.fromhex(self._features.fingerprint),
        )
        return query, descriptor, ask

    def _prepare(self, asked: pb.Prepare) -> None:
        """Set up keys for the next rounds (secagg.md §3.7); an aborted set-up is no error, the next one follows."""
        descriptor = EpochDescriptor.parse(asked.descriptor)
        sites, cohort = cohort_of(self._settings, trainers_only=True)
        expected = EpochDescriptor.choose(
            sites,
            run_id=self.run_id,
            epoch=descriptor.epoch,
            slots=self._settings.rounds.prepared_rounds,
            roster=self._identity.roster,
            config_hash=self._settings.digest(),
            colluders=cohort.colluders,
            min_survivors=cohort.min_survivors,
        )
        if expected.canonical() != asked.descriptor:
            raise ProtocolError(
                "FS-1379",
                "a set-up of keys that is not what this site computes from the same public settings",
                expected="equal descriptors on both sides",
                cure="do not go on with this aggregator; report it",
            )
        check_epoch(
            descriptor,
            policy=self._round_policy(),
            roster=self._identity.roster,
            site=self.config.site,
            config_hash=self._settings.digest(),
        )
        epoch, ctx = self._epochs.set_up(descriptor), descriptor.ctx
        try:
            self._send(ctx, epoch.advertise())
            self._send(ctx, epoch.shares(self._relay(ctx, "shares")))
            epoch.receive_shares(self._relay(ctx, "done"))
        except RoundAborted as error:
            log.warning("set-up of keys aborted: %s", error)
            epoch.abort()

    def _session_of(self, descriptor: RoundDescriptor) -> SecAggClient:
        """The state machine of one attempt, with keys of its own or set up ahead."""
        if descriptor.epoch:
            try:
                return self._epochs.round(descriptor)
            except ProtocolError as error:
                if error.code != "FS-1358":
                    raise
                # Its set-up went on without this site: the round is lost for it, and the next set-up is not.
                raise RoundAborted("FS-1362", error.found, expected=error.expected, cure=error.cure) from error
        return SecAggClient(
            descriptor,
            site=self.config.site,
            signing_key=self._identity.signing_key,
            roster=self._identity.roster,
            latch=self._latch,
        )

    def _round_policy(self) -> RoundPolicy:
        limits = self.config.policy
        return RoundPolicy(min_cohort=limits.min_cohort, min_colluders=limits.min_colluders, methods=limits.methods)

    def _converse(self, query: Query, ask: Ask, session: SecAggClient, door: Door) -> str:
        """The five messages of one attempt, or three with keys set up ahead, with the door in the middle."""
        ctx = session.ctx
        with _over_at_the_aggregator("FS-1704", aborts=True):
            inputs = self._fetch(query.inputs, ask.inputs)
        if session.state is State.NEW:
            self._send(ctx, session.advertise())
            self._send(ctx, session.shares(self._relay(ctx, "shares")))
            session.receive_shares(self._relay(ctx, "masked"))
        method = load_method(query.method)
        contribution, kept = door.release(
            query,
            method,
            inputs=inputs,
            state=self._load_state(method),
            seal=session.mask,
            send=lambda sealed: self._upload(ctx, sealed),
        )
        self._send(ctx, session.sign_survivors(self._relay(ctx, "survivors")))
        self._send(ctx, session.unmask(self._relay(ctx, "unmask")))
        session.finished(self._relay(ctx, "result"))
        self._save_state(method, kept)
        return contribution.reservation

    def _fetch(self, hashes: Mapping[str, bytes], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Broadcast tensors by hash, of the types and shapes of ``like``; the names are equal already."""
        tensors = {}
        for name, digest in hashes.items():
            blob = self.transport.fetch(pb.FetchRequest(session=self._session, digest=digest))
            tensors[name] = unpack_tensor(name, digest, blob)
            check_like(name, tensors[name], like[name])
        return tensors

    def _send(self, ctx: bytes, payload: bytes) -> None:
        with _over_at_the_aggregator(*_OVER):
            self.transport.send(pb.PhaseMessage(session=self._session, ctx=ctx, payload=payload))

    def _upload(self, ctx: bytes, sealed: MaskedInput) -> None:
        payload = memoryview(sealed.payload).cast("B")
        header = pb.UploadHeader(session=self._session, ctx=ctx, header=sealed.header, size=len(payload))
        with _over_at_the_aggregator(*_OVER):
            self.transport.upload(header, payload)

    def _relay(self, ctx: bytes, phase: str) -> bytes:
        """The aggregator's broadcast of a phase of this attempt."""
        give_up = time.monotonic() + self.config.wait_seconds
        while True:
            directive = self._next(give_up)
            kind = directive.WhichOneof("kind")
            if kind == "relay" and directive.relay.ctx == ctx and directive.relay.phase == phase:
                return bytes(directive.relay.payload)
            if kind == "abort" and directive.abort.ctx == ctx:
                raise RoundAborted(
                    "FS-1360",
                    printable(directive.abort.reason),
                    expected="a round that ends with a sum",
                    cure="none needed; the next attempt uses new keys and is charged anew",
                )
            if kind in ("ask", "prepare", "finished"):
                self._held = directive
                raise RoundAborted(
                    "FS-1361",
                    "the aggregator went on without finishing this attempt",
                    expected="the messages of one attempt in order",
                    cure="none needed",
                )

    def _say_why(self, error: BaseException) -> None:
        """Tells the aggregator, and so the other sites, that this site leaves; a code, and only a public one."""
        public = isinstance(error, FedsecureError) and error.code.startswith(_PUBLIC_REASONS)
        if isinstance(error, FedsecureError) and public and error.code not in _PRIVATE_REASONS:
            self._leave(error.code)

    def _leave(self, code: str) -> None:
        """Frees the session for this site's next process, and lets the others go on without it; once."""
        if not self._joined or self._left:
            return
        self._left = True
        if self._pulse is not None:
            self._pulse.set()

        def goodbye() -> None:
            try:
                self.transport.beat(pb.BeatRequest(session=self._session, leaving=code))
            except (FedsecureError, ValueError):
                log.info("the aggregator was not told")

        # An aggregator that is gone must not keep a site that wants to leave.
        told = threading.Thread(target=goodbye, name="fedsecure-goodbye", daemon=True)
        told.start()
        told.join(GOODBYE_SECONDS)

    def _door(self, dataset: Dataset | None, evaluation: Dataset | None) -> Door:
        given: dict[Population, Dataset | None] = {"train": dataset, "evaluation": evaluation}
        configured: dict[Population, DatasetConfig | None] = {
            "train": self.config.train if self._entry.role == "train" else None,
            "evaluation": self.config.evaluation if self._entry.evaluation_units > 0 else None,
        }
        sources: dict[Population, Source] = {}
        for population, section in configured.items():
            if section is not None:
                public = population == "evaluation" and self._evaluation_public()
                self._check_given(section, given[population], public=public)
                sources[population] = Source(
                    section.name,
                    public,
                    self._loader(population, section, given[population]),
                    self._hasher(population, section, given[population]),
                )
        return Door(
            config=self.config,
            settings=self._settings,
            features=self._features,
            ledger=self.ledger,
            sources=sources,
            rng=self._rng,
            device=self.config.device,
            run=self.run_id,
        )

    def _check_given(self, section: DatasetConfig, given: Dataset | None, *, public: bool) -> None:
        """A data set handed in must be the one the site's file declares: it is charged, or not, as that one."""
        if given is None:
            return
        if given.name != section.name or (public and not given.public):
            raise PrivacyError(
                "FS-1228",
                f"data set {given.name!r}, public: {given.public}, in place of {section.name!r}, public: {public}",
                expected="the name under which the site's file charges it, and the same declaration",
                cure="give the data set the name of its section, and declare it public only if it is",
            )
        if tuple(given.classes) != self._settings.classes:
            raise DataError(
                "FS-1126",
                f"data set {given.name!r} with classes {list(given.classes)[:10]}",
                expected=f"{list(self._settings.classes)[:10]}, in this order",
                cure="build the data set with the run's classes",
            )

    def _hasher(
        self, population: Population, section: DatasetConfig, given: Dataset | None
    ) -> Callable[[], Sequence[bytes]]:
        """Who pays: every patient of the data set; where patients are unknown, every record of that place."""

        def hashes() -> Sequence[bytes]:
            earlier = self._hashes.get(population)
            if earlier is None or earlier[0] is not given:
                records = given if given is not None else open_dataset(section, classes=self._settings.classes)
                records.index()
                place = f"{section.path.resolve()}/{section.split or ''}"
                patients = records.patient_ids
                ids = (
                    [f"patient/{name}" for name in dict.fromkeys(patients)]
                    if patients is not None
                    else [f"record/{place}/{name}" for name in records.record_ids]
                )
                earlier = self._hashes[population] = given, self.ledger.hash_units(ids, population)
            return earlier[1]

        return hashes

    def _loader(
        self, population: Population, section: DatasetConfig, given: Dataset | None
    ) -> Callable[[], UnitFeatures]:
        declared = self._entry.max_units if population == "train" else self._entry.evaluation_units
        privacy = self._settings.privacy

        def read() -> UnitFeatures:
            earlier = self._loaded.get(population)
            if earlier is None or earlier[0] is not given:
                self._progress(Moment(f"reading and encoding {section.name}"))
                records = given if given is not None else open_dataset(section, classes=self._settings.classes)
                self._check_disjoint(population, records)
                units = load_units(
                    records,
                    self._features,
                    cache=self.config.state / "features",
                    unit=privacy.unit,
                    cap=privacy.max_records_per_unit,
                    max_units=declared,
                    key=self.ledger.key,
                )
                self._loaded[population] = given, units
                return units
            return earlier[1]

        return read

    def _check_disjoint(self, population: Population, records: Dataset) -> None:
        """Training and private evaluation are charged apart, which holds for patients who are in one of them only."""
        if self._settings.privacy.unit != "patient" or (population == "evaluation" and self._evaluation_public()):
            return
        records.index()
        mine = frozenset(records.patient_ids or ())
        both = mine & self._patients.get("evaluation" if population == "train" else "train", frozenset())
        if both:
            raise PrivacyError(
                "FS-1229",
                f"{len(both)} patients are in the training set and in the private evaluation set",
                expected="every patient in one of the two: each set is charged to its own patients",
                cure="split by patient, for instance with `holdout` and `part`",
            )
        self._patients[population] = mine

    def _evaluation_public(self) -> bool:
        """Public only if the federation and this site's own file both say so."""
        section = self.config.evaluation
        return bool(section and section.public and self._entry.evaluation_public)

    def _load_state(self, method: Method) -> SiteState:
        path = self._folder / f"{method.name}.safetensors"
        return SiteState(tensors=load_file(path)) if path.exists() else SiteState()

    def _save_state(self, method: Method, state: SiteState) -> None:
        if state.tensors:
            write_whole(self._folder / f"{method.name}.safetensors", save_tensors(dict(state.tensors)))

    def _finish(self, finished: pb.Finished) -> None:
        outcome = read_summary(finished.summary_json)
        if not finished.complete:
            self.outcome = outcome
            self._farewell()
            raise RunError(
                "FS-1709",
                f"the run was given up: {outcome.get('error') or 'no reason given'}",
                expected="a run that completes",
                cure="see the reason; what was charged stays charged",
            )
        if set(finished.outputs) != set(self._start.tensors):
            raise ProtocolError(
                "FS-1378",
                f"final tensors {[printable(name, limit=40) for name in sorted(finished.outputs)[:10]]}",
                expected=f"{sorted(self._start.tensors)}",
                cure="install the same fedsecure release on both sides",
            )
        self.outputs = self._fetch(dict(finished.outputs), self._start.tensors)
        self.outcome = outcome
        self._farewell()
        self._write_results()

    def _farewell(self) -> None:
        """Tells the aggregator that the end was heard."""
        if self._pulse is not None:
            self._pulse.set()
        try:
            self.transport.next(pb.NextRequest(session=self._session, after=self._seen))
        except FedsecureError:
            log.info("the aggregator left first")

    def _adapter_epsilon(self) -> float:
        """ε of the site that paid most: aborted attempts are charged like others."""
        from fedsecure.privacy.accounting import epsilon

        attempts = (self.outcome or {}).get("attempts", ())
        paid = sum(attempt["stage"] == "training" for attempt in attempts)
        return epsilon(
            self.plan.round_events * max(self._settings.method.rounds, paid), delta=self._settings.privacy.delta
        )

    def _write_results(self) -> None:
        """Report, adapter and traffic, in the run's folder."""
        report = self.privacy_report()
        write_whole(self._folder / "privacy-report.json", json.dumps(report, indent=2, sort_keys=True).encode())
        task = self.method.task(self._settings, self._features)
        encoder, privacy = self._settings.encoder, self._settings.privacy
        metadata = AdapterMetadata(
            model=encoder.model,
            pretrained=encoder.pretrained,
            fingerprint=encoder.fingerprint,
            prompt=encoder.prompt,
            classes=self._settings.classes,
            temperature=task.temperature,
            epsilon=None if self._rng.seeded else self._adapter_epsilon(),
            delta=privacy.delta,
            unit=privacy.unit,
            rounds=self._settings.method.rounds,
            preprocessing=self._features.preprocessing,
            extra={"run": self.run_id.hex(), "method": self.method.name},
        )
        save_adapter(self._folder / "adapter.safetensors", task, tensors=self.outputs, metadata=metadata)
        usage = {
            "bytes_up": self.transport.bytes_up,
            "bytes_down": self.transport.bytes_down,
            "engine": choose_engine(self.config.engine, task),
        }
        write_whole(self._folder / "usage.json", json.dumps(usage).encode())


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


@contextmanager
def _over_at_the_aggregator(*codes: str, aborts: bool = False) -> Iterator[None]:
    """Some refusals only say that the aggregator is further on.

    A message may have been counted although its reply was lost, or have come too late: the next directive tells which.
    Where there is nothing to go on with (``aborts``), the attempt ends here.
    """
    try:
        yield
    except (RunError, ProtocolError) as error:
        if error.code not in codes:
            raise
        if aborts:
            raise RoundAborted("FS-1362", error.found, expected=error.expected, cure=error.cure) from error
        log.info("the aggregator is further on: %s", error.found)


__all__ = ["Client", "Moment", "Receipt", "SiteFeatures"]
