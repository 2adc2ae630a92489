"""All pages: links and named files exist, the index is whole, and the floors are those that are enforced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_pages import DOCS, ROOT, anchors, blocks, links, page, prose, sections, table
from test_floors import FLOOR, FORBIDDEN

from fedsecure.aggregator.states import FOLLOWING
from fedsecure.secagg.client import State

PAGES = sorted(DOCS.glob("*.md"))


def missing_links(file: Path, text: str) -> list[str]:
    """Links to files or fragments that are not there."""
    broken = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (file.parent / name).resolve() if name else file
        if not target.exists() or (fragment and fragment not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("file", PAGES, ids=lambda f: f.name)
def test_links_lead_somewhere(file: Path) -> None:
    assert missing_links(file, file.read_text(encoding="utf-8")) == []


def test_a_dead_link_is_found() -> None:
    text = "[a](nowhere.md) [b](errors.md#fs-0000) [c](errors.md#fs-1201) [d](https://example.org)"
    assert missing_links(DOCS / "index.md", text) == ["nowhere.md", "errors.md#fs-0000"]


@pytest.mark.parametrize("file", PAGES, ids=lambda f: f.name)
def test_named_source_files_exist(file: Path) -> None:
    named = re.findall(
        r"`((?:fedsecure|aggregator|secagg|privacy|methods)/[\w/]+\.\w+)`", prose(file.read_text("utf-8"))
    )
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "fedsecure" / name).exists(), name


def test_every_page_is_in_the_index() -> None:
    listed = {link.partition("#")[0] for link in links(page("index.md"))}
    assert {file.name for file in PAGES} - {"index.md"} <= listed


def test_the_floors_are_those_that_are_enforced() -> None:
    shown = {
        room: int(row["floor"])
        for row in table(sections(page("architecture.md"))["Floors"])
        for room in re.findall(r"`(\w+)`", row["rooms"])
    }
    assert shown == {room: floor for room, floor in FLOOR.items() if not room.startswith("__")}


@pytest.mark.parametrize("package", ["torch", "grpc"])
def test_the_packages_that_stay_outside_are_those_that_are_enforced(package: str) -> None:
    text = " ".join(sections(page("architecture.md"))["Floors"].split())
    (said,) = re.findall(rf"{package} never reaches ([^.;]*)[.;]", text)
    assert set(re.findall(r"`(\w+)`", said)) == {room for room, packages in FORBIDDEN.items() if package in packages}


def test_the_diagram_of_states_is_the_rules() -> None:
    diagrams = [block.text for block in blocks(page("architecture.md"), "mermaid")]
    (diagram,) = [text for text in diagrams if text.startswith("stateDiagram")]
    arrows = {(a, b) for a, b in re.findall(r"(\w+) --> (\w+)", diagram)}
    every = {(now.value, then.value) for now, those in FOLLOWING.items() for then in those}
    assert arrows <= every
    # Left out of the picture: what the text under it says of every state, and repeats.
    assert all(then in ("waiting", "over") or now == then for now, then in every - arrows)


def test_the_diagram_has_every_phase_in_order() -> None:
    diagrams = [block.text for block in blocks(page("architecture.md"), "mermaid")]
    (diagram,) = [text for text in diagrams if text.startswith("sequenceDiagram")]
    assert re.findall(r"\bR\d\b", diagram) == ["R0", "R1", "R2", "R3", "R4"]
    assert diagram.index("reserve") < diagram.index("read, answer") < diagram.index("commit") < diagram.index("R2")
    assert [state.value for state in State][1:7] == ["advertised", "shared", "received", "masked", "signed", "unmasked"]
