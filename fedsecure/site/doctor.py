"""``fedsecure doctor``: whatever a site needs for a run, tried in order and each by itself, before any run.

From the site's file and keys over the line to the aggregator to disk, packages, records and budget; what needs no
aggregator is tried without one. What fails says how to mend it; what rests on something that failed is not tried.
Nothing is charged, no record's content is read, and the findings name no record, so that they can be sent to whoever
helps.
"""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from time import time as wall_clock
from typing import Literal

from fedsecure.config import DatasetConfig, RunSettings, SiteConfig, SiteEntry, load
from fedsecure.data.loading import detect_format, open_dataset
from fedsecure.errors import EnvironmentProblem, FedsecureError, IdentityError
from fedsecure.extras import require
from fedsecure.files import make_folder
from fedsecure.identity import certificates
from fedsecure.identity.provision import Identity, load_identity
from fedsecure.learning.features import check_declared, check_patients
from fedsecure.methods.agenda import starting_state
from fedsecure.methods.constants import run_constants
from fedsecure.methods.registry import load_training_method
from fedsecure.privacy.ledger import Ledger
from fedsecure.site.line import PROTOCOL
from fedsecure.site.membership import (
    check_budget,
    check_evaluation_budget,
    check_identity,
    check_settings,
    checked_plan,
    entry_of,
    training_section,
)
from fedsecure.site.questions import rehearse
from fedsecure.transport.channel import GrpcTransport
from fedsecure.transport.probe import Address, Handshake, connect, resolve, shake_hands
from fedsecure.transport.status import printable
from fedsecure.wire import federation_pb2 as pb

