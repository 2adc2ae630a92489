"""What ``fedsecure audit-log`` prints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fedsecure.audit_log import Entry, Verdict
from fedsecure.cli.display import out

_DIGEST = re.compile(r"[0-9a-f]{32,}")
_COLOURS = (("refused", "red"), ("aborted", "yellow"), ("alarm", "red"), ("failed", "red"), ("healed", "yellow"))


def show_audit_verdict(found: Verdict, *, checked_against: str, signatures: bool) -> None:
    """That an audit log's chain holds, what it counts, and the head to note."""
    held = f", and line {checked_against.partition(':')[0]} is as noted" if checked_against else ""
    _say(f"{found.head.lines} lines, unbroken{held}")
    if found.began is not None and found.ended is not None:
        _say(f"from {_utc(found.began)} to {_utc(found.ended)} UTC")
    if found.checkpoints:
        how = "all signed by the member" if signatures else "not checked without --roster and --member"
        _say(f"{found.checkpoints} checkpoints, {how}")
    if found.healed:
        _say(f"{found.healed} times a process ended while it wrote a line; none of those lines counted")
    if found.torn:
        _say(f"{found.torn} bytes after the last line: a process ended while it wrote, or writes now", style="yellow")
    _say(f"head {found.head}")
    _say("note the head elsewhere: with --head this command finds a log that was cut since", style="dim")


def show_audit_entries(shown: Iterable[Entry]) -> None:
    """One row an entry: number, time, event, and its facts by name; long digests end in an ellipsis."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("line", justify="right", no_wrap=True)
    table.add_column("when (UTC)", no_wrap=True)
    table.add_column("event", no_wrap=True)
    table.add_column("facts", overflow="fold")
    for entry in shown:
        colour = next((colour for word, colour in _COLOURS if word in entry.event), "")
        facts = "  ".join(f"{_escaped(name)}={_fact(value)}" for name, value in entry.facts.items())
        table.add_row(str(entry.seq), _utc(entry.at), Text(_escaped(entry.event), colour), Text(facts))
    out.print(table)


def _say(text: str, **style: Any) -> None:
    """A head is never broken."""
    out.print(text, highlight=False, soft_wrap=True, markup=False, **style)


def _utc(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"{at:g}"


def _fact(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_escaped(str(item)) for item in value)
    shown = _escaped(value) if isinstance(value, str) else json.dumps(value)
    return shown[:12] + "…" if _DIGEST.fullmatch(shown) else shown


def _escaped(text: str) -> str:
    """Nothing in a log moves a cursor; letters of any script stay."""
    return "".join(c if c.isprintable() else json.dumps(c).strip('"') if c != "\x7f" else "\\u007f" for c in text)
