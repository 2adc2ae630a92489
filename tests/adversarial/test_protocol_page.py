"""The protocol page: every test it links to exists, and its table of thresholds is the one that is computed."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from fedsecure.secagg.thresholds import Thresholds

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
LINKS = sorted(set(re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", PAGE)))


@cache
def names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize(("file", "name"), LINKS, ids=lambda part: part)
def test_linked_tests_exist(file: str, name: str) -> None:
    path = ROOT / file
    assert path.is_file()
    if name:
        assert name in names(path)
        assert name.startswith(("test_", "Test"))


def test_every_claim_has_a_test() -> None:
    section = PAGE.split("## From claims to tests")[1].split("##")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 18
    assert all("::" in row for row in rows)


def test_every_attack_is_on_the_page() -> None:
    """A new attack belongs in the table."""
    files = ("test_hostile_aggregator", "test_hostile_epochs")
    attacks = {n for file in files for n in names(ROOT / f"tests/adversarial/{file}.py") if n.startswith("test_")}
    assert attacks <= {name for _, name in LINKS}


def test_the_table_of_thresholds() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == 8
    for row in rows:
        n, c, t, missing, honest = map(int, row)
        chosen = Thresholds.choose(n)
        assert (chosen.colluders, chosen.threshold) == (c, t)
        assert (n - chosen.min_survivors, chosen.min_survivors - c) == (missing, honest)


def test_the_check_can_fail() -> None:
    assert "test_no_such_thing" not in names(Path(__file__))
    assert "test_the_check_can_fail" in names(Path(__file__))