State = Literal["ok", "warning", "failed", "skipped"]
# Certificates are valid from five minutes before they were made (identity.certificates).
CLOCK_LIMIT, CLOCK_NOTICE = 300.0, 30.0
EXPIRY_NOTICE = dt.timedelta(days=30)
ROOM_NOTICE = 1 << 30
_PACKAGES = {"torch": "torch", "opacus": "opacus", "open_clip": "open_clip_torch"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        state: ``"skipped"`` rests on a check that failed, or does not concern this site.
        found: one line.
        expected, cure, code: where it failed, or could soon; a warning has no code.
    """

    check: str
    state: State
    found: str
    expected: str = ""
    cure: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Concern:
    """Not wrong yet: what was found, and what to do in good time."""

    found: str
    cure: str


class NotHere(Exception):
    """A check that does not concern this site; says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name, the checks it rests on, and what it does."""

    name: str
    needs: tuple[str, ...]
    run: Callable[[Examination], str | Concern]


class Examination:
    """One site under examination; each check leaves here what later ones need."""

    config: SiteConfig
    identity: Identity
    address: Address
    handshake: Handshake
    reply: pb.GreetReply
    settings: RunSettings
    entry: SiteEntry
    run: bytes
    ahead: float

    def __init__(self, file: Path, *, seconds: float = 10.0) -> None:
        self.file, self.seconds = file, seconds

    # --- the site's own files -----------------------------------------------------------------------------------

    def configuration(self) -> str:
        self.config = load(self.file, SiteConfig)
        self.address = Address.parse(self.config.aggregator)
        return f"{self.config.site}, whose aggregator is {self.address}"

    def keys(self) -> str | Concern:
        self.identity = load_identity(self.config.identity)
        check_identity(self.identity, self.config)
        own = certificates.parse(self.identity.certificate, "the certificate")
        roster = self.identity.roster
        text = f"one of {len(roster.entries)} sites of {roster.federation!r}, roster {roster.version}"
        return _until(own.not_valid_after_utc, text, "run `fedsecure renew` before that (docs/enrolment.md)")

    # --- the line -------------------------------------------------------------------------------------------------

    def name(self) -> str:
        return ", ".join(resolve(self.address)[:4])

    def port(self) -> str:
        return f"answers after {connect(self.address, seconds=self.seconds):.0f} ms"

    def tls(self) -> str:
        config = self.config
        self.handshake = shake_hands(self.address, self.identity, folder=config.identity, seconds=self.seconds)
        return f"{self.handshake.version}, {self.handshake.cipher}, nothing between"

    def certificate(self) -> str | Concern:
        text = "the aggregator's, as the roster names it"
        return _until(self.handshake.expires, text, "tell the operator to have it renewed before that")

    def greeting(self) -> str:
        line = GrpcTransport(str(self.address), self.identity, connect_seconds=self.seconds, call_seconds=self.seconds)
        try:
            before = wall_clock()
            self.reply = line.greet(pb.GreetRequest(protocol=PROTOCOL))
            # The reply was made about half way between question and answer.
            self.ahead = (before + wall_clock()) / 2 - self.reply.unix_ms / 1000
        finally:
            line.close()
        return f"answered, in version {self.reply.protocol} of the protocol"

    def aggregator(self) -> str:
        reply = self.reply
        self._check_reply(reply)
        self.settings, self.run = RunSettings.parse(reply.settings_json), bytes(reply.run)
        self.entry = entry_of(self.settings, self.config.site)
        check_settings(self.settings, self.entry, self.config)
        return f"run {self.run.hex()[:8]} of {self.settings.name!r}: {printable(reply.waiting, limit=200)}"

    def _check_reply(self, reply: pb.GreetReply) -> None:
        if reply.roster_hash != self.identity.roster.hash:
            raise IdentityError(
                "FS-1452",
                "the site's roster is not the aggregator's",
                expected="the same signed roster everywhere",
                cure="fetch the current roster from the coordinator",
            )

    def clock(self) -> str | Concern:
        ahead = self.ahead
        text = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the aggregator's"
        if abs(ahead) < 1:
            return "the aggregator's, within a second"
        if abs(ahead) > CLOCK_LIMIT:
            raise EnvironmentProblem(
                "FS-1818",
                f"this machine's clock is {text}",
                expected=f"at most {CLOCK_LIMIT:.0f} s, or certificates count as expired or not yet valid",
                cure="set it by the hospital's time server (`timedatectl`), or tell the operator to",
            )
        return Concern(text, "have both machines follow a time server") if abs(ahead) > CLOCK_NOTICE else text

    # --- the machine ----------------------------------------------------------------------------------------------

    def disk(self) -> str | Concern:
        places = {make_folder(path) for path in (self.config.state, self.config.ledger.parent)}
        free = min(shutil.disk_usage(place).free for place in places)
        text = f"{free / 1e9:.1f} GB free for state and ledger"
        return (
            Concern(text, "free some space: features of images and uploads are kept there")
            if free < ROOM_NOTICE
            else text
        )

    def packages(self) -> str:
        require(*_PACKAGES)
        for module in _PACKAGES:
            try:
                import_module(module)
            except (ImportError, OSError) as error:
                raise EnvironmentProblem(
                    "FS-1817",
                    f"{module} is installed and does not load ({str(error)[:200]})",
                    expected="a package that fits this machine",
                    cure="install it anew with the exact versions of constraints.txt",
                ) from error
        return ", ".join(f"{package} {version(package)}" for package in _PACKAGES.values())

    def device(self) -> str:
        import torch

        from fedsecure.vision.encoder import choose_device

        chosen = choose_device(self.config.device)
        if chosen.startswith("cuda"):
            room = torch.cuda.get_device_properties(chosen).total_memory
            return f"{torch.cuda.get_device_name(chosen)}, {room / 1e9:.0f} GB"
        return f"{chosen}, {torch.get_num_threads()} threads"

    # --- the records and their ledger, without any run --------------------------------------------------------------

    def datasets(self) -> str:
        sections = [section for section in (self.config.train, self.config.evaluation) if section is not None]
        return ", ".join(f"{section.name}: {detect_format(section.path)}" for section in sections) or "none"

    def ledger(self) -> str:
        file, limits, train = self.config.ledger, self.config.policy, self.config.train
        if not file.exists():
            # The first run makes it, not an examination.
            return f"none yet, so nothing of ε {limits.max_epsilon:g} is spent"
        with Ledger.open_existing(file) as ledger:
            text = f"{ledger.verify()} rows of an unbroken chain"
            if train is None:
                return text
            spent = ledger.epsilon(train.name, "train", limits.delta)
        return f"{text}; {train.name} has spent ε {spent:.2f} of {limits.max_epsilon:g}"

    # --- the run --------------------------------------------------------------------------------------------------

    def encoder(self) -> str:
        config, encoder = self.config, self.settings.encoder
        run_constants(
            self.settings,
            file=config.encoder_file,
            target=config.target_file,
            device=config.device,
            engine=config.engine,
        )
        return f"{encoder.model}, the run's own weights or feature file"

    def training(self) -> str:
        if self.entry.role != "train":
            raise NotHere("this site only evaluates")
        return self._listed(training_section(self.config), declared=self.entry.max_units)

    def evaluation(self) -> str:
        if self.config.evaluation is None or self.entry.evaluation_units == 0:
            raise NotHere("this site evaluates nothing")
        return self._listed(self.config.evaluation, declared=self.entry.evaluation_units)

    def _listed(self, section: DatasetConfig, *, declared: int) -> str:
        """A data set as it is listed; how much it holds is nobody's business but that it is no more than declared."""
        records, unit = open_dataset(section, classes=self.settings.classes), self.settings.privacy.unit
        records.index()
        check_patients(records, unit)
        patients = records.patient_ids if unit == "patient" else None
        check_declared(len(set(records.record_ids if patients is None else patients)), declared, dataset=section.name)
        return f"{section.name}: found, at most the declared {declared:,} units, by {unit}"

    def limits(self) -> str:
        start = starting_state(self.settings)
        rehearse(self.settings, start=start, run=self.run, roster=self.identity.roster, config=self.config)
        return "every question of this run keeps to the file's [policy]"

    def budget(self) -> str:
        if self.entry.role != "train":
            raise NotHere("this site only evaluates")
        config, settings = self.config, self.settings
        plan = checked_plan(settings, load_training_method(settings.method.name))
        with tempfile.TemporaryDirectory() as folder:
            file = config.ledger if config.ledger.exists() else Path(folder) / "ledger.db"
            with Ledger(file) as ledger:
                after = check_budget(settings, plan, config=config, ledger=ledger, run=self.run)
                check_evaluation_budget(settings, self.entry, config=config, ledger=ledger, run=self.run)
        return f"this run would take ε to {after:.2f} of {config.policy.max_epsilon:g}"


CHECKS = (
    Check("configuration", (), Examination.configuration),
    Check("keys", ("configuration",), Examination.keys),
    Check("name", ("configuration",), Examination.name),
    Check("port", ("name",), Examination.port),
    Check("TLS", ("port", "keys"), Examination.tls),
    Check("certificate", ("TLS",), Examination.certificate),
    Check("greeting", ("TLS",), Examination.greeting),
    Check("aggregator", ("greeting",), Examination.aggregator),
    Check("clock", ("greeting",), Examination.clock),
    Check("disk", ("configuration",), Examination.disk),
    Check("packages", (), Examination.packages),
    Check("device", ("configuration", "packages"), Examination.device),
    Check("data sets", ("configuration",), Examination.datasets),
    Check("ledger", ("configuration", "disk"), Examination.ledger),
    Check("encoder", ("aggregator", "device"), Examination.encoder),
    Check("training data", ("aggregator", "data sets"), Examination.training),
    Check("evaluation data", ("aggregator", "data sets"), Examination.evaluation),
    Check("limits", ("aggregator",), Examination.limits),
    Check("budget", ("aggregator", "ledger"), Examination.budget),
)


def examine(file: Path, *, seconds: float = 10.0) -> Iterator[Finding]:
    """The findings of all checks, in order, each as soon as it is there.

    Args:
        file: ``site.toml``.
        seconds: longest wait for the aggregator, a check.
    """
    site, sound = Examination(file, seconds=seconds), set[str]()
    for check in CHECKS:
        missing = next((name for name in check.needs if name not in sound), None)
        finding = _skipped(check, f"needs {missing}") if missing else _found(check, site)
        if finding.state in ("ok", "warning"):
            sound.add(check.name)
        yield finding


def _found(check: Check, site: Examination) -> Finding:
    try:
        found = check.run(site)
    except FedsecureError as error:
        return Finding(check.name, "failed", error.found, error.expected, error.cure, error.code)
    except NotHere as reason:
        return _skipped(check, str(reason))
    if isinstance(found, Concern):
        return Finding(check.name, "warning", found.found, cure=found.cure)
    return Finding(check.name, "ok", found)


def _skipped(check: Check, why: str) -> Finding:
    return Finding(check.name, "skipped", why)


def _until(end: dt.datetime, text: str, cure: str) -> str | Concern:
    """A certificate that is good, and for how long."""
    whole = f"{text}, until {end:%Y-%m-%d}"
    return Concern(whole, cure) if end - dt.datetime.now(dt.UTC) < EXPIRY_NOTICE else whole
