"""A privacy report as one self-contained page: template, plots, and nothing fetched from anywhere.

Its sections are in the order in which NIST SP 800-226 (2025) asks: unit and definition, mechanism, composition, trust
model, data collection, hazards, utility.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsecure.errors import EnvironmentProblem
from fedsecure.files import write_whole
from fedsecure.privacy.report_figures import by_purpose, events_of, several_sites
from fedsecure.privacy.report_text import exposure, power, rates_by_site
from fedsecure.privacy.report_verify import check_format, no_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _SOFT, _ACCENT, _PALE = "#1d2433", "#5b6478", "#1f5fa8", "#9db7d6"
_COLOURS = ("#1f5fa8", "#c8571b", "#3b8252", "#7a4ba0", "#9a7d0a", "#3f8f9b", "#b0416b", "#55606e")
_MOST_CLASSES = 20
_FALSE_POSITIVES = (1e-3, 1e-2, 1e-1)
_MOST_BYTES = 1 << 28


def load_report(path: Path | str) -> dict[str, Any]:
    """Read a report back.

    Raises:
        PrivacyError: FS-1232 it cannot be read or is no report, FS-1233 it is of a newer release.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise no_report(path, f"more than {_MOST_BYTES >> 20} MiB")
        report = json.loads(raw, object_pairs_hook=_unambiguous, parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise no_report(path, str(error)) from error
    check_format(report, path)
    return dict(report)


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with each name once: of two, one reader would check the first and another show the second."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def write_html(report: Mapping[str, Any], path: Path | str) -> None:
    """Write the page of a site's or a network's report.

    Raises:
        EnvironmentProblem: FS-1815 jinja2 or matplotlib is missing; FS-1802 the page cannot be written.
    """
    write_whole(Path(path), render_html(report).encode())


def render_html(report: Mapping[str, Any]) -> str:
    """The page as text: HTML 5 with inline style and ``data:`` images only.

    Raises:
        EnvironmentProblem: FS-1815 jinja2 or matplotlib is missing.
    """
    try:
        import jinja2
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            "FS-1815", f"the page needs {error.name}, which is not installed", expected="jinja2 and matplotlib",
            cure="pip install 'fedsecure[report]'; the JSON report needs neither",
        ) from error  # fmt: skip
    report = current(report)
    sites: Sequence[Mapping[str, Any]] = report["sites"] if report["kind"] == "network" else [report]
    trained = [site for site in sites if site["budgets"].get("train", {}).get("releases")]
    worst = max(
        (site["budgets"]["train"]["this_run"] for site in trained),
        key=lambda price: float("inf") if price["epsilon"] is None else float(price["epsilon"]),
        default=None,
    )
    plots = dict.fromkeys(("attack", "epsilon", "accuracy", "utility"), "")
    if worst is not None:
        plots["attack"] = _plot(_attack, worst)
        plots["epsilon"] = _plot(_spent, trained, _target(report))
    if report["accuracy"] and report["accuracy"]["before"] and report["accuracy"]["after"]:
        plots["accuracy"] = _plot(_accuracy, report["accuracy"])
        if report["epsilon"] and report["accuracy"]["after"]["accuracy"] is not None:
            plots["utility"] = _plot(_utility, report["accuracy"], float(report["epsilon"]))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    environment.filters["percent"] = _percent
    environment.filters["power"] = power
    source = resources.files("fedsecure.privacy").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        r=report,
        sites=sites,
        worst=worst,
        plots=plots,
        attack=_attack_rows(worst),
        mechanism=_mechanism_rows(report["mechanism"], target=_target(report)),
        exposure=exposure(report),
        audits=_audits(report, sites),
        definition=_definition(sites),
    )


