"""docs/threat-model.md: claims are numbered without a gap, and each names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from docs_pages import ROOT, page, sections

TEXT = page("threat-model.md")
LINKS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))
ROWS = [line for line in TEXT.splitlines() if line.startswith("| **T")]


@cache
def names(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)} | {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)  # a state machine's test case
        for target in node.targets
        if isinstance(target, ast.Name)
    }


@pytest.mark.parametrize(("file", "name"), LINKS, ids=lambda part: part)
def test_named_tests_exist(file: str, name: str) -> None:
    assert name.startswith(("test_", "Test"))
    assert name in names(file)


def test_claims_are_numbered_and_each_names_a_test() -> None:
    numbers = [int(match[1]) for row in ROWS if (match := re.match(r"\| \*\*T(\d+)\*\* ", row))]
    assert numbers == list(range(1, len(ROWS) + 1))
    assert len(numbers) >= 30
    assert [row for row in ROWS if not re.search(r"`tests/[\w/]+\.py::\w+`", row)] == []


def test_what_is_not_claimed_is_said() -> None:
    assert len(re.findall(r"^\* \*\*", sections(TEXT)["What is not claimed"], re.MULTILINE)) >= 8


def test_the_check_can_fail() -> None:
    assert "test_no_such_thing" not in names("tests/docs/test_threat_model_page.py")
    assert "test_the_check_can_fail" in names("tests/docs/test_threat_model_page.py")
