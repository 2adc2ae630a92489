"""What people see: tables of results on stdout, and one clear message for each failure on stderr. Waiting is shown by
:mod:`fedsecure.cli.progress`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsecure.errors import FedsecureError

if TYPE_CHECKING:
    from fedsecure.methods.recommend import Recommendation
    from fedsecure.privacy.audit import AuditResult
    from fedsecure.privacy.plan import PrivacyPlan
    from fedsecure.simulation.demo import DemoResult
    from fedsecure.simulation.scaffold import Layout

out = Console()
err = Console(stderr=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")


def show_error(error: FedsecureError) -> None:
    """Code and finding, expectation, cure: three lines."""
    text = Text.assemble((error.code, "bold red"), " ", error.found, "\n  expected: ", error.expected)
    text.append(f"\n  cure:     {error.cure}\n  see docs/errors.md#{error.code.lower()}", style="dim")
    err.print(text, soft_wrap=True)


def set_up_logging(format: Literal["text", "json"] = "text") -> None:
    """Lines on stderr, for people or for machines; never a tensor, a count or a secret (:mod:`fedsecure.logs`)."""
    from fedsecure.logs import set_up

    set_up(format)


def moment(seconds: float) -> str:
    """A unix time as a date and a time of day in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def new_table(title: str | None, *columns: str) -> Table:
    """Names at the left, which fold where they are too long; numbers aligned at the right, never broken."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    table.pad_edge = False
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def side_by_side(title: str | None, rows: Iterable[tuple[str, str]]) -> Table:
    """Labels and values, side by side."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    return table


def say(text: str) -> None:
    """A plain line of the result, whole, and seen at once even through a pipe."""
    _say(text)
    sys.stdout.flush()


