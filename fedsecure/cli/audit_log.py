"""``fedsecure audit-log``: a site's or an aggregator's log, checked and shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsecure.cli.options import Json

if TYPE_CHECKING:
    from fedsecure.audit_log import Check

audit_log = typer.Typer(help="The log of what a site or an aggregator did, hash-chained.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(help="audit.log in the state folder of a site, or of an aggregator's run.")]


@audit_log.command("verify")
def verify(
    file: File,
    head: Annotated[str, typer.Option(help="lines:hash, as filed away earlier: finds a log that was cut since.")] = "",
    roster: Annotated[Path | None, typer.Option(help="roster.json; with --member, checkpoints are checked.")] = None,
    member: Annotated[str, typer.Option(help="Whose log it is: a site's id, or aggregator.")] = "",
    coordinator: Annotated[Path | None, typer.Option(help="coordinator.pub; beside the roster by default.")] = None,
    as_json: Json = False,
) -> None:
    """Check the whole chain, and print the head to file away."""
    from fedsecure.audit_log import Head
    from fedsecure.audit_log import verify as run
    from fedsecure.cli.audit_shown import show_audit_verdict
    from fedsecure.cli.display import print_json

    if (roster is None) == bool(member):
        raise typer.BadParameter("--roster and --member go together")
    check = _check(roster, coordinator, member) if roster is not None else None
    verdict = run(file, head=Head.parse(head) if head else None, check=check)
    if as_json:
        facts = {"lines": verdict.head.lines, "head": str(verdict.head), "events": dict(verdict.events)}
        facts |= {"began": verdict.began, "ended": verdict.ended, "torn_bytes": verdict.torn}
        print_json(facts | {"healed": verdict.healed, "checkpoints": verdict.checkpoints, "signed": verdict.signed})
    else:
        show_audit_verdict(verdict, checked_against=head, signatures=check is not None)


@audit_log.command("show")
def show(
    file: File,
    last: Annotated[int, typer.Option(help="Of so many lines at the end; 0 for all.", min=0)] = 20,
    as_json: Json = False,
) -> None:
    """Show what happened. The chain is checked on the way."""
    from collections import deque
    from dataclasses import asdict

    from fedsecure.audit_log import entries
    from fedsecure.cli.audit_shown import show_audit_entries
    from fedsecure.cli.display import print_json

    shown = deque(entries(file), maxlen=last or None)
    if as_json:
        print_json({"entries": [asdict(entry) for entry in shown]})
    else:
        show_audit_entries(shown)


def _check(roster: Path, coordinator: Path | None, member: str) -> Check:
    from fedsecure.audit_log import PURPOSE
    from fedsecure.identity import keys
    from fedsecure.identity.roster import Roster

    signed: Any = Roster.load(roster, keys.load_public_key(coordinator or roster.with_name("coordinator.pub")))
    key = signed.aggregator_key if member == "aggregator" else signed.find(member).identity_key
    return lambda body, signature: keys.verify(key, PURPOSE, body, signature)
