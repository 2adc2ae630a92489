"""docs/operations.md: what it tells people to type exists, and each procedure says what it costs."""

from __future__ import annotations

import re

import pytest
from docs_pages import ROOT, blocks, page, sections
from typer.main import get_command

from fedsecure.cli.app import app

TEXT = page("operations.md")
PROCEDURES = [
    *("A dead site", "A killed aggregator", "A full disk", "An expired certificate", "A revoked site"),
    *("After a run", "Backup", "Restore", "Upgrade"),
]


@pytest.mark.parametrize("heading", PROCEDURES)
def test_each_procedure_says_what_it_costs(heading: str) -> None:
    body = sections(TEXT)[heading]
    assert "*Costs*" in body or "*costs*" in body


def test_named_files_exist() -> None:
    named = set(re.findall(r"deploy/[\w./@-]*\w", TEXT))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_commands_exist() -> None:
    known = get_command(app)
    said = re.findall(
        r"(?m)(?:^|&& )fedsecure ((?:[a-z][a-z-]* ?)+)", "\n".join(block.text for block in blocks(TEXT, "sh"))
    )
    assert len(said) > 8
    for words in said:
        first, *rest = words.split()
        command = known.commands.get(first)  # type: ignore[attr-defined]
        assert command is not None, words
        if hasattr(command, "commands"):
            assert rest[0] in command.commands, words
