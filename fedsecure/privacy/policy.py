"""The site's own limits: the aggregator proposes, these decide, before the ledger is touched (privacy.md §7).

A query is believed only as far as its segments really carry the noise that its events claim. Segments that one unit can
move together count together: their multipliers z_s = σ_i·√honest/Δ compose to 1/√Σ z_s⁻², as the event must say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedsecure.config import PolicyConfig, RunSettings
from fedsecure.errors import PrivacyError
from fedsecure.messages import Event, Population, Query, Segment
from fedsecure.privacy.grid import check_segment, segment_clip_norm
from fedsecure.privacy.ring16 import RING_BITS, clip_room

# One unit moves its class's count of hits and its count of units by at most 1 each.
EVALUATION_SENSITIVITY = math.sqrt(2.0)
_ROUNDING = 1e-9


def collusion(settings: RunSettings, sites: int) -> tuple[int, int]:
    """c and u_min of a cohort, from the public settings (secagg.md §3.5)."""
    rounds = settings.rounds
    colluders = max(1, (sites - 1) // 3) if rounds.colluders == "auto" else rounds.colluders
    least = max((sites + colluders) // 2 + 1, colluders + 2)
    return colluders, least if rounds.min_survivors == "auto" else max(least, rounds.min_survivors)


def check_query(query: Query, settings: RunSettings, policy: PolicyConfig) -> None:
    """Refuse a query that this site's policy does not allow, or whose price is not what its noise is worth.

    Args:
        query: what the aggregator asks.
        settings: the run's public settings, as hashed into the round's context.
        policy: the site's own limits.

    Raises:
        PrivacyError: FS-1216 a run without privacy, FS-1220 method, FS-1221 place of noise, FS-1222 noise multiplier,
            FS-1223 privacy unit, FS-1226 size of the cohort or number of colluders; FS-1224 noise and price disagree,
            FS-1225 a segment without noise is neither public nor privatised step by step, FS-1227 a bound below what a
            unit may contribute;
            FS-1206, FS-1211, FS-1212 from the ring.
    """
    _check_limits(query, settings, policy)
    for segment in query.segments:
        check_segment(segment, len(query.cohort), query.ring_bits)
        if (segment.bound > 0) != (segment.noise_variance > 0):
            raise _inconsistent(
                f"segment {segment.name!r} has bound {segment.bound} and noise variance "
                f"{float(segment.noise_variance):g}"
            )
    noised = [segment for segment in query.segments if segment.noise_variance > 0]
    if noised:
        _check_price(query, settings, noised)
    if len(noised) < len(query.segments):
        _check_bare(query, settings)


def _check_limits(query: Query, settings: RunSettings, policy: PolicyConfig) -> None:
    if query.method not in policy.methods:
        raise _refused("FS-1220", f"method {query.method!r}", ", ".join(policy.methods), "methods")
    trains = any(event.population == "train" for event in query.events)
    place = settings.privacy.noise
    if trains and place not in policy.noise:
        raise _refused("FS-1221", f'noise = "{place}"', " or ".join(policy.noise), "noise")
    if trains and policy.unit == "patient" and settings.privacy.unit == "record":
        raise _refused("FS-1223", 'unit = "record"', 'unit = "patient"', "unit")
    if trains and settings.privacy.no_privacy and not policy.no_privacy:
        raise _refused("FS-1216", f'no privacy ("{settings.privacy.no_privacy}")', "a private run", "no_privacy")
    for event in query.events:
        if event.noise_multiplier < policy.min_noise_multiplier:
            raise _refused(
                "FS-1222",
                f"noise multiplier {event.noise_multiplier:.4g}",
                f"at least {policy.min_noise_multiplier:g}",
                "min_noise_multiplier",
            )
    colluders, _ = collusion(settings, len(query.cohort))
    if len(query.cohort) < policy.min_cohort or colluders < policy.min_colluders:
        raise _refused(
            "FS-1226",
            f"a cohort of {len(query.cohort)} sites with at most {colluders} colluding",
            f"at least {policy.min_cohort} sites and {policy.min_colluders}",
            "min_cohort and min_colluders",
        )


def _check_price(query: Query, settings: RunSettings, noised: list[Segment]) -> None:
    """The door's noise is worth at least what its events claim, for each population that may be in the segments."""
    paying = [event for event in query.events if not by_steps(event, settings)]
    if not paying:
        raise _inconsistent("segments with noise, and no event that pays for them")
    # What one unit can do to all noised segments together, in units of this site's own noise.
    own = 1 / math.sqrt(math.fsum(segment.bound**2 / float(segment.noise_variance) for segment in noised))
    for population in sorted({event.population for event in paying}):
        events = [event for event in paying if event.population == population]
        if any(event.steps != 1 for event in events):
            raise _inconsistent("an event of several steps for noise that the door adds once")
        for segment in noised:
            _check_room(segment, settings, population, query.ring_bits)
        honest = _honest(settings, population, len(query.cohort))
        for claimed, real in (
            (_together(event.noise_multiplier for event in events), own * math.sqrt(honest)),
            (_together(event.local_noise_multiplier for event in events), own),
        ):
            if real < claimed * (1 - _ROUNDING):
                raise _inconsistent(
                    f"noise worth a multiplier of {real:.6g} for {population} units, sold as {claimed:.6g}"
                )


