"""Every ``--help`` page is a snapshot, and showing one loads next to nothing.

After a wanted change: ``FEDSECURE_SNAPSHOTS=write pytest tests/cli/test_help.py -n0``, then read the difference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from cli.conftest import Command
from typer.main import get_command

from fedsecure.cli.app import app

SNAPSHOTS = Path(__file__).parent / "snapshots"
# What --help may not load. Pydantic is not among them: newer releases of typer parse with it.
HEAVY = {"torch", "grpc", "numpy", "dp_accounting", "scipy", "sqlite3", "matplotlib", "open_clip", "PIL", "rich"}


def pages(group: typer.core.TyperGroup, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The program, its commands and theirs."""
    found = [path]
    for name, inner in sorted(group.commands.items()):
        found += pages(inner, (*path, name)) if isinstance(inner, typer.core.TyperGroup) else [(*path, name)]
    return found


root = get_command(app)
assert isinstance(root, typer.core.TyperGroup)
PAGES = pages(root)


def name_of(path: tuple[str, ...]) -> str:
    return "-".join(("fedsecure", *path)) + ".txt"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_help_is_as_it_was(path: tuple[str, ...], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    ended = command(*path, "--help")
    assert ended.status == 0, ended.err
    shown = "\n".join(line.rstrip() for line in ended.out.splitlines()) + "\n"
    assert max(map(len, shown.splitlines())) <= 100
    file = SNAPSHOTS / name_of(path)
    if os.environ.get("FEDSECURE_SNAPSHOTS") == "write":
        file.write_text(shown, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == shown, "see the head of this file for how to accept the change"


def test_no_snapshot_is_left_over() -> None:
    assert {file.name for file in SNAPSHOTS.iterdir()} == {name_of(path) for path in PAGES}


def test_the_commands_are_all_there() -> None:
    expected = {
        "demo",
        "serve",
        "join",
        "init",
        "enroll",
        "renew",
        "predict",
        "evaluate",
        "report",
        "budget",
        "transcript",
        "audit",
        "runs",
        "simulate",
    }
    assert {path[0] for path in PAGES if path} >= expected
    assert {path for path in PAGES if len(path) == 2} == {
        *(("budget", name) for name in ("show", "history", "set", "verify")),
        *(("runs", name) for name in ("list", "show", "pause", "resume", "stop")),
        ("transcript", "verify"),
        ("report", "page"),
        ("report", "attach"),
        ("report", "verify"),
        *(("members", name) for name in ("invite", "pending", "approve", "refuse", "list", "revoke", "renew")),
        ("audit-log", "verify"),
        ("audit-log", "show"),
    }


LOADED = """
import sys
sys.argv = ["fedsecure", *{arguments!r}]
from fedsecure.cli.app import main
try:
    main()
except SystemExit:
    pass
print("\\nLOADED", *sorted({{name.split(".")[0] for name in sys.modules}}))
print("OWN", *sorted(name for name in sys.modules if name.startswith("fedsecure.")))
"""


def loaded(*arguments: str) -> tuple[set[str], set[str]]:
    """Packages, and modules of this one, that a command has loaded when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(arguments=arguments)], capture_output=True, text=True, timeout=240
    )
    packages, own = (line.split()[1:] for line in done.stdout.splitlines()[-2:])
    return set(packages), set(own)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--version",), ("demo", "--help"), ("budget", "--help")])
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    packages, own = loaded(*arguments)
    assert not packages & HEAVY
    assert own == {
        "fedsecure.cli",
        "fedsecure.cli.app",
        "fedsecure.cli.audit_log",
        "fedsecure.cli.doctor",
        "fedsecure.cli.duplicates",
        "fedsecure.cli.enrolling",
        "fedsecure.cli.members",
        "fedsecure.cli.options",
        "fedsecure.cli.records",
        "fedsecure.cli.running",
        "fedsecure.cli.runs",
        "fedsecure.cli.using",
        "fedsecure.cli.watching",
        "fedsecure.errors",
    }


def test_the_check_sees_what_is_loaded(tmp_path: Path) -> None:
    packages, own = loaded("budget", "show", "--ledger", str(tmp_path / "none.db"))
    assert "rich" in packages
    assert "sqlite3" in packages
    assert "fedsecure.privacy.ledger" in own