def _say(text: str, **style: Any) -> None:
    """A line of the result, whole: paths are never broken."""
    out.print(text, highlight=False, soft_wrap=True, markup=False, **style)


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, each row one line however long its last cell is."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header) - 1)] + [0]
    for row in (header, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        _say(line, style="bold" if row is header else "")


def _short(path: Path) -> Path:
    """A path as seen from here, where it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def _epsilon(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def show_recommendation(found: Recommendation) -> None:
    """Every candidate, the one to take marked, the reason and the lines for the settings."""
    numbers = found.numbers
    total = sum(numbers.units.values())
    title = f"{len(numbers.units)} sites, {total:,} units, {numbers.classes} classes, d = {numbers.dimension}, "
    title += f"ε = {numbers.privacy.target_epsilon:g} at δ = {numbers.privacy.delta:g}"
    _say(title, style="bold")
    _say("")
    header = ("", "method", "noise", "rounds", "parameters", "multiplier", "μ", "class signal", "S/N", "verdict")
    _lines(
        header,
        [
            (
                "→" if candidate is found.best else "",
                candidate.method, candidate.noise, str(candidate.rounds), f"{candidate.parameters:,}",
                f"{candidate.noise_multiplier:.3g}", f"{candidate.mu:.3g}", f"{candidate.class_signal:.3g}",
                f"{candidate.signal_to_noise:.3g}", candidate.verdict,
            )
            for candidate in found.candidates
        ],
    )  # fmt: skip
    _say("")
    _say(f"Take {found.best.method} with {found.best.noise} noise: {found.reason}")
    _say("")
    _say(found.toml())


def show_demo(result: DemoResult) -> None:
    """The tables a demo ends with."""
    summary = result.summary
    scores = new_table("Global accuracy", "", "zero-shot", "trained")
    for label, key in (("accuracy", "accuracy"), ("balanced accuracy", "balanced_accuracy")):
        scores.add_row(label, _percent(summary[key]["before"]), _percent(summary[key]["after"]))
    out.print(scores)
    sites = new_table("Sites", "site", f"ε at δ = {summary['delta']:g}", "evaluation ε", "sent", "received")
    for site in summary["sites"]:
        spent, evaluated = summary["epsilon"].get(site), summary["epsilon_evaluation"].get(site)
        if site in summary["lost_sites"]:
            sites.add_row(site, "–" if spent is None else _epsilon(spent), "lost on the way", "–", "–")
            continue
        public = "public" if summary["evaluation_public"] else "–"
        sites.add_row(
            site,
            "only evaluates" if spent is None else _epsilon(spent),
            public if evaluated is None else _epsilon(evaluated),
            _size(summary["bytes_up"][site]),
            _size(summary["bytes_down"][site]),
        )
    out.print(sites)
    secagg, attempts = summary["secagg"], summary["attempts"]
    aborted = sum("aborted" in record for record in attempts)
    kind = {"phantoms": "generated, synthetic scans", "images": "your images", "features": "precomputed features"}
    rows = [
        ("data", kind[summary["source"]]),
        ("privacy unit", f"{summary['unit']}: this data names no patients, so each one is protected by itself"),
        ("training", f"{summary['adapter']} adapter, {summary['rounds']} rounds, {summary['engine']} engine"),
        ("noise", "whole at each site" if summary["noise"] == "local" else "shared by the sites, inside the sums"),
        ("secure sums", f"{len(attempts) - aborted}" + (f", and {aborted} aborted" if aborted else "")),
        (
            "holds against",
            f"a malicious aggregator and {secagg['colluders']} colluding site(s); "
            f"no sum of fewer than {secagg['min_survivors']} sites",
        ),
        ("processes", f"{summary['processes']}, {summary['wall_seconds']:.1f} s"),
    ]
    out.print(side_by_side("Run", rows))
    out.print()
    _say(f"privacy report  {summary['page']}")
    _say(f"                {summary['report']}")
    _say(f"adapter         {summary['adapter_file']}")
    if summary["source"] != "phantoms":
        _say("")
        _say(
            "The demo's ledgers end with its folder, which the next demo replaces: each demo begins with an unspent "
            "budget. A site's real ledger (`fedsecure join`) is kept."
        )


def show_outcome(outcome: Mapping[str, Any]) -> None:
    """What the aggregator learned."""
    table = new_table(f"Run {outcome['run'][:8]}: {outcome['rounds']} rounds", "", "accuracy", "balanced")
    for stage, facts in outcome["evaluations"].items():
        table.add_row(stage, _percent(facts["accuracy"]), _percent(facts["balanced_accuracy"]))
    if outcome["evaluations"]:
        out.print(table)
    aborted = [record for record in outcome["attempts"] if "aborted" in record]
    _say(f"{len(outcome['attempts']) - len(aborted)} secure sums, {len(aborted)} aborted attempts")
    for record in aborted:
        _say(f"  round {record['round']} attempt {record['attempt']}: {record['aborted']}")


def show_plan(plan: PrivacyPlan) -> None:
    """The plan, before any record is read."""
    err.print(side_by_side("Privacy plan of this run", plan.table()))


def show_site_report(report: Mapping[str, Any], *, folder: Path) -> None:
    """A site's own figures at the end of a run, and where its files are."""
    delta = f"δ = {report['delta']:g}"
    rows = [("privacy unit", report["unit"])]
    for population, label in (("train", "training"), ("evaluation", "evaluation")):
        if held := report["budgets"].get(population):
            own, every = held["this_run"]["epsilon"], held["all_runs"]["epsilon"]
            rows.append((f"{label} ε of this run", f"{_epsilon(own)} at {delta}"))
            if held["runs"] > 1:
                rows.append((f"{label} ε of all {held['runs']} runs", f"{_epsilon(every)} at {delta}"))
    if measured := report["accuracy"]:
        shown = [
            f"{_percent(measured[stage]['accuracy'])} {stage}" for stage in ("before", "after") if measured.get(stage)
        ]
        rows.append(("global accuracy", ", ".join(shown) or "–"))
    if report["stamp"]:
        rows.append(("stamp", report["stamp"]))
    out.print(side_by_side(f"Site {report['site']}", rows))
    out.print()
    _say(f"privacy-report.json and adapter.safetensors are in {_short(folder)}")


def show_layout(layout: Layout) -> None:
    """Where a new federation's files are, and the next commands."""
    if not layout.site_keys:
        _say("Every site makes its own keys. Start the aggregator, then invite each site (docs/enrolment.md):")
        _say(f"  fedsecure serve --config {layout.federation}")
        for site, file in layout.sites.items():
            _say(f"  fedsecure members invite {layout.folder} {site} --role {layout.roles[site]} --address HOST:PORT")
            _say(f"    and send {file} with it, for the site to complete")
        _say(f"Keep {layout.folder / 'ca'} offline: its keys can add members.", style="yellow")
        return
    _say("Put each site's records where its site.toml says, then start, each in its own terminal:")
    _say(f"  fedsecure serve --config {layout.federation}")
    for file in layout.sites.values():
        _say(f"  fedsecure join --config {file}")
    _say(
        "For trials only: every private key was made here. Give each site its own folder, and no other.", style="yellow"
    )


def show_predictions(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line an image, its path last."""
    _lines(
        ("class", "probability", "image"), [(r["class"], f"{r['probability']:11.3f}", str(r["image"])) for r in rows]
    )


def show_evaluation(result: Mapping[str, Any]) -> None:
    table = new_table(f"{result['records']} records", "", "zero-shot", "adapter")
    for label, key in (("accuracy", "accuracy"), ("balanced accuracy", "balanced_accuracy")):
        table.add_row(label, _percent(result["zero_shot"][key]), _percent(result["adapter"][key]))
    table.add_section()
    for name, before, after in result["per_class"]:
        table.add_row(Text(f"recall of {name}"), _percent(before), _percent(after))
    out.print(table)


def show_budget(rows: Sequence[Mapping[str, Any]], *, delta: float) -> None:
    """A line for each data set and population."""
    if not rows:
        _say("nothing has been charged")
        return
    table = new_table(
        f"Privacy budgets at δ = {delta:g}", "data set", "units", "spent ε", "limit ε", "left ε", "charges", "fit more"
    )
    table.columns[0].min_width = 12
    for row in rows:
        limit = "–"
        if row["limit_epsilon"] is not None:
            limit = f"{row['limit_epsilon']:g}" + (f" at {row['limit_delta']:g}" if row["limit_delta"] != delta else "")
        left = row["releases_left"]
        table.add_row(
            Text(row["dataset"]),
            row["population"],
            _epsilon(row["epsilon"]),
            limit,
            _epsilon(row["remaining"]),
            str(row["releases"]),
            "–" if left is None else str(left),
            style="red" if left == 0 else None,
        )
    out.print(table)
    _say("fit more: how many more charges like the last one keep within the limit", style="dim")
    for row in rows:
        if row["seeded"]:
            _say(
                f"{row['dataset']}, {row['population']} units: {row['seeded']} of {row['releases']} releases had noise "
                "from a seed; whoever knows it can subtract it, and their ε promises nothing", style="red",
            )  # fmt: skip
    if any(row["limit_epsilon"] is None for row in rows):
        _say("no limit in the ledger: the policy in site.toml decides (--max-epsilon reckons with it)", style="dim")


def show_history(rows: Sequence[Mapping[str, Any]], *, delta: float) -> None:
    """Under each data set and population one line a charge or limit, oldest first; a charge's end is in its line."""
    shown = [row for row in rows if row["state"] in ("RESERVED", "LIMIT")]
    if not shown:
        _say("nothing has been charged")
        return
    ends = {row["reservation"]: row["reason"] for row in rows if row["state"] == "VOID"}
    header = ("when (UTC)", "run", "round", "attempt", "state", "ε alone", "remark")
    for name, population in dict.fromkeys((row["dataset"], row["population"]) for row in shown):
        _say(f"{name}, {population} units", style="bold")
        lines = [
            (
                row["utc"][:19].replace("T", " "),
                row["run"][:8] or "–",
                f"{row['round']:5}" if row["run"] else "    –",
                f"{row['attempt']:7}" if row["run"] else "      –",
                row["final"].lower(),
                f"{_epsilon(row['epsilon']):>7}",
                _remark(row, ends.get(row["reservation"], "")),
            )
            for row in shown
            if (row["dataset"], row["population"]) == (name, population)
        ]
        _lines(header, lines)
        _say("")
    _say(f"ε alone: of that charge by itself, at δ = {delta:g}; together they come to less than their sum", style="dim")


def _remark(row: Mapping[str, Any], why_void: str) -> str:
    said = [why_void or row["reason"], row["note"]]
    if row["limit_epsilon"] is not None:
        said.insert(0, f"at most ε = {row['limit_epsilon']:g} at δ = {row['limit_delta']:g}")
    return "; ".join(text for text in said if text)


def show_limit(row: Mapping[str, Any]) -> None:
    """A limit just recorded, beside what is spent; and whether any charge knows its name."""
    limit, before = f"ε = {row['limit_epsilon']:g} at δ = {row['limit_delta']:g}", row["before"]
    _say(f"{row['dataset']}, {row['population']} units: at most {limit}" + (f"; before: {before:g}" if before else ""))
    _say(f"spent ε {_epsilon(row['epsilon'])}, left {_epsilon(row['remaining'])}")
    if not row["releases"]:
        _say(
            "nothing has been charged under this name yet: compare it with `name` in site.toml, or with "
            "`fedsecure budget show`", style="yellow",
        )  # fmt: skip


def show_chain(found: Mapping[str, Any]) -> None:
    """That a ledger's chain holds, and the head to note."""
    held = f", and row {found['checked_against'].partition(':')[0]} is as noted" if found["checked_against"] else ""
    _say(f"{found['rows']} rows, unbroken{held}")
    _say(f"head {found['head']}")
    _say("note the head elsewhere: with --head this command finds a ledger that was set back since", style="dim")


_LAYERS = {
    "A": "A, replay: sums with and without one unit; the noise and the sampler by themselves",
    "B": "B, canaries: planted units against what the accountant believes",
}


def show_audit(result: AuditResult) -> None:
    """Facts, the tests of each layer with their limits, the attack's figures, and the verdict."""
    out.print(side_by_side("Audit", [(label, str(value)) for label, value in result.facts.items()]))
    rows = result.table()
    for layer, title in _LAYERS.items():
        out.print()
        table = new_table(title, "test", "found", "limit", "")
        for _, name, found, limit, verdict in (row for row in rows if row[0] == layer):
            table.add_row(name, found, limit, verdict, style="bold red" if verdict == "FAIL" else None)
        out.print(table)
    if result.memberships:
        table = new_table(
            "C, membership: an attack's figures, and no test", "trained", "AUC", "found at 1 %", "at 0.1 %"
        )
        for attack in result.memberships:
            table.add_row(attack.subject, f"{attack.auc:.3f}", _percent(attack.tpr_at_1), _percent(attack.tpr_at_01))
        out.print(table)
        _say("AUC 0.5 is guessing; found: of the members, where so many of the others are accused", style="dim")
    else:
        _say("C, membership: left out (--no-membership, or no time within --seconds)", style="dim")
    verdict = "not refuted" if result.passed else "REFUTED by " + ", ".join(result.failures)
    _say("")
    _say(
        f"proven ε = {result.epsilon:g} at δ = {result.delta:g}: {verdict}",
        style="bold" if result.passed else "bold red",
    )
    _say("an audit can refute a claim and never prove it", style="dim")
