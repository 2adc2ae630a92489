"""What a site must remember over restarts so that no round is ever answered twice (secagg.md §3.2, §3.3 R3, R4, §3.6).

Per run: the highest (round, attempt) begun, its context, and whether its survivor set was signed and its
shares given away. Every mark is on disk before the act it stands for; where it cannot be written, the act
does not happen. A file put back from an old backup is not noticed: it belongs with the site's other state.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from fedsecure.errors import ProtocolError

MAX_BYTES = 1 << 24  # about 80,000 runs


class RoundLatch(Protocol):
    """Marks that only ever move forward."""

    def begin(self, run: bytes, round: int, attempt: int, ctx: bytes) -> None:
        """Record that this attempt begins; FS-1345 unless (round, attempt) exceeds all earlier of the run."""

    def mark_signed(self, ctx: bytes) -> None:
        """Record that a survivor set of ``ctx`` is signed; FS-1346 a second time, FS-1347 if not current."""

    def mark_consumed(self, ctx: bytes) -> None:
        """Record that shares of ``ctx`` are given away; FS-1346 a second time, FS-1347 if not current."""


@dataclass(frozen=True, slots=True)
class _Record:
    round: int
    attempt: int
    ctx: str
    signed: bool = False
    consumed: bool = False


def _sound(run: str, record: _Record) -> bool:
    """A mark of another type could pass for one that is not set, so every type counts."""
    types = (type(record.round), type(record.attempt), type(record.signed), type(record.consumed))
    if types != (int, int, bool, bool) or min(record.round, record.attempt) < 0:
        return False
    return len(bytes.fromhex(run)) == 16 and len(bytes.fromhex(record.ctx)) == 32


def _begin(records: dict[str, _Record], run: bytes, round: int, attempt: int, ctx: bytes) -> None:
    last = records.get(run.hex())
    if last is not None and (round, attempt) <= (last.round, last.attempt):
        raise ProtocolError(
            "FS-1345",
            f"round {round}, attempt {attempt} after round {last.round}, attempt {last.attempt}",
            expected="a later round or attempt: one that has begun is never begun again",
            cure="let the aggregator start a new attempt; after a restart of a site that is the only way",
        )
    records[run.hex()] = _Record(round, attempt, ctx.hex())


def _mark(records: dict[str, _Record], ctx: bytes, name: str) -> None:
    for run, record in records.items():
        if record.ctx == ctx.hex():
            if getattr(record, name):
                raise ProtocolError(
                    "FS-1346",
                    f"round {record.round}, attempt {record.attempt} is already {name}",
                    expected="one survivor set and one set of shares for each attempt, ever",
                    cure="let the aggregator start a new attempt; asking twice is an attack or a fault there",
                )
            signed, consumed = name == "signed" or record.signed, name == "consumed" or record.consumed
            records[run] = replace(record, signed=signed, consumed=consumed)
            return
    raise ProtocolError(
        "FS-1347",
        "an attempt that is not the current one of its run",
        expected="the attempt that began last",
        cure="let the aggregator go on with the newest attempt",
    )


class MemoryLatch:
    """Marks in memory: for simulations and tests; a restart forgets them."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def begin(self, run: bytes, round: int, attempt: int, ctx: bytes) -> None:
        _begin(self._records, run, round, attempt, ctx)

    def mark_signed(self, ctx: bytes) -> None:
        _mark(self._records, ctx, "signed")

    def mark_consumed(self, ctx: bytes) -> None:
        _mark(self._records, ctx, "consumed")


class FileLatch:
    """Marks in a JSON file, replaced atomically and fsynced; processes that share it take turns.

    Raises (all methods):
        ProtocolError: FS-1348 the file is damaged, FS-1349 it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, run: bytes, round: int, attempt: int, ctx: bytes) -> None:
        with self._open() as records:
            _begin(records, run, round, attempt, ctx)

    def mark_signed(self, ctx: bytes) -> None:
        with self._open() as records:
            _mark(records, ctx, "signed")

    def mark_consumed(self, ctx: bytes) -> None:
        with self._open() as records:
            _mark(records, ctx, "consumed")

    @contextmanager
    def _open(self) -> Iterator[dict[str, _Record]]:
        try:
            with open(self._path.with_name(self._path.name + ".lock"), "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                records = self._read()
                yield records
                self._write(records)
        except OSError as error:
            raise ProtocolError(
                "FS-1349",
                f"{self._path} cannot be read or written ({error.strerror})",
                expected="a writable state folder with free space",
                cure="mend the folder's permissions or free some space; the round was not answered",
            ) from error

    def _read(self) -> dict[str, _Record]:
        try:
            with self._path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return {}
        try:
            if len(raw) > MAX_BYTES:
                raise ValueError("too large")
            records = {str(run): _Record(**record) for run, record in json.loads(raw)["runs"].items()}
            if not all(_sound(run, record) for run, record in records.items()):
                raise TypeError("wrong types")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(
                "FS-1348",
                f"{self._path} is damaged ({type(error).__name__})",
                expected="the record of rounds that this site has answered",
                cure="put it back from a backup; deleting it is safe only once the run is over",
            ) from error
        return records

    def _write(self, records: dict[str, _Record]) -> None:
        raw = json.dumps({"runs": {run: asdict(record) for run, record in records.items()}})
        if len(raw) > MAX_BYTES:  # ASCII; one that is never read back would refuse all rounds of all runs
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        folder = self._path.parent
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=self._path.name)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
