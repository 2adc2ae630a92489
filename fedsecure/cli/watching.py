"""Commands that look at an aggregator's run from outside: ``status`` once, ``top`` until it is over."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsecure.cli.options import Json

if TYPE_CHECKING:
    from rich.console import Group

    from fedsecure.aggregator.watching import Sight

Config = Annotated[Path, typer.Option(help="federation.toml")]
Run = Annotated[str, typer.Option(help="First digits of the run's id; the newest run by default.")]


def status(config: Config, run: Run = "", as_json: Json = False) -> None:
    """Show who takes part in a run and whom it waits for. Status 1 if the aggregator is silent or the run failed."""
    from fedsecure.aggregator.watching import look
    from fedsecure.cli.display import out, print_json
    from fedsecure.config import FederationConfig, load

    sight = look(load(config, FederationConfig).state, run=run)
    if as_json:
        print_json({**sight.status, "age_seconds": sight.age, "silent": sight.silent, "attempts": sight.attempts})
    else:
        out.print(_view(sight))
    failed = sight.over and not sight.status["outcome"]["complete"]
    raise typer.Exit(1 if sight.silent or failed else 0)


def top(
    config: Config,
    run: Run = "",
    seconds: Annotated[float, typer.Option(help="Between two looks.", min=0.1)] = 1.0,
) -> None:
    """Show the same live, until the run is over or Ctrl-C."""
    from rich.live import Live

    from fedsecure.aggregator.watching import look
    from fedsecure.cli.display import out
    from fedsecure.config import FederationConfig, load

    state = load(config, FederationConfig).state
    with Live(console=out, auto_refresh=False) as live:
        while True:
            sight = look(state, run=run)
            live.update(_view(sight), refresh=True)
            if sight.over:
                return
            time.sleep(seconds)


def _view(sight: Sight) -> Group:
    from rich.console import Group
    from rich.text import Text

    from fedsecure.cli.display import new_table, side_by_side
    from fedsecure.cli.progress import waiting_for

    now = sight.status
    outcome = now["outcome"]
    stage = {None: now["stage"], True: "complete", False: "given up"}[outcome and outcome["complete"]]
    rows = [("run", now["run"][:8]), ("stage", stage), ("round", f"{now['step']} of {now['steps']} done")]
    if outcome is None:
        rows += [("attempt", str(now["attempt"])), ("now", waiting_for(now))]
    elif not outcome["complete"]:
        rows.append(("why", str(outcome.get("error", ""))))
    parts: list[object] = [side_by_side(None, rows)]
    if sight.silent:
        parts.append(Text(f"the aggregator has not written for {sight.age:.0f} s: look whether it runs", "bold red"))
    sites = new_table(None, "site", "there", "heard")
    for site, there in now["sites"].items():
        sites.add_row(site, Text("yes", "green") if there else Text("no", "red"), now["presence"][site])
    parts.append(sites)
    if sight.attempts:
        last = new_table("last attempts", "round", "attempt", "stage", "survivors", "seconds", "aborted")
        for attempt in sight.attempts:
            survivors = attempt.get("survivors")
            last.add_row(
                str(attempt["round"]),
                str(attempt["attempt"]),
                attempt["stage"],
                f"{len(survivors)} of {len(attempt['cohort'])}" if survivors is not None else "–",
                f"{attempt['seconds']:.1f}",
                str(attempt.get("code") or "–"),
            )
        parts.append(last)
    return Group(*parts)  # type: ignore[arg-type]
