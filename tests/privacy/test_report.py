"""The report: figures recomputed from the ledger, valid under the published schema, and a page that fetches nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fedsecure.config import RunSettings
from fedsecure.errors import EnvironmentProblem, PrivacyError
from fedsecure.messages import Event
from fedsecure.methods.base import Cohort
from fedsecure.privacy import accounting
from fedsecure.privacy.ledger import Ledger, Limit
from fedsecure.privacy.plan import Privacy, PrivacyPlan
from fedsecure.privacy.report import network_report, site_report
from fedsecure.privacy.report_html import load_report, render_html, write_html
from fedsecure.privacy.report_verify import attach_audit

RUN = "0123456789abcdef" * 2
DIGEST = hashlib.sha256(b"q").digest()
SITES = ("north", "south", "west")


def run_settings(**privacy: Any) -> RunSettings:
    return RunSettings(
        name="trial <b>one</b>",
        classes=("glioma", "meningioma", "no tumour", "pituitary"),
        encoder={"dimension": 64, "fingerprint": "0" * 64},  # type: ignore[arg-type]
        privacy=privacy,  # type: ignore[arg-type]
        method={"rounds": 6},  # type: ignore[arg-type]
        sites={  # type: ignore[arg-type]
            **{site: {"max_units": 100 * k} for k, site in enumerate(SITES, 3)},
            "rest": {"role": "evaluate", "evaluation_units": 80},
        },
    )


def run_plan(settings: RunSettings) -> PrivacyPlan:
    return Privacy(**settings.privacy.model_dump()).plan(
        parameters=256,
        units=settings.declared_units(),
        rounds=6,
        cohort=Cohort(sites=3, colluders=1, min_survivors=3),
    )


def outcome() -> dict[str, Any]:
    attempts: list[dict[str, Any]] = [
        {"round": 0, "attempt": 0, "stage": "before", "cohort": [1] * 4, "survivors": [1] * 4}
    ]
    attempts.append({"round": 1, "attempt": 0, "stage": "training", "cohort": [1] * 3, "aborted": "south was lost"})
    attempts += [
        {"round": k, "attempt": int(k == 1), "stage": "training", "cohort": [1] * 3, "survivors": [1] * 3}
        for k in range(1, 7)
    ]
    counts = {
        "before": {"accuracy": 0.41, "balanced_accuracy": 0.4, "hits": [5, 9, 12, 7.2], "totals": [20, 20.3, 20, 20]},
        "after": {"accuracy": 0.83, "balanced_accuracy": 0.81, "hits": [15, 16, 19, 18], "totals": [20, 20.1, 20, 20]},
    }
    return {"complete": True, "attempts": attempts, "evaluations": counts, "rounds": 6}


def spend(folder: Path, site: str, events: tuple[Event, ...], *, rounds: int = 6, run: str = RUN) -> Ledger:
    ledger = Ledger(folder / f"{site}.db")
    for number in range(rounds):
        made = ledger.reserve(
            dataset=f"{site} scans",
            population=events[0].population,
            events=events,
            run=run,
            round=number,
            attempt=0,
            query_digest=DIGEST,
            limit_epsilon=1e9,
            delta=1e-5,
        )
        if number != 1:
            ledger.commit(made, DIGEST)
    return ledger


def trainer(folder: Path, site: str = "north", *, seeded: bool = False, **privacy: Any) -> dict[str, Any]:
    settings = run_settings(**privacy)
    plan = run_plan(settings)
    with spend(folder, site, plan.round_events) as ledger:
        return site_report(
            site=site, role="train", run=RUN, settings=settings, ledger=ledger, train_dataset=f"{site} scans",
            evaluation_dataset=None, delta=1e-5, plan=plan, outcome=outcome(), seeded=seeded,
            limits={"train": Limit(20.0, 1e-6)},
        )  # fmt: skip


def evaluator(folder: Path, *, dataset: str | None = "rest scans", **privacy: Any) -> dict[str, Any]:
    settings = run_settings(**privacy)
    event = Event("evaluation", "evaluation counts", 4.0, 4.0)
    with spend(folder, "rest", (event,), rounds=2) as ledger:
        return site_report(
            site="rest", role="evaluate", run=RUN, settings=settings, ledger=ledger, train_dataset=None,
            evaluation_dataset=dataset, delta=1e-5, plan=run_plan(settings), outcome=outcome(), seeded=False,
        )  # fmt: skip


def network(folder: Path, **changes: Any) -> dict[str, Any]:
    return network_report([evaluator(folder, **changes), *(trainer(folder, site, **changes) for site in SITES)])


def first_format(report: dict[str, Any]) -> dict[str, Any]:
    """The same report as format 1 had it."""
    older: dict[str, Any] = json.loads(json.dumps(report))
    for part in (older, *older.get("sites", [])):
        part["schema_version"] = 1
        for name in ("max_sites_per_patient", "audit", "several_sites", "signature"):
            part.pop(name, None)
        for budget in part.get("budgets", {}).values():
            del budget["shares"], budget["limits"]
    return older


def validate(report: dict[str, Any]) -> None:
    schema = json.loads(resources.files("fedsecure.privacy").joinpath("report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(json.dumps(report, allow_nan=False)))


def test_figures_are_recomputed_from_the_ledger(tmp_path: Path) -> None:
    report = trainer(tmp_path)
    validate(report)
    (event,) = run_plan(run_settings()).round_events
    assert report["epsilon"] == accounting.epsilon([event] * 6, delta=1e-5)
    price = report["budgets"]["train"]["this_run"]
    outsider, colluding, beyond = (entry["epsilon"] for entry in price["adversaries"])
    assert outsider < colluding == report["epsilon"] < beyond
    assert beyond == accounting.epsilon([event] * 6, delta=1e-5, adversary="beyond")
    # All three sites' noise against an outsider: z·√(3/2).
    assert price["adversaries"][0]["mu"] == pytest.approx(report["mu"] / (3 / 2) ** 0.5)
    releases = report["budgets"]["train"]["releases"]
    assert [row["state"] for row in releases] == ["COMMITTED", "RESERVED", *["COMMITTED"] * 4]
    assert sum(row["share"] for row in releases) == pytest.approx(1)
    assert releases[-1]["epsilon_after"] == report["epsilon"]
    assert [row["aborted"] for row in report["rounds"]].count("south was lost") == 1
    assert f"{report['epsilon']:.2f}" in report["statement"]


def test_the_statement_says_that_it_rests_on_the_noise_of_other_sites(tmp_path: Path) -> None:
    def beyond(report: dict[str, Any]) -> str:
        return f"{report['budgets']['train']['this_run']['adversaries'][2]['epsilon']:.2f}"

    for place in ("shared", "local", "joined", "several"):
        (tmp_path / place).mkdir()
    shared, local = trainer(tmp_path / "shared"), trainer(tmp_path / "local", noise="local")
    colluders = shared["secagg"]["colluders"]
    assert f"no more than {colluders} of them" in shared["statement"]
    assert f"with more of them ε is {beyond(shared)}" in shared["statement"]
    assert "together with the aggregator" not in local["statement"], "a site's own noise gives the whole ε"
    joined = network(tmp_path / "joined")
    assert f"no more than {colluders} of them" in joined["statement"]
    assert beyond(shared) in joined["statement"]
    several = network(tmp_path / "several", max_sites_per_patient=2)
    assert f"no more than {colluders} of them" in several["statement"]
    assert beyond(shared) not in several["statement"], "that is for a unit at one site"


def test_other_runs_on_the_same_data_are_shown_and_voids_are_not_charged(tmp_path: Path) -> None:
    settings = run_settings()
    plan = run_plan(settings)
    spend(tmp_path, "north", plan.round_events, rounds=3, run="f" * 32).close()
    with spend(tmp_path, "north", plan.round_events) as ledger:
        voided = next(e for e in ledger.history() if e.final == "RESERVED" and e.run == RUN)
        ledger.void(voided.reservation, "the aggregator was gone before the upload")
        report = site_report(
            site="north", role="train", run=RUN, settings=settings, ledger=ledger, train_dataset="north scans",
            evaluation_dataset=None, delta=1e-5, plan=plan, outcome=None, seeded=False,
        )  # fmt: skip
    validate(report)
    budget = report["budgets"]["train"]
    assert budget["runs"] == 2
    assert report["epsilon"] == accounting.epsilon(plan.round_events * 5, delta=1e-5)
    assert budget["all_runs"]["epsilon"] == accounting.epsilon(plan.round_events * 8, delta=1e-5)
    assert [row["share"] for row in budget["releases"]][1] == 0.0
    (event,) = plan.round_events
    assert budget["all_runs_events"] == [
        {
            "noise_multiplier": event.noise_multiplier,
            "local_noise_multiplier": event.local_noise_multiplier,
            "sampling_rate": 1.0,
            "steps": 8,
        }
    ]
    assert report["accuracy"] is None
    assert report["rounds"] == []


@pytest.mark.slow
def test_what_the_policy_and_the_officer_allow_is_beside_what_was_paid(tmp_path: Path) -> None:
    settings, plan = run_settings(), run_plan(run_settings())
    with spend(tmp_path, "north", plan.round_events) as ledger:
        ledger.set_limit("north scans", "train", Limit(9.0, 1e-5), reason="agreed with the board")
        report = site_report(
            site="north", role="train", run=RUN, settings=settings, ledger=ledger, train_dataset="north scans",
            evaluation_dataset=None, delta=1e-5, plan=plan, outcome=None, seeded=False,
            limits={"train": Limit(20.0, 1e-6), "evaluation": Limit(1.0, 1e-5)},
        )  # fmt: skip
    validate(report)
    spent = plan.round_events * 6
    assert report["budgets"]["train"]["limits"] == [
        {"by": "policy", "epsilon": 20.0, "delta": 1e-6, "remaining": 20.0 - accounting.epsilon(spent, delta=1e-6)},
        {"by": "officer", "epsilon": 9.0, "delta": 1e-5, "remaining": 9.0 - accounting.epsilon(spent, delta=1e-5)},
    ]
    # The page shows the tighter one, and the other's δ where it is another.
    page = render_html(report)
    assert f'<td class="n">9</td><td class="n">{9.0 - report["epsilon"]:.3f}</td>' in page
    assert '<td class="n">20 at δ = 10⁻⁶</td>' in render_html(trainer(tmp_path, "south"))
    assert '<td class="n">–</td><td class="n">–</td>' in render_html(evaluator(tmp_path))


def test_what_the_units_paid_under_another_name_is_in_all_runs(tmp_path: Path) -> None:
    settings, plan = run_settings(), run_plan(run_settings())
    (event,) = plan.round_events
    with Ledger(tmp_path / "north.db") as ledger:
        for number, (name, run) in enumerate([("old name", "f" * 32), ("north scans", RUN)]):
            ledger.reserve(
                dataset=name, population="train", events=(event,), run=run, round=number, attempt=0,
                query_digest=DIGEST, limit_epsilon=50.0, delta=1e-5, units=ledger.hash_units(["patient/1"]),
            )  # fmt: skip
        report = site_report(
            site="north", role="train", run=RUN, settings=settings, ledger=ledger, train_dataset="north scans",
            evaluation_dataset=None, delta=1e-5, plan=plan, outcome=None, seeded=False,
        )  # fmt: skip
    validate(report)
    budget = report["budgets"]["train"]
    assert report["epsilon"] == budget["this_run"]["epsilon"] == accounting.epsilon([event], delta=1e-5)
    assert budget["all_runs"]["epsilon"] == accounting.epsilon([event] * 2, delta=1e-5)


def test_poisson_and_local_noise_reports(tmp_path: Path) -> None:
    report = trainer(tmp_path, sampling_rate=0.3, noise_multiplier=2.0)
    validate(report)
    assert report["mu"] is None
    assert report["mechanism"]["sampling"] == "Poisson"
    assert 0 < report["epsilon"] <= 8.0
    attack = report["budgets"]["train"]["this_run"]["attack"]
    assert all(low["tpr"] <= high["tpr"] for low, high in itertools.pairwise(attack))
    local = trainer(tmp_path, "south", noise="local")
    assert len({entry["epsilon"] for entry in local["budgets"]["train"]["this_run"]["adversaries"]}) == 1


def test_evaluation_sites(tmp_path: Path) -> None:
    private = evaluator(tmp_path)
    validate(private)
    assert private["epsilon"] is None
    assert private["epsilon_evaluation"] == accounting.epsilon([Event("evaluation", "x", 4.0, 4.0, 1.0, 2)], delta=1e-5)
    (tmp_path / "p").mkdir()
    public = evaluator(tmp_path / "p", dataset=None)
    validate(public)
    assert public["epsilon_evaluation"] is None
    assert "nothing about private units" in public["statement"]


def test_network_report_takes_the_largest_and_keeps_every_site(tmp_path: Path) -> None:
    report = network(tmp_path)
    validate(report)
    assert [site["site"] for site in report["sites"]] == ["north", "rest", "south", "west"]
    assert report["epsilon"] == max(site["epsilon"] for site in report["sites"] if site["role"] == "train")
    assert report["epsilon_evaluation"] == report["sites"][1]["epsilon_evaluation"]
    assert report["accuracy"]["per_class"][0] == {"class": "glioma", "before": 0.25, "after": 0.75}


def test_reports_of_different_runs_do_not_merge(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    for reports in ([], [one, one | {"run": "f" * 32}]):
        with pytest.raises(PrivacyError, match="FS-1230"):
            network_report(reports)


def test_the_schema_refuses_what_is_missing_or_extra(tmp_path: Path) -> None:
    report = trainer(tmp_path)
    for broken in (
        {key: value for key, value in report.items() if key != "delta"},
        report | {"surprise": 1},
        report | {"seeded": "no"},
        report | {"delta": 1.5},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validate(broken)


@pytest.mark.slow
def test_a_seeded_run_is_stamped_everywhere(tmp_path: Path) -> None:
    report = trainer(tmp_path, seeded=True)
    validate(report)
    assert report["stamp"] == "NO PRIVACY (seeded)"
    assert report["statement"].startswith("NO PRIVACY (seeded)")
    assert "seed" in report["mechanism"]["generator"]
    merged = network_report([report, trainer(tmp_path, "south")])
    assert merged["stamp"] == "NO PRIVACY (seeded)"
    assert '<p class="stamp">NO PRIVACY (seeded)</p>' in render_html(merged)
    assert "NO PRIVACY" not in render_html(trainer(tmp_path, "west"))


@pytest.mark.slow
def test_a_run_without_privacy_says_so_first_and_why(tmp_path: Path) -> None:
    report = trainer(tmp_path, no_privacy="public <data>")
    validate(report)
    assert report["stamp"] == "NO PRIVACY (by consent)"
    assert report["statement"].startswith("NO PRIVACY (by consent)")
    assert "public <data>" in report["statement"]
    assert "usual standards" not in report["statement"]
    assert "public <data>" in report["not_protected"][0]
    merged = network_report([report, trainer(tmp_path, "south", no_privacy="public <data>")])
    validate(merged)
    assert merged["stamp"] == report["stamp"]
    for page in (render_html(report), render_html(merged)):
        assert '<p class="stamp">NO PRIVACY (by consent)</p>' in page
        assert "public &lt;data&gt;" in page
        assert "none: the run does without privacy" in page
    # Without the reason the same noise is called weak, and no word is said about consent.
    private = trainer(tmp_path, "west")
    assert (private["no_privacy"], private["stamp"]) == (None, None)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.fetched += [
            str(v) for k, v in attrs if k in ("src", "href", "srcset", "data") and not str(v).startswith("data:")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    report = network(tmp_path)
    write_html(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert page.tags.count("img") == 4
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\(", text)
    assert f"{report['epsilon']:.3f}" in text
    assert "83.0%" in text
    assert "south was lost" in text
    # A federation's name is text, never markup.
    assert "trial &lt;b&gt;one&lt;/b&gt;" in text


NIST = (
    "Unit and definition", "Mechanism", "Composition", "Trust model", "Data collection and exposure",
    "Hazards and limits", "Utility", "Provenance",
)  # fmt: skip


def test_the_sections_are_in_the_order_of_nist_sp_800_226(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    for report in (network(tmp_path), evaluator(tmp_path / "alone", dataset=None)):
        headings = re.findall(r"<h2><span>(\d)</span> ([^<]+)</h2>", render_html(report))
        assert headings == [(str(number), name) for number, name in enumerate(NIST, 1)]


@pytest.mark.slow
def test_signed_reports_say_whose_they_are(tmp_path: Path) -> None:
    report = trainer(tmp_path)
    assert "Ed25519" not in render_html(report).split("Provenance")[1]
    signature = {"algorithm": "Ed25519", "site": "north", "value": "ab" * 64}
    validate(report | {"signature": signature})
    assert "by the identity key of north <code>abababababababab…" in render_html(report | {"signature": signature})


@pytest.mark.slow
@pytest.mark.parametrize(
    "privacy", [{"sampling_rate": 0.3, "noise_multiplier": 2.0}, {"noise": "local", "unit": "record"}]
)
def test_pages_of_single_sites(tmp_path: Path, privacy: dict[str, Any]) -> None:
    assert "site <strong>north</strong>" in render_html(trainer(tmp_path, **privacy))
    assert "evaluates" in render_html(evaluator(tmp_path, dataset=None))


def test_reading_a_report_back(tmp_path: Path) -> None:
    report = trainer(tmp_path)
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert load_report(file) == json.loads(json.dumps(report))
    file.write_text(json.dumps(report | {"schema_version": 3}))
    with pytest.raises(PrivacyError, match="FS-1233"):
        load_report(file)
    for text in ("{", "[]", '{"schema": "other"}'):
        file.write_text(text)
        with pytest.raises(PrivacyError, match="FS-1232"):
            load_report(file)
    with pytest.raises(PrivacyError, match="FS-1232"):
        load_report(tmp_path / "absent.json")


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(EnvironmentProblem, match=r"FS-1815.*fedsecure\[report\]"):
        render_html(trainer(tmp_path))


def test_shares_by_purpose_add_up_to_the_whole(tmp_path: Path) -> None:
    settings, plan = run_settings(), run_plan(run_settings())
    (event,) = plan.round_events
    extra = [replace(event, purpose="prototypes", noise_multiplier=2 * event.noise_multiplier)]
    with spend(tmp_path, "north", (event, *extra)) as ledger:
        report = site_report(
            site="north", role="train", run=RUN, settings=settings, ledger=ledger, train_dataset="north scans",
            evaluation_dataset=None, delta=1e-5, plan=plan, outcome=None, seeded=False,
        )  # fmt: skip
    validate(report)
    shares = report["budgets"]["train"]["shares"]
    assert [(row["purpose"], row["releases"]) for row in shares["purposes"]] == [("training", 6), ("prototypes", 6)]
    assert [row["share"] for row in shares["purposes"]] == pytest.approx([0.8, 0.2])
    assert shares["definition"].startswith("part of μ²")
    page = render_html(report)
    assert "prototypes" in page
    assert "80.0%" in page


@pytest.mark.slow
def test_units_at_several_sites_cost_more_and_the_report_says_so(tmp_path: Path) -> None:
    apart = network(tmp_path)
    figures = [row for row in apart["several_sites"]["figures"] if row["population"] == "train"]
    mu = figures[0]["mu"]
    assert (apart["epsilon"], apart["mu"]) == (figures[0]["epsilon"], mu)
    # The same noise meets two clipped vectors of the unit: twice the μ, not √2 times.
    assert [row["mu"] for row in figures] == pytest.approx([mu, 2 * mu, 3 * mu])
    assert [row["sites"] for row in figures] == [1, 2, 3]
    (tmp_path / "two").mkdir()
    declared = network(tmp_path / "two", max_sites_per_patient=2)
    validate(declared)
    assert declared["epsilon"] == figures[1]["epsilon"]
    assert "up to 2 sites" in declared["statement"]
    assert any("more than 2 sites" in line and "nobody has checked" in line for line in declared["assumptions"])
    page = render_html(declared)
    assert "2 (declared)" in page
    assert "compose in parallel" in page
    assert "for a patient at up to 2 sites" in page
    assert "the largest of all" not in page
    assert "the largest of all sites" in render_html(apart)


def test_several_sites_with_local_noise_compose_and_sampling_falls_under_group_privacy(tmp_path: Path) -> None:
    local = network(tmp_path, noise="local")["several_sites"]["figures"]
    assert local[1]["mu"] == pytest.approx(local[0]["mu"] * 2**0.5)
    (tmp_path / "p").mkdir()
    sampled = network(tmp_path / "p", sampling_rate=0.3, noise_multiplier=20.0)["several_sites"]["figures"]
    assert sampled[1]["mu"] is None
    # Never below the exact figure of a full batch's half: twice ε, at a smaller δ.
    assert 2 * sampled[0]["epsilon"] < sampled[1]["epsilon"] < 4 * sampled[0]["epsilon"]


def audit_result() -> dict[str, Any]:
    check = {"layer": "B", "name": "mean of canaries", "found": 1.7, "limit": 4.5, "passed": True}
    bound = {"name": "one run", "epsilon": 0.55, "claimed": 2.0, "certain": 0.4, "limit": 2.5, "passed": True}
    return {
        "date": "2026-11-21", "passed": True, "epsilon": 2.0, "delta": 1e-5, "facts": {"engine": "closed-form"},
        "checks": [check], "bounds": [bound], "membership": [{"subject": "linear", "auc": 0.6}],
    }  # fmt: skip


@pytest.mark.slow
def test_an_audit_is_shown_or_said_to_be_missing(tmp_path: Path) -> None:
    report = trainer(tmp_path)
    assert "empirical audit: not run" in render_html(report)
    attached = attach_audit(report, audit_result())
    validate(attached)
    page = render_html(attached)
    assert "mean of canaries" in page
    assert "2026-11-21" in page
    assert "not run" not in page
    assert "mean of canaries" in render_html(network_report([attached]))
    refuted = attach_audit(report, audit_result() | {"passed": False})
    assert "REFUTED" in render_html(refuted)
    for broken in ([], {}, audit_result() | {"checks": None}):
        with pytest.raises(PrivacyError, match="FS-1269"):
            attach_audit(report, broken)


def test_a_report_of_the_first_format_is_still_shown(tmp_path: Path) -> None:
    page = render_html(first_format(network(tmp_path)))
    assert "What it was spent on" in page
    assert "If a patient is at several sites" in page
