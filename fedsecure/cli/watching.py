"""Commands that look at an aggregator's run from outside: ``status`` once, ``top`` until it is over."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsecure.cli.options import Json

if TYPE_CHECKING:
    pass

Config = Annotated[Path, typer.Option(help="federation.toml")]
Run = Annotated[str, typer.Option(help="First digits of the run's id; the newest run by default.")]


def status(config: Config, run: Run = "", as_json: Json = False) -> None:
    """Show who takes part in a run and whom it waits for. Status 1 if the aggregator is silent or the run failed."""
    from fedsecure.aggregator.watching import look
    from fedsecure.cli.display import out, print_json
    from fedsecure.cli.watched import view
    from fedsecure.config import FederationConfig, load

    sight = look(load(config, FederationConfig).state, run=run)
    if as_json:
        print_json({**sight.status, "age_seconds": sight.age, "silent": sight.silent, "attempts": sight.attempts})
    else:
        out.print(view(sight))
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
    from fedsecure.cli.watched import view
    from fedsecure.config import FederationConfig, load

    state = load(config, FederationConfig).state
    with Live(console=out, auto_refresh=False) as live:
        while True:
            sight = look(state, run=run)
            live.update(view(sight), refresh=True)
            if sight.over:
                return
            time.sleep(seconds)
