"""A run as its folder tells of it: for people, from another process than the aggregator's own.

``fedsecure serve`` writes ``status.json`` twice a second, and a line into ``rounds.jsonl`` for each attempt. Reading
them disturbs nothing; a status that is not renewed any more says that the aggregator is gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsecure.errors import RunError

# The aggregator writes twice a second; a loaded disk may hold it up.
STALE_SECONDS = 15.0
_MOST_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Sight:
    """One look at a run.

    Attributes:
        folder: of the run.
        status: as ``status.json`` has it.
        attempts: the last attempts, oldest first, as the round log has them.
        age: seconds since the aggregator wrote its status.
    """

    folder: Path
    status: Mapping[str, Any]
    attempts: tuple[Mapping[str, Any], ...]
    age: float

    @property
    def over(self) -> bool:
        """Whether the run has ended, well or not."""
        return self.status["outcome"] is not None

    @property
    def silent(self) -> bool:
        """Whether the aggregator should have written since, and has not."""
        return not self.over and self.age > STALE_SECONDS


def look(state: Path, *, run: str = "", attempts: int = 5) -> Sight:
    """The run in an aggregator's state folder that was written last, or the one whose id begins with ``run``.

    Raises:
        RunError: FS-1723 there is none, or its status cannot be read.
    """
    files = [file for file in state.glob("runs/*/status.json") if file.parent.name.startswith(run)]
    found = {file: file.stat().st_mtime for file in files}
    if not found:
        raise _nothing(state, f"no run {run + '… ' if run else ''}with a status")
    newest = max(found, key=lambda file: found[file])
    try:
        status = json.loads(_bounded(newest))
        lines = _bounded(newest.with_name("rounds.jsonl")).splitlines() if attempts else []
        # The line being written is not a line yet.
        kept = tuple(json.loads(line) for line in lines[-attempts:] if line.endswith(b"}"))
        status["stage"], status["waiting"], status["sites"], status["presence"], status["outcome"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _nothing(state, f"{newest} is no status ({type(error).__name__})") from error
    return Sight(newest.parent, status, kept, max(0.0, time.time() - found[newest]))


def _bounded(file: Path) -> bytes:
    """The end of a file, 16 MiB at most; nothing where there is no file yet."""
    if not file.exists():
        return b""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _MOST_BYTES))
        return opened.read()


def _nothing(state: Path, found: str) -> RunError:
    return RunError(
        "FS-1723",
        f"{state}: {found}",
        expected="the state folder of an aggregator that has been started, as `state` in federation.toml names it",
        cure="name the aggregator's federation.toml, and start `fedsecure serve`",
    )
