"""The results of a simulation for people and programs: one CSV row a run, a Markdown table of means, and a plot.

Figures over seeds are mean ± standard deviation of the sample; with one seed there is none.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsecure.files import write_whole

Row = Mapping[str, Any]
COLUMNS = (
    "method",
    "partition",
    "noise",
    "sites",
    "epsilon",
    "seed",
    "zero_shot",
    "accuracy",
    "balanced_accuracy",
    "epsilon_spent",
    "rounds",
    "bytes_up",
    "wall_seconds",
    "cell",
)
_GROUP = ("method", "partition", "noise", "sites", "epsilon")


def epsilon_text(epsilon: float) -> str:
    """``∞`` for a run without privacy."""
    return "∞" if math.isinf(epsilon) else f"{epsilon:g}"


def to_csv(rows: Sequence[Row], *, extra: Sequence[str] = ()) -> str:
    """One line a run, in the order given, with further columns; ε of a run without privacy is ``inf``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (*COLUMNS, *extra), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each setting, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
    found = []
    for key, members in groups.items():
        entry: dict[str, Any] = {**dict(zip(_GROUP, key, strict=True)), "seeds": len(members)}
        for name in ("zero_shot", "accuracy", "balanced_accuracy", "bytes_up", "wall_seconds", "epsilon_spent"):
            values = [float(row[name]) for row in members if row[name] is not None]
            entry[name] = statistics.mean(values) if values else None
            entry[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(entry)
    return found


def to_markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """The table of means."""
    lines = [
        "| method | partition | noise | sites | ε | seeds | zero-shot, % | accuracy, % | balanced accuracy, % "
        "| MB up, a site | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in summary:
        cells = [
            entry["method"],
            entry["partition"],
            entry["noise"],
            entry["sites"],
            epsilon_text(entry["epsilon"]),
            entry["seeds"],
            *(_percent(entry, name) for name in ("zero_shot", "accuracy", "balanced_accuracy")),
            f"{entry['bytes_up'] / 1e6:.2f}",
            f"{entry['wall_seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def to_columns(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The table of means of further columns, shares of one, with what a site sends in a round."""
    parts = [summarise([{**row, "accuracy": row.get(column)} for row in rows]) for column in columns]
    lines = ["| method | noise | ε | KB up, a site and round | " + " | ".join(columns) + " |"]
    lines.append("|" + "---|" * (4 + len(columns)))
    sent = summarise([{**row, "bytes_up": row["bytes_up"] / max(row["rounds"], 1)} for row in rows])
    for position, entry in enumerate(sent):
        cells = [entry["method"], entry["noise"], epsilon_text(entry["epsilon"]), f"{entry['bytes_up'] / 1e3:.1f}"]
        cells += [_percent(part[position], "accuracy") for part in parts]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_results(
    folder: Path, rows: Sequence[Row], *, heading: str, columns: Sequence[str], extra: Sequence[str]
) -> dict[str, Any]:
    """``results.csv`` one line a run, ``results.md`` the means, and ``accuracy.png``.

    Args:
        folder: that they are written into, each whole or not at all.
        rows: of the runs, with their further columns.
        heading: what stands above the tables.
        columns: further ones whose means are shown.
        extra: further ones of the CSV file.

    Returns:
        the rows, their summary, the page, and the plot's path or ``None``.
    """
    summary = summarise(rows)
    page = "\n".join((heading, to_markdown(summary), to_columns(rows, columns)))
    write_whole(folder / "results.csv", to_csv(rows, extra=extra).encode(), mode=0o644)
    write_whole(folder / "results.md", page.encode(), mode=0o644)
    image = folder / "accuracy.png"
    drawn = plot(summary, image)
    return {"rows": list(rows), "summary": summary, "page": page, "plot": str(image) if drawn else None}


def _percent(entry: Mapping[str, Any], name: str) -> str:
    if entry[name] is None:
        return "–"
    spread = entry[f"{name}_std"]
    return f"{100 * entry[name]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def plot(summary: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Accuracy over ε as PNG, a line a setting, bars of one standard deviation; False without matplotlib, or
    where nothing was evaluated.

    A run without privacy stands at the right edge; the dashed line is zero-shot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for entry in summary:
        if entry["accuracy"] is not None:
            name = ", ".join(str(entry[key]) for key in ("method", "partition", "noise"))
            lines.setdefault(name, []).append(entry)
    if not lines:
        return False
    finite = sorted({entry["epsilon"] for entry in summary if math.isfinite(entry["epsilon"])})
    edge = 2.5 * max(finite, default=1.0)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, entries in lines.items():
        ordered = sorted(entries, key=lambda entry: float(entry["epsilon"]))
        axes.errorbar(
            [entry["epsilon"] if math.isfinite(entry["epsilon"]) else edge for entry in ordered],
            [100 * entry["accuracy"] for entry in ordered],
            [100 * (entry["accuracy_std"] or 0.0) for entry in ordered],
            marker="o",
            capsize=3,
            label=name,
        )
    starts = [entry["zero_shot"] for entry in summary if entry["zero_shot"] is not None]
    if starts:
        axes.axhline(100 * statistics.mean(starts), linestyle="--", color="grey", label="zero-shot")
    axes.set_xscale("log", base=2)
    ticks = [*finite, *([edge] if any(math.isinf(entry["epsilon"]) for entry in summary) else [])]
    axes.set_xticks(ticks, [epsilon_text(tick if tick in finite else math.inf) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("ε")
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(file, image.getvalue(), mode=0o644)
    return True
