"""Reads the Markdown of ``docs/``: tables under headings, fenced blocks, anchors and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "fedsecure"

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_CELL = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; ``name`` is that of an HTML comment ``<!-- name -->`` on the line before it."""

    language: str
    text: str
    name: str


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text)


def blocks(text: str, language: str = "") -> list[Block]:
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        named = re.fullmatch(r"<!-- ([\w.-]+) -->", before)
        found.append(Block(match[1], match[2], named[1] if named else ""))
    return [block for block in found if language in ("", block.language)]


def sections(text: str) -> dict[str, str]:
    """Heading → the text up to the next heading of any level."""
    parts = re.split(r"^#{1,6} (.+)$", prose(text), flags=re.MULTILINE)
    return {heading.strip(): body for heading, body in zip(parts[1::2], parts[2::2], strict=True)}


def table(text: str) -> list[dict[str, str]]:
    """The rows of the first table in ``text``, by column."""
    lines = [line.strip() for line in text[max(0, text.find("\n|")) :].strip().splitlines()]
    lines = list(takewhile(lambda line: line.startswith("|"), lines))
    rows = [[cell.strip().replace("\\|", "|") for cell in _CELL.split(line)[1:-1]] for line in lines]
    if not rows:
        return []
    assert all(len(row) == len(rows[0]) for row in rows), f"a ragged table: {rows[0]}"
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def literal(cell: str) -> str:
    """What a cell shows as code: the text between its first pair of backticks, else the cell."""
    match = re.search(r"`([^`]*)`", cell)
    return match[1] if match else cell


def anchors(text: str) -> set[str]:
    """Fragments a link may name: of headings, as GitHub makes them, and of HTML anchors."""
    found = set(re.findall(r'<a id="([^"]+)">', text))
    for heading in re.findall(r"^#{1,6} (.+)$", prose(text), flags=re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(plain.replace(" ", "-"))
    return found


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))
