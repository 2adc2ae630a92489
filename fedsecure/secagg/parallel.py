"""Worker processes for mask streams and key agreement, one a core (secagg.md §3.4).

Neither releases the interpreter lock, so threads do not help. A worker is a fresh interpreter, not a fork; it
gets keys through a socket pair and leaves sums of streams in anonymous shared memory, so nothing secret is on
a command line, in the environment or in a file. This process works too: it hands out jobs that the workers
have ready hands for, does the rest itself, and does again what a lost worker leaves behind. Workers end with
their parent. Where none can be had, all jobs are done here.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import select
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

MASKS, AGREEMENT = b"m", b"a"  # kinds of job
READY = b"r"  # first byte of whatever a worker sends
SLOT_BYTES = 1 << 20
SLOTS = 2  # jobs a worker holds: one in hand, one waiting
MESSAGE_BYTES = 1 << 15
# Measured on two cores: from USE on, sharing pays; starting a worker costs as much as START bytes of keystream.
USE, START = 1 << 26, 1 << 30
MAX_WORKERS = 8
PATIENCE = 60.0  # seconds for one job, or for a worker to start
_ZEROS = bytes(SLOT_BYTES)


class Job(Protocol):
    """A piece of work that this process or a worker can do."""

    @property
    def kind(self) -> bytes:
        """``MASKS`` or ``AGREEMENT``."""

    def here(self) -> None:
        """Do it in this process."""

    def request(self) -> bytes:
        """What a worker needs to know, less than 32 KiB."""

    def take(self, answer: bytes, slot: memoryview) -> None:
        """Use what a worker answered, and left in its 1 MiB slot."""


class _Lost(Exception):
    """A worker is gone or makes no progress."""


class _Worker:
    """One child process, its socket, and its slots of shared memory."""

    def __init__(self) -> None:
        memory = os.memfd_create("masks", os.MFD_CLOEXEC)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            os.ftruncate(memory, SLOTS * SLOT_BYTES)
            self._memory = mmap.mmap(memory, SLOTS * SLOT_BYTES)
            passed = (theirs.fileno(), memory)
            command = [sys.executable, "-m", "fedsecure.secagg.worker", *map(str, passed)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=passed)
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        view = memoryview(self._memory)
        self._slots = [view[i * SLOT_BYTES : (i + 1) * SLOT_BYTES] for i in range(SLOTS)]
        self.free: list[int] = []  # none before the worker has said that it is ready
        self.held: deque[tuple[Job, int]] = deque()

    def give(self, job: Job) -> None:
        slot = self.free.pop()
        self.held.append((job, slot))
        try:
            self._socket.sendall(job.kind + bytes([slot]) + job.request())
        except OSError as error:
            raise _Lost from error

    def collect(self, *, timeout: float = 0.0) -> bool:
        """Take one answer if it comes within ``timeout`` seconds; says whether one came."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(1000 * timeout):
            return False
        try:
            answer = self._socket.recv(MESSAGE_BYTES)
        except OSError as error:
            raise _Lost from error
        if not answer:
            raise _Lost
        if not self.held:
            self.free = list(range(SLOTS))
            return True
        job, slot = self.held.popleft()
        job.take(answer[1:], self._slots[slot])
        self._slots[slot][:] = _ZEROS  # sums of masks are as secret as masks
        self.free.append(slot)
        return True

    def stop(self) -> None:
        self._socket.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for slot in self._slots:
            slot[:] = _ZEROS

    def disown(self) -> None:
        """In a forked child: leave the worker to the parent."""
        self._socket.close()
        self._process.returncode = 0


