"""Threads of which exactly one runs at a time, on a clock that moves only when the world says so.

The site's real code blocks: in a call, in a sleep, on an event. Here each of these hands the baton back to the world,
which decides who goes on, when, and with what. Nothing sleeps and nothing races, so the same decisions give the same
run.
"""

from __future__ import annotations

import threading
from _thread import allocate_lock
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class Killed(BaseException):
    """The process of whoever sees this is gone: it unwinds without a trace on disk or line."""


@dataclass(slots=True)
class Process:
    """Something that can be killed as a whole: a site's process, or the aggregator's.

    Attributes:
        name: of the site.
        skew: seconds by which the machine's wall clock is wrong.
        dead: killed, or over.
    """

    name: str
    skew: float = 0.0
    dead: bool = False
    actors: list[Actor] = field(default_factory=list)


class Actor:
    """One thread of a process."""

    def __init__(self, stage: Stage, process: Process, name: str, body: Callable[[], object]) -> None:
        self.process = process
        self.name = name
        self.until: float | None = None
        self.event: Event | Lock | None = None
        self.target: Actor | None = None
        self.done = False
        self.started = False
        self._stage = stage
        self._body = body
        self._turn = allocate_lock()
        self._turn.acquire()
        self._outcome: Any = None
        self._thread = threading.Thread(target=self._run, name=f"{process.name}/{name}", daemon=True)
        process.actors.append(self)

    def block(
        self, *, until: float | None = None, event: Event | Lock | None = None, target: Actor | None = None
    ) -> Any:
        """Hand the baton back; returns what the world says when it comes again.

        Args:
            until: when to go on at the latest.
            event: goes on when it is set, or the lock free.
            target: goes on when that thread has ended.
        """
        self.until, self.event, self.target = until, event, target
        self._stage.back.release()
        self._turn.acquire()
        self.until = self.event = self.target = None
        if self.process.dead:
            raise Killed
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def resume(self, outcome: Any) -> None:
        """From the world: let this one run until it blocks or ends."""
        self._outcome = outcome
        self._stage.current = self
        if not self.started:
            self.started = True
            self._thread.start()
        else:
            self._turn.release()
        self._stage.back.acquire()
        self._stage.current = None
        if self.done:
            self._thread.join()

    def _run(self) -> None:
        try:
            if not self.process.dead:
                self._body()
        except Killed:
            pass
        except BaseException as error:
            self._stage.surprises.append(error)
        finally:
            self.done = True
            self._stage.back.release()


class Stage:
    """The clock, the threads, and whose turn it is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.current: Actor | None = None
        self.owner: Process | None = None  # of code that the world runs itself: the aggregator
        self.back = allocate_lock()
        self.back.acquire()
        self.actors: list[Actor] = []
        self.surprises: list[BaseException] = []

    @property
    def process(self) -> Process | None:
        """Whose code is running."""
        return self.current.process if self.current is not None else self.owner

    def spawn(self, process: Process, name: str, body: Callable[[], object]) -> Actor:
        """A thread that is ready to start."""
        actor = Actor(self, process, name, body)
        self.actors.append(actor)
        return actor

    def ready(self) -> list[Actor]:
        """Threads that go on by themselves now: new ones, and those whose time, event or thread has come."""
        return [actor for actor in self.actors if self._is_ready(actor)]

    def next_time(self) -> float | None:
        """When the next thread goes on by itself, if no event comes before."""
        return min((actor.until for actor in self.actors if actor.until is not None), default=None)

    def resume(self, actor: Actor, outcome: Any = None) -> None:
        """Let a thread run until it blocks or ends."""
        actor.resume(outcome)
        self.actors = [actor for actor in self.actors if not actor.done]

    def kill(self, process: Process) -> None:
        """End a process: every thread of it unwinds at once."""
        process.dead = True
        for actor in process.actors:
            if actor is not self.current and not actor.done:
                if actor.started:
                    actor.resume(None)
                actor.done = True
        self.actors = [actor for actor in self.actors if not actor.done]

    def _is_ready(self, actor: Actor) -> bool:
        if not actor.started:
            return True
        if actor.until is not None and actor.until <= self.now:
            return True
        return (actor.event is not None and actor.event.is_set()) or (actor.target is not None and actor.target.done)

    # --- what stands in for the modules of the site's code ------------------------------------------------------------

    def time(self) -> SimpleNamespace:
        """The module ``time``."""
        return SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep, time=lambda: self.now)

    def threading(self) -> SimpleNamespace:
        """The module ``threading``."""

        class StagedThread(Thread):
            stage = self

        class StagedEvent(Event):
            stage = self

        class StagedLock(Lock):
            stage = self

        staged = {"Thread": StagedThread, "Event": StagedEvent, "Lock": StagedLock}
        return SimpleNamespace(**{**vars(threading), **staged})

    def sleep(self, seconds: float) -> None:
        """Nothing but this thread's turn goes by."""
        assert self.current is not None
        self.current.block(until=self.now + seconds)


class Event:
    """``threading.Event`` on a stage."""

    stage: Stage

    def __init__(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        actor = self.stage.current
        if not self._set and actor is not None:
            actor.block(event=self, until=None if timeout is None else self.stage.now + timeout)
        return self._set


class Lock:
    """``threading.Lock`` on a stage: who waits for it hands the baton back."""

    stage: Stage

    def __init__(self) -> None:
        self._held = False

    def is_set(self) -> bool:
        """Whether whoever waits can go on."""
        return not self._held

    def __enter__(self) -> None:
        while self._held:
            assert self.stage.current is not None
            self.stage.current.block(event=self)
        self._held = True

    def __exit__(self, *exception: object) -> None:
        self._held = False


class Thread:
    """``threading.Thread`` on a stage, of the process that makes it."""

    stage: Stage

    def __init__(
        self, *, target: Callable[..., object], name: str = "", args: tuple[Any, ...] = (), daemon: bool = True
    ) -> None:
        self._body = lambda: target(*args)
        self._name = name
        self._actor: Actor | None = None

    def start(self) -> None:
        actor = self.stage.current
        assert actor is not None
        if not actor.process.dead:
            self._actor = self.stage.spawn(actor.process, self._name, self._body)

    def is_alive(self) -> bool:
        return self._actor is not None and not self._actor.done

    def join(self, timeout: float | None = None) -> None:
        actor = self.stage.current
        if actor is not None and self._actor is not None and not self._actor.done:
            actor.block(target=self._actor, until=None if timeout is None else self.stage.now + timeout)
