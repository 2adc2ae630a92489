"""docs/configuration.md against the models: every key with its type, default and range, and examples that load."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from docs_pages import blocks, literal, page, sections, table
from pydantic import BaseModel

from fedsecure.config import (
    AlignmentConfig,
    Clip2flConfig,
    DatasetConfig,
    EncoderConfig,
    EvaluationConfig,
    FacmicConfig,
    FederationConfig,
    MethodConfig,
    PolicyConfig,
    PrivacyConfig,
    RoundsConfig,
    SiteConfig,
    SiteEntry,
    TelemetryConfig,
    load,
    parse_settings,
    read_toml,
)
from fedsecure.errors import ConfigError
from fedsecure.secagg.thresholds import Thresholds

PAGES: dict[str, type[BaseModel]] = {
    "Top level of federation.toml": FederationConfig,
    "`[telemetry]`": TelemetryConfig,
    "`[encoder]`": EncoderConfig,
    "`[method]`": MethodConfig,
    "`[method.alignment]`": AlignmentConfig,
    "`[method.facmic]`": FacmicConfig,
    "`[method.clip2fl]`": Clip2flConfig,
    "`[privacy]`": PrivacyConfig,
    "`[evaluation]`": EvaluationConfig,
    "`[rounds]`": RoundsConfig,
    "`[sites.<id>]`": SiteEntry,
    "Top level of site.toml": SiteConfig,
    "`[train]` and `[evaluation]`": DatasetConfig,
    "`[policy]`": PolicyConfig,
}
KEYS = [(heading, key) for heading, model in PAGES.items() for key in model.model_fields]


def rows(heading: str) -> dict[str, dict[str, str]]:
    return {literal(row["key"]): row for row in table(sections(page("configuration.md"))[heading])}


def branches(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """What a key may be, absence left out."""
    return [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]


def shown_type(schema: dict[str, Any]) -> str:
    kinds = []
    for part in branches(schema):
        if "$ref" in part or part["type"] == "object":
            kinds.append("table")
        elif "const" in part:
            kinds.append(f"`{json.dumps(part['const'])}`")
        elif part["type"] == "array":
            inner = part["items"] if "items" in part else part["prefixItems"][0]
            count = f"{part['maxItems']} " if "prefixItems" in part else ""
            kinds.append(f"list of {count}{inner['type']}s")
        else:
            kinds.append("path" if part.get("format") == "path" else part["type"])
    return " or ".join(kinds)


def shown_range(schema: dict[str, Any]) -> str:
    """The limits as the page writes them."""
    part = branches(schema)[-1]
    part = part["items"] if part.get("type") == "array" and "enum" in part.get("items", {}) else part
    if "enum" in part:
        return ", ".join(f"`{json.dumps(value)}`" for value in part["enum"])
    if "prefixItems" in part:
        return ""
    for least, most, what in (
        ("minProperties", "maxProperties", "entries"),
        ("minItems", "maxItems", "entries"),
        ("minLength", "maxLength", "characters"),
    ):
        if least in part or most in part:
            low, high = part.get(least), part.get(most)
            return f"at most {high} {what}" if low is None else f"{low} … {high} {what}"
    signs = (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
    return ", ".join(f"{sign} {part[key]}" for key, sign in signs if key in part)


def test_every_model_of_the_module_has_its_table() -> None:
    found, left = set(), [FederationConfig, SiteConfig]
    while left:
        model = left.pop()
        found.add(model)
        left += [kind for kind in nested(model) if kind not in found]
    assert found == set(PAGES.values())


def nested(model: type[BaseModel]) -> list[type[BaseModel]]:
    names = set(re.findall(r"#/\$defs/(\w+)", json.dumps(model.model_json_schema())))
    return [kind for kind in PAGES.values() if kind.__name__ in names]


@pytest.mark.parametrize("heading", PAGES)
def test_every_key_is_documented_and_no_other(heading: str) -> None:
    assert set(rows(heading)) == set(PAGES[heading].model_fields)
    assert all(row["meaning"] for row in rows(heading).values())


@pytest.mark.parametrize(("heading", "key"), KEYS)
def test_default_type_and_range_are_those_of_the_code(heading: str, key: str) -> None:
    model, row = PAGES[heading], rows(heading)[key]
    field = model.model_fields[key]
    schema = model.model_json_schema()["properties"][key]
    assert row["type"] == shown_type(schema)
    assert row["range"] == shown_range(schema) or ("pattern" in schema and row["range"])
    if field.is_required():
        assert row["default"] == "required"
    elif isinstance(field.default, BaseModel):
        assert row["default"] == "defaults"
    elif field.default is None:
        assert row["default"] == "none"
    else:
        shown = tomllib.loads(f"x = {literal(row['default'])}")["x"]
        assert shown == json.loads(json.dumps(field.default))
        assert type(shown) is type(json.loads(json.dumps(field.default)))


def test_the_table_of_thresholds_is_the_protocols() -> None:
    body = sections(page("configuration.md"))["`[rounds]`"]
    second = table(body[body.index("\n| sites n |") :])
    assert len(second) >= 5
    for row in second:
        chosen = Thresholds.choose(int(row["sites n"]))
        shown = [int(row[name]) for name in ("c", "t", "u_min", "may drop out")]
        assert shown == [chosen.colluders, chosen.threshold, chosen.min_survivors, chosen.sites - chosen.min_survivors]


def example(name: str) -> str:
    (block,) = [block for block in blocks(page("configuration.md"), "toml") if block.name == name]
    return block.text


def test_every_toml_block_is_checked_here() -> None:
    names = [block.name for block in blocks(page("configuration.md"), "toml")]
    assert sorted(names) == ["federation.toml", "settings.toml", "site.toml"]


def test_the_federation_example_loads_and_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "federation.toml"
    file.write_text(example("federation.toml"))
    config = load(file, FederationConfig)
    assert config.state == tmp_path / "state"
    raw = tomllib.loads(file.read_text())
    assert set(raw) == set(FederationConfig.model_fields) - {"encoder_file", "target_file"}
    for section in ("encoder", "method", "privacy", "evaluation", "rounds"):
        assert set(raw[section]) == set(type(getattr(config, section)).model_fields), section
    assert {key for site in raw["sites"].values() for key in site} == set(SiteEntry.model_fields)


def test_the_site_example_loads_and_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(example("site.toml"))
    config = load(file, SiteConfig)
    assert config.identity == tmp_path / "identity"
    raw = tomllib.loads(file.read_text())
    assert set(raw) == set(SiteConfig.model_fields) - {"encoder_file", "target_file"}
    assert set(raw["policy"]) == set(PolicyConfig.model_fields)


def test_the_settings_example_wants_only_the_encoder_measured(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(example("settings.toml"))
    raw = read_toml(file)
    with pytest.raises(ConfigError, match="encoder.dimension"):
        parse_settings(raw, file)
    raw["encoder"] |= {"dimension": 64, "fingerprint": "0" * 64}
    assert parse_settings(raw, file).declared_units() == {"hospital-a": 800, "hospital-b": 500, "hospital-c": 650}


def test_a_wrong_key_in_an_example_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(example("site.toml").replace("min_cohort", "min_cohorts"))
    with pytest.raises(ConfigError, match="min_cohorts"):
        load(file, SiteConfig)
