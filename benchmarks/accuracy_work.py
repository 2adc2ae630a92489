"""Measurements that are kept one by one, so that those that are finished are not taken again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsecure.simulation.simulate import Step, open_results, read_row, write_row

# A change, ε and the fold.
Work = tuple[str, float, int]


def work_off(
    out: Path,
    kind: str,
    work: Sequence[Work],
    *,
    key: Callable[[Work], str],
    score: Callable[[Work], float],
    watch: Callable[[Step], None],
) -> list[dict[str, Any]]:
    """A row a piece of work; what is finished under ``out`` is read."""
    kept, rows = open_results(out), []
    for done, piece in enumerate(work):
        name, epsilon, fold = piece
        watch(Step(done, len(work), f"{name}, ε = {epsilon:g}, fold {fold}"))
        row = read_row(kept, key(piece))
        if row is None:
            begun = time.monotonic()
            facts = {"method": kind, "change": name, "epsilon": epsilon, "seed": fold, "accuracy": score(piece)}
            row = {**facts, "wall_seconds": round(time.monotonic() - begun, 2)}
            write_row(kept, key(piece), row)
        rows.append(row)
    return rows


def finished_work(out: Path, work: Sequence[Work], *, key: Callable[[Work], str]) -> list[dict[str, Any]]:
    """The rows of what is finished; nothing is run."""
    return [row for row in (read_row(out, key(piece)) for piece in work) if row is not None]


def take_work(
    out: Path, work: Sequence[Work], rows: Sequence[Mapping[str, Any]], *, key: Callable[[Work], str]
) -> None:
    """Take recorded rows as finished, where they are not measured yet; see :mod:`benchmarks.accuracy_recorded`."""
    found = {(row["change"], row["epsilon"], row["seed"]): row for row in rows}
    kept = open_results(out)
    for piece in work:
        if piece in found and read_row(kept, key(piece)) is None:
            write_row(kept, key(piece), found[piece])
