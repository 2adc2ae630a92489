"""The demo's child processes: one aggregator and every site, each with a log of its own.

A site that is killed on the way is the protocol's business. One that ends itself with an error of its own is the
user's: the error is read back from the child's log and raised here with its code and its cure.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedsecure.config import SiteConfig, load
from fedsecure.errors import RUN_OVER, FedsecureError, RunError
from fedsecure.files import write_whole
from fedsecure.learning.encoding import Encoded
from fedsecure.simulation.scaffold import Layout

Watch = Callable[[Mapping[str, Any]], None]

# As the command line prints an error; the last one in a log is the one the process ended with.
_PRINTED = re.compile(
    r"^(?P<code>FS-1[0-8]\d\d) (?P<found>.*?)\n  expected: (?P<expected>.*?)\n  cure:     (?P<cure>.*?)\n  see docs/",
    re.DOTALL | re.MULTILINE,
)
# A site's errors that only follow from another process having ended: FS-1709, and every one of the network.
_CONSEQUENCES = ("FS-1709", "FS-15")


def read_error(text: str, *, where: str) -> FedsecureError | None:
    """The error a process printed last, as an exception of its family; None where it printed none.

    Args:
        text: what the process wrote.
        where: its name, put before what was found.
    """
    printed = list(_PRINTED.finditer(text))
    if not printed:
        return None
    code, found, expected, cure = printed[-1].groups()
    kind = next(k for k in FedsecureError.__subclasses__() if code.startswith(k.families))
    return kind(code, f"{where}: {found}", expected=expected, cure=cure)


def encoded_at(lines: Sequence[str]) -> str:
    """What the last lines of sites' logs say of images being encoded, added up; nothing where no site is at it."""
    found = [far for line in lines if (far := Encoded.read(line)) is not None and far.done < far.count]
    if not found:
        return ""
    where = found[0].name if len(found) == 1 else f"{len(found)} sites"
    return str(Encoded(where, sum(f.done for f in found), sum(f.count for f in found), sum(f.rate for f in found)))


class Processes:
    """Starts the processes of a layout, watches them to the end and stops them."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._state = layout.federation.parent / "state"
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def count(self) -> int:
        """Processes started, this one not counted."""
        return len(self._children)

    def start(self) -> None:
        """Start the aggregator, wait for its address, start the sites.

        Raises:
            FedsecureError: the aggregator's own; RunError FS-1713 it does not listen, FS-1714 it ended unexplained.
        """
        self._spawn("aggregator", "serve")
        address = self._await_address()
        for site, file in self._layout.sites.items():
            text = file.read_text(encoding="utf-8")
            old = load(file, SiteConfig).aggregator
            write_whole(file, text.replace(f'aggregator = "{old}"', f'aggregator = "{address}"').encode())
            self._spawn(site, "join")
        pids = {name: child.pid for name, child in self._children.items()}
        write_whole(self._layout.folder / "processes.json", json.dumps(pids).encode())

    def watch(self, watch: Watch) -> None:
        """Until the run is over.

        Args:
            watch: called a few times a second with the aggregator's status, ``lost``, the sites that were killed, and
                ``encoding``, how far sites are with their images, in words; empty where none is at it.

        Raises:
            FedsecureError: the error that the first process to fail reported; RunError FS-1714 it reported none.
        """
        aggregator = self._children["aggregator"]
        while aggregator.poll() is None:
            lost = [name for name, code in self._codes().items() if code and name != "aggregator"]
            for name in lost:
                self._raise_own_error(name)
            if (status := self._status()) is not None:
                watch({**status, "lost": lost, "encoding": self._encoding()})
            if len(lost) == len(self._layout.sites):
                raise self._error(lost[0])
            time.sleep(0.2)
        if aggregator.returncode not in (0, RUN_OVER):
            # The sites wait for the next process of this run, and none comes.
            for name in self._layout.sites:
                self._raise_own_error(name)
            self.stop()
            raise self._error("aggregator")
        for name, child in self._children.items():
            try:
                child.wait(timeout=30)
            except subprocess.TimeoutExpired:
                child.kill()
                watch({"stage": "over", "waiting": f"{name} did not end by itself"})
        for name in self._layout.sites:
            self._raise_own_error(name)
        if aggregator.returncode != 0:
            raise self._error("aggregator")
        if (status := self._status()) is not None:
            watch(status)

    def stop(self) -> None:
        """End whatever still runs."""
        for child in self._children.values():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for child in self._children.values():
            try:
                child.wait(timeout=5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _spawn(self, name: str, command: str) -> None:
        file = self._layout.federation if command == "serve" else self._layout.sites[name]
        # The sites share this machine's cores; torch would let each of them take all.
        threads = str(max(1, (os.cpu_count() or 1) // len(self._layout.sites)))
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        environment |= {"NO_COLOR": "1", "COLUMNS": "100"}
        with (file.parent / "log.txt").open("wb") as log:
            self._children[name] = subprocess.Popen(
                [sys.executable, "-m", "fedsecure", command, "--config", str(file), "--quiet"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def _await_address(self) -> str:
        give_up = time.monotonic() + 60
        file = self._state / "address"
        while not file.exists():
            if self._children["aggregator"].poll() is not None:
                raise self._error("aggregator")
            if time.monotonic() > give_up:
                raise RunError(
                    "FS-1713",
                    "the aggregator did not listen within 60 s",
                    expected="a running `fedsecure serve`",
                    cure=f"see {self._layout.federation.parent / 'log.txt'}",
                )
            time.sleep(0.05)
        return file.read_text()

    def _codes(self) -> dict[str, int | None]:
        return {name: child.poll() for name, child in self._children.items()}

    def _status(self) -> dict[str, Any] | None:
        for file in self._state.glob("runs/*/status.json"):
            loaded: dict[str, Any] = json.loads(file.read_text())
            return loaded
        return None

    def _log(self, name: str) -> str:
        file = self._layout.federation if name == "aggregator" else self._layout.sites[name]
        return (file.parent / "log.txt").read_text(errors="replace")

    def _encoding(self) -> str:
        return encoded_at(list(map(self._last_line, self._layout.sites)))

    def _last_line(self, site: str) -> str:
        with (self._layout.sites[site].parent / "log.txt").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 1024))
            return log.read().decode(errors="replace").rstrip().rpartition("\n")[2]

    def _raise_own_error(self, name: str) -> None:
        """Raise what a site ended itself with, unless a signal ended it or another process caused it."""
        code = self._children[name].poll()
        if code is not None and code > 0:
            error = self._error(name)
            if not error.code.startswith(_CONSEQUENCES):
                raise error

    def _error(self, name: str) -> FedsecureError:
        text = self._log(name)
        code = self._children[name].poll()
        said = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")
        # Negative: a signal; whatever the log holds is not why it ended.
        return (None if code is None or code < 0 else read_error(text, where=name)) or RunError(
            "FS-1714",
            f"{name} ended with exit status {code}; its last line: {said.strip()}",
            expected="every process to reach the end of the run",
            cure=f"see the log.txt files under {self._layout.folder}",
        )
