"""The budget ledger: what each privacy unit has paid, written before its records are read (privacy.md §3.9 and §7).

Rows are only ever appended: a reservation, later its commit or its void, each with the hash of the row before.
RESERVED and COMMITTED both count as spent; only a durable VOID, for reasons outside the data, gives a reservation
back. ε is never stored: it is recomputed from the events. A charge is against all units of a data set, as keyed
hashes: whatever set shares a unit with an earlier one inherits the largest spend among them, under any name.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedsecure.errors import BudgetExceeded, LedgerError
from fedsecure.messages import Event, Population
from fedsecure.privacy import accounting
from fedsecure.privacy.ledger_file import (
    Entry,
    Limit,
    Reservation,
    State,
    decode_events,
    decode_limit,
    encode_events,
    encode_limit,
    wrong_argument,
)
from fedsecure.privacy.ledger_head import Head
from fedsecure.privacy.ledger_store import LedgerStore
from fedsecure.privacy.payers import Payers, hash_names, other
from fedsecure.privacy.report_text import SEEDED
from fedsecure.privacy.unit_sets import Account, Charge, Overlaps, UnitSet, accounts, store_set

POPULATIONS: tuple[Population, ...] = ("train", "evaluation")
# Of an officer's limit.
LARGEST_DELTA = 1e-3
# The accountant's own rounding.
MARGIN = 1 + 1e-9

__all__ = ["Entry", "Ledger", "Limit", "Reservation", "State"]


class Ledger(LedgerStore):
    """The ledger of one site. Use as a context manager, or close it.

    Several processes may hold the same file; every change is one ``IMMEDIATE`` transaction.

    Args:
        path: the SQLite file; created with mode 0600 where there is none. Beside it lies ``<name>.head``, a copy of the
            last row's hash.
        wait_seconds: longest wait for another process.
        renew_head: a head known from elsewhere that the ledger must hold; the lost copy is then written anew.

    Raises:
        LedgerError: FS-1250 the folder cannot be written, FS-1251 nor the file, FS-1252 it is no ledger, FS-1253 it is
            from a newer release, FS-1254 another process holds it, FS-1255 no space or a failing disk, FS-1256 it was
            altered, FS-1262 it is older than the copy of its head, FS-1263 that copy cannot be written, FS-1264 nor
            read.
    """

    def __init__(self, path: Path | str, *, wait_seconds: float = 10.0, renew_head: Head | None = None) -> None:
        self._overlaps = Overlaps()
        super().__init__(path, wait_seconds=wait_seconds, renew_head=renew_head)

    def hash_units(self, ids: Iterable[str], population: Population = "train") -> list[bytes]:
        """HMAC-SHA256 with the site's secret over population and id, 32 bytes for each id, in order.

        A patient and a record of one name hash alike; tell them apart in the id.
        """
        return hash_names(ids, population, self.key)

    # --- charging ------------------------------------------------------------------------------------------------

    def reserve(
        self,
        *,
        dataset: str,
        population: Population,
        events: Sequence[Event],
        run: str,
        round: int,
        attempt: int,
        query_digest: bytes,
        limit_epsilon: float,
        delta: float,
        units: Sequence[bytes] | Payers | None = None,
        seeded: bool = False,
    ) -> Reservation:
        """Charge a data set before it is read. When this returns, the charge survives a crash of the machine.

        Args:
            dataset: its name in the site's configuration.
            population: whose units pay; all events are about them.
            events: what the answer will cost.
            run, round, attempt: which question; each triple is charged at most once per data set and population.
            query_digest: SHA-256 of the query, 32 bytes.
            limit_epsilon: the site's own limit for this population, over all runs; a limit in the ledger may be less.
            delta: δ at which the limit holds.
            units: *all* units the data set holds, sampled or not: :class:`Payers`, or :meth:`hash_units` of them.
                ``None`` charges the name.
            seeded: the noise comes from a seed and protects nobody, which the row then says.

        Raises:
            BudgetExceeded: FS-1201, with projected ε, spent ε and limit; nothing was charged.
            LedgerError: FS-1257 charged already, FS-1259 an argument is wrong, FS-1265 the data set's units are all
                others than before, FS-1270 the clock went back, FS-1271 a patient has been charged by record, FS-1272
                a unit in the other population; FS-1254, FS-1255, FS-1262 to FS-1264.
        """
        paying = units if isinstance(units, Payers) else None
        whose = self._checked(dataset, population, events, units)
        if len(query_digest) != 32:
            raise wrong_argument(f"a query digest of {len(query_digest)} bytes", "SHA-256, 32 bytes")
        with self._transaction():
            taken = self._db.execute(
                "SELECT 1 FROM entries WHERE state = 'RESERVED' AND dataset_name = ? AND population = ? AND run = ?"
                " AND round = ? AND attempt = ?",
                (dataset, population, run, round, attempt),
            ).fetchone()
            if taken:
                raise LedgerError(
                    "FS-1257", f"round {round}, attempt {attempt} of run {run[:8]} has been charged to {dataset!r}",
                    expected="a new attempt: new batch, new noise, new charge",
                    cure="answer the aggregator's next attempt instead",
                )  # fmt: skip
            self._check_met(dataset, population, paying)
            after = self._afford(dataset, population, events, whose, Limit(limit_epsilon, delta))
            reservation = Reservation(secrets.token_hex(16), dataset, population, tuple(events), after)
            if whose is not None:
                store_set(self._db, whose)
            self._append(
                reservation=reservation.id,
                state="RESERVED",
                dataset_name=dataset,
                population=population,
                run=run,
                round=round,
                attempt=attempt,
                events=encode_events(events),
                query_sha256=query_digest.hex(),
                unit_set="" if whose is None else whose.digest,
                reason=SEEDED if seeded else "",
            )
        return reservation

    def afford(
        self,
        *,
        dataset: str,
        population: Population,
        events: Sequence[Event],
        limit_epsilon: float,
        delta: float,
        units: Sequence[bytes] | Payers | None = None,
    ) -> float:
        """What ε would be after some events, without charging them; arguments and errors as for :meth:`reserve`."""
        paying = units if isinstance(units, Payers) else None
        whose = self._checked(dataset, population, events, units)
        with self._snapshot():
            self._check_met(dataset, population, paying)
            return self._afford(dataset, population, events, whose, Limit(limit_epsilon, delta))

    def commit(self, reservation: Reservation | str, payload_sha256: bytes) -> None:
        """Record what is about to leave for a reservation; call it before the first byte is sent.

        Raises:
            LedgerError: FS-1258 the reservation is unknown, committed already or void.
        """
        self._end(reservation, "COMMITTED", payload_sha256=payload_sha256.hex())

    def void(self, reservation: Reservation | str, reason: str) -> None:
        """Give a reservation back, for good: only for reasons outside the data, when no byte of the upload left.

        Raises:
            LedgerError: FS-1258 the reservation is unknown, committed or void already; FS-1259 no reason is given.
        """
        self._check_reason(reason)
        self._end(reservation, "VOID", reason=reason)

    def set_limit(self, dataset: str, population: Population, limit: Limit, *, reason: str) -> None:
        """Record an officer's limit for whatever units the data set holds; the last one counts.

        A lower limit than what is spent stops further charges; it gives nothing back.

        Raises:
            LedgerError: FS-1267 ε or δ is out of range, FS-1259 no reason is given.
        """
        # Whatever the data set: at a larger δ a limit says next to nothing, and what is left of it looks large.
        if not (0 < limit.epsilon < math.inf and 0 < limit.delta <= LARGEST_DELTA):
            raise LedgerError(
                "FS-1267", f"a limit of ε = {limit.epsilon!r} at δ = {limit.delta!r}",
                expected=f"a finite ε above 0, and δ in (0, {LARGEST_DELTA:g}], best below a tenth of 1/units",
                cure="name a limit that can be kept",
            )  # fmt: skip
        self._check_reason(reason)
        self._checked(dataset, population, (), None)
        with self._transaction():
            self._append(
                reservation=secrets.token_hex(16),
                state="LIMIT",
                dataset_name=dataset,
                population=population,
                limit_at=encode_limit(limit),
                reason=reason,
            )

    def _end(self, reservation: Reservation | str, state: State, *, payload_sha256: str = "", reason: str = "") -> None:
        name = reservation if isinstance(reservation, str) else reservation.id
        kept = ("dataset_name", "population", "run", "round", "attempt", "events", "query_sha256", "unit_set")
        with self._transaction():
            rows = self._db.execute(
                f"SELECT state, {', '.join(kept)} FROM entries WHERE reservation = ? ORDER BY seq",  # noqa: S608
                (name,),
            ).fetchall()
            if [row[0] for row in rows] != ["RESERVED"]:
                raise LedgerError(
                    "FS-1258",
                    f"reservation {name[:8]} is {rows[-1][0] if rows else 'unknown'} and was to become {state}",
                    expected="a reservation that is neither committed nor void",
                    cure="a charge ends once; ask for a new attempt",
                )
            values: dict[str, Any] = dict(zip(kept, rows[0][1:], strict=True))
            self._append(reservation=name, state=state, payload_sha256=payload_sha256, reason=reason, **values)

    # --- what is spent -------------------------------------------------------------------------------------------

    def spent(
        self,
        dataset: str,
        population: Population,
        *,
        units: Sequence[bytes] | None = None,
        delta: float = 1e-5,
    ) -> tuple[Event, ...]:
        """All events that the unit which has paid most has paid or reserved, over all runs; voids do not count.

        Args:
            dataset, population: under which name; charges by name count for every unit ever charged under it.
            units: hashes of the units that are asked about; by default all that were charged under the name.
            delta: δ by which histories with Poisson sampling are compared.
        """
        whose = self._checked(dataset, population, (), units)
        with self._snapshot():
            found = self._accounts(dataset, population, whose, frozenset())
        return max(found, key=lambda account: accounting.epsilon(account.events, delta=delta)).events

    def epsilon(
        self, dataset: str, population: Population, delta: float, *, units: Sequence[bytes] | None = None
    ) -> float:
        """ε(δ) of :meth:`spent`, against the aggregator with at most c sites."""
        return accounting.epsilon(self.spent(dataset, population, units=units, delta=delta), delta=delta)

    def limits(self) -> dict[tuple[str, Population], Limit]:
        """The limits in force, by data set and population."""
        with self._snapshot():
            rows = self._db.execute(
                "SELECT dataset_name, population, limit_at, seq FROM entries WHERE state = 'LIMIT' ORDER BY seq"
            ).fetchall()
        found = {(name, population): decode_limit(text, seq) for name, population, text, seq in rows}
        return {key: limit for key, limit in found.items() if limit is not None}

    def history(self, dataset: str | None = None, population: Population | None = None) -> tuple[Entry, ...]:
        """All rows in order, of one data set and population or of all.

        Raises:
            LedgerError: FS-1256 a row cannot be read.
        """
        with self._snapshot():
            rows = self._rows()
        final = {row["reservation"]: row["state"] for row in rows}
        same = ("seq", "utc", "reservation", "state", "population", "run", "round", "attempt", "query_sha256")
        return tuple(
            Entry(
                **{name: row[name] for name in (*same, "payload_sha256", "reason", "note", "hash")},
                final=final[row["reservation"]],
                dataset=row["dataset_name"],
                events=decode_events(row["events"], row["seq"]),
                units=row["unit_set"],
                limit=decode_limit(row["limit_at"], row["seq"]),
            )
            for row in rows
            if dataset in (None, row["dataset_name"]) and population in (None, row["population"])
        )

    def datasets(self) -> tuple[str, ...]:
        """Names of all data sets that were ever charged or given a limit."""
        with self._lock, self._errors():
            return tuple(name for (name,) in self._db.execute("SELECT name FROM datasets ORDER BY key"))

    # --- inside --------------------------------------------------------------------------------------------------

    def _checked(
        self,
        dataset: str,
        population: Population,
        events: Sequence[Event],
        units: Sequence[bytes] | Payers | None,
    ) -> UnitSet | None:
        if population not in POPULATIONS or not dataset or any(event.population != population for event in events):
            raise wrong_argument(
                f"{len(events)} event(s) for {population!r} units of {dataset!r}",
                "a named data set, and events about that population only",
            )
        hashes = units.units if isinstance(units, Payers) else units
        return None if hashes is None else UnitSet.of(population, hashes)

    def _check_met(self, dataset: str, population: Population, paying: Payers | None) -> None:
        """That no unit has been charged as what it must not have been; inside a snapshot."""
        if paying is not None and self._charged(other(population), paying.elsewhere):
            raise LedgerError(
                "FS-1272", f"units of {dataset!r} have been charged as {other(population)} units before",
                expected="every unit in the training set or in the private evaluation set, over all runs",
                cure="split as in the runs before; for a larger evaluation set take units that were never trained on",
            )  # fmt: skip
        if paying is not None and self._charged(population, paying.by_record):
            raise LedgerError(
                "FS-1271", f"patients of {dataset!r} have been charged by record before",
                expected='unit = "patient" in every run over these patients: what one record paid is not what a '
                "patient with several has paid",
                cure="go on by record, where [policy] unit allows it, or take patients that were never used by record",
            )  # fmt: skip

    def _charged(self, population: Population, hashes: Sequence[bytes]) -> bool:
        """Whether a charge that counts was made for one of some units."""
        if not hashes:
            return False
        paid = self._db.execute(
            "SELECT DISTINCT s.key FROM unit_sets s JOIN entries e ON e.unit_set = s.digest WHERE e.population = ?"
            " AND e.state = 'RESERVED' AND e.reservation NOT IN (SELECT reservation FROM entries WHERE state = 'VOID')",
            (population,),
        ).fetchall()
        keys = {key for (key,) in paid}
        return bool(keys) and any(p & keys for p in self._overlaps.patterns(self._db, UnitSet.of(population, hashes)))

    def _check_reason(self, reason: str) -> None:
        if not reason.strip():
            raise wrong_argument("no reason", "a sentence for the record", "say why")

    def _afford(
        self, dataset: str, population: Population, events: Sequence[Event], whose: UnitSet | None, policy: Limit
    ) -> float:
        """ε after the events for the unit that has paid most; refused where it would pass a limit."""
        self._check_clock()
        limits = {name: limit for (name, about), limit in self.limits().items() if about == population}
        largest = 0.0
        for account in self._accounts(dataset, population, whose, frozenset(limits)):
            largest = max(largest, accounting.epsilon((*account.events, *events), delta=policy.delta))
            named = [(name, limit) for name, limit in limits.items() if name in account.names]
            for name, limit in [("", policy), *named]:
                before = accounting.epsilon(account.events, delta=limit.delta)
                after = accounting.epsilon((*account.events, *events), delta=limit.delta)
                if after > limit.epsilon * MARGIN:
                    source = f" (`fedsecure budget set` for {name!r})" if name else " (the site's policy)"
                    raise BudgetExceeded(
                        "FS-1201",
                        f"{population} units of data set {dataset!r} would reach ε = {after:.3f} "
                        f"(spent so far {before:.3f})",
                        expected=f"at most ε = {limit.epsilon:g} at δ = {limit.delta:g}{source}",
                        cure="ask for a smaller target_epsilon or fewer rounds, or have the data protection officer "
                        "raise the limit in the site's policy or with `fedsecure budget set`",
                    )
        return largest

    def _accounts(
        self, dataset: str, population: Population, whose: UnitSet | None, limited: frozenset[str]
    ) -> list[Account]:
        """What the units have paid that can have paid most; inside a snapshot."""
        stored = self._db.execute("SELECT digest, key, base IS NOT NULL OR length(added) > 0 FROM unit_sets").fetchall()
        keys = {digest: key for digest, key, _ in stored}
        filled = {key for _, key, units in stored if units}
        void = {name for (name,) in self._db.execute("SELECT reservation FROM entries WHERE state = 'VOID'")}
        rows = self._db.execute(
            "SELECT dataset_name, unit_set, events, seq, reservation FROM entries"
            " WHERE state = 'RESERVED' AND population = ? ORDER BY seq",
            (population,),
        ).fetchall()
        charges, links = list[Charge](), dict[str, set[int]]()
        for name, digest, text, seq, reservation in rows:
            links.setdefault(name, set()).update([keys[digest]] if digest else [])
            if reservation not in void:
                charges.append(Charge(name, keys.get(digest), decode_events(text, seq)))
        under = frozenset(links.get(dataset, ()))
        if whose is None:
            patterns = Overlaps.of_name(self._db, under, population) if under else []
        else:
            patterns = self._overlaps.patterns(self._db, whose)
            paid = under & filled & {charge.units for charge in charges}
            if paid and len(whose) and not any(pattern & paid for pattern in patterns):
                raise LedgerError(
                    "FS-1265", f"data set {dataset!r} holds none of the {population} units it was charged for before",
                    expected="the units of before, with others or without",
                    cure="if they are new patients, give the data set another name; if their ids were changed, restore "
                    "them: a new id is no new budget",
                )  # fmt: skip
        fixed = {name: frozenset(found) for name, found in links.items()}
        return accounts(charges, fixed, patterns, dataset=dataset, limited=limited)
