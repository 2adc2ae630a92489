"""Sets of privacy units, as keyed hashes, and what the units of one set have paid (privacy.md, "Evasion").

A set is stored once, against the set before it where that is shorter, and charged by its digest. Which units share
a history is found by refining a partition: one pass for each stored set, whatever the number of units or of charges.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedsecure.messages import Event, Population
from fedsecure.privacy.ledger_file import altered, wrong_argument
from fedsecure.privacy.ledger_schema import lost_at_the_end

HASH_BYTES = 32
MAX_UNITS = 1 << 24
_KEPT = 8
_MOST_ACCOUNTS = 64

Hashes = npt.NDArray[np.bytes_]
_NONE = np.zeros(0, f"S{HASH_BYTES}")


@dataclass(frozen=True, slots=True, eq=False)
class UnitSet:
    """Distinct units of one population.

    Attributes:
        population: whose units they are.
        hashes: (n,) 32-byte keyed hashes, sorted and distinct; n = 0 is allowed.
        digest: SHA-256 over population and sorted hashes, in hexadecimal.
    """

    population: Population
    hashes: Hashes
    digest: str

    @classmethod
    def of(cls, population: Population, units: Sequence[bytes]) -> UnitSet:
        """The set of some keyed hashes, in any order, repeated or not.

        Raises:
            LedgerError: FS-1259 a hash is not of 32 bytes, or there are more than 2^24.
        """
        if len(units) > MAX_UNITS or any(len(unit) != HASH_BYTES for unit in units):
            raise wrong_argument(
                f"{len(units)} unit hashes, or some of another length",
                f"at most {MAX_UNITS} keyed hashes of {HASH_BYTES} bytes",
                "use Ledger.hash_units",
            )
        return cls.sorted(population, np.unique(np.frombuffer(b"".join(units), _NONE.dtype)))

    @classmethod
    def sorted(cls, population: Population, hashes: Hashes) -> UnitSet:
        """The set of hashes that are sorted and distinct already."""
        sha = hashlib.sha256(b"fedsecure/ledger/units/v1\0" + population.encode() + b"\0")
        sha.update(hashes.tobytes())
        return cls(population, hashes, sha.hexdigest())

    def __len__(self) -> int:
        return len(self.hashes)


def _among(hashes: Hashes, others: Hashes) -> npt.NDArray[np.bool_]:
    """Which of some hashes are among others; both sorted."""
    if not len(others):
        return np.zeros(len(hashes), np.bool_)
    place = np.searchsorted(others, hashes)
    return np.asarray(others[np.minimum(place, len(others) - 1)] == hashes)


def store_set(db: sqlite3.Connection, units: UnitSet) -> None:
    """Write a set that is not stored yet, inside the caller's transaction."""
    if db.execute("SELECT 1 FROM unit_sets WHERE digest = ?", (units.digest,)).fetchone():
        return
    base, added, removed = None, units.hashes, _NONE
    same = [(key, hashes) for key, population, hashes in _last(db) if population == units.population]
    for key, before in same:
        more, less = units.hashes[~_among(units.hashes, before)], before[~_among(before, units.hashes)]
        if len(more) + len(less) < len(units):
            base, added, removed = key, more, less
    db.execute(
        "INSERT INTO unit_sets (digest, population, base, added, removed) VALUES (?, ?, ?, ?, ?)",
        (units.digest, units.population, base, added.tobytes(), removed.tobytes()),
    )


def _last(db: sqlite3.Connection) -> list[tuple[int, Population, Hashes]]:
    """The last set of each population."""
    return list({population: (key, population, hashes) for key, population, hashes in _stored(db)}.values())


def _stored(db: sqlite3.Connection) -> Iterator[tuple[int, Population, Hashes]]:
    """Key, population and hashes of every set, in order; a set is based on the one before it of its population."""
    last: dict[Population, tuple[int, Hashes]] = {}
    rows = db.execute("SELECT key, population, base, added, removed FROM unit_sets ORDER BY key")
    for key, population, base, added, removed in rows:
        hashes = np.frombuffer(added, _NONE.dtype)
        if base is not None:
            known, before = last[population]
            if known != base:
                raise ValueError("based on another set")
            kept = before[~_among(before, np.frombuffer(removed, _NONE.dtype))]
            hashes = np.sort(np.concatenate([kept, hashes]))
        last[population] = key, hashes
        yield key, population, hashes


def check_sets(db: sqlite3.Connection, path: Path) -> dict[str, Population]:
    """Recompute the digest of every stored set; returns digest and population of each.

    Raises:
        LedgerError: FS-1256 a set was altered, removed or put in.
    """
    digests = [row for (row,) in db.execute("SELECT digest FROM unit_sets ORDER BY key")]
    found: dict[str, Population] = {}
    try:
        for number, (key, population, hashes) in enumerate(_stored(db), start=1):
            units = UnitSet.sorted(population, hashes)
            if key != number or units.digest != digests[number - 1] or bool((hashes[1:] <= hashes[:-1]).any()):
                raise ValueError("its units do not hash to its name")
            found[units.digest] = population
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise altered(f"unit set {len(found) + 1} ({error})", path) from error
    if lost_at_the_end(db, "unit_sets", len(digests)):
        raise altered("unit sets are missing at the end", path)
    return found


