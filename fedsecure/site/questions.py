"""A site's judgement of what it is asked: everything that can be recomputed is recomputed, and compared.

The aggregator chooses nothing that the site cannot veto. What passes here has the method, layout, noise, price and
context that the run's public settings call for at this point, and breaks none of this site's own floors.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsecure.config import PolicyConfig, RunSettings, SiteConfig
from fedsecure.errors import ProtocolError
from fedsecure.identity.roster import Roster
from fedsecure.messages import Query
from fedsecure.methods.agenda import asked_at, evaluates, question
from fedsecure.methods.base import Ask, ServerState
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.contexts import config_hash, epoch_context, round_context
from fedsecure.privacy.policy import check_query
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.draw import Draw
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.policy import RoundPolicy, check, check_epoch
from fedsecure.site.membership import Membership
from fedsecure.wire import federation_pb2 as pb


@dataclass(frozen=True, slots=True)
class Question:
    """An accepted question, its signed context, and what the settings call for there."""

    query: Query
    descriptor: RoundDescriptor
    ask: Ask


def accept(asked: pb.Ask, member: Membership, *, draw: Draw | None = None) -> Question:
    """Parse a question and recompute all of it.

    Args:
        asked: the question.
        member: this site's place in the run.
        draw: the run's, where it draws its cohorts and this site knows it.

    Raises:
        ProtocolError: FS-1371 malformed, FS-1373 not what the settings call for, FS-1399 another cohort than the one
            drawn, FS-1397 a cohort before the draw, FS-1372 a context of other numbers; others where a floor of this
            site is broken (:func:`fedsecure.secagg.policy.check`).
    """
    try:
        query = Query.from_json(asked.query_json)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, AssertionError, RecursionError) as e:
        raise ProtocolError(
            "FS-1371",
            "a query that cannot be parsed",
            expected="the canonical form of this release",
            cure="install the same fedsecure release on both sides",
        ) from e
    settings = member.settings
    ask = question(settings, query.round, start=member.start)
    called_for = ask and (ask.method, ask.version, ask.segments, ask.ring_bits, ask.events, set(ask.inputs))
    found = (query.method, query.version, query.segments, query.ring_bits, query.events, set(query.inputs))
    sized = all(len(digest) == 32 for digest in query.inputs.values())
    if ask is None or found != called_for or not sized or query.attempt >= settings.rounds.max_attempts:
        raise ProtocolError(
            "FS-1373",
            f"question {query.round}, attempt {query.attempt}, is not what the run's settings call for there",
            expected="the method, segments, events and inputs that this site computes from the same settings",
            cure="do not go on with this aggregator, unless its release of the method is another; report it",
        )
    sites = asked_at(settings, query.round, draw=draw)
    if settings.draws and query.cohort != sites:
        raise ProtocolError(
            "FS-1399",
            f"question {query.round} asks {', '.join(query.cohort[:10])}, and the draw says {', '.join(sites[:10])}",
            expected="the sites that the run's draw has in this round, and all of them in an evaluation",
            cure="do not go on with this aggregator; report it",
        )
    # Which prepared keys a round uses is the aggregator's to say; whether they are there and unused, this site's.
    claimed = RoundDescriptor.parse(asked.descriptor)
    descriptor = round_context(
        settings,
        query,
        roster=member.identity.roster,
        trainers_only=ask.trainers_only,
        epoch=claimed.epoch,
        slot=claimed.slot,
        draw=draw,
    )
    if descriptor.canonical() != asked.descriptor or query.cohort != sites or query.run != member.run:
        raise ProtocolError(
            "FS-1372",
            "the round's context is not what this site computes from the same public settings",
            expected="equal descriptors on both sides",
            cure="do not go on with this aggregator; report it",
        )
    check(
        descriptor,
        query,
        policy=floors(member.config.policy),
        roster=member.identity.roster,
        site=member.config.site,
        config_hash=config_hash(settings, trainers_only=ask.trainers_only, draw=draw),
        base_hash=bytes.fromhex(member.features.fingerprint),
    )
    return Question(query, descriptor, ask)


def accept_set_up(asked: pb.Prepare, member: Membership) -> EpochDescriptor:
    """The context of a set-up of keys, recomputed but for its number.

    Raises:
        ProtocolError: FS-1379 not what this site computes; others where a floor of this site is broken.
    """
    settings, roster = member.settings, member.identity.roster
    descriptor = EpochDescriptor.parse(asked.descriptor)
    expected = epoch_context(settings, run=member.run, number=descriptor.epoch, roster=roster)
    if expected.canonical() != asked.descriptor:
        raise ProtocolError(
            "FS-1379",
            "a set-up of keys that is not what this site computes from the same public settings",
            expected="equal descriptors on both sides",
            cure="do not go on with this aggregator; report it",
        )
    check_epoch(
        descriptor,
        policy=floors(member.config.policy),
        roster=roster,
        site=member.config.site,
        config_hash=settings.digest(),
    )
    return descriptor


def rehearse(settings: RunSettings, *, start: ServerState, run: bytes, roster: Roster, config: SiteConfig) -> None:
    """Refuse a run of which this site would refuse a question, before anybody waits for its answer.

    Every kind of question that the settings call for is put together as the aggregator will, and judged by this site's
    own limits. What only a real one has, its tensors and its draw, is left to :func:`accept`.

    Args:
        settings: the run's public settings, which name the site.
        start: :func:`fedsecure.methods.agenda.starting_state` of these settings.
        run: the run's id, 16 bytes.
        roster: the site's own verified copy.
        config: the site's file.

    Raises:
        ProtocolError, PrivacyError: as :func:`accept` and :func:`fedsecure.privacy.policy.check_query` would.
    """
    rounds, before = settings.method.rounds, int(evaluates(settings, "before"))
    # A method may ask something else first, as prototypes, and in the last of its rounds.
    for round in sorted({0, before, before + 1, before + rounds - 1, before + rounds}):
        ask = question(settings, round, start=start)
        if ask is None:
            continue
        sites, _ = cohort_of(settings, trainers_only=ask.trainers_only)
        if config.site not in sites:
            continue
        if ask.trainers_only and settings.draws:
            others = [site for site in sites if site != config.site][: settings.cohort_size() - 1]
            sites = tuple(site for site in sites if site == config.site or site in others)
        query = Query(
            run=run,
            round=round,
            attempt=0,
            method=ask.method,
            version=ask.version,
            cohort=sites,
            inputs=dict.fromkeys(ask.inputs, bytes(32)),
            segments=ask.segments,
            events=ask.events,
            ring_bits=ask.ring_bits,
        )
        check(
            round_context(settings, query, roster=roster, trainers_only=ask.trainers_only),
            query,
            policy=floors(config.policy),
            roster=roster,
            site=config.site,
            config_hash=settings.digest(),
            base_hash=bytes.fromhex(settings.encoder.fingerprint),
        )
        check_query(query, settings, config.policy)


def floors(limits: PolicyConfig) -> RoundPolicy:
    """What a site's own limits say about a round's secure aggregation."""
    return RoundPolicy(
        min_cohort=limits.min_cohort,
        min_colluders=limits.min_colluders,
        min_threshold=limits.min_threshold,
        min_survivors=limits.min_survivors,
        methods=limits.methods,
        max_wrap_log2=limits.max_wrap_log2,
    )
