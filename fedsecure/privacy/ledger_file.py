"""The ledger's file: its rows, its private creation, a row's hash, and SQLite's failures in plain words.

Rows of format 1 keep their hashes, so a head that was printed before an upgrade still holds after it (privacy.md §3.9).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fedsecure.errors import LedgerError
from fedsecure.messages import Event, Population, event_from_dict, event_to_dict
from fedsecure.privacy.ledger_schema import BLANK, COLUMNS, COLUMNS_1

State = Literal["RESERVED", "COMMITTED", "VOID", "LIMIT"]

GENESIS = "0" * 64


@dataclass(frozen=True, slots=True)
class Limit:
    """What an officer allows the units of one population of a data set: at most ``epsilon`` at ``delta``."""

    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """A charge that is on disk.

    Attributes:
        id: 32 hexadecimal digits, unique.
        dataset, population: whose units pay.
        events: what they pay.
        epsilon: ε of everything that the unit which has paid most has paid, this included, at the δ asked for.
    """

    id: str
    dataset: str
    population: Population
    events: tuple[Event, ...]
    epsilon: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One row.

    Attributes:
        state: what the row records; ``"LIMIT"`` an officer's limit.
        final: what has become of its reservation since.
        units: digest of the set of units that pay; empty where the charge is by the data set's name.
        limit: the limit that is set, with ``reason``.
        note: a remark of the ledger itself: what the clock read when it had gone back.
    """

    seq: int
    utc: str
    reservation: str
    state: State
    final: State
    dataset: str
    population: Population
    run: str
    round: int
    attempt: int
    events: tuple[Event, ...]
    query_sha256: str
    payload_sha256: str
    reason: str
    units: str
    limit: Limit | None
    note: str
    hash: str


def create_private(path: Path) -> None:
    """Make the folder and, with mode 0600, the file; SQLite gives its companions the same mode."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if path.is_file():
            raise _read_only(path, error.strerror) from error
        raise LedgerError(
            "FS-1250", f"{path} cannot be created ({error.strerror})", expected="a folder this user may write to",
            cure="mend the permissions, or name another place under `ledger`",
        ) from error  # fmt: skip


def sqlite_error(error: sqlite3.Error | UnicodeDecodeError, path: Path, wait: float) -> LedgerError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return held(path, wait)
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return LedgerError(
            "FS-1255", f"{path} cannot be written ({error})", expected="free space on a working disk",
            cure="free space and start again; what was not written was not charged, and nothing was read",
        )  # fmt: skip
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return _read_only(path, str(error))
    if name.startswith("SQLITE_NOTADB"):
        return no_ledger(path)
    return altered(f"SQLite says: {error}", path)


def held(path: Path, wait: float) -> LedgerError:
    return LedgerError(
        "FS-1254", f"{path} has been held by another process for {wait:g} s", expected="its turn within that time",
        cure="let the other run of this site finish its reservation, or stop it",
    )  # fmt: skip


def wrong_argument(found: str, expected: str, cure: str = "report it as a defect") -> LedgerError:
    return LedgerError("FS-1259", found, expected=expected, cure=cure)


def _read_only(path: Path, why: str | None) -> LedgerError:
    return LedgerError(
        "FS-1251", f"{path} cannot be opened for writing ({why})", expected="a file this user may read and write",
        cure="mend its permissions; a site without a writable ledger may not answer",
    )  # fmt: skip


def no_ledger(path: Path) -> LedgerError:
    return LedgerError(
        "FS-1252", f"{path} is not a budget ledger", expected="a file written by this class, or none",
        cure="mend `ledger` in the site's file; never delete a ledger to make room",
    )  # fmt: skip


def altered(what: str, path: Path) -> LedgerError:
    return LedgerError(
        "FS-1256", f"{path} was altered or is damaged: {what}", expected="an unbroken chain of rows",
        cure="stop, keep the file, and tell the data protection officer; a spent budget cannot be guessed",
    )  # fmt: skip


def clock_went_back(path: Path, now: datetime, then: datetime) -> LedgerError:
    read, last = (moment.isoformat(sep=" ", timespec="seconds") for moment in (now, then))
    return LedgerError(
        "FS-1270", f"the clock reads {read}, and the last charge in {path} is of {last}",
        expected="a clock that goes on", cure="set the machine's clock; if it is right now and was ahead before, have "
        "the data protection officer say so with `fedsecure budget set`, and charges go on from there",
    )  # fmt: skip


def row_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 over a row in canonical JSON; a value of a foreign type cannot hash like one of ours."""
    columns = COLUMNS_1 if row["format"] == 1 else COLUMNS
    raw = json.dumps([row[name] for name in columns], separators=(",", ":"), ensure_ascii=True, default=repr).encode()
    tag = b"fedsecure/ledger/v1\0" if row["format"] == 1 else b"fedsecure/ledger/v2\0"
    return hashlib.sha256(tag + raw).hexdigest()


