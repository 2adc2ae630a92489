"""``fedsecure audit-log``: verify and show, on logs that hold and logs that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.conftest import Command

from fedsecure.audit_log import PURPOSE, AuditLog
from fedsecure.identity import keys
from fedsecure.identity.provision import load_identity, provision


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    made = AuditLog(tmp_path / "audit.log")
    made.append("run-started", {"sites": ["a", "b"], "method": "linear"}, at=1_790_000_000.0)
    made.append("attempt-aborted", {"round": 1, "code": "FS-1350", "reason": "\x1b[2Jgone\nagain"}, at=1_790_000_060.0)
    return made


def test_a_log_that_holds_and_its_head(log: AuditLog, command: Command) -> None:
    shown = command("audit-log", "verify", log.path)
    assert shown.status == 0
    assert "2 lines, unbroken" in shown.out
    assert f"head {log.head()}" in shown.out
    earlier = str(log.head())
    log.append("more")
    assert "line 2 is as noted" in command("audit-log", "verify", log.path, "--head", earlier).out
    told = json.loads(command("audit-log", "verify", log.path, "--json").out)
    assert told["lines"] == 3
    assert told["head"] == str(log.head())
    assert told["events"] == {"attempt-aborted": 1, "more": 1, "run-started": 1}


def test_what_is_wrong_has_a_code(log: AuditLog, tmp_path: Path, command: Command) -> None:
    head = str(log.head())
    whole = log.path.read_bytes()
    log.path.write_bytes(whole.replace(b"FS-1350", b"FS-1351"))
    assert command("audit-log", "verify", log.path).error() == "FS-1821"
    assert command("audit-log", "show", log.path).error() == "FS-1821"
    log.path.write_bytes(whole.splitlines(keepends=True)[0])
    assert command("audit-log", "verify", log.path, "--head", head).error() == "FS-1824"
    assert command("audit-log", "verify", log.path, "--head", "2").error() == "FS-1040"
    assert command("audit-log", "verify", tmp_path / "none").error() == "FS-1823"
    assert command("audit-log", "verify", log.path, "--member", "site-1").status == 2


def test_a_torn_line_is_said_and_no_failure(log: AuditLog, command: Command) -> None:
    with log.path.open("ab") as file:
        file.write(b'{"at":1')
    shown = command("audit-log", "verify", log.path)
    assert shown.status == 0
    assert "7 bytes after the last line" in shown.out


def test_show_has_the_last_lines_and_no_control_characters(log: AuditLog, command: Command) -> None:
    log.append("charged", {"reservation": "ab" * 16, "epsilon_so_far": 0.25, "public": True})
    shown = command("audit-log", "show", log.path, "--last", "2").out
    assert "2026-09-21" in shown
    assert "run-started" not in shown
    assert "\x1b" not in shown
    assert "\\u001b[2Jgone\\nagain" in shown.replace("\n", "").replace(" ", "")
    assert "reservation=abababababab…" in shown
    told = json.loads(command("audit-log", "show", log.path, "--json").out)["entries"]
    assert [line["event"] for line in told] == ["run-started", "attempt-aborted", "charged"]
    assert told[0]["facts"]["sites"] == ["a", "b"]
    assert len(json.loads(command("audit-log", "show", log.path, "--last", "0", "--json").out)["entries"]) == 3


def test_checkpoints_against_the_roster(tmp_path: Path, command: Command) -> None:
    names = ("site-1", "site-2", "site-3")
    provision(tmp_path / "keys", federation="f", sites=dict.fromkeys(names, "train"), hosts=("localhost",))
    folder = tmp_path / "keys" / "sites" / "site-1" / "identity"
    key = load_identity(folder).signing_key
    log = AuditLog(tmp_path / "audit.log", sign=lambda body: keys.sign(key, PURPOSE, body))
    log.append("event")
    log.checkpoint()
    roster = ("--roster", folder / "roster.json", "--member")
    shown = command("audit-log", "verify", log.path, *roster, "site-1")
    assert "1 checkpoints, all signed by the member" in shown.out
    assert command("audit-log", "verify", log.path, *roster, "site-2").error() == "FS-1825"
    assert command("audit-log", "verify", log.path, *roster, "aggregator").error() == "FS-1825"
    assert "not checked without" in command("audit-log", "verify", log.path).out
