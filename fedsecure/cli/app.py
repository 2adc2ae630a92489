"""The ``fedsecure`` command: parse, call, print. What a command needs is imported when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fedsecure.cli.audit_log import audit_log
from fedsecure.cli.doctor import doctor
from fedsecure.cli.duplicates import duplicates
from fedsecure.cli.enrolling import enroll, renew
from fedsecure.cli.members import members
from fedsecure.cli.records import audit, budget, report, transcript
from fedsecure.cli.running import demo, init, join, plan, serve, simulate
from fedsecure.cli.runs import runs
from fedsecure.cli.using import evaluate, predict
from fedsecure.cli.watching import status, top
from fedsecure.errors import FedsecureError, exit_status

app = typer.Typer(
    name="fedsecure",
    help="Hospitals fine-tune CLIP together through secure, private sums. Nothing else leaves a site.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (demo, simulate, duplicates, plan, serve, status, top, join, doctor, init, predict, evaluate, audit):
    app.command()(command)
app.command()(enroll)
app.command()(renew)
for name, group in (
    ("members", members),
    ("runs", runs),
    ("budget", budget),
    ("transcript", transcript),
    ("report", report),
    ("audit-log", audit_log),
):
    app.add_typer(group, name=name)


def main() -> None:
    """Entry point: a failure made on purpose is one clear message and exit status 1.

    The status is 3 where a run is over for good. A service manager must not start that again by itself: it would begin
    a new run, and charge the sites for it.
    """
    try:
        app(prog_name="fedsecure")
    except FedsecureError as error:
        from fedsecure.cli.display import show_error

        show_error(error)
        sys.exit(exit_status(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        from fedsecure import __version__

        typer.echo(f"fedsecure {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None: ...
