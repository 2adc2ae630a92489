"""The audit log: whatever is done to its bytes is found, and no crash, full disk or second process breaks it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsecure import audit_log
from fedsecure.audit_log import CHECKPOINT, HEALED, PURPOSE, AuditLog, Head, entries, verify
from fedsecure.errors import ConfigError, EnvironmentProblem
from fedsecure.identity import keys

many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FACTS = st.dictionaries(
    st.text(max_size=8),
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.lists(st.text(max_size=5), max_size=3),
    max_size=4,
)


def written(path: Path, lines: int = 6, *, event: str = "thing-happened", **options: Any) -> AuditLog:
    log = AuditLog(path, **options)
    for number in range(lines):
        log.append(event, {"round": number, "site": "site-ä", "cohort": ["a", "b"]}, at=1000.0 + number)
    return log


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Head, list[bytes]]:
    """A log of six lines, its head, and the lines of another log that has seven."""
    folder = tmp_path_factory.mktemp("logs")
    log, other = written(folder / "audit.log"), written(folder / "other.log", 7, event="other-thing")
    return log.path.read_bytes(), log.head(), other.path.read_bytes().splitlines(keepends=True)


def refused(path: Path, head: Head) -> str:
    """The code with which a log is found to be another than its head says; fails where it passes."""
    with pytest.raises(EnvironmentProblem) as caught:
        verify(path, head=head)
    return caught.value.code


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FACTS, max_size=5))
def test_what_is_written_is_read_back(tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    path = tmp_path / "audit.log"
    path.unlink(missing_ok=True)
    log = AuditLog(path)
    for each in facts:
        log.append("event", each)
    assert [dict(entry.facts) for entry in entries(path)] == facts if facts else not path.exists()
    if facts:
        assert verify(path, head=log.head()).head == log.head()


def test_a_line_can_be_checked_by_hand(tmp_path: Path) -> None:
    log = written(tmp_path / "audit.log")
    before = "0" * 64
    for number, line in enumerate(log.path.read_text().splitlines(), 1):
        body = json.loads(line)
        stated = body.pop("hash")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        assert stated == hashlib.sha256(text.encode()).hexdigest()
        assert (body["seq"], body["prev"]) == (number, before)
        before = stated
    assert str(log.head()) == f"6:{before}"
    assert log.path.stat().st_mode & 0o777 == 0o600


@many
@given(st.data())
def test_an_edited_removed_inserted_or_doubled_byte_is_found(
    tmp_path: Path, intact: tuple[bytes, Head, list[bytes]], data: st.DataObject
) -> None:
    path, (whole, head, _) = tmp_path / "audit.log", intact
    at = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["edit", "remove", "insert", "double", "cut"]))
    if kind == "edit":
        other = data.draw(st.integers(0, 255).filter(lambda value: value != whole[at]))
        changed = whole[:at] + bytes([other]) + whole[at + 1 :]
    elif kind == "remove":
        changed = whole[:at] + whole[at + 1 :]
    elif kind == "insert":
        changed = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at:]
    elif kind == "double":
        changed = whole[:at] + whole[at : at + 1] + whole[at:]
    else:
        changed = whole[:at]
    path.write_bytes(changed)
    assert refused(path, head) in {"FS-1821", "FS-1824"}


@many
@given(st.data())
def test_a_removed_moved_doubled_or_foreign_line_is_found(
    tmp_path: Path, intact: tuple[bytes, Head, list[bytes]], data: st.DataObject
) -> None:
    path, (whole, head, foreign) = tmp_path / "audit.log", intact
    lines = whole.splitlines(keepends=True)
    i, j = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    kind = data.draw(st.sampled_from(["remove", "swap", "double", "foreign", "replace"]))
    changed = list(lines)
    if kind == "remove":
        del changed[i]
    elif kind == "swap":
        changed[i], changed[j] = changed[j], changed[i]
    elif kind == "double":
        changed.insert(j, lines[i])
    elif kind == "foreign":
        changed.insert(i, foreign[6])
    else:
        # Whole and of the right number, from another log: only what follows it says that it does not belong.
        changed[i] = foreign[i]
    path.write_bytes(b"".join(changed))
    if changed == lines:
        assert verify(path, head=head).head == head
    else:
        assert refused(path, head) in {"FS-1821", "FS-1824"}


def test_only_the_head_finds_a_cut_or_a_log_written_anew(tmp_path: Path) -> None:
    log = written(tmp_path / "audit.log")
    head, lines = log.head(), log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:4]))
    assert verify(log.path).head.lines == 4, "the chain alone cannot tell"
    assert refused(log.path, head) == "FS-1824"
    log.path.unlink()
    forger = AuditLog(log.path)
    for number in range(9):
        forger.append("nothing-happened", {"round": number})
    assert verify(log.path).head.lines == 9
    assert refused(log.path, head) == "FS-1824"


def test_a_chain_that_skips_a_number_is_no_chain(tmp_path: Path) -> None:
    path, before = tmp_path / "audit.log", "0" * 64
    with path.open("w") as file:
        for number in (1, 3):
            body = {"at": 1, "event": "event", "facts": {}, "prev": before, "seq": number}
            before = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
            file.write(json.dumps({**body, "hash": before}, sort_keys=True, separators=(",", ":")) + "\n")
    with pytest.raises(EnvironmentProblem, match="FS-1821.*line 3"):
        verify(path)


def test_an_earlier_head_holds_for_a_log_that_went_on(tmp_path: Path) -> None:
    log = written(tmp_path / "audit.log")
    earlier = Head.parse(str(log.head()))
    log.append("more")
    assert verify(log.path, head=earlier).head.lines == 7
    assert verify(log.path, head=Head()).head.lines == 7
    for text in ("", "6", "6:abc", "06:" + "0" * 64, "6:" + "G" * 64):
        with pytest.raises(ConfigError, match="FS-1040"):
            Head.parse(text)


# --- crashes ----------------------------------------------------------------------------------------------------------


def test_a_line_torn_anywhere_is_healed_and_said_so(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    written(path, 3)
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    third = whole.index(b"\n", second) + 1
    for end in range(third + 1, len(whole), 7):
        path.write_bytes(whole[:end])
        found = verify(path)
        assert (found.head.lines, found.torn) == (2, end - third)
        AuditLog(path).append("went-on")
        assert [entry.event for entry in entries(path)] == ["thing-happened"] * 2 + [HEALED, "went-on"]
        healed = list(entries(path))[2].facts
        assert healed == {"bytes": end - third, "sha256": hashlib.sha256(whole[third:end]).hexdigest()}
        assert verify(path).healed == 1


APPENDER = """
import sys
from pathlib import Path
from fedsecure.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]))
number = 0
while True:
    entry = log.append("beat", {"number": number, "padding": "x" * 2000})
    print(entry.head, flush=True)
    number += 1
