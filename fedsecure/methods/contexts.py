"""The signed contexts of a run, from its public settings: of a round (secagg.md §3.2) and of keys set up ahead (§3.7).

The aggregator and every site build them here from the same numbers, and a site compares: what differs is refused.
"""

from __future__ import annotations

from fedsecure.config import RunSettings
from fedsecure.identity.roster import Roster
from fedsecure.messages import Query
from fedsecure.methods.cohorts import cohort_of, tossers
from fedsecure.secagg.coin import Record, Toss
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.draw import Draw
from fedsecure.secagg.epoch_descriptor import EpochDescriptor


def round_context(
    settings: RunSettings,
    query: Query,
    *,
    roster: Roster,
    trainers_only: bool,
    epoch: bytes = b"",
    slot: int = 0,
    draw: Draw | None = None,
) -> RoundDescriptor:
    """The descriptor of one attempt.

    Args:
        settings: the run's public settings.
        query: the question of this attempt.
        roster: the builder's own verified copy.
        trainers_only: whose c and u_min hold, as in the question's ``Ask``.
        epoch, slot: prepared keys, if the attempt uses any.
        draw: the run's, if it has one.

    Raises:
        ProtocolError: what the descriptor's constructor raises.
    """
    _, cohort = cohort_of(settings, trainers_only=trainers_only)
    return RoundDescriptor.from_query(
        query,
        roster=roster,
        config_hash=config_hash(settings, trainers_only=trainers_only, draw=draw),
        base_hash=bytes.fromhex(settings.encoder.fingerprint),
        colluders=cohort.colluders,
        min_survivors=cohort.min_survivors,
        epoch=epoch,
        slot=slot,
    )


def config_hash(settings: RunSettings, *, trainers_only: bool, draw: Draw | None) -> bytes:
    """``config_hash`` of a round: of the public settings and, in a training round with a draw, of its seed."""
    return draw.bind(settings.digest()) if draw is not None and trainers_only else settings.digest()


def toss_context(settings: RunSettings, *, run: bytes, number: int, parties: tuple[str, ...], roster: Roster) -> Toss:
    """Toss number ``number`` for the run's draw."""
    _, required = tossers(settings)
    return Toss(run, roster.hash, settings.digest(), number, parties, required)


def draw_of(settings: RunSettings, record: Record) -> Draw:
    """The draw that a checked record is the seed of."""
    sites, _ = tossers(settings)
    return Draw(sites, settings.cohort_size(), record.seed)


def epoch_context(settings: RunSettings, *, run: bytes, number: int, roster: Roster) -> EpochDescriptor:
    """The descriptor of the run's set-up of keys number ``number``, for its training cohort.

    Raises:
        ProtocolError: what the descriptor's constructor raises.
    """
    sites, cohort = cohort_of(settings, trainers_only=True)
    return EpochDescriptor.choose(
        sites,
        run_id=run,
        epoch=number,
        slots=settings.rounds.prepared_rounds,
        roster=roster,
        config_hash=settings.digest(),
        colluders=cohort.colluders,
        min_survivors=cohort.min_survivors,
    )
