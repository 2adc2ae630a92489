"""Commands for whoever has to sign: reports, budgets, recorded rounds, audits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.core

from fedsecure.cli.options import Engine, Json

if TYPE_CHECKING:
    from fedsecure.identity.roster import Roster

budget = typer.Typer(help="What has been spent of each data set's privacy budget.", no_args_is_help=True)
transcript = typer.Typer(help="Recorded rounds.", no_args_is_help=True)


class _PageFirst(typer.core.TyperGroup):
    """``fedsecure report FILE`` is short for ``fedsecure report page FILE``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["page", *args])


report = typer.Typer(cls=_PageFirst, help="A privacy report as a page, or checked.", no_args_is_help=True)
ReportFile = Annotated[Path, typer.Argument(help="privacy-report.json of a site, or report.json of a federation.")]
Coordinator = Annotated[Path | None, typer.Option(help="coordinator.pub; beside the roster by default.")]


def _trusted(roster: Path, coordinator: Path | None) -> Roster:
    """A roster that its coordinator signed."""
    from fedsecure.identity import keys
    from fedsecure.identity.roster import Roster

    return Roster.load(roster, keys.load_public_key(coordinator or roster.with_name("coordinator.pub")))


@report.command("page")
def report_page(
    file: ReportFile,
    html: Annotated[Path, typer.Option(help="The page to write.")] = Path("privacy-report.html"),
) -> None:
    """Make a self-contained HTML page of a privacy report."""
    from fedsecure.privacy.report_html import load_report, write_html

    write_html(load_report(file), html)
    typer.echo(str(html))


@report.command("attach")
def report_attach(
    file: ReportFile,
    audit: Annotated[Path, typer.Option(help="What `fedsecure audit --json` printed.")],
    identity: Annotated[
        Path | None, typer.Option(help="identity.key of the report's site, to sign it anew; without it, unsigned.")
    ] = None,
) -> None:
    """Put the result of an audit into a report, in place."""
    import json

    from fedsecure.files import write_whole
    from fedsecure.identity import keys
    from fedsecure.privacy.report_html import load_report
    from fedsecure.privacy.report_verify import PURPOSE, attach_audit, load_audit, sign_report

    attached = attach_audit(load_report(file), load_audit(audit))
    if identity is not None:
        if attached["kind"] != "site":
            raise typer.BadParameter(
                "a federation's report is not signed; its sites' reports are", param_hint="identity"
            )
        key = keys.load_private_key(identity)
        attached = sign_report(attached, lambda body: keys.sign(key, PURPOSE, body), site=str(attached["site"]))
    write_whole(file, json.dumps(attached, indent=2, sort_keys=True).encode())
    typer.echo(f"{file}: {'signed anew' if identity else 'without a signature'}")


@report.command("verify")
def report_verify(
    file: ReportFile,
    roster: Annotated[Path | None, typer.Option(help="roster.json; without it signatures are not checked.")] = None,
    coordinator: Coordinator = None,
    partial: Annotated[bool, typer.Option("--partial", help="Training sites may be missing; they are named.")] = False,
    as_json: Json = False,
) -> None:
    """Compute every figure of a report again from its events, and check its sites' signatures."""
    from dataclasses import asdict

    from fedsecure.cli.display import print_json
    from fedsecure.identity import keys
    from fedsecure.privacy.report_html import load_report
    from fedsecure.privacy.report_verify import PURPOSE, verify_report

    public: dict[str, bytes] = {}
    if roster is not None:
        public = {entry.site: entry.identity_key for entry in _trusted(roster, coordinator).entries}

    def holds(site: str, body: bytes, signature: bytes) -> bool:
        return site in public and keys.verify(public[site], PURPOSE, body, signature)

    verdict = verify_report(load_report(file), verify=holds if roster is not None else None)
    if as_json:
        print_json(asdict(verdict) | {"ok": verdict.ok, "consistent": verdict.consistent})
    else:
        typer.echo(f"{verdict.figures} figures computed again, {len(verdict.findings)} differ")
        for line in verdict.findings:
            typer.echo(f"  {line}")
        for site in verdict.absent:
            typer.echo(f"{site}: trained in this run, and its part is missing; the ε of all sites may be larger")
        if roster is None:
            typer.echo("signatures are not checked without --roster; every site's identity folder has a roster.json")
        else:
            for name, what in verdict.signatures.items():
                typer.echo(f"{name}: signature {what}")
    held = verdict.ok if roster is not None else verdict.consistent
    raise typer.Exit(0 if held and (partial or not verdict.absent) else 1)


