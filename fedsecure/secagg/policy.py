"""A site's own floors for a round, checked before it makes a single key (secagg.md §2.7, §3.2, §3.5, §4.2).

The server chooses nothing that a site cannot veto: thresholds, colluders, cohort, model, configuration and
ring are all compared with what the site computed or configured itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedsecure.errors import IdentityError, ProtocolError
from fedsecure.identity.roster import Roster
from fedsecure.messages import Query
from fedsecure.secagg.descriptor import RoundDescriptor, hash_query
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.ring import wrap_probability_log2
from fedsecure.secagg.thresholds import MIN_SITES, Mode, Thresholds, minimum_survivors, minimum_threshold

NoiseFloor = Callable[[RoundDescriptor, Query], None]
MAX_WRAP_LOG2 = -40.0


@dataclass(frozen=True, slots=True)
class RoundPolicy:
    """What a site insists on.

    Attributes:
        min_cohort: least n, at least 3.
        min_colluders: least c, at least 1.
        min_threshold: least t beside that of n, c and the mode.
        min_survivors: least u_min beside max(t, c+2).
        methods: allowed methods; ``None`` allows every installed one.
        modes: allowed adversary models.
        max_wrap_log2: most log2 of the chance that a coordinate of the sum wraps around; at most −40.

    Raises:
        ProtocolError: FS-1390 a floor below those of the protocol itself.
    """

    min_cohort: int = MIN_SITES
    min_colluders: int = 1
    min_threshold: int = 2
    min_survivors: int = MIN_SITES
    methods: tuple[str, ...] | None = None
    modes: tuple[Mode, ...] = (Mode.ACTIVE,)
    max_wrap_log2: float = MAX_WRAP_LOG2

    def __post_init__(self) -> None:
        # Not an assertion: these hold with ``python -O`` too. Comparisons are written so that NaN fails.
        sound = self.min_cohort >= MIN_SITES and self.min_colluders >= 1 and self.max_wrap_log2 <= MAX_WRAP_LOG2
        if not sound or not self.modes:
            raise ProtocolError(
                "FS-1390",
                f"a policy with min_cohort={self.min_cohort}, min_colluders={self.min_colluders}, "
                f"max_wrap_log2={self.max_wrap_log2}, {len(self.modes)} mode(s)",
                expected=f"min_cohort >= {MIN_SITES}, min_colluders >= 1, max_wrap_log2 <= {MAX_WRAP_LOG2:g}, a mode",
                cure="raise the floors in this site's policy",
            )


def check(
    descriptor: RoundDescriptor,
    query: Query,
    *,
    policy: RoundPolicy,
    roster: Roster,
    site: str,
    config_hash: bytes,
    base_hash: bytes,
    noise_floor: NoiseFloor | None = None,
) -> None:
    """Refuse a round that breaks a floor; returns where it breaks none.

    Args:
        descriptor: as received.
        query: as received; ``query.inputs`` must hold hashes that the site computed from the tensors it has.
        policy: this site's floors.
        roster: this site's own verified copy.
        site: own id.
        config_hash: hash of the public settings this site joined with.
        base_hash: fingerprint of the encoder this site holds.
        noise_floor: raises ``PrivacyError`` where the round's noise is below the site's own floor.

    Raises:
        ProtocolError: FS-1330 mode, FS-1331 cohort too small, FS-1332 t, FS-1333 u_min, FS-1334 c, FS-1335
            cohort outside the roster, FS-1336 own site absent, FS-1337 other roster, FS-1338 other model,
            FS-1339 other configuration or encoder, FS-1340 descriptor and query differ, FS-1341 the sum may
            wrap around, FS-1342 method not allowed.
    """
    _check_parties(descriptor, policy=policy, roster=roster, site=site)
    if descriptor.model_hash != _model_hash(query):
        raise _refuse("FS-1338", "a model hash of other tensors", "the hash of the tensors received")
    if descriptor.config_hash != config_hash or descriptor.base_hash != base_hash:
        what = "settings" if descriptor.config_hash != config_hash else "encoder"
        raise _refuse("FS-1339", f"a round for another {what}", f"the {what} this site joined with")
    same = (query.run, query.round, query.attempt, query.cohort, query.segments, query.ring_bits, hash_query(query))
    if same != (
        descriptor.run_id,
        descriptor.round,
        descriptor.attempt,
        descriptor.cohort,
        descriptor.segments,
        descriptor.ring_bits,
        descriptor.query_hash,
    ):
        raise _refuse("FS-1340", "a descriptor of another query", "the descriptor of the query received")
    if policy.methods is not None and query.method not in policy.methods:
        allowed = ", ".join(policy.methods)
        raise _refuse("FS-1342", f"method {query.method!r}", f"one of {allowed}")
    wrap = wrap_log2(descriptor)
    if not wrap <= policy.max_wrap_log2:
        raise _refuse(
            "FS-1341",
            f"a ring that may overflow with probability 2^{wrap:.0f}",
            f"at most 2^{policy.max_wrap_log2:.0f}",
        )
    if noise_floor is not None:
        noise_floor(descriptor, query)


def check_epoch(
    descriptor: EpochDescriptor, *, policy: RoundPolicy, roster: Roster, site: str, config_hash: bytes
) -> None:
    """Refuse the set-up of an epoch that breaks a floor; each of its rounds is checked again by :func:`check`.

    Args and errors as :func:`check`, as far as they concern the sites, the thresholds and the configuration.
    """
    _check_parties(descriptor, policy=policy, roster=roster, site=site)
    if descriptor.config_hash != config_hash:
        raise _refuse("FS-1339", "an epoch for other settings", "the settings this site joined with")


def _check_parties(
    descriptor: RoundDescriptor | EpochDescriptor, *, policy: RoundPolicy, roster: Roster, site: str
) -> None:
    n, c, t, u = len(descriptor.cohort), descriptor.colluders, descriptor.threshold, descriptor.min_survivors
    if descriptor.mode not in policy.modes:
        allowed = ", ".join(mode.name for mode in policy.modes)
        raise _refuse("FS-1330", f"mode {descriptor.mode.name}", f"one of {allowed}")
    if n < policy.min_cohort:
        raise _refuse("FS-1331", f"a cohort of {n} sites", f"at least {policy.min_cohort}")
    if c < policy.min_colluders:
        raise _refuse("FS-1334", f"protection against c={c} colluding sites", f"c >= {policy.min_colluders}")
    if descriptor.neighbours:
        # Not the constructor's word for it: the bounds of the sparse graph are worked out here again.
        Thresholds(n, c, t, u, descriptor.mode, descriptor.neighbours)
        least, most = policy.min_threshold, descriptor.neighbours
    else:
        least, most = max(minimum_threshold(n, c, mode=descriptor.mode), policy.min_threshold), n
    if not least <= t <= most:
        raise _refuse("FS-1332", f"threshold t={t} for n={n}, c={c}", f"{least} <= t <= {most}")
    least = max(minimum_survivors(t, c), policy.min_survivors)
    if not least <= u <= n:
        raise _refuse("FS-1333", f"u_min={u} for n={n}, t={t}, c={c}", f"{least} <= u_min <= {n}")
    if descriptor.roster_hash != roster.hash:
        raise _refuse("FS-1337", "a round for another roster", f"roster {roster.hash.hex()[:16]}…")
    for member in descriptor.cohort:
        try:
            roster.find(member)
        except IdentityError as error:
            raise _refuse("FS-1335", f"{member!r} in the cohort", "sites of the roster only") from error
    if site not in descriptor.cohort:
        raise _refuse("FS-1336", f"a cohort without {site!r}", "a cohort with this site in it")


def _model_hash(query: Query) -> bytes | None:
    """The hash of the query's tensors; ``None`` where a tensor has a name that no text encoding knows."""
    try:
        return query.model_hash
    except UnicodeEncodeError:
        return None


def wrap_log2(descriptor: RoundDescriptor) -> float:
    """log2 of the chance that any coordinate of the round's sum wraps around: the segments' bounds added.

    0 where a segment's noise is beyond every float.
    """
    try:
        return _wrap_log2(descriptor)
    except OverflowError:
        return 0.0


def _wrap_log2(descriptor: RoundDescriptor) -> float:
    logs = [
        wrap_probability_log2(
            len(descriptor.cohort),
            segment.length,
            clamp=segment.clamp,
            noise_std=segment.noise_std,
            bits=descriptor.ring_bits,
        )
        for segment in descriptor.segments
    ]
    top = max(logs)
    return top if math.isinf(top) else min(0.0, top + math.log2(sum(2.0 ** (x - top) for x in logs)))


def _refuse(code: str, found: str, expected: str) -> ProtocolError:
    return ProtocolError(
        code,
        f"the aggregator asks for {found}",
        expected=expected,
        cure="change the round at the aggregator, or this site's policy if its owner agrees",
    )
