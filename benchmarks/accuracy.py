"""Accuracy against ε with the deployed code: every table of examples/results/facmic.md, by one command that resumes.

    python -m benchmarks.accuracy --data FOLDER [--out accuracy] [--only TABLE,…] [--page FILE.md [--grow]] [--finished]
    python -m benchmarks.accuracy --data FOLDER --method fedclip,moon [--epsilon 1,8,inf] [--seeds 3]

FOLDER holds ``ucf101_clip_vitb32.npz``, ``caltech_clip_vitb32.npz`` and ``brain-tumor`` (docs/datasets.md). Runs are
those of ``fedsecure simulate`` and ``examples/facmic.py``; each leaves its privacy report under ``--out``, and finished
ones are not run again. ``--page`` puts tables, CSV files and plots in their places, ``--finished`` only those of runs
that are there already. With ``--grow`` the runs that the CSV files beside the page hold count as finished and keep
figures and date, so that only what they lack is run. ``--method`` measures any installed method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.accuracy_page import dated, keep, render, update_page
from benchmarks.accuracy_recorded import as_recorded, recorded_rows
from benchmarks.accuracy_tables import Row, Table, of_methods, tables
from fedsecure.cli.display import err, show_error
from fedsecure.cli.simulated import simulation_progress
from fedsecure.errors import FedsecureError
from fedsecure.simulation.simulate import Step, listed, numbers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder of the three data sets")
    parser.add_argument("--out", type=Path, default=Path("accuracy"))
    parser.add_argument("--only", help="tables, with commas")
    parser.add_argument("--page", type=Path, help="Markdown file with places for the tables")
    parser.add_argument("--grow", action="store_true", help="take the runs of the page's CSV files as finished")
    parser.add_argument("--finished", action="store_true", help="show what is finished and run nothing")
    parser.add_argument("--list", action="store_true", help="name the tables, and how many runs each is")
    parser.add_argument("--method", help="installed methods, with commas, in place of the page's tables")
    parser.add_argument("--epsilon", default="0.5,1,2,4,8,inf", help="with --method")
    parser.add_argument("--seeds", type=int, default=3, help="with --method")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Table]:
    """The tables to run."""
    if options.method is not None:
        epsilons = numbers("--epsilon", options.epsilon)
        return of_methods(
            options.data, options.out, methods=listed(options.method), epsilons=epsilons, seeds=options.seeds
        )
    known = tables(options.data, options.out)
    if options.only is None:
        return known
    wanted = listed(options.only)
    missing = set(wanted) - {table.slug for table in known}
    if missing:
        raise SystemExit(f"no such table: {', '.join(sorted(missing))}; see --list")
    return [table for table in known if table.slug in wanted]


def grown(work: Sequence[Table], options: argparse.Namespace) -> list[Table]:
    """The chosen tables with what is recorded beside the page. Tables share runs, so all take theirs."""
    if options.page is None or options.method is not None:
        raise SystemExit("--grow adds to the tables of a page: name it with --page, and leave --method out")
    taken = [t.growing(recorded_rows(options.page.parent, t.slug)) for t in tables(options.data, options.out)]
    return [table for table in taken if table.slug in {one.slug for one in work}]


def run(table: Table, *, before: int, total: int, watch: Callable[[Step], None]) -> list[Row]:
    """The rows of one table; ``before`` runs of ``total`` belong to earlier tables."""
    rows: list[Row] = []
    for part in table.parts:

        def show(step: Step, before: int = before) -> None:
            watch(Step(before + step.done, total, f"{table.slug}: {step.what}", round=step.round, rounds=step.rounds))

        rows += part.run(show)
        before += part.cells
    return as_recorded(rows, table.recorded)


def main() -> int:
    options = arguments()
    try:
        work = chosen(options)
        if options.grow:
            work = grown(work, options)
        if options.list:
            for table in work:
                print(f"{table.slug:<20} {table.cells:>4} runs  {table.title}")
            return 0
        total, before = sum(table.cells for table in work), 0
        found = {}
        with simulation_progress(live=True) as watch:
            for table in work:
                rows = table.finished() if options.finished else run(table, before=before, total=total, watch=watch)
                before += table.cells
                if not rows:
                    continue
                rows = dated(rows)
                found[table.slug] = render(table, rows)
                if options.page is not None:
                    keep(table, rows, folder=options.page.parent)
                    update_page(options.page, {table.slug: found[table.slug]})
    except FedsecureError as error:
        show_error(error)
        return 1
    for slug, text in found.items():
        print(f"## {slug}\n\n{text}")
    err.print(f"reports of all runs: {options.out}/*/reports", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