@budget.command("show")
def budget_show(
    ledger: Annotated[Path, typer.Option(help="The site's ledger file.")],
    delta: Annotated[float, typer.Option(help="δ at which ε is computed.")] = 1e-5,
    max_epsilon: Annotated[
        float | None, typer.Option(help="Limit to reckon with where the ledger has none, such as the policy's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Spent and remaining ε of every data set, and how many more releases like the last one fit."""
    from fedsecure.cli.display import print_json, show_budget
    from fedsecure.privacy.budget import show

    rows = show(ledger, delta=delta, max_epsilon=max_epsilon)
    if as_json:
        print_json({"delta": delta, "datasets": rows})
    else:
        show_budget(rows, delta=delta)


@budget.command("history")
def budget_history(
    ledger: Annotated[Path, typer.Option(help="The site's ledger file.")],
    dataset: Annotated[str | None, typer.Option(help="Of this data set only.")] = None,
    delta: Annotated[float, typer.Option(help="δ at which ε of a single charge is computed.")] = 1e-5,
    as_json: Json = False,
) -> None:
    """Every charge, what it costs by itself and what became of it, and every limit."""
    from fedsecure.cli.display import print_json, show_history
    from fedsecure.privacy.budget import history

    rows = history(ledger, dataset=dataset, delta=delta)
    if as_json:
        print_json({"delta": delta, "entries": rows})
    else:
        show_history(rows, delta=delta)


@budget.command("set")
def budget_set(
    dataset: Annotated[str, typer.Argument(help="Name of the data set in the site's file.")],
    ledger: Annotated[Path, typer.Option(help="The site's ledger file.")],
    epsilon: Annotated[float, typer.Option(help="Largest ε over all runs.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger for good.")],
    delta: Annotated[float, typer.Option(help="δ at which the limit holds.")] = 1e-5,
    population: Annotated[Literal["train", "evaluation"], typer.Option(help="Whose units.")] = "train",
) -> None:
    """Record an officer's limit; the smaller of it and the site's policy decides."""
    from fedsecure.cli.display import show_limit
    from fedsecure.privacy.budget import set_limit

    row = set_limit(ledger, dataset, population=population, epsilon=epsilon, delta=delta, reason=reason)
    show_limit(row)


@budget.command("verify")
def budget_verify(
    ledger: Annotated[Path, typer.Option(help="The site's ledger file.")],
    head: Annotated[str | None, typer.Option(help="rows:hash noted earlier; the ledger must still hold it.")] = None,
    renew: Annotated[bool, typer.Option(help="Write a lost .head file anew; needs --head.")] = False,
    as_json: Json = False,
) -> None:
    """Check the ledger's chain, and that it is no older copy."""
    from fedsecure.cli.display import print_json, show_chain
    from fedsecure.privacy.budget import verify

    found = verify(ledger, head=head, renew=renew)
    if as_json:
        print_json(found)
    else:
        show_chain(found)


@transcript.command("verify")
def transcript_verify(
    file: Annotated[Path, typer.Argument(help="A recorded round.")],
    roster: Annotated[Path | None, typer.Option(help="roster.json to trust, in place of the transcript's own.")] = None,
    coordinator: Coordinator = None,
    set_up: Annotated[
        Path | None, typer.Option(help="Transcript of the set-up of its keys; the one beside it by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every signature, context, commitment and hash of a recorded round, and name who broke a rule."""
    from fedsecure.cli.display import print_json
    from fedsecure.secagg.verify import verify_transcript

    known = None if roster is None else _trusted(roster, coordinator)
    verdict = verify_transcript(file, roster=known, set_up=set_up)
    if as_json:
        print_json(verdict.to_dict())
    else:
        typer.echo("\n".join(verdict.lines()))
    raise typer.Exit(0 if verdict.ok else 1)


def audit(
    features: Annotated[Path | None, typer.Option(help="Feature file, .npz; generated features by default.")] = None,
    adapter: Annotated[Literal["linear", "facmic"], typer.Option(help="What is trained.")] = "linear",
    noise: Annotated[Literal["distributed", "local"], typer.Option(help="Where the noise is added.")] = "distributed",
    unit: Annotated[Literal["patient", "record"], typer.Option(help="Whom the claim is about.")] = "record",
    engine: Annotated[Engine, typer.Option(help="Where clipped sums come from.")] = "auto",
    epsilon: Annotated[float, typer.Option(help="The claim to test.")] = 2.0,
    delta: Annotated[float, typer.Option(help="δ of the claim.")] = 1e-5,
    sampling_rate: Annotated[float, typer.Option(help="1: full batch; less: Poisson sampling.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Time to aim for.")] = 45.0,
    membership: Annotated[bool, typer.Option(help="Also attack membership, for the report.")] = True,
    as_json: Json = False,
) -> None:
    """Try to refute the proven ε: replay, canaries, membership attack."""
    from datetime import UTC, datetime

    from fedsecure.cli.display import print_json, show_audit
    from fedsecure.learning.audit_run import run_audit

    result = run_audit(
        features=features,
        adapter=adapter,
        noise=noise,
        unit=unit,
        engine=engine,
        epsilon=epsilon,
        delta=delta,
        sampling_rate=sampling_rate,
        seconds=seconds,
        membership=membership,
    )
    if as_json:
        print_json({"date": datetime.now(UTC).date().isoformat()} | result.to_dict())
    else:
        show_audit(result)
    raise typer.Exit(0 if result.passed else 1)
