"""docs/privacy-report.md against the published schema, the report's words, and the ledger's rules."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from docs_pages import PACKAGE, literal, page, sections, table

from fedsecure.privacy.report_text import ADVERSARIES, CONSENTED, NOT_PROTECTED, SEEDED, band

SCHEMA: dict[str, Any] = json.loads((PACKAGE / "privacy" / "report.schema.json").read_text(encoding="utf-8"))
DEFS: dict[str, Any] = SCHEMA["$defs"]
SITE, NETWORK = (set(DEFS[kind]["properties"]) for kind in ("site", "network"))
# Heading → the fields its table has to list.
TABLES: dict[str, set[str]] = {
    "Both kinds": SITE & NETWORK,
    "A site's own": SITE - NETWORK,
    "A federation's own": NETWORK - SITE,
    "budgets": set(DEFS["budget"]["properties"]),
    "price": set(DEFS["price"]["properties"]),
    "releases": set(DEFS["release"]["properties"]),
    "mechanism": set(DEFS["mechanism"]["properties"]),
    "secagg": set(DEFS["secagg"]["properties"]),
    "rounds": set(DEFS["round"]["properties"]),
    "accuracy": set(DEFS["accuracy"]["properties"]),
}
# Definitions that have no table of their own: their fields stand in the row that holds them.
INSIDE = {"stage": "accuracy", "audit": "audit"}


def rows(heading: str) -> dict[str, str]:
    return {literal(row["field"]): row["meaning"] for row in table(sections(page("privacy-report.md"))[heading])}


def definition(heading: str) -> dict[str, Any]:
    singular = {"budgets": "budget", "releases": "release", "rounds": "round"}
    if heading in ("Both kinds", "A site's own"):
        return DEFS["site"]
    return DEFS["network"] if heading.startswith("A federation") else DEFS[singular.get(heading, heading)]


def inner(schema: dict[str, Any]) -> set[str]:
    """Fields of objects that are written out inside a field's schema, or in a definition without a table."""
    found: set[str] = set()
    for part in [schema, *schema.get("anyOf", []), schema.get("items", {})]:
        found |= set(part.get("properties", {}))
        name = part.get("$ref", "").rpartition("/")[2]
        if name in INSIDE:
            found |= set(DEFS[name]["properties"])
    return found


def values(schema: dict[str, Any]) -> set[str]:
    """Words a field may take, at any depth."""
    text = json.dumps([schema.get("enum", []), schema.get("const"), schema.get("items", {}), schema.get("anyOf", [])])
    found = [*schema.get("enum", []), schema.get("const")]
    for part in re.findall(r'"enum": (\[[^\]]*\])', text):
        found += json.loads(part)
    return {value for value in found if isinstance(value, str)}


def test_every_definition_of_the_schema_has_its_place() -> None:
    covered = {
        "site",
        "network",
        "budget",
        "price",
        "release",
        "mechanism",
        "secagg",
        "round",
        "accuracy",
        "signature",
        *INSIDE,
    }
    assert set(DEFS) == covered


@pytest.mark.parametrize("heading", TABLES)
def test_every_field_is_explained_and_no_other(heading: str) -> None:
    assert set(rows(heading)) == TABLES[heading]
    assert all(rows(heading).values())


@pytest.mark.parametrize(("heading", "field"), [(h, f) for h in TABLES for f in sorted(TABLES[h])])
def test_inner_fields_and_words_are_named_in_the_row(heading: str, field: str) -> None:
    schema, text = definition(heading)["properties"][field], rows(heading)[field]
    if field == "budgets":
        assert set(schema["properties"]) <= set(re.findall(r"`(\w+)`", text))
        return
    assert inner(schema) <= set(re.findall(r"`([\w.]+)`", text))
    assert {value for value in values(schema) if f"`{json.dumps(value)}`" not in text} == set()


def test_the_checks_see_what_is_missing() -> None:
    release = DEFS["release"]["properties"]
    assert inner(release["events"]) == {
        "purpose",
        "noise_multiplier",
        "local_noise_multiplier",
        "sampling_rate",
        "steps",
    }
    assert values(release["state"]) == {"RESERVED", "COMMITTED", "VOID"}
    assert values(DEFS["site"]["properties"]["stamp"]) == {SEEDED, CONSENTED}
    assert inner(DEFS["accuracy"]["properties"]["before"]) == {"accuracy", "balanced_accuracy"}


def test_the_words_for_epsilon_are_the_reports() -> None:
    listed = table(sections(page("privacy-report.md"))["The words"])
    for row in listed[:-1]:
        limit = float(row["ε"].removeprefix("up to "))
        assert band(limit) == row["word"]
        assert band(limit * 1.001) != row["word"]
        stated = float(row["probability changes by at most"].removesuffix(" times").replace(",", ""))
        assert stated == pytest.approx(math.exp(limit), rel=0.02)
    assert band(1e9) == listed[-1]["word"]


def test_adversaries_and_gaps_are_the_reports() -> None:
    text = page("privacy-report.md")
    words = sections(text)["The words"]
    assert set(ADVERSARIES) == {literal(row["name"]) for row in table(words[words.index("\n| name |") :])}
    gaps = sections(text)["What is not protected"]
    assert len(re.findall(r"^\* ", gaps, flags=re.MULTILINE)) == len(NOT_PROTECTED)


def test_only_the_door_gives_a_charge_back() -> None:
    calls = {path.name for path in PACKAGE.rglob("*.py") if ".void(" in path.read_text(encoding="utf-8")}
    assert calls <= {"release.py"}, "docs/privacy-report.md says who does, and when"
