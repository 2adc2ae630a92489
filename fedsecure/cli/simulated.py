"""What people see of ``fedsecure simulate``: cells and time left while it runs, and tables of means at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedsecure.cli.display import err, out
from fedsecure.simulation.tables import to_markdown

if TYPE_CHECKING:
    from fedsecure.simulation.simulate import Step


@contextmanager
def simulation_progress(*, live: bool) -> Iterator[Callable[[Step], None]]:
    """A bar over all cells with the time left, or a line a finished cell where nothing can be redrawn."""
    redrawn = live and err.is_terminal
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[cells]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not redrawn,
    )
    said = 0
    with progress:
        task = progress.add_task("preparing", total=None, cells="")

        def watch(step: Step) -> None:
            nonlocal said
            part = min(step.round / step.rounds, 1.0) if step.rounds else 0.0
            counted = f"{step.done}/{step.cells} runs"
            progress.update(
                task, description=step.what, completed=step.done + part, total=step.cells, cells=step.note or counted
            )
            if live and not redrawn and step.done > said:
                said = step.done
                err.print(f"{counted}: {step.what}", highlight=False, soft_wrap=True)

        yield watch


def without_infinity(value: Any) -> Any:
    """The same with ``"inf"`` for ∞, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: without_infinity(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinity(inner) for inner in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def show_simulation(result: Mapping[str, Any]) -> None:
    """The table, each site's class counts, and where the files are."""
    out.print(to_markdown(result["summary"]), highlight=False, markup=False, soft_wrap=True)
    for name, counts in result["counts"].items():
        out.print(f"records a class at each site ({name}), known because this is a simulation:", highlight=False)
        for site, classes in counts.items():
            out.print(f"  {site}: {sum(classes)} in all; {_short(classes)}", highlight=False, soft_wrap=True)
    if any(math.isinf(entry["epsilon"]) for entry in result["summary"]):
        out.print("ε = ∞: a run without privacy, with a token of noise; see [privacy] no_privacy.", markup=False)
    out.print(f"{result['computed']} runs computed, {result['reused']} taken from before", highlight=False)
    for label, key in (("runs", "csv"), ("means", "markdown"), ("plot", "plot")):
        shown = result[key] or "not drawn: install fedsecure[report]"
        out.print(f"{label:<7}{shown}", highlight=False, soft_wrap=True)


def _short(classes: list[int]) -> str:
    if len(classes) <= 12:
        return " ".join(str(count) for count in classes)
    held = [count for count in classes if count]
    return f"{len(held)} of {len(classes)} classes, {min(held, default=0)} to {max(held, default=0)} records in each"
