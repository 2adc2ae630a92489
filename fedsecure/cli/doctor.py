"""``fedsecure doctor``: what keeps a site from a run, and how to mend it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsecure.cli.options import Json

if TYPE_CHECKING:
    from fedsecure.site.doctor import Finding

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "bold red"), "skipped": ("–", "dim")}


def doctor(
    config: Annotated[Path, typer.Option(help="site.toml")],
    seconds: Annotated[float, typer.Option(help="Longest wait for the aggregator, a check.", min=0.1)] = 10.0,
    as_json: Json = False,
) -> None:
    """Try what a run needs, from the keys to the budget, and say how to mend what fails. Nothing is charged."""
    from dataclasses import asdict

    from fedsecure.cli.display import print_json
    from fedsecure.site.doctor import examine

    findings = []
    for finding in examine(config, seconds=seconds):
        findings.append(finding)
        if not as_json:
            _show(finding)
    failed = sum(finding.state == "failed" for finding in findings)
    if as_json:
        print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    else:
        _sum_up(findings, failed)
    raise typer.Exit(1 if failed else 0)


def _show(finding: Finding) -> None:
    from rich.text import Text

    from fedsecure.cli.display import out

    mark, style = _MARKS[finding.state]
    text = Text.assemble((mark, style), f" {finding.check:<16} ", (f"{finding.code} " if finding.code else "", style))
    text.append(finding.found, style="dim" if finding.state == "skipped" else "")
    for label, value in (("expected", finding.expected), ("cure", finding.cure)):
        if value:
            text.append(f"\n{'':19}{label + ':':<10}{value}", style="dim")
    out.print(text, soft_wrap=True, highlight=False)


def _sum_up(findings: list[Finding], failed: int) -> None:
    from fedsecure.cli.display import out

    counted = {state: sum(finding.state == state for finding in findings) for state in _MARKS}
    text = ", ".join(f"{count} {state}" for state, count in counted.items() if count)
    out.print(f"\n{text}: {'not ready for a run' if failed else 'ready'}", soft_wrap=True, highlight=False)
