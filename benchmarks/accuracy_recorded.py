"""Runs that the CSV files beside a page hold, taken as finished, so that a table can grow without its old runs.

A recorded run is known by what its columns say it is, and not by the hash of its cell, which changes with the release.
It keeps its figures, its date and its cell. Whoever adds to recorded runs makes one of them again first, and says on
the page whether it gave the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.accuracy_page import read_rows
from fedsecure.simulation.simulate import SimulationOptions, open_results, planned_cells, read_row, write_row

Row = Mapping[str, Any]


def recorded_rows(folder: Path, slug: str) -> list[dict[str, Any]]:
    """The rows of a table's CSV file; none where there is no such file."""
    file = folder / f"{slug}.csv"
    return read_rows(file) if file.exists() else []


def identity(row: Row) -> tuple[Any, ...]:
    """What a run of a table is, by its columns."""
    names = ("method", "change", "partition", "noise", "sites", "rounds", "epsilon", "seed")
    return tuple(row.get(name) for name in names)


def as_recorded(rows: Sequence[Row], recorded: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, each in its recorded form where it has one: tables that share a run may have timed it apart."""
    found = {identity(row): row for row in recorded}
    return [dict(found.get(identity(row), row)) for row in rows]


def take_cells(options: SimulationOptions, rows: Sequence[Row]) -> None:
    """Write those of the recorded runs that are cells of a simulation into its folder, where none is finished yet."""
    found = {identity(row): row for row in rows}
    out = open_results(options.out)
    for cell in planned_cells(options):
        size = {"sites": len(cell.settings.declared_units()), "rounds": cell.settings.method.rounds}
        row = found.get(identity({**asdict(cell.variant), **size}))
        if row is not None and read_row(out, cell.key) is None:
            write_row(out, cell.key, {**row, "class_counts": {}})
