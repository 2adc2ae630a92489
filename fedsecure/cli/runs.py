"""``fedsecure runs``: what an aggregator has run, and what the operator wants of a run that is not over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsecure.cli.options import Json

if TYPE_CHECKING:
    from fedsecure.aggregator.database import Database
    from fedsecure.aggregator.store import Wanted
    from fedsecure.config import FederationConfig

runs = typer.Typer(help="The aggregator's runs: list, show, pause, resume, stop.", no_args_is_help=True)
Config = Annotated[Path, typer.Option(help="federation.toml")]
Run = Annotated[str, typer.Argument(help="First digits of the run's id; the federation's newest run by default.")]


@runs.command("list")
def list_runs(config: Config, as_json: Json = False) -> None:
    """List all runs of this aggregator, the newest first."""
    from fedsecure.aggregator.store import described, runs_of
    from fedsecure.cli.display import moment, new_table, out, print_json

    with _database(config) as (database, _):
        found = [described(row) for row in runs_of(database)]
    if as_json:
        print_json({"runs": found})
        return
    table = new_table(None, "federation", "run", "begun, UTC", "rounds", "now")
    for one in found:
        now = one["ended"] or one["state"]
        table.add_row(one["federation"], one["run"][:8], moment(one["begun"]), str(one["step"]), now)
    out.print(table)


@runs.command("show")
def show_run(config: Config, run: Run = "", as_json: Json = False) -> None:
    """Show every attempt of a run: who took part, how long it took, why it ended."""
    from fedsecure.aggregator.store import RunStore, described, pick
    from fedsecure.cli.display import moment, new_table, out, print_json, side_by_side

    with _database(config) as (database, loaded):
        row = pick(database, run, loaded.settings())
        attempts = RunStore(database, loaded.state, bytes.fromhex(row.id)).attempts()
    about = described(row)
    if as_json:
        print_json({**about, "attempts": attempts})
        return
    shown = [("run", row.id), ("state", about["state"]), ("begun", moment(row.begun)), ("ended", about["ended"])]
    out.print(side_by_side(None, shown))
    table = new_table(None, "round", "attempt", "stage", "survivors", "seconds", "why not")
    for one in attempts:
        survivors = one.get("survivors")
        table.add_row(
            str(one["round"]),
            str(one["attempt"]),
            one["stage"],
            f"{len(survivors)} of {len(one['cohort'])}" if survivors is not None else "–",
            f"{one['seconds']:.1f}",
            str(one.get("code") or ""),
        )
    out.print(table)
    for one in attempts:
        if "aborted" in one:
            out.print(f"round {one['round']}, attempt {one['attempt']}: {one['aborted']}", soft_wrap=True, markup=False)


@runs.command("pause")
def pause(config: Config, run: Run = "") -> None:
    """Let the attempt in progress end and ask nothing further. Sites stay joined, and are told."""
    _want(config, run, "pause", "pauses after the attempt in progress")


@runs.command("resume")
def resume(config: Config, run: Run = "") -> None:
    """Go on with a run that was paused."""
    _want(config, run, "run", "goes on")


@runs.command("stop")
def stop(config: Config, run: Run = "") -> None:
    """End a run for good, at once. Its sites are told; what was charged stays charged."""
    _want(config, run, "stop", "ends")


def _want(config: Path, run: str, wanted: Wanted, what: str) -> None:
    from fedsecure.aggregator.store import want
    from fedsecure.cli.display import out

    with _database(config) as (database, loaded):
        row = want(database, run, wanted, loaded.settings())
    out.print(f"run {row.id[:8]} of {row.federation} {what}, once its aggregator looks (it does every second)")


@contextmanager
def _database(config: Path) -> Iterator[tuple[Database, FederationConfig]]:
    from fedsecure.aggregator.database import open_database
    from fedsecure.config import FederationConfig, load

    loaded = load(config, FederationConfig)
    database = open_database(loaded)
    try:
        yield database, loaded
    finally:
        database.close()
