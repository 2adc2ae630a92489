"""What people see while they wait: a live line on a terminal, one plain line a stage elsewhere. Always on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from fedsecure.cli.display import err

if TYPE_CHECKING:
    from fedsecure.client import Moment

Watch = Callable[[Mapping[str, Any]], None]
STAGES = {
    "preparing": "preparing",
    "before": "evaluation before",
    "training": "training",
    "after": "evaluation after",
    "done": "finishing",
    "over": "finishing",
}
# The aggregator's names of what it collects (secagg.md §3.3), in words.
_PHASES = {
    "advertise": "keys",
    "shares": "key shares",
    "masked": "masked answers",
    "survivors": "signatures",
    "unmask": "unmasking shares",
}
# A wait is spoken of when it has lasted so long; shorter ones would only flicker.
_PATIENCE_SECONDS = 2.0


class _Rounds(TextColumn):
    """``round 7/20``, or nothing where no round is counted."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text(f"round {task.completed:.0f}/{task.total:.0f}" if task.total else "")


class _Line:
    """One line about one run: live where stderr is a terminal and that is wanted, else a line for each new stage."""

    def __init__(self, live: bool, lines: bool) -> None:
        self._plain = lines and not (live and err.is_terminal)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            _Rounds(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim", table_column=Column(no_wrap=True, ratio=1)),
            console=err,
            transient=True,
            expand=True,
            disable=not (live and err.is_terminal),
        )
        self._said: set[str] = set()

    def __enter__(self) -> _Line:
        self._progress.start()
        self._task = self._progress.add_task("starting", total=None, note="")
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, stage: str, *, step: int = 0, steps: int | None = None, note: str = "", say: str = "") -> None:
        """Set what is shown; ``say`` is the plain line, printed once."""
        self._progress.update(self._task, description=stage, total=steps, completed=step, note=note)
        if self._plain and say and say not in self._said:
            self._said.add(say)
            err.print(say, highlight=False, soft_wrap=True)

    def log(self, text: str) -> None:
        """A line that stays."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)


class _Patience:
    """The awaited, in words, once the wait has lasted."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._since = 0.0

    def note(self, status: Mapping[str, Any]) -> str:
        key = tuple(status.get(name) for name in ("stage", "round", "attempt", "phase"))
        now = time.monotonic()
        if key != self._key:
            self._key, self._since = key, now
        return waiting_for(status) if now - self._since >= _PATIENCE_SECONDS else ""


def waiting_for(status: Mapping[str, Any]) -> str:
    """The aggregator's status as what is awaited, of whom."""
    what, colon, who = str(status.get("waiting", "")).partition(": waiting for ")
    if not colon:
        return what
    count, _, missing = who.partition(": ")
    some, _, total = count.removesuffix(" sites").partition(" of ")
    names = ", ".join(
        part.removesuffix(" not seen yet").partition(" last heard")[0] for part in missing.split(", ") if part
    )
    if some == total:
        names = f"all {total} sites"
    phase = str(status.get("phase", ""))
    wanted = "" if phase == "joining" else f" ({_PHASES.get(phase, phase)})"
    return f"waiting for {names or count}{wanted}"


def _position(status: Mapping[str, Any]) -> tuple[str, int, int | None]:
    """Stage in words, rounds done, rounds in all; a stage without rounds has none."""
    stage = STAGES.get(str(status["stage"]), str(status["stage"]))
    counted = status["stage"] == "training"
    return stage, int(status.get("step", 0)), status.get("steps") if counted else None


def _plain(status: Mapping[str, Any]) -> str:
    """The line a stage deserves where nothing can be redrawn."""
    stage, step, steps = _position(status)
    if status["stage"] == "preparing":
        return f"preparing: {status.get('waiting', '')}"
    if status["stage"] == "training" and steps:
        quarter = step * 4 // steps
        return f"training: round {max(1, quarter * steps // 4)} of {steps}"
    return stage


@contextmanager
def demo_progress(*, live: bool) -> Iterator[Watch]:
    """A line over the aggregator's status, with what was lost on the way."""
    patience = _Patience()
    lost: set[str] = set()
    with _Line(live, lines=live) as line:

        def watch(status: Mapping[str, Any]) -> None:
            for name in set(status.get("lost", ())) - lost:
                lost.add(name)
                if live:
                    line.log(f"lost {name}; the run goes on as long as enough sites are left")
            stage, step, steps = _position(status)
            waits = str(status["waiting"]) if "phase" not in status else patience.note(status)
            note = str(status.get("encoding") or waits)
            line.show(stage, step=step, steps=steps, note=note, say=_plain(status))

        yield watch


@contextmanager
def serve_progress(*, live: bool) -> Iterator[tuple[Callable[[str, bytes], None], Watch]]:
    """The aggregator's own view: where it listens, which round, who is awaited."""
    patience = _Patience()
    with _Line(live, lines=True) as line:

        def announce(address: str, run: bytes) -> None:
            line.log(f"listening on {address}, run {run.hex()[:8]}")

        def watch(status: Mapping[str, Any]) -> None:
            stage, step, steps = _position(status)
            stage = "waiting for sites" if status["phase"] == "joining" and step == 0 else stage
            waits = patience.note(status)
            say = waits if stage == "waiting for sites" else _plain(status)
            line.show(stage, step=step, steps=steps, note=waits, say=say)

        yield announce, watch


@contextmanager
def join_progress(*, live: bool) -> Iterator[Callable[[Moment], None]]:
    """A site's own view of the run."""
    stage, step = "joining", 0
    steps: int | None = None
    with _Line(live, lines=True) as line:

        def watch(moment: Moment) -> None:
            nonlocal stage, step, steps
            note = say = ""
            if moment.rounds:
                stage = {"evaluate": "evaluation", "finished": "finishing"}.get(moment.what, "training")
                step = min(moment.round, moment.rounds)
                steps = moment.rounds if stage == "training" else None
                say = _plain({"stage": stage, "step": step, "steps": steps})
            elif ": waiting for " in moment.what:
                note = waiting_for({"waiting": moment.what, "phase": "joining"})
            else:
                note = say = moment.what
            line.show(stage, step=step, steps=steps, note=note, say=say)

        yield watch