def _check_room(segment: Segment, settings: RunSettings, population: Population, ring_bits: int) -> None:
    """The noise is scaled to the bound, so the bound must hold what this site clips its units to, and the rounding:
    of the sum, or in the ring of 16 bits of each unit, as the door sees to."""
    norm = settings.privacy.max_grad_norm if population == "train" else EVALUATION_SENSITIVITY
    room = segment_clip_norm(segment)
    if ring_bits == RING_BITS:
        room = clip_room(segment.bound, segment.length, rounding="record") * segment.grid
    if room < norm * (1 - _ROUNDING):
        raise PrivacyError(
            "FS-1227",
            f"segment {segment.name!r} has room for {room:.6g} a unit; {population} units contribute up to {norm:.6g}",
            expected="a bound of at least the clip norm",
            cure="do not go on with this aggregator; report it",
        )


def _check_bare(query: Query, settings: RunSettings) -> None:
    """Segments the door adds no noise to: privatised step by step at the site, or counts of public sets."""
    if any(by_steps(event, settings) for event in query.events):
        return
    public = any(entry.evaluation_public for entry in settings.sites.values())
    if public and all(event.population == "evaluation" for event in query.events):
        return
    raise PrivacyError(
        "FS-1225",
        f"method {query.method!r} asks for segments without noise",
        expected='noise from the door, noise = "local", or evaluation sets declared public',
        cure="do not go on with this aggregator; report it",
    )


def by_steps(event: Event, settings: RunSettings) -> bool:
    """Whether the training engine draws this event's noise, a whole share at each local step."""
    return (
        event.population == "train"
        and settings.privacy.noise == "local"
        and event.local_noise_multiplier >= event.noise_multiplier
    )


def _honest(settings: RunSettings, population: Population, sites: int) -> int:
    """Sites whose noise counts. Evaluation: only this one's, since sites without such units add none."""
    if population == "evaluation":
        return 1
    colluders, survivors = collusion(settings, sites)
    return max(1, survivors - colluders)


def _together(multipliers: Iterable[float]) -> float:
    return 1 / math.sqrt(math.fsum(z**-2 for z in multipliers))


def _refused(code: str, found: str, expected: str, key: str) -> PrivacyError:
    return PrivacyError(
        code,
        f"the run asks for {found}, which this site's policy does not allow",
        expected=expected,
        cure=f"agree on other settings with the coordinator, or change {key} under [policy] in the site's file",
    )


def _inconsistent(found: str) -> PrivacyError:
    return PrivacyError(
        "FS-1224",
        found,
        expected="noise worth at least what the query's events say",
        cure="do not go on with this aggregator; report it",
    )
