"""docs/observability.md, the Grafana dashboard and the Prometheus rules speak of what exists, and of all of it."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from docs_pages import ROOT, blocks, page, sections, table

from fedsecure.aggregator import happenings
from fedsecure.aggregator.happenings import Kind
from fedsecure.aggregator.metrics import Metrics
from fedsecure.audit_log import AuditLog
from fedsecure.logs import FIELDS
from fedsecure.site import diary

DEPLOY = ROOT / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "fedsecure.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
# Labels that Prometheus itself adds.
SCRAPED = {"instance", "job", "le"}


def exposed() -> dict[str, set[str]]:
    """Every sample's name that the aggregator exposes, with its labels."""
    found: dict[str, set[str]] = {}
    for collector in set(Metrics("ab" * 16).registry._collector_to_names):
        labels = set(getattr(collector, "_labelnames", ()))
        for family in collector.describe():  # type: ignore[attr-defined]
            ends = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "info": ("_info",)}
            for end in ends.get(family.type, ("",)):
                found[family.name + end] = labels
    return found


def expressions() -> list[str]:
    shown = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    asked = [
        variable["query"]["query"] for variable in BOARD["templating"]["list"] if isinstance(variable["query"], dict)
    ]
    return [*shown, *asked, *(rule["expr"] for rule in RULES)]


def wrong(expression: str) -> list[str]:
    """Names of metrics or labels in an expression that nothing exposes, and brackets that do not match."""
    known, bad = exposed(), []
    for name, inside in re.findall(r"\b(fedsecure_\w+)(?:\{([^}]*)\})?", expression):
        if name not in known:
            bad.append(name)
            continue
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))
        bad += [f"{name}{{{label}}}" for label in used - known[name] - SCRAPED]
    lists = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression)
    grouped = {part.strip() for text in lists for part in text.split(",")}
    bad += sorted(grouped - SCRAPED - set().union(*known.values()))
    for left, right in ("()", "[]", "{}"):
        bad += [left] * (expression.count(left) != expression.count(right))
    return bad


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_speaks_of_what_is_exposed(expression: str) -> None:
    assert wrong(expression) == []


def test_the_check_sees_a_name_a_label_and_a_bracket() -> None:
    assert wrong("rate(fedsecure_nothing_total[5m])") == ["fedsecure_nothing_total"]
    assert wrong("fedsecure_attempts") == ["fedsecure_attempts"], "counters end in _total"
    assert wrong('fedsecure_attempts_total{code="x"}') == ["fedsecure_attempts_total{code}"]
    assert wrong("sum by (color) (fedsecure_rounds)") == ["color"]
    assert wrong("sum((fedsecure_rounds)") == ["("]


def test_every_metric_is_shown_or_watched() -> None:
    text = " ".join(expressions())
    unused = {name for name in exposed() if not re.search(rf"\b{name}\b", text)}
    assert unused <= {
        "fedsecure_run_info",
        "fedsecure_attempt_duration_seconds_count",
        "fedsecure_attempt_duration_seconds_sum",
    }


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids) > 10
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        across, down = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in across for y in down}
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}", "no machine's own data source"
    assert "__inputs" not in BOARD
    for file in (DEPLOY / "grafana" / "provisioning").rglob("*.yaml"):
        assert yaml.safe_load(file.read_text())["apiVersion"] == 1


def test_every_rule_says_how_bad_it_is_and_what_to_do() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "cure"}
    listed = {row["alert"].strip("`") for row in table(sections(page("observability.md"))["Dashboard and alerts"])}
    assert listed == set(names)


def test_prometheus_reads_the_rules_beside_it() -> None:
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert [(DEPLOY / "prometheus" / name).exists() for name in config["rule_files"]] == [True]
    assert config["scrape_configs"][0]["job_name"] == "fedsecure"
    assert 'job="fedsecure"' in RULES[0]["expr"]


def test_the_page_lists_every_metric_and_no_other() -> None:
    listed = {row["metric"].strip("`") for row in table(sections(page("observability.md"))["Metrics"])}
    assert listed == {re.sub(r"_(bucket|count|sum)$", "", name) for name in exposed()}


def named(heading: str, column: str) -> set[str]:
    """All that stands in backticks in one column of a section's table."""
    rows = table(sections(page("observability.md"))[heading])
    return {word for row in rows for word in re.findall(r"`([\w-]+)`", row[column])}


def test_the_page_lists_every_kind_of_happening_and_its_facts() -> None:
    assert named("Happenings", "kind") == set(get_args(Kind))
    source = inspect.getsource(happenings)
    for row in table(sections(page("observability.md"))["Happenings"]):
        kinds, facts = (re.findall(r"`([\w-]+)`", row[column]) for column in ("kind", "facts"))
        (line,) = [text for text in source.splitlines() if f'"{kinds[0]}",' in text]
        for fact in facts:
            assert re.search(rf"\b{fact}\b", line), (kinds, fact)


def test_the_page_lists_every_field_of_a_log_line() -> None:
    assert set(FIELDS) <= named("Logs", "field")


def test_the_page_lists_every_event_of_a_site() -> None:
    source = inspect.getsource(diary)
    written = set(re.findall(r'self\._(?:write|last_word)\(\s*"([\w-]+)"', source))
    assert named("Audit log", "event") == written
    said = {row["event"]: row["facts beside `run`"] for row in table(sections(page("observability.md"))["Audit log"])}
    for fact in re.findall(r"(\w+)=", source.partition('"run-joined"')[2].partition("def not_joined")[0]):
        assert f"`{fact}`" in said["`run-joined`"]


def test_the_pages_own_check_of_a_log_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = AuditLog(tmp_path / "audit.log")
    for number in range(5):
        log.append("event", {"site": "ä", "number": number, "share": 0.1 * number, "names": ["a"]})
    (snippet,) = [block.text for block in blocks(page("observability.md"), "python") if block.name == "verify"]
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "observability.md", "exec"), {})
    assert capsys.readouterr().out.strip() == str(log.head())
    log.path.write_bytes(log.path.read_bytes().replace(b'"number":3', b'"number":4'))
    with pytest.raises(AssertionError, match="line 4 was changed"):
        exec(compile(snippet, "observability.md", "exec"), {})