def current(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report of an earlier format with what it lacks, for display; the copy carries no valid signature."""
    found: dict[str, Any] = json.loads(json.dumps(report))
    sites: list[dict[str, Any]] = found["sites"] if found["kind"] == "network" else [found]
    for part in (found, *sites):
        part.setdefault("max_sites_per_patient", 1)
        part.setdefault("audit", None)
    for site in sites:
        for population, budget in site["budgets"].items():
            paid = [row["events"] for row in budget["releases"] if row["state"] != "VOID"]
            budget.setdefault("limits", [])
            budget.setdefault("shares", by_purpose([events_of(rows, population) for rows in paid]))
    if found["kind"] == "network" and "several_sites" not in found:
        found["several_sites"] = several_sites(sites, found["delta"], declared=1)
    return found


def _audits(
    report: Mapping[str, Any], sites: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Whose audit it is, and the audit; one line "not run" where nobody has any."""
    found = [(f"site {site['site']}", site["audit"]) for site in sites if site["audit"]]
    if report["kind"] == "network" and report["audit"]:
        found.insert(0, ("the federation", report["audit"]))
    return found or [("empirical audit", None)]


def _definition(sites: Sequence[Mapping[str, Any]]) -> str:
    found = {budget["shares"]["definition"] for site in sites for budget in site["budgets"].values()}
    return "; ".join(sorted(found))


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "–"


def _percent(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "–"


def _attack_rows(price: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The bound where readers look for it."""
    points = price["attack"] if price else ()
    return [point for point in points if any(math.isclose(point["fpr"], at) for at in _FALSE_POSITIVES)]


def _target(report: Mapping[str, Any]) -> float | None:
    """The ε that the noise was made for; a run without privacy was made for none."""
    return None if report.get("no_privacy") else float(report["mechanism"]["target_epsilon"])


def _mechanism_rows(m: Mapping[str, Any], *, target: float | None) -> list[tuple[str, str]]:
    place = {
        "distributed": "exact discrete Gaussian, a share from each site, whole only in the secure sum",
        "local": "Gaussian, whole at each site and each local step",
    }[m["noise"]]
    rates = m.get("sampling_rates") or {"every site": m["sampling_rate"]}
    return [
        ("method", f"{m['method']}, {m['parameters']:,} trained parameters"),
        ("clip norm of a unit", f"{m['clip_norm']:g}"),
        ("noise", place),
        (
            "noise multiplier a step",
            f"{m['noise_multiplier']:.4g} (a site's own share {m['local_noise_multiplier']:.4g})",
        ),
        ("sampling", m["sampling"] + ("" if m["sampling"] == "full batch" else f", rate {rates_by_site(rates)}")),
        (
            "planned",
            f"{m['rounds_planned']} rounds × {m['local_steps']} local step(s), spare attempts: {m['spare_attempts']}",
        ),
        ("target ε", "none: the run does without privacy" if target is None else f"{target:g}"),
        ("predicted signal-to-noise a step", f"{m['signal_to_noise']:.3g}"),
        ("accountant", m["accountant"]),
        ("random numbers", m["generator"]),
    ]


# --- plots ------------------------------------------------------------------------------------------------------------


def _plot(draw: Any, *arguments: Any) -> str:
    """A drawing as a ``data:`` URI; an image element keeps its ids and styles to itself."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "fedsecure", "text.color": _INK}):
        figure = Figure(figsize=(5.6, 3.7), layout="constrained")
        draw(figure, *arguments)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _axes(figure: Figure) -> Axes:
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    axes.tick_params(colors=_SOFT)
    return axes


def _attack(figure: Figure, price: Mapping[str, Any]) -> None:
    axes = _axes(figure)
    fpr = [point["fpr"] for point in price["attack"]] + [1.0]
    tpr = [point["tpr"] for point in price["attack"]] + [1.0]
    axes.fill_between(fpr, fpr, tpr, color=_PALE, alpha=0.35, linewidth=0)
    axes.plot(fpr, tpr, color=_ACCENT, linewidth=2)
    axes.plot(fpr, fpr, color=_SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.set_xlim(1e-4, 1)
    axes.set_ylim(0, 1)
    axes.text(0.9, 0.12, "guessing", color=_SOFT, ha="right", va="bottom")
    near = min(price["attack"], key=lambda point: abs(point["fpr"] - 0.01))
    axes.plot([near["fpr"]], [near["tpr"]], "o", color=_ACCENT, markersize=6)
    axes.annotate(
        f"{near['tpr']:.1%} at 1%", (near["fpr"], near["tpr"]), xytext=(-8, 8), textcoords="offset points",
        color=_ACCENT, ha="right",
    )  # fmt: skip
    axes.set_xlabel("wrongly accused (false-positive rate)", color=_INK)
    axes.set_ylabel("rightly recognised, at most", color=_INK)


def _spent(figure: Figure, sites: Sequence[Mapping[str, Any]], target: float | None) -> None:
    axes = _axes(figure)
    # Sites that pay alike share a line.
    lines: dict[tuple[float | None, ...], list[str]] = {}
    for site in sites:
        spent = tuple(row["epsilon_after"] for row in site["budgets"]["train"]["releases"])
        lines.setdefault(spent, []).append(site["site"])
    longest = max(len(spent) for spent in lines)
    for index, (spent, names) in enumerate(lines.items()):
        points = [(float(k), epsilon) for k, epsilon in enumerate(spent, 1) if epsilon is not None]
        points.append((longest + 0.5, points[-1][1] if points else 0.0))
        label = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
        axes.step(
            [0, *(k for k, _ in points)], [0.0, *(epsilon for _, epsilon in points)], where="post", linewidth=2,
            color=_COLOURS[index % len(_COLOURS)], label=label,
        )  # fmt: skip
    if target is not None:
        axes.axhline(target, color=_SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"target {target:g}", (0, target), xytext=(4, -4), textcoords="offset points", color=_SOFT, va="top"
        )
    axes.set_xlim(0, longest + 0.5)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("training releases", color=_INK)
    axes.set_ylabel("ε", color=_INK)
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def _utility(figure: Figure, accuracy: Mapping[str, Any], epsilon: float) -> None:
    axes = _axes(figure)
    # The second, hollow and larger, shows where both are equal.
    rows = (("accuracy", "accuracy", _ACCENT, "o", 46), ("balanced_accuracy", "balanced", _COLOURS[1], "D", 90))
    for key, label, colour, marker, size in rows:
        before, after = accuracy["before"][key], accuracy["after"][key]
        if before is not None and after is not None:
            axes.plot([0, epsilon], [before, after], color=colour, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
            face = "none" if marker == "D" else colour
            axes.scatter(
                [0, epsilon],
                [before, after],
                marker=marker,
                facecolors=face,
                edgecolors=colour,
                s=size,
                zorder=2,
                label=label,
            )
    axes.set_xlim(-0.04 * epsilon, 1.08 * epsilon)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("ε (0: zero-shot, nothing private is used)", color=_INK)
    axes.grid(axis="y", color="#e6eaf1")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def _accuracy(figure: Figure, accuracy: Mapping[str, Any]) -> None:
    rows = [("all", accuracy["before"]["accuracy"], accuracy["after"]["accuracy"])]
    rows.append(("balanced", accuracy["before"]["balanced_accuracy"], accuracy["after"]["balanced_accuracy"]))
    if len(accuracy["per_class"]) <= _MOST_CLASSES:
        rows += [(row["class"], row.get("before"), row.get("after")) for row in accuracy["per_class"]]
    rows = [row for row in rows if row[1] is not None and row[2] is not None]
    figure.set_size_inches(8.4, 1.1 + 0.34 * len(rows))
    axes = _axes(figure)
    for place, (_, before, after) in enumerate(rows):
        axes.plot([before, after], [place, place], color=_PALE, linewidth=3, zorder=1)
    places = range(len(rows))
    axes.scatter([row[1] for row in rows], places, color="white", edgecolors=_SOFT, s=46, zorder=2, label="zero-shot")
    axes.scatter([row[2] for row in rows], places, color=_ACCENT, s=46, zorder=3, label="trained")
    axes.set_yticks(list(places), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="x", color="#e6eaf1")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=9, borderaxespad=0)
