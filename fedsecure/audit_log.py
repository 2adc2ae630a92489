"""An append-only log in which every line holds the hash of the line before, on the disk before anything goes on.

One JSON object a line (JSON Lines), in canonical form: sorted keys, no spaces, ASCII. ``hash`` is SHA-256 over the
canonical form of the other fields, ``prev`` among them, so each line vouches for all before it. The newest line is
vouched for by its *head*, ``lines:hash``, filed away elsewhere: against it a log that was cut, or written anew, is
found out. A log can also carry checkpoints, signatures of its head by the member's identity key. docs/observability.md
has the format and how to check it without this package.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from fedsecure.errors import ConfigError, EnvironmentProblem

Fact = str | int | float | bool | None | Sequence[str]
Sign = Callable[[bytes], bytes]
Check = Callable[[bytes, bytes], bool]
MAX_LINE = 1 << 20
START = "0" * 64
CHECKPOINT, HEALED = "checkpoint", "log-healed"
PURPOSE = "fedsecure/audit-log/checkpoint/v1"
_HEAD = re.compile(r"(0|[1-9]\d{0,17}):([0-9a-f]{64})")
_TIMES = (int, float)
_FIELDS = {"at", "event", "facts", "hash", "prev", "seq"}


@dataclass(frozen=True, slots=True)
class Head:
    """The newest line: how many lines there are, and its hash. ``str()`` is what to file away."""

    lines: int = 0
    hash: str = START

    def __str__(self) -> str:
        return f"{self.lines}:{self.hash}"

    @staticmethod
    def parse(text: str) -> Head:
        """Raises ConfigError FS-1040 where it is none."""
        match = _HEAD.fullmatch(text.strip())
        if match is None:
            raise ConfigError(
                "FS-1040",
                f"{text[:80]!r} is no head of an audit log",
                expected="lines:hash, as in 42:0f1e… (64 digits)",
                cure="copy it from an earlier `fedsecure audit-log verify`",
            )
        return Head(int(match[1]), match[2])


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: number from 1, unix time in seconds, what happened, and its facts."""

    seq: int
    at: float
    event: str
    facts: Mapping[str, Any]
    prev: str
    hash: str

    @property
    def head(self) -> Head:
        return Head(self.seq, self.hash)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check of a whole log found, all of it in order.

    Attributes:
        head: of the newest line; ``events`` counts lines by event; ``began`` and ``ended`` are unix times, or None.
        torn: bytes after the last whole line. A process died while it wrote them; the next append heals the log.
        healed: lines that say so of an earlier time.
        checkpoints: their number; ``signed``: those whose signature was checked and holds.
    """

    head: Head
    events: Mapping[str, int]
    began: float | None = None
    ended: float | None = None
    torn: int = 0
    signed: int = 0

    @property
    def healed(self) -> int:
        return self.events.get(HEALED, 0)

    @property
    def checkpoints(self) -> int:
        return self.events.get(CHECKPOINT, 0)


@dataclass(slots=True)
class AuditLog:
    """Appends to one log. Several processes, and threads, may: each append holds the file's lock.

    Args:
        path: of the log; made where it is not there.
        sign: signs a checkpoint's bytes; without it there are none.
        every: lines after which a checkpoint follows by itself.
        wait_seconds: longest wait for another process that is appending.
    """

    path: Path
    sign: Sign | None = None
    every: int = 1000
    wait_seconds: float = 10.0
    _known: tuple[int, int] = (0, -1)  # inode and size when this object last looked
    _head: Head = field(default_factory=Head)

    def append(self, event: str, facts: Mapping[str, Fact] | None = None, *, at: float | None = None) -> Entry:
        """Add one line; it is on disk when this returns.

        Args:
            event: what happened, in words with hyphens.
            facts: JSON scalars and lists of strings; nothing about a record, no key and no tensor.
            at: unix time; now by default.

        Raises:
            EnvironmentProblem: FS-1820 it cannot be written, FS-1821 its last line is damaged, FS-1822 another process
                holds it. Nothing is half written then.
            ValueError, TypeError: facts of another kind, or more than 1 MiB of them.
        """
        _check_facts(event, facts or {})
        with self._opened() as file:
            entry = self._write(file, event, facts or {}, at)
            if self.sign is not None and entry.seq % self.every == 0:
                self._checkpoint(file, self.sign)
            return entry

    def checkpoint(self) -> None:
        """Sign the head as it is; nothing where this log has no ``sign``. Raises as :meth:`append`."""
        if self.sign is not None:
            with self._opened() as file:
                self._checkpoint(file, self.sign)

    def head(self) -> Head:
        """The newest line, healing a torn one. Raises as :meth:`append`."""
        with self._opened():
            return self._head

    # --- inside -----------------------------------------------------------------------------------------------------

    def _checkpoint(self, file: FileIO, sign: Sign) -> None:
        self._write(file, CHECKPOINT, {"signature": sign(str(self._head).encode()).hex()}, None)

    def _write(self, file: FileIO, event: str, facts: Mapping[str, Fact], at: float | None) -> Entry:
        """One line at the end of the locked file, or nothing."""
        at = round(time.time() if at is None else at, 3)
        body: dict[str, Any] = {"at": at, "event": event, "facts": dict(facts)}
        body |= {"prev": self._head.hash, "seq": self._head.lines + 1}
        entry = Entry(**body, hash=_hash(body))
        line = _canonical({**body, "hash": entry.hash}) + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(f"an audit line of {len(line)} bytes")
        end = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(line)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError as error:
            self._known = (0, -1)
            with suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise _unwritable(self.path, error) from error
        self._head = entry.head
        self._known = (os.fstat(file.fileno()).st_ino, end + len(line))
        return entry

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        """The file, locked, with :attr:`_head` as it is now."""
        try:
            file = self._locked()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        with file:
            stat = os.fstat(file.fileno())
            if (stat.st_ino, stat.st_size) != self._known:
                self._catch_up(file, stat.st_size)
            yield file

    def _locked(self) -> FileIO:
        deadline = time.monotonic() + self.wait_seconds
        while True:
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            file = FileIO(descriptor, "r+")
            try:
                while not _take(file):
                    if time.monotonic() > deadline:
                        raise _held(self.path, self.wait_seconds)
                    time.sleep(0.002)
                # Renamed or removed while this waited: what is there now is the log.
                if self.path.exists() and self.path.stat().st_ino == os.fstat(descriptor).st_ino:
                    if new:
                        _sync_folder(self.path.parent)
                    return file
            except BaseException:
                file.close()
                raise
            file.close()

    def _catch_up(self, file: FileIO, size: int) -> None:
        """Read the end: another process may have appended, or died while it did."""
        start = max(0, size - 2 * MAX_LINE)
        file.seek(start)
        tail = _read(file, size - start)
        whole, torn = tail[: tail.rfind(b"\n") + 1], tail[tail.rfind(b"\n") + 1 :]
        if not whole and start:
            raise _damaged(self.path, "its end", "no line within 2 MiB")
        last = whole[:-1].rpartition(b"\n")[2]
        if whole:
            entry = _parse(last)
            if isinstance(entry, str):
                raise _damaged(self.path, "its last line", entry)
            self._head = entry.head
        else:
            self._head = Head()
        self._known = (os.fstat(file.fileno()).st_ino, size)
        if torn:
            # No append that returned ended like this, so nothing that was vouched for is lost.
            try:
                os.ftruncate(file.fileno(), size - len(torn))
            except OSError as error:
                raise _unwritable(self.path, error) from error
            facts: dict[str, Fact] = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
            self._write(file, HEALED, facts, None)


def entries(path: Path) -> Iterator[Entry]:
    """Every whole line, each checked against the one before; the torn end of a log is left out.

    Raises:
        EnvironmentProblem: FS-1821 a line is damaged, missing, out of order or put in, FS-1823 it cannot be read.
    """
    for found in _walk(path):
        if isinstance(found, Entry):
            yield found


def _walk(path: Path) -> Iterator[Entry | int]:
    """As :func:`entries`, and at the end the number of bytes after the last whole line, if there are any."""
    head = Head()
    for line in _lines(path):
        if not line.endswith(b"\n"):
            yield len(line)
            return
        number = f"line {head.lines + 1}"
        entry = _parse(line[:-1])
        if isinstance(entry, str):
            raise _damaged(path, number, entry)
        if entry.seq != head.lines + 1:
            raise _damaged(path, number, f"it calls itself line {entry.seq}")
        if entry.prev != head.hash:
            raise _damaged(path, number, "it does not follow the line before")
        head = entry.head
        yield entry


def verify(path: Path, *, head: Head | None = None, check: Check | None = None) -> Verdict:
    """Check a whole log.

    Args:
        head: filed away earlier; the log must still hold that line.
        check: (bytes, signature) → whether the log's member signed them; checkpoints are checked with it.

    Raises:
        EnvironmentProblem: as :func:`entries`; FS-1824 the line of ``head`` is not there: the log was cut or written
            anew; FS-1825 a checkpoint's signature is false.
    """
    events: dict[str, int] = {}
    found, at, signed, torn, before = head is None or head == Head(), list[float](), 0, 0, Head()
    for entry in _walk(path):
        if isinstance(entry, int):
            torn = entry
            break
        events[entry.event] = events.get(entry.event, 0) + 1
        at = [*at[:1], entry.at]
        found = found or entry.head == head
        if entry.event == CHECKPOINT and check is not None:
            signature = entry.facts.get("signature")
            if not isinstance(signature, str) or not check(str(before).encode(), _bytes(signature)):
                raise EnvironmentProblem(
                    "FS-1825",
                    f"{path}, line {entry.seq}: a checkpoint that its member did not sign",
                    expected="signatures by the identity key in the roster",
                    cure="check against the right roster and member; else somebody has rewritten this log: keep it",
                )
            signed += 1
        before = entry.head
    if not found:
        raise EnvironmentProblem(
            "FS-1824",
            f"{path} has {before.lines} lines, and none of them is line {head}",
            expected="every line that the log ever held",
            cure="look for the newest copy of the log; if there is none, it was cut or written anew: report it",
        )
    return Verdict(before, events, at[0] if at else None, at[-1] if at else None, torn, signed)


def _check_facts(event: str, facts: Mapping[str, Fact]) -> None:
    if not event or len(event) > 100:
        raise ValueError("an event's name has 1 to 100 characters")
    for name, value in facts.items():
        if isinstance(value, list | tuple):
            kind = all(isinstance(item, str) for item in value)
        else:
            kind = value is None or type(value) in (str, int, float, bool)
        if not kind or not isinstance(name, str):
            raise TypeError(f"fact {name!r} is a {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"fact {name!r} is not finite")


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _parse(line: bytes) -> Entry | str:
    """A line by itself, or what is wrong with it."""
    try:
        body = json.loads(line)
        if not isinstance(body, dict) or set(body) != _FIELDS or _canonical(body) != line:
            return "not the canonical form of an entry"
        entry = Entry(**body)
        if (type(entry.seq), type(entry.event), type(entry.facts)) != (int, str, dict) or type(entry.at) not in _TIMES:
            return "not the canonical form of an entry"
    except (ValueError, RecursionError):
        return "no JSON"
    stated = body.pop("hash")
    return entry if _hash(body) == stated else "its hash is not that of its content"


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                yield line if len(line) <= MAX_LINE else line[:MAX_LINE] + b"\n"
    except OSError as error:
        raise _unreadable(path, error) from error


def _bytes(digits: str) -> bytes:
    try:
        return bytes.fromhex(digits)
    except ValueError:
        return b""


def _read(file: FileIO, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count and (part := file.read(count - len(parts))):
        parts += part
    return bytes(parts)


def _take(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        "FS-1820",
        f"the audit log {path} cannot be written ({error.strerror})",
        expected="a line on disk before anything goes on",
        cure="free space or mend the permissions; what was logged before stands",
    )


def _unreadable(path: Path, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        "FS-1823",
        f"the audit log {path} cannot be read ({error.strerror})",
        expected="an audit log of a site or an aggregator",
        cure="name the file, such as state/audit.log, and read it as the user who wrote it",
    )


def _damaged(path: Path, where: str, what: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        "FS-1821",
        f"the audit log {path} is damaged at {where}: {what}",
        expected="an unbroken chain of lines",
        cure="find out who or what changed it; keep this file under another name, and a new log begins",
    )


def _held(path: Path, seconds: float) -> EnvironmentProblem:
    return EnvironmentProblem(
        "FS-1822",
        f"another process has held the audit log {path} for {seconds:g} s",
        expected="processes that append and let go",
        cure="see which one it is (`fuser`), and end it if it hangs",
    )
