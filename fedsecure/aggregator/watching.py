"""A run as its folder tells of it: for people, from another process than the aggregator's own.

``fedsecure serve`` writes ``status.json`` twice a second, with the last attempts in it. Reading it disturbs nothing; a
status that is not renewed any more says that the aggregator is gone.
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
        attempts: the last attempts that are over, oldest first.
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
        with newest.open("rb") as opened:
            status = json.loads(opened.read(_MOST_BYTES))
        kept = tuple(status.pop("attempts")[-attempts:]) if attempts else ()
        status["stage"], status["waiting"], status["sites"], status["presence"], status["outcome"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _nothing(state, f"{newest} is no status ({type(error).__name__})") from error
    return Sight(newest.parent, status, kept, max(0.0, time.time() - found[newest]))


def _nothing(state: Path, found: str) -> RunError:
    return RunError(
        "FS-1723",
        f"{state}: {found}",
        expected="the state folder of an aggregator that has been started, as `state` in federation.toml names it",
        cure="name the aggregator's federation.toml, and start `fedsecure serve`",
    )
