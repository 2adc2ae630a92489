"""The signed contexts of a run, from its public settings: of a round (secagg.md §3.2) and of keys set up ahead (§3.7).

The aggregator and every site build them here from the same numbers, and a site compares: what differs is refused.
"""

from __future__ import annotations

from fedsecure.config import RunSettings
from fedsecure.identity.roster import Roster
from fedsecure.messages import Query
from fedsecure.methods.cohorts import cohort_of
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch_descriptor import EpochDescriptor


def round_context(
    settings: RunSettings, query: Query, *, roster: Roster, trainers_only: bool, epoch: bytes = b"", slot: int = 0
) -> RoundDescriptor:
    """The descriptor of one attempt.

    Args:
        settings: the run's public settings.
        query: the question of this attempt.
        roster: the builder's own verified copy.
        trainers_only: whose c and u_min hold, as in the question's ``Ask``.
        epoch, slot: prepared keys, if the attempt uses any.

    Raises:
        ProtocolError: what the descriptor's constructor raises.
    """
    _, cohort = cohort_of(settings, trainers_only=trainers_only)
    return RoundDescriptor.from_query(
        query,
        roster=roster,
        config_hash=settings.digest(),
        base_hash=bytes.fromhex(settings.encoder.fingerprint),
        colluders=cohort.colluders,
        min_survivors=cohort.min_survivors,
        epoch=epoch,
        slot=slot,
    )


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