@dataclass(slots=True)
class Partition:
    """The units of one set by the stored sets they are in: ``patterns[labels[i]]`` are the keys for unit i."""

    labels: npt.NDArray[np.int64]
    patterns: list[frozenset[int]]
    upto: int = 0

    def refine(self, key: int, inside: npt.NDArray[np.bool_]) -> None:
        if inside.any():
            found, self.labels = np.unique(2 * self.labels + inside, return_inverse=True)
            self.patterns = [self.patterns[n // 2] | ({key} if n % 2 else frozenset()) for n in found.tolist()]
        self.upto = key


@dataclass(slots=True)
class Overlaps:
    """Partitions of the sets used last; stored sets never change, so each is looked at once."""

    _known: dict[str, Partition] = field(default_factory=dict)

    def patterns(self, db: sqlite3.Connection, units: UnitSet) -> list[frozenset[int]]:
        """For each kind of unit in the set, the keys of all stored sets that hold it."""
        made = self._known.pop(units.digest, None) or Partition(np.zeros(len(units), np.int64), [frozenset()])
        (newest,) = db.execute("SELECT coalesce(max(key), 0) FROM unit_sets").fetchone()
        if newest > made.upto:
            for key, population, hashes in _stored(db):
                if key > made.upto and population == units.population:
                    made.refine(key, _among(units.hashes, hashes))
            made.upto = newest
        self._known[units.digest] = made
        while len(self._known) > _KEPT:
            self._known.pop(next(iter(self._known)))
        return made.patterns

    @staticmethod
    def of_name(db: sqlite3.Connection, keys: frozenset[int], population: Population) -> list[frozenset[int]]:
        """The same for all units of several stored sets together."""
        sets = [(key, hashes) for key, whose, hashes in _stored(db) if whose == population]
        whole = _NONE
        for key, hashes in sets:
            if key in keys:
                whole = np.union1d(whole, hashes)
        made = Partition(np.zeros(len(whole), np.int64), [frozenset()])
        for key, hashes in sets:
            made.refine(key, _among(whole, hashes))
        return made.patterns


@dataclass(frozen=True, slots=True)
class Charge:
    """One charge that counts: the name it was made under, the key of the units' set or None, and its events."""

    name: str
    units: int | None
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Account:
    """What some units have paid, and every name they were ever charged under."""

    events: tuple[Event, ...]
    names: frozenset[str]


def accounts(
    charges: Sequence[Charge],
    links: Mapping[str, frozenset[int]],
    patterns: Sequence[frozenset[int]],
    *,
    dataset: str,
    limited: frozenset[str],
) -> list[Account]:
    """The accounts that can be the worst, for units of some patterns that are charged under ``dataset`` now.

    A charge by name binds whatever set was ever charged under that name, since nobody knows whose it was.

    Args:
        charges: all that count, of one population, in order.
        links: name → keys of the sets ever charged under it.
        patterns: keys of the sets that hold a unit, for each kind of unit.
        dataset: the present name.
        limited: names that have limits of their own; accounts are told apart by those.

    Returns:
        At least one. Exact for full batch; where more than 64 Poisson histories differ, one that is no less than any.
    """
    groups: dict[frozenset[str], dict[tuple[int, ...], Account]] = {}
    for pattern in {frozenset[int](), *patterns}:
        names = frozenset({dataset, *(name for name, keys in links.items() if keys & pattern)})
        counted = tuple(
            number
            for number, charge in enumerate(charges)
            if (charge.name in names if charge.units is None else charge.units in pattern)
        )
        group = groups.setdefault(names & limited | {dataset}, {})
        if counted not in group:
            group[counted] = Account(tuple(e for number in counted for e in charges[number].events), names)
    return [account for group in groups.values() for account in _worst(list(group.values()))]


def _worst(found: list[Account]) -> list[Account]:
    if all(event.sampling_rate == 1 for account in found for event in account.events):
        # Full batch: ε grows with μ² whatever is added later, so the largest stays the largest.
        return [max(found, key=lambda account: math.fsum(e.steps / e.noise_multiplier**2 for e in account.events))]
    counts = [_composition(account) for account in found]
    if len(found) <= _MOST_ACCOUNTS:
        return [
            account
            for number, account in enumerate(found)
            if not any(
                counts[number] <= other and (counts[number] != other or number > place)
                for place, other in enumerate(counts)
                if place != number
            )
        ]
    most: Counter[Event] = Counter()
    for count in counts:
        most |= count
    names = frozenset[str]().union(*(account.names for account in found))
    return [Account(tuple(event for event, times in most.items() for _ in range(times)), names)]


def _composition(account: Account) -> Counter[Event]:
    return Counter(account.events)
