"""What an officer sees and does at the command line: budgets, their history, and an audit put into a report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from cli.conftest import Command
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federation_world import World

from fedsecure.identity import keys
from fedsecure.messages import Event
from fedsecure.privacy.ledger import Ledger
from fedsecure.privacy.report import network_report
from fedsecure.privacy.report_verify import PURPOSE, signed_body

DIGEST = hashlib.sha256(b"question").digest()


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    with Ledger(path) as opened:
        for number in range(3):
            made = opened.reserve(
                dataset="chest x-rays 2026", population="train", events=(Event("train", "training", 5.0, 2.5),),
                run="ab" * 16, round=number, attempt=0, query_digest=DIGEST, limit_epsilon=8.0, delta=1e-5,
            )  # fmt: skip
        opened.void(made, "the line was down")
    return path


def test_show_says_whose_noise_came_from_a_seed(command: Command, ledger: Path) -> None:
    assert "seed" not in command("budget", "show", "--ledger", ledger).out
    with Ledger(ledger) as opened:
        opened.reserve(
            dataset="chest x-rays 2026", population="train", events=(Event("train", "training", 5.0, 2.5),),
            run="ab" * 16, round=9, attempt=0, query_digest=DIGEST, limit_epsilon=8.0, delta=1e-5, seeded=True,
        )  # fmt: skip
    shown = " ".join(command("budget", "show", "--ledger", ledger).out.split())
    assert "1 of 3 releases had noise from a seed" in shown
    assert "NO PRIVACY (seeded)" in command("budget", "history", "--ledger", ledger).out


def test_show_says_what_is_left(command: Command, ledger: Path) -> None:
    (row,) = json.loads(command("budget", "show", "--ledger", ledger, "--json").out)["datasets"]
    assert (row["releases"], row["remaining"], row["releases_left"]) == (2, None, None)
    assert "no limit in the ledger" in command("budget", "show", "--ledger", ledger).out
    agreed = ("--epsilon", "1.5", "--reason", "agreed with the board")
    assert command("budget", "set", "chest x-rays 2026", "--ledger", ledger, *agreed).status == 0
    (row,) = json.loads(command("budget", "show", "--ledger", ledger, "--json").out)["datasets"]
    assert (row["limit_epsilon"], row["releases_left"]) == (1.5, 1)
    table = command("budget", "show", "--ledger", ledger).out
    assert "chest x-rays" in table
    assert f"{row['remaining']:.3f}" in table
    assert command("budget", "show", "--ledger", ledger, "--delta", "1.5").error() == "FS-1202"
    assert command("budget", "show", "--ledger", ledger, "--max-epsilon", "-1").error() == "FS-1202"


def test_history_has_a_line_for_each_charge_and_limit(command: Command, ledger: Path) -> None:
    agreed = ("--epsilon", "1.5", "--reason", "agreed with the board")
    command("budget", "set", "chest x-rays 2026", "--ledger", ledger, *agreed)
    lines = command("budget", "history", "--ledger", ledger).out.splitlines()
    assert lines[0] == "chest x-rays 2026, train units"
    assert lines[1].split() == ["when", "(UTC)", "run", "round", "attempt", "state", "ε", "alone", "remark"]
    assert len(lines) == 2 + 4 + 2
    assert "the line was down" in lines[4]
    assert "at most ε = 1.5 at δ = 1e-05; agreed with the board" in lines[5]
    # Without remarks a line fits the narrowest terminal.
    assert all(len(line) < 80 for line in lines[:4])
    entries = json.loads(command("budget", "history", "--ledger", ledger, "--json").out)["entries"]
    assert [entry["state"] for entry in entries] == ["RESERVED", "RESERVED", "RESERVED", "VOID", "LIMIT"]
    other = command("budget", "history", "--ledger", ledger, "--dataset", "nothing")
    assert other.out.strip() == "nothing has been charged"


def test_a_limit_is_told_beside_what_is_spent_and_a_misspelt_name_is_noticed(command: Command, ledger: Path) -> None:
    agreed = ("--ledger", ledger, "--reason", "agreed")
    first = command("budget", "set", "chest x-rays 2026", "--epsilon", "1.5", *agreed).out
    assert "at most ε = 1.5 at δ = 1e-05" in first
    assert "before" not in first
    assert "nothing has been charged" not in first
    again = command("budget", "set", "chest x-rays 2026", "--epsilon", "2", *agreed).out
    assert "before: 1.5" in again
    (row,) = json.loads(command("budget", "show", "--ledger", ledger, "--json").out)["datasets"]
    assert f"spent ε {row['epsilon']:.3f}, left {row['remaining']:.3f}" in again
    assert (
        "nothing has been charged under this name"
        in command("budget", "set", "chest x-ray 2026", "--epsilon", "2", *agreed).out
    )


def test_verify_gives_a_head_to_note_and_compares_it_later(command: Command, ledger: Path) -> None:
    rows, head, note = command("budget", "verify", "--ledger", ledger).out.splitlines()
    assert rows == "4 rows, unbroken"
    assert "--head" in note
    known = head.removeprefix("head ")
    assert known == json.loads(command("budget", "verify", "--ledger", ledger, "--json").out)["head"]
    command("budget", "set", "chest x-rays 2026", "--ledger", ledger, "--epsilon", "2", "--reason", "agreed")
    later = command("budget", "verify", "--ledger", ledger, "--head", known).out.splitlines()
    assert later[0] == "5 rows, unbroken, and row 4 is as noted"
    wrong = known[:-1] + ("0" if known[-1] != "0" else "1")
    assert command("budget", "verify", "--ledger", ledger, "--head", wrong).error() == "FS-1262"


def test_a_signed_report_is_verified_against_the_roster(command: Command, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.start()
    with world.client("site-1") as client:
        signed = client.privacy_report()
        roster = ("--roster", client.config.identity / "roster.json")
    file = tmp_path / "privacy-report.json"

    def verify(report: dict[str, object], *options: object) -> tuple[int, str]:
        file.write_text(json.dumps(report))
        ended = command("report", "verify", file, *options)
        return ended.status, ended.out

    status, told = verify(signed, *roster)
    assert (status, told.splitlines()[-1]) == (0, "site-1: signature valid")
    status, told = verify(signed)
    assert status == 0
    assert "not checked without --roster" in told
    for edit in ({"not_protected": ["nothing"]}, {"epsilon": 0.5}, {"site": "site-2"}):
        assert verify(signed | edit, *roster)[0] == 1
    status, told = verify(signed | {"epsilon": 0.5})
    assert status == 1
    assert "epsilon is 0.5" in told
    status, told = verify(network_report([signed]), *roster)
    assert status == 1
    assert "site-2: trained in this run, and its part is missing" in told
    assert verify(network_report([signed]), *roster, "--partial")[0] == 0


def test_an_audit_is_attached_and_signed_anew(command: Command, tmp_path: Path) -> None:
    report, audit, key = tmp_path / "report.json", tmp_path / "audit.json", tmp_path / "identity.key"
    private = Ed25519PrivateKey.generate()
    keys.save_private_key(key, private)
    bare = {"schema": "fedsecure/privacy-report", "schema_version": 2, "kind": "site", "site": "north", "audit": None}
    report.write_text(json.dumps(bare))
    found = {
        "date": "2026-11-21", "passed": True, "epsilon": 2.0, "delta": 1e-5, "facts": {}, "checks": [], "bounds": [],
        "membership": [],
    }  # fmt: skip
    attach = ("report", "attach", report, "--audit", audit)
    assert command(*attach).error() == "FS-1269"
    audit.write_text("{}")
    assert command(*attach).error() == "FS-1269"
    audit.write_text(json.dumps(found))
    assert "without a signature" in command(*attach).out
    assert json.loads(report.read_text())["audit"] == found
    assert "signed anew" in command(*attach, "--identity", key).out
    signed = json.loads(report.read_text())
    value = bytes.fromhex(signed["signature"]["value"])
    assert keys.verify(keys.public_bytes(private), PURPOSE, signed_body(signed), value)
    report.write_text(json.dumps(bare | {"kind": "network"}))
    assert command(*attach, "--identity", key).status == 2