def check_chain(
    rows: Sequence[Mapping[str, Any]], datasets: Mapping[int, str], sets: Mapping[str, Population], path: Path
) -> None:
    """Check rows in order, and that reservations end at most once.

    Args:
        rows: ``COLUMNS`` and hash of every row.
        datasets: key and name of each data set.
        sets: digest and population of each unit set.
        path: for the error.

    Raises:
        LedgerError: FS-1256 a row was altered, removed or put in.
    """
    previous, utc, form = GENESIS, "", 1
    states: dict[str, str] = {}
    paying: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        # A reservation comes first in its story, and once; an end comes second; a limit stands alone.
        before = None if row["state"] in ("RESERVED", "LIMIT") else "RESERVED"
        name, units = row["reservation"], row["unit_set"]
        if (
            row["seq"] != number
            or row["prev_hash"] != previous
            or row["hash"] != row_hash(row)
            or row["format"] < form
            or (row["format"] == 1 and {name: row[name] for name in BLANK} != BLANK)
            or (row["format"] == 2 and row["utc"] < utc)
            or datasets.get(row["dataset"]) != row["dataset_name"]
            or states.get(name) != before
            or (units != "" and sets.get(units) != row["population"])
            or paying.setdefault(name, units) != units
            or (row["state"] == "LIMIT") != (row["limit_at"] != "")
        ):
            raise altered(f"row {number}", path)
        decode_events(row["events"], number)
        decode_limit(row["limit_at"], number)
        states[name], previous, form = row["state"], row["hash"], row["format"]
        utc = max(utc, row["utc"])
    if set(datasets) != {row["dataset"] for row in rows}:
        raise altered("the list of data sets", path)
    if set(sets) != {row["unit_set"] for row in rows} - {""}:
        raise altered("the list of unit sets", path)


def secret_digest(key: bytes) -> str:
    return hashlib.sha256(b"fedsecure/ledger/secret/v1\0" + key).hexdigest()


def encode_events(events: Sequence[Event]) -> str:
    return json.dumps([event_to_dict(event) for event in events], sort_keys=True, separators=(",", ":"))


def decode_events(text: str, seq: int) -> tuple[Event, ...]:
    try:
        return _events(text)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise _unreadable(seq, "events") from error


@lru_cache(maxsize=1024)
def _events(text: str) -> tuple[Event, ...]:
    return tuple(event_from_dict(raw) for raw in json.loads(text))


def encode_limit(limit: Limit) -> str:
    raw = {"delta": float(limit.delta).hex(), "epsilon": float(limit.epsilon).hex()}
    return json.dumps(raw, sort_keys=True, separators=(",", ":"))


def decode_limit(text: str, seq: int) -> Limit | None:
    if text == "":
        return None
    try:
        raw = json.loads(text)
        limit = Limit(float.fromhex(raw["epsilon"]), float.fromhex(raw["delta"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(seq, "a limit") from error
    if not (math.isfinite(limit.epsilon) and limit.epsilon > 0 and 0 < limit.delta < 1):
        raise _unreadable(seq, "a limit")
    return limit


def _unreadable(seq: int, what: str) -> LedgerError:
    return LedgerError(
        "FS-1256", f"row {seq} holds {what} that cannot be read", expected="the canonical form",
        cure="stop, keep the file, and tell the data protection officer; a spent budget cannot be guessed",
    )  # fmt: skip
