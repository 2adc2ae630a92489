"""Joining: what a site is part of, checked whole before anything is charged or read.

The aggregator's welcome names the run and its settings. A site takes neither method, roles, encoder nor budget on
trust: what does not fit its own files, its roster or its ledger ends the session here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fedsecure.config import DatasetConfig, RunSettings, SiteConfig, SiteEntry
from fedsecure.errors import ConfigError, PrivacyError, ProtocolError
from fedsecure.identity.provision import Identity
from fedsecure.learning.features import SiteFeatures
from fedsecure.messages import Population
from fedsecure.methods.agenda import starting_state
from fedsecure.methods.base import ServerState, TrainingMethod
from fedsecure.methods.cohorts import check_roles, cohort_of
from fedsecure.methods.constants import run_constants
from fedsecure.methods.evaluate import count_events
from fedsecure.methods.registry import load_training_method
from fedsecure.privacy.ledger import Ledger
from fedsecure.privacy.payers import Payers
from fedsecure.privacy.plan import PrivacyPlan, paid_by
from fedsecure.site.line import Moment, Progress
from fedsecure.wire import federation_pb2 as pb

RUN_BYTES = 16
# Four bytes each; what a broadcast may hold at most (fedsecure.transport.tensors).
MAX_PARAMETERS = 1 << 28


@dataclass(frozen=True, slots=True)
class Membership:
    """One site's place in one run.

    Attributes:
        config, identity: the site's own.
        run: 16 bytes, the run's id.
        settings: the run's public settings, as this site checked them.
        entry: what they say about this site.
        method, plan, start: the training method, its privacy plan, and its state before the first question.
        features: the run's encoder or feature file, of the settings' fingerprint.
    """

    config: SiteConfig
    identity: Identity
    run: bytes
    settings: RunSettings
    entry: SiteEntry
    method: TrainingMethod
    plan: PrivacyPlan
    start: ServerState
    features: SiteFeatures

    @property
    def evaluation_public(self) -> bool:
        """Public only if the federation and this site's own file both say so."""
        section = self.config.evaluation
        return bool(section and section.public and self.entry.evaluation_public)


def accept_welcome(
    reply: pb.JoinReply, *, config: SiteConfig, identity: Identity, ledger: Ledger, progress: Progress
) -> Membership:
    """The membership that an aggregator's welcome amounts to.

    Raises:
        ProtocolError: FS-1377 the run id is none.
        ConfigError: FS-1006 the run does not name this site, FS-1007 no data to train on, FS-1008 settings of another
            release, FS-1011, FS-1012 settings that this site's file contradicts, FS-1013 too large an adapter.
        IdentityError: FS-1450, FS-1455 from the roster.
        PrivacyError: the plan does not stand, or (FS-1201) does not fit what is left of this site's budget.
        ModelError, DataError: the encoder or feature file is not the run's.
    """
    settings = RunSettings.parse(reply.settings_json)
    run = bytes(reply.run)
    if len(run) != RUN_BYTES:
        raise ProtocolError(
            "FS-1377",
            f"a run id of {len(run)} bytes",
            expected=f"{RUN_BYTES} random bytes",
            cure="install the same fedsecure release on both sides",
        )
    entry = entry_of(settings, config.site)
    check_roles(settings, identity.roster)
    check_settings(settings, entry, config)
    method = load_training_method(settings.method.name)
    plan = checked_plan(settings, method)
    if entry.role == "train":
        check_budget(settings, plan, config=config, ledger=ledger, run=run)
    check_evaluation_budget(settings, entry, config=config, ledger=ledger, run=run)
    start = starting_state(settings)
    progress(Moment(f"joined {settings.name}"))
    features = run_constants(
        settings,
        file=config.encoder_file,
        target=config.target_file,
        device=config.device,
        engine=config.engine,
    )
    return Membership(config, identity, run, settings, entry, method, plan, start, features)


def check_identity(identity: Identity, config: SiteConfig) -> None:
    """The keys are those of the site that the file names; ConfigError FS-1005."""
    if identity.site != config.site:
        raise ConfigError(
            "FS-1005",
            f"site = {config.site!r} with the identity of {identity.site!r}",
            expected="the site's own identity folder",
            cure="correct `site` or `identity` in the site's file",
        )


