"""``fedsecure enroll``, ``renew`` and ``members`` on the command line: enrolment by files, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli.conftest import Command
from enrolling_world import Coordinated

from fedsecure.identity.provision import load_identity


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Coordinated:
    monkeypatch.chdir(tmp_path)
    return Coordinated(tmp_path / "brain")


def test_enrolment_renewal_and_revocation_by_files(world: Coordinated, command: Command, tmp_path: Path) -> None:
    invited = command("members", "invite", "brain", "ward-a", "--role", "evaluate")
    assert re.fullmatch(r"fs1-[\w-]+\n", invited.out), "the token alone is the output"
    (tmp_path / "token").write_text(invited.out)
    assert "ward-a" in command("members", "pending", "brain").out

    asked = command("enroll", "token", "--folder", "identity", "--out", "request.json")
    aloud = re.search(r"keys of ward-a +((?:\w{4} ){4}\w{4})$", asked.out, re.MULTILINE)
    federation = re.search(r"the federation +((?:\w{4} ){4}\w{4})$", asked.out, re.MULTILINE)
    assert aloud
    assert federation
    assert federation[1] in invited.err.replace("\n", " ")

    assert command("members", "approve", "brain", "request.json", "--yes", "AAAA BBBB CCCC").status == 1
    assert world.roster.entries == ()
    approved = command("members", "approve", "brain", "request.json", "--yes", aloud[1][:14])
    assert approved.status == 0, approved.err
    assert aloud[1] in approved.out
    assert federation[1] in approved.out
    done = command("enroll", "--welcome", "welcome.json", "--folder", "identity")
    assert "ward-a is a member of test: roster 2" in done.out
    assert load_identity(tmp_path / "identity").roster.find("ward-a").role == "evaluate"

    assert command("renew", "--folder", "identity", "--out", "request-2.json").status == 0
    assert "new certificate" in command("members", "renew", "brain", "request-2.json").out
    assert command("renew", "--folder", "identity", "--welcome", "welcome-2.json").status == 0
    listed = json.loads(command("members", "list", "brain", "--json").out)
    assert [(one["site"], one["role"]) for one in listed["members"]] == [
        ("aggregator", "aggregator"),
        ("ward-a", "evaluate"),
    ]
    assert listed["members"][1]["previous_accepted"]
    assert "ward-a" in command("members", "list", "brain").out

    assert "roster 4" in command("members", "revoke", "brain", "ward-a").out
    refreshed = command("enroll", "--refresh", "--roster", "brain/ca/roster.json", "--folder", "identity")
    assert "ward-a left" in refreshed.out
    assert json.loads(command("members", "list", "brain", "--json").out)["revoked"][0]["site"] == "ward-a"


def test_a_refusal_by_files(world: Coordinated, command: Command, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(command("members", "invite", "brain", "ward-a").out)
    command("enroll", "token", "--out", "request.json")
    assert command("members", "refuse", "brain", "request.json", "--reason", "who is this?").status == 0
    ended = command("enroll", "--welcome", "welcome.json")
    assert ended.error() == "FS-1467"
    assert "who is this?" in ended.err


def test_withdrawing_an_invitation(world: Coordinated, command: Command) -> None:
    command("members", "invite", "brain", "ward-a")
    assert command("members", "revoke", "brain", "ward-a").status == 0
    assert "nobody is invited" in command("members", "pending", "brain").out
    assert world.roster.version == 1, "nobody left"
    assert command("members", "revoke", "brain", "ward-a").error() == "FS-1423"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("enroll", "fs1-xxx"), "FS-1461"),
        (("enroll", "fs1-xxx", "--welcome", "w.json"), "FS-1030"),
        (("enroll", "fs1-xxx", "--refresh"), "FS-1030"),
        (("enroll", "--welcome", "w.json", "--out", "r.json"), "FS-1030"),
        (("enroll",), "FS-1471"),
        (("enroll", "--welcome", "w.json"), "FS-1400"),
        (("enroll", "--refresh"), "FS-1471"),
        (("renew",), "FS-1400"),
        (("renew", "--welcome", "w.json", "--out", "r.json"), "FS-1030"),
        (("members", "invite", "brain", "ward-a", "--hours", "0"), "FS-1031"),
        (("members", "invite", "brain", "ward-a", "--address", "nowhere"), "FS-1031"),
        (("members", "invite", "brain", "../x"), "FS-1422"),
        (("members", "invite", "nowhere", "ward-a"), "FS-1479"),
        (("members", "approve", "brain", "ward-a", "--yes", "x"), "FS-1472"),
        (("members", "renew", "brain", "ward-a"), "FS-1472"),
        (("members", "refuse", "brain", "ward-a"), "FS-1472"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_each_mistake_is_one_clear_error(
    world: Coordinated, command: Command, arguments: tuple[str, ...], code: str
) -> None:
    assert command(*arguments).error() == code
