"""What ``fedsecure status`` and ``top`` show of a run: how far it is, whom it waits for, and how attempts ended."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedsecure.cli.progress import STAGES, waiting_for

if TYPE_CHECKING:
    from fedsecure.aggregator.watching import Sight

# More sites than fit a screen: those that are there need no line of their own.
MOST_SITES = 24
_SECONDS = re.compile(r"(\d+) s ago")


def view(sight: Sight) -> Group:
    """The whole picture, top to bottom in the order of what to look at first."""
    parts: list[RenderableType] = [_head(sight)]
    if sight.silent:
        age = _ago(f"{sight.age:.0f} s ago").removesuffix(" ago")
        parts += [Text(), Text(f"the aggregator has not written for {age}: look whether it runs", "bold red")]
    if not sight.over:
        parts += [Text(), *_sites(sight.status)]
    if sight.attempts:
        parts += [Text(), _attempts(sight)]
        if why := next((a["aborted"] for a in reversed(sight.attempts) if a.get("aborted")), ""):
            parts.append(Text.assemble(("last abort: ", "dim"), (str(why), "dim")))
    return Group(*parts)


def _head(sight: Sight) -> Table:
    now, outcome = sight.status, sight.status["outcome"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("run", now["run"][:8])
    if outcome is None:
        table.add_row("stage", STAGES.get(now["stage"], now["stage"]))
    elif outcome["complete"]:
        table.add_row("stage", Text("complete", "bold green"))
    else:
        table.add_row("stage", Text("given up", "bold red"))
    done, steps = int(now["step"]), int(now["steps"])
    rounds = Table.grid(padding=(0, 1))
    rounds.add_row(
        f"{done} of {steps} done", ProgressBar(total=max(1, steps), completed=done, width=24, complete_style="green")
    )
    table.add_row("rounds", rounds)
    if outcome is None:
        table.add_row("now", f"round {now['round']}, attempt {now['attempt']}")
        table.add_row("", Text(waiting_for(now), "yellow"))
    elif not outcome["complete"]:
        table.add_row("why", str(outcome.get("error", "")))
    for stage, facts in ((outcome or {}).get("evaluations") or {}).items():
        if facts.get("accuracy") is not None:
            table.add_row(f"accuracy {stage}", f"{100 * facts['accuracy']:.1f} %")
    return table


def _sites(now: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Those that are gone or waited for first; the others only as far as there is room."""
    awaited = {site for site in now["sites"] if re.search(rf"(?<![\w.-]){re.escape(site)}(?![\w.-])", now["waiting"])}
    there = sum(map(bool, now["sites"].values()))
    ranked = sorted(now["sites"], key=lambda site: (now["sites"][site], site not in awaited, site))
    shown = sorted(now["sites"]) if len(ranked) <= MOST_SITES else ranked[:MOST_SITES]
    table = _table(f"sites: {there} of {len(ranked)} there", "site", "there", "heard", "")
    for site in shown:
        here = Text("yes", "green") if now["sites"][site] else Text("no", "bold red")
        table.add_row(site, here, _ago(now["presence"][site]), Text("waited for", "yellow") if site in awaited else "")
    yield table
    if len(shown) < len(ranked):
        yield Text(f"and {len(ranked) - len(shown)} more", "dim")


def _attempts(sight: Sight) -> Table:
    table = _table("last attempts", "round", "attempt", "stage", "outcome", "seconds")
    for column in (0, 1, 4):
        table.columns[column].justify = "right"
    for attempt in sight.attempts:
        survivors = attempt.get("survivors")
        if survivors is not None:
            whole = len(survivors) == len(attempt["cohort"])
            ended = Text(f"{len(survivors)} of {len(attempt['cohort'])}", "green" if whole else "yellow")
        else:
            ended = Text(f"aborted {attempt.get('code') or ''}".rstrip(), "red")
        where = str(attempt["round"]), str(attempt["attempt"]), attempt["stage"]
        table.add_row(*where, ended, f"{attempt['seconds']:.1f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="dim")
    table.pad_edge = False
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column != columns[0])
    return table


def _ago(presence: str) -> str:
    """``240 s ago`` as ``4 min ago``; other words as they are."""
    found = _SECONDS.fullmatch(presence)
    seconds = int(found[1]) if found else 0
    if seconds < 120:
        return presence
    return f"{seconds // 60} min ago" if seconds < 7200 else f"{seconds // 3600} h ago"
