"""Rows of runs as the tables of a page: a line a setting, a column an ε, mean ± standard deviation over the seeds.

Differences of two settings are taken seed by seed, since a seed fixes how the records are shared out, and come with the
95 % interval of Student's t. A page marks the place of a table by ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsecure.files import make_folder, write_whole
from fedsecure.simulation.tables import epsilon_text, plot, summarise

if TYPE_CHECKING:
    from benchmarks.accuracy_tables import Table

Row = Mapping[str, Any]
# 97.5 % points of Student's t with 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# The same in every row, or nothing but what other columns say.
_LEFT_OUT = ("no_privacy", "class_counts", "curve")
SHOWN = {"linear": "linear head", "facmic": "attention module"}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file of results, numbers as numbers and empty cells as None."""

    def value(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text) if text else None
            except ValueError:
                continue
        return text

    with file.open(newline="", encoding="utf-8") as stream:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(stream)]


def render(table: Table, rows: Sequence[Row]) -> str:
    """The table, after a line that says how it came about."""
    seeds = sorted({int(row["seed"]) for row in rows})
    said = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    seconds = statistics.median(float(row["wall_seconds"]) for row in rows)
    runs = f"{len(rows)} runs, median {seconds:.0f} s each" if len(rows) > 1 else f"one run, {seconds:.0f} s"
    lines = [
        f"`python -m benchmarks.accuracy --data FOLDER --only {table.slug}`, {dates(rows)}, {machine()},",
        f"{said}, {runs}.",
        "",
    ]
    if table.lines is not None:
        lines += table.lines(rows)
    elif table.columns is not None:
        lines += [*_by_score(rows, table.columns), *_differences(table, table.columns, rows)]
    else:
        lines += list(_by_epsilon(table, rows))
    return "\n".join(lines) + "\n"


def dated(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with the day their run was first recorded: today for one that has none."""
    today = str(datetime.now(UTC).date())
    return [{**row, "date": row.get("date") or today} for row in rows]


def dates(rows: Sequence[Row]) -> str:
    """The days of the runs, and how many were of each where there are several."""
    counted = sorted(Counter(str(row["date"]) for row in rows).items())
    if len(counted) == 1:
        return counted[0][0]
    return " and ".join(f"{day} ({count} run{'s' if count > 1 else ''})" for day, count in counted)


def machine() -> str:
    return f"{os.cpu_count()} shared cores ({platform.machine()})"


def _by_epsilon(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    epsilons = sorted({float(row["epsilon"]) for row in rows})
    found: dict[str, dict[float, dict[int, float]]] = {}
    for row in rows:
        name = ", ".join(str(row[part]) for part in table.label)
        by_seed = found.setdefault(name, {}).setdefault(float(row["epsilon"]), {})
        by_seed[int(row["seed"])] = 100 * float(row["accuracy"])
    most = max(len(scores) for line in found.values() for scores in line.values())
    yield "| test accuracy, % | " + " | ".join(f"ε = {epsilon_text(epsilon)}" for epsilon in epsilons) + " |"
    yield "|---" * (len(epsilons) + 1) + "|"
    for name, line in found.items():
        cells = [spread(list(line[e].values()), most) if e in line else "–" for e in epsilons]
        yield f"| {shown(name)} | " + " | ".join(cells) + " |"
    for one, other in table.pairs:
        if one not in found or other not in found:
            continue
        cells = []
        for epsilon in epsilons:
            first, second = found[one].get(epsilon, {}), found[other].get(epsilon, {})
            cells.append(interval([first[seed] - second[seed] for seed in sorted(set(first) & set(second))]))
        yield f"| {shown(one)} minus {shown(other)}, 95 % | " + " | ".join(cells) + " |"


def _by_score(rows: Sequence[Row], columns: Mapping[str, str]) -> Iterator[str]:
    yield "| test accuracy, % | ε | " + " | ".join(columns) + " | seconds |"
    yield "|---" * (len(columns) + 3) + "|"
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row["method"]), float(row["epsilon"])), []).append(row)
    for (method, epsilon), members in groups.items():
        cells = []
        for column in columns.values():
            values = [100 * float(row[column]) for row in members if row.get(column) is not None]
            cells.append(spread(values, len(members)))
        seconds = statistics.median(float(row["wall_seconds"]) for row in members)
        yield f"| {shown(method)} | {epsilon_text(epsilon)} | " + " | ".join(cells) + f" | {seconds:.0f} |"


def _differences(table: Table, columns: Mapping[str, str], rows: Sequence[Row]) -> Iterator[str]:
    """A second table, of pairs of methods: a line an ε, a column a score."""
    chosen = table.compared or tuple(columns)
    scores: dict[tuple[str, float], dict[int, Row]] = {}
    for row in rows:
        scores.setdefault((str(row["method"]), float(row["epsilon"])), {})[int(row["seed"])] = row
    lines = []
    for one, other in table.pairs:
        for epsilon in sorted({epsilon for method, epsilon in scores if method == one}):
            first, second = scores[one, epsilon], scores.get((other, epsilon), {})
            cells = []
            for column in (columns[name] for name in chosen):
                pairs = [(first[seed].get(column), second[seed].get(column)) for seed in sorted(first.keys() & second)]
                cells.append(
                    interval([100 * (float(a) - float(b)) for a, b in pairs if a is not None and b is not None])
                )
            lines.append(f"| {shown(one)} minus {shown(other)} | {epsilon_text(epsilon)} | " + " | ".join(cells) + " |")
    if lines:
        yield ""
        yield "| difference by seed, 95 % | ε | " + " | ".join(chosen) + " |"
        yield "|---" * (len(chosen) + 2) + "|"
        yield from lines


def shown(name: str) -> str:
    """A line's name, a method by what it trains where that is clearer."""
    method, *rest = name.split(", ")
    return ", ".join((SHOWN.get(method, method), *rest))


def spread(values: Sequence[float], most: int) -> str:
    """``58.9 ± 0.8``, with the number of values where it is less than ``most``."""
    if not values:
        return "–"
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return text if len(values) == most else f"{text} (n = {len(values)})"


def interval(differences: Sequence[float]) -> str:
    """``−3.3 (−4.0 to −2.6)``: mean and 95 % interval of paired differences."""
    if not differences:
        return "–"
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{_signed(mean)} (n = 1)"
    half = STUDENT[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{_signed(mean)} ({_signed(mean - half)} to {_signed(mean + half)})"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def keep(table: Table, rows: Sequence[Row], *, folder: Path) -> None:
    """A table's CSV file, and its plot where it has one."""
    make_folder(folder)
    columns = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, dict)))
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [c for c in columns if c not in _LEFT_OUT], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / f"{table.slug}.csv", text.getvalue().encode(), mode=0o644)
    if table.drawn:
        plot(summarise([{**row, "method": shown(row["method"])} for row in rows]), folder / f"{table.slug}.png")


def update_page(file: Path, found: Mapping[str, str]) -> None:
    """Put tables in their places; a page that has no place for one is left as it is."""
    page = file.read_text(encoding="utf-8") if file.exists() else ""
    for slug, text in found.items():
        begin, end = f"<!-- begin {slug} -->\n", f"<!-- end {slug} -->"
        if begin in page and end in page:
            head, _, rest = page.partition(begin)
            page = f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    write_whole(file, page.encode(), mode=0o644)