class Crew:
    """This process and its workers.

    Args:
        workers: processes in all, 2 or more.

    Raises:
        OSError: no child process or shared memory can be had.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._others: list[_Worker] = []
        self._again: deque[Job] = deque()  # from lost workers
        try:
            for _ in range(workers - 1):
                self._others.append(_Worker())
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        return bool(self._others)

    def wait(self) -> int:
        """Wait until every worker has started; returns how many processes there are now, this one among them."""
        for worker in list(self._others):
            with self._mind(worker):
                if not (worker.free or worker.held or worker.collect(timeout=PATIENCE)):
                    raise _Lost
        return 1 + len(self._others)

    def run(self, jobs: Iterable[Job]) -> None:
        """Do all ``jobs``, in any order, each once; an exception of a job done here ends the run."""
        self._again.clear()
        source, done = iter(jobs), False
        try:
            while True:
                for worker in list(self._others):
                    with self._mind(worker):
                        while worker.collect():
                            pass
                        while worker.free and (job := self._next(source)) is not None:
                            worker.give(job)
                job = self._next(source)
                if job is not None:
                    job.here()
                elif busy := [worker for worker in self._others if worker.held]:
                    with self._mind(busy[0]):
                        if not busy[0].collect(timeout=PATIENCE):
                            raise _Lost
                else:
                    done = True
                    return
        finally:
            if not done:  # answers to jobs of this run must not reach the next
                self.stop()

    def stop(self) -> None:
        """End the workers and wipe the shared memory."""
        while self._others:
            self._others.pop().stop()

    def disown(self) -> None:
        """In a forked child: leave the workers to the parent."""
        while self._others:
            self._others.pop().disown()

    def _next(self, source: Iterator[Job]) -> Job | None:
        return self._again.popleft() if self._again else next(source, None)

    @contextlib.contextmanager
    def _mind(self, worker: _Worker) -> Iterator[None]:
        """Take the jobs of a worker back when it is lost."""
        try:
            yield
        except _Lost:
            self._others.remove(worker)
            self._again.extend(job for job, _ in worker.held)
            worker.stop()


_lock = threading.Lock()
_crew: Crew | None = None
_done = 0  # bytes of keystream made alone so far


@contextlib.contextmanager
def crew(size: int, *, workers: int | None = None) -> Iterator[Crew | None]:
    """The workers for ``size`` bytes of keystream, or ``None`` where the caller does better alone.

    With ``workers=None`` that is below 64 MiB, on one core, while another thread has the workers, or until
    this process has had 1 GiB to do, which is when starting workers pays; a caller never waits for the start.
    Any other work counts by the keystream that could be made in its time.
    """
    global _done
    wanted = min(cores(), MAX_WORKERS) if workers is None else workers
    if wanted < 2 or (workers is None and size < USE) or not _lock.acquire(blocking=False):
        yield None
        return
    try:
        _done += size
        started = _crew is not None and _crew.alive
        if workers is None and not started and _done < START:
            yield None
        else:
            yield _hire(wanted)
    finally:
        _lock.release()


def warm_up(workers: int | None = None) -> int:
    """Start workers, one a core where ``None``, and wait for them; returns the processes there are."""
    wanted = min(cores(), MAX_WORKERS) if workers is None else workers
    with _lock:
        hired = _hire(wanted) if wanted > 1 else None
        return hired.wait() if hired else 1


def close() -> None:
    """End the workers of this process; the next large sum starts them again."""
    global _crew, _done
    with _lock:
        if _crew is not None:
            _crew.stop()
        _crew, _done = None, 0


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hire(workers: int) -> Crew | None:
    """The crew of this size; kept between calls, and made anew where all workers are lost."""
    global _crew
    if _crew is not None:
        if _crew.alive and _crew.workers == workers:
            return _crew
        _crew.stop()
    try:
        _crew = Crew(workers)
    except (OSError, AttributeError):  # AttributeError: no memfd_create on this system
        _crew = None
    return _crew


def _after_fork() -> None:
    global _crew, _lock
    if _crew is not None:
        _crew.disown()
    _crew, _lock = None, threading.Lock()


atexit.register(close)
os.register_at_fork(after_in_child=_after_fork)