"""


def test_kill_9_leaves_a_log_that_holds_every_line_that_was_vouched_for(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    acknowledged = 0
    for turn in range(8):
        process = subprocess.Popen([sys.executable, "-c", APPENDER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        heads = [process.stdout.readline().strip() for _ in range(3 + turn)]
        process.send_signal(signal.SIGKILL)
        heads += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait()
        process.stdout.close()
        acknowledged += len(heads)
        last = Head.parse(heads[-1])
        assert verify(path, head=last).head.lines >= acknowledged
    AuditLog(path).append("end")
    assert verify(path).torn == 0


class FullDisk(io.FileIO):
    """Takes some bytes of a line, then none."""

    room = 40

    def write(self, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = super().write(bytes(data)[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = written(tmp_path / "audit.log", 2)
    before = log.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(audit_log, "FileIO", FullDisk)
        with pytest.raises(EnvironmentProblem, match="FS-1820"):
            log.append("lost")
    assert log.path.read_bytes() == before
    log.append("found")
    assert [entry.event for entry in entries(log.path)][-1] == "found"


def test_a_line_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((tmp_path / "audit.log").read_bytes())
        real(descriptor)

    monkeypatch.setattr(audit_log.os, "fsync", fsync)
    log = AuditLog(tmp_path / "audit.log")
    for _ in range(3):
        log.append("event")
        assert synced[-1] == log.path.read_bytes()


def test_a_damaged_end_is_not_built_upon(tmp_path: Path) -> None:
    log = written(tmp_path / "audit.log")
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-3] + b"0" + whole[-2:])
    changed = log.path.read_bytes()
    with pytest.raises(EnvironmentProblem, match="FS-1821"):
        AuditLog(log.path).append("more")
    assert log.path.read_bytes() == changed
    log.path.write_bytes(b"\0" * (5 << 20))
    with pytest.raises(EnvironmentProblem, match="FS-1821"):
        AuditLog(log.path).append("more")


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "folder.log").mkdir()
    with pytest.raises(EnvironmentProblem, match="FS-1820"):
        AuditLog(tmp_path / "folder.log").append("event")
    for absent in (tmp_path / "none.log", tmp_path / "folder.log"):
        with pytest.raises(EnvironmentProblem, match="FS-1823"):
            verify(absent)


# --- several at once --------------------------------------------------------------------------------------------------


def test_threads_and_processes_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    log = AuditLog(path)
    process = subprocess.Popen([sys.executable, "-c", APPENDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()

    def append(name: str) -> None:
        for _ in range(20):
            log.append(name)

    threads = [threading.Thread(target=append, args=(f"thread-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.stdout.readline()
    process.kill()
    process.communicate()
    events = verify(path).events
    assert [events[f"thread-{i}"] for i in range(4)] == [20] * 4
    assert events["beat"] >= 2


def test_a_process_that_does_not_let_go_is_named(tmp_path: Path) -> None:
    log = written(tmp_path / "audit.log", wait_seconds=0.05)
    with log._opened(), pytest.raises(EnvironmentProblem, match="FS-1822"):
        AuditLog(log.path, wait_seconds=0.05).append("event")
    AuditLog(log.path).append("event")


def test_a_log_that_is_moved_away_begins_anew(tmp_path: Path) -> None:
    log = written(tmp_path / "audit.log")
    log.path.rename(tmp_path / "audit.2026.log")
    log.append("event")
    assert verify(log.path).head.lines == 1
    assert verify(tmp_path / "audit.2026.log").head.lines == 6


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_signed_and_checked(tmp_path: Path) -> None:
    key, stranger = keys.generate(), keys.generate()

    def check(who: Any) -> audit_log.Check:
        return lambda body, signature: keys.verify(keys.public_bytes(who), PURPOSE, body, signature)

    log = written(tmp_path / "audit.log", 7, sign=lambda body: keys.sign(key, PURPOSE, body), every=3)
    log.checkpoint()
    found = verify(log.path, check=check(key))
    assert found.checkpoints == found.signed == found.events[CHECKPOINT] >= 3
    assert verify(log.path).signed == 0
    with pytest.raises(EnvironmentProblem, match="FS-1825"):
        verify(log.path, check=check(stranger))
    # Who rewrites history from some line on, hashes and all, lacks the key for the checkpoints after it.
    forged = AuditLog(tmp_path / "forged.log")
    for entry in entries(log.path):
        facts = {**entry.facts, "round": 99} if entry.seq == 2 else entry.facts
        forged.append(entry.event, facts, at=entry.at)
    assert verify(forged.path).head.lines == found.head.lines
    with pytest.raises(EnvironmentProblem, match="FS-1825"):
        verify(forged.path, check=check(key))
    unsigned = written(tmp_path / "unsigned.log")
    unsigned.checkpoint()
    unsigned.append(CHECKPOINT, {"signature": "no digits"})
    with pytest.raises(EnvironmentProblem, match="FS-1825"):
        verify(unsigned.path, check=check(key))


# --- what may stand in it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"secret", {"a": 1}, [1.0, 2.0], [b"x"], object(), (x for x in "a")])
def test_bytes_arrays_and_objects_are_refused(tmp_path: Path, value: Any) -> None:
    log = AuditLog(tmp_path / "audit.log")
    with pytest.raises(TypeError):
        log.append("event", {"value": value})
    assert not log.path.exists()


def test_numbers_and_lines_are_bounded(tmp_path: Path) -> None:
    log = written(tmp_path / "audit.log", 1)
    before = log.path.read_bytes()
    for facts in ({"x": float("nan")}, {"x": float("inf")}, {"x": "a" * audit_log.MAX_LINE}):
        with pytest.raises(ValueError):
            log.append("event", facts)
    for name in ("", "e" * 101):
        with pytest.raises(ValueError):
            log.append(name)
    assert log.path.read_bytes() == before
    log.append("event", {"x": "a" * (audit_log.MAX_LINE - 300)})
    log.append("after")
    assert verify(log.path).head.lines == 3


def test_time_is_given_or_now(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log")
    assert log.append("event", at=12.3456).at == 12.346
    assert abs(log.append("event").at - time.time()) < 60
    found = verify(log.path)
    assert found.began == 12.346