def entry_of(settings: RunSettings, site: str) -> SiteEntry:
    """What a run's settings say about a site; ConfigError FS-1006."""
    entry = settings.sites.get(site)
    if entry is None:
        raise ConfigError(
            "FS-1006",
            f"the run's settings do not name {site!r}",
            expected="an entry under [sites]",
            cure="ask the coordinator to add this site",
        )
    return entry


def training_section(config: SiteConfig) -> DatasetConfig:
    """Where a training site's records are; ConfigError FS-1007."""
    if config.train is None:
        raise ConfigError(
            "FS-1007",
            f"{config.site!r} is a training site without a [train] data set",
            expected="a [train] section",
            cure="add it to the site's file",
        )
    return config.train


def check_settings(settings: RunSettings, entry: SiteEntry, config: SiteConfig) -> None:
    """What a site does not take from an aggregator, whatever method and budget say."""
    section, source = config.evaluation, settings.encoder.pretrained
    if section is not None and entry.evaluation_public and not section.public:
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


def checked_plan(settings: RunSettings, method: TrainingMethod) -> PrivacyPlan:
    """The run's privacy plan, of a size that this site can hold; ConfigError FS-1013, and the plan's own errors."""
    _, cohort = cohort_of(settings, trainers_only=True)
    plan = method.plan(settings, cohort)
    if plan.parameters > MAX_PARAMETERS:
        raise ConfigError(
            "FS-1013",
            f"an adapter of {plan.parameters:,} parameters",
            expected=f"at most {MAX_PARAMETERS:,}",
            cure="ask the coordinator for a smaller adapter",
        )
    return plan


def check_budget(
    settings: RunSettings,
    plan: PrivacyPlan,
    *,
    config: SiteConfig,
    ledger: Ledger,
    run: bytes,
    units: Payers | None = None,
) -> float:
    """Refuse a run that cannot fit this site's budget before anything is charged; returns ε after it.

    ``units``: of the training set. Without them, which no data set is opened for, what they have paid under another
    name is not seen.
    """
    train = training_section(config)
    _check_delta(config, plan.units[config.site], train.name)
    # After a restart in the middle of a run, the rounds charged before are spent, not ahead.
    mine = _charged_rounds(ledger, train.name, "train", run)
    ahead = paid_by(config.site, plan.events_of(max(0, plan.asked - mine)), settings)
    return ledger.afford(
        dataset=train.name,
        population="train",
        events=ahead,
        limit_epsilon=config.policy.max_epsilon,
        delta=config.policy.delta,
        units=units,
    )


def check_evaluation_budget(
    settings: RunSettings, entry: SiteEntry, *, config: SiteConfig, ledger: Ledger, run: bytes
) -> None:
    """The same for a private evaluation set: all evaluations of the run fit, or none is begun."""
    section = config.evaluation
    if section is None or entry.evaluation_units == 0 or entry.evaluation_public:
        return
    _check_delta(config, entry.evaluation_units, section.name)
    ahead = max(0, len(settings.evaluation.when) - _charged_rounds(ledger, section.name, "evaluation", run))
    ledger.afford(
        dataset=section.name,
        population="evaluation",
        events=count_events(settings) * ahead,
        limit_epsilon=config.policy.max_evaluation_epsilon,
        delta=config.policy.delta,
    )


def _check_delta(config: SiteConfig, units: int, dataset: str) -> None:
    """A limit at a δ that gives whole units away is none."""
    delta = config.policy.delta
    if delta * units >= 1:
        raise PrivacyError(
            "FS-1273",
            f"[policy] delta = {delta:g} in this site's file, with up to {units} units in {dataset!r}",
            expected=f"δ below 1/{units}, better below 1/{10 * units}",
            cure="choose a smaller delta in the site's file",
        )


def _charged_rounds(ledger: Ledger, dataset: str, population: Population, run: bytes) -> int:
    return len({e.round for e in ledger.history(dataset, population) if e.run == run.hex()})
