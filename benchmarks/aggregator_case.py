"""One load test: lays out a federation, starts the aggregator and its sites as two processes, and watches the former.

Resident memory and processor time are those of the aggregator's process (the latter also of its workers, where it
starts any), from ``/proc``. A third process, the one that asks, calls ``Greet`` again and again over a channel of its
own: how long a small call waits while the sites are at work, without the sites' own waits in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.aggregator_driver import PATIENCE, Plan
from fedsecure.aggregator.admission import PROTOCOL
from fedsecure.identity.provision import load_identity, provision
from fedsecure.secagg.thresholds import MAX_SITES
from fedsecure.simulation.scaffold import to_toml
from fedsecure.transport.channel import GrpcTransport
from fedsecure.wire import federation_pb2 as pb

ROOT = Path(__file__).resolve().parents[1]
PROBE_SECONDS = 0.1
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        sites: up to 128 with the complete graph, more with the k-regular one.
        classes, dimension: of the linear head that is trained; d is their product, at least ``sites``.
        rounds: whole rounds, of which ``warm_up`` are not measured.
        released: whether the sites run the released client.
    """

    sites: int
    classes: int
    dimension: int
    rounds: int
    warm_up: int
    released: bool = False


@dataclass
class Watched:
    """The aggregator's process as seen at the end of each round.

    Attributes:
        at: seconds on the monotonic clock.
        cpu: seconds of processor time so far.
        rss: resident memory in MB of 10^6 bytes.
    """

    pid: int
    at: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)

    def look(self) -> None:
        self.at.append(time.monotonic())
        self.cpu.append(cpu_seconds(self.pid))
        self.rss.append(memory_mb(self.pid, "VmRSS"))


def measure(case: Case, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run one case to its end.

    Returns:
        ``rounds_per_minute``, ``p50_ms`` and ``p99_ms`` of the sites' calls that carry something (send, upload and
        fetch), ``calls_ms`` the same by kind, ``repeated`` the calls made again, ``greet_ms`` of the third process,
        ``rss_mb`` the peak, ``cpu_s`` a round, ``rss_first_mb`` and ``rss_last_mb``: medians over the first and the
        last tenth of the measured rounds.
    """
    memory = Path("/dev/shm")  # keys of a thousand sites, each file synced to the disk, would take half a minute
    with (
        tempfile.TemporaryDirectory(prefix="fedsecure-keys-", dir=memory if memory.is_dir() else None) as keys,
        tempfile.TemporaryDirectory(prefix="fedsecure-load-") as folder,
    ):
        progress(f"{case.sites} sites: keys and certificates")
        file = lay_out(case, keys=Path(keys), folder=Path(folder))
        program = ["benchmarks.aggregator_serve", str(file)]
        if case.sites <= MAX_SITES:
            program = ["fedsecure", "serve", "--quiet", "--config", str(file)]
        with Child("the aggregator", program, Path(folder)) as aggregator:
            address = aggregator.wait_for(file.parent / "state" / "address")
            plan = Plan(address, f"{keys}/sites", case.released, case.warm_up)
            module = ["benchmarks.aggregator_driver", json.dumps(vars(plan))]
            with Child("the sites", module, Path(folder)) as driver:
                return _watch(case, aggregator, driver, plan, progress)


def lay_out(case: Case, *, keys: Path, folder: Path) -> Path:
    """Identities under ``keys`` and ``federation.toml`` under ``folder``; returns the file."""
    names = [f"site-{i:04d}" for i in range(case.sites)]
    provision(keys, federation="load", sites=dict.fromkeys(names, "train"), hosts=["127.0.0.1"])
    waits = dict.fromkeys(("phase_seconds", "training_seconds", "start_seconds", "silence_seconds"), PATIENCE)
    content = {
        "listen": "127.0.0.1:0",
        "state": str(folder / "state"),
        "identity": str(keys / "aggregator" / "identity"),
        "name": "load",
        "classes": [f"class-{i}" for i in range(case.classes)],
        "encoder": {
            "model": "features",
            "pretrained": "file",
            "dimension": case.dimension,
            "fingerprint": "0" * 64,
        },
        "method": {"name": "linear", "rounds": case.rounds},
        "privacy": {"unit": "record", "noise_multiplier": 20.0, "minimum_signal_to_noise": 0.0},
        "evaluation": {"when": []},
        "rounds": {**waits, "prepared_rounds": 0},
        "sites": {name: {"max_units": 10} for name in names},
    }
    file = folder / "federation.toml"
    file.write_text(to_toml(content), encoding="utf-8")
    return file


class Child:
    """A process of this benchmark; its complaints are shown if it fails."""

    def __init__(self, what: str, module: list[str], folder: Path) -> None:
        self._what = what
        self._log = (folder / f"{module[0]}.log").open("w+", encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *module]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()

    def wait_for(self, file: Path) -> str:
        """The text of a file that the process is to write."""
        give_up = time.monotonic() + PATIENCE
        while not file.exists():
            self.check()
            if time.monotonic() > give_up:
                raise TimeoutError(f"{self._what} did not write {file}")
            time.sleep(0.05)
        return file.read_text(encoding="utf-8")

    def check(self, cause: Child | None = None) -> bool:
        """Whether it still runs; raises where it has failed, for ``cause`` first if that fails with it."""
        code = self.process.poll()
        if code:
            if cause is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    cause.process.wait(GRACE_SECONDS)
                cause.check()
            self._log.seek(0)
            raise RuntimeError(f"{self._what} ended with {code}:\n{self._log.read()[-4000:]}")
        return code is None


def _watch(case: Case, aggregator: Child, driver: Child, plan: Plan, progress: Callable[[str], None]) -> dict[str, Any]:
    watched, said = Watched(aggregator.process.pid), dict[str, Any]()

    def read() -> None:
        assert driver.process.stdout is not None
        for line in driver.process.stdout:
            said.update(json.loads(line))
            if "latencies" not in said:
                watched.look()
                progress(f"{case.sites} sites: round {said['round'] + 1} of {case.rounds}")

    reading = threading.Thread(target=read)
    reading.start()
    greetings, peak = _greet(plan, watched, case, aggregator, driver)
    driver.process.wait(PATIENCE)
    reading.join()
    driver.check(aggregator)
    aggregator.process.wait(PATIENCE)
    aggregator.check()
    if len(watched.at) != case.rounds:
        raise RuntimeError(f"{len(watched.at)} of {case.rounds} rounds")
    first, rounds = max(0, case.warm_up - 1), case.rounds - case.warm_up
    at, cpu, rss = watched.at[first:], watched.cpu[first:], watched.rss[case.warm_up :]
    tenth = max(1, len(rss) // 10)
    latencies: dict[str, list[float]] = said["latencies"]
    everything = [value for values in latencies.values() for value in values]
    return {
        "rounds_per_minute": 60 * (len(at) - 1) / (at[-1] - at[0]),
        **_percentiles(everything),
        "calls_ms": {kind: _percentiles(values) for kind, values in sorted(latencies.items())},
        "greet_ms": _percentiles(greetings),
        "repeated": said["repeated"],
        "rss_mb": max(peak, *watched.rss),
        "cpu_s": (cpu[-1] - cpu[0]) / rounds,
        "rss_first_mb": float(np.median(rss[:tenth])),
        "rss_last_mb": float(np.median(rss[-tenth:])),
    }


def _greet(plan: Plan, watched: Watched, case: Case, aggregator: Child, driver: Child) -> tuple[list[float], float]:
    """Seconds of each greeting while the measured rounds go on, and the peak of the memory up to their end."""
    identity = load_identity(Path(plan.folder) / "site-0000" / "identity")
    line = GrpcTransport(plan.address, identity, connect_seconds=PATIENCE, call_seconds=PATIENCE)
    seconds, peak = list[float](), 0.0
    try:
        while aggregator.check() and driver.check(aggregator) and len(watched.at) < case.rounds:
            start = time.perf_counter()
            line.greet(pb.GreetRequest(protocol=PROTOCOL))
            if len(watched.at) >= case.warm_up:
                seconds.append(time.perf_counter() - start)
            peak = memory_mb(watched.pid, "VmHWM")
            time.sleep(PROBE_SECONDS)
    finally:
        line.close()
    return seconds, peak


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, (50, 99)) if seconds else (np.nan, np.nan)
    return {"p50_ms": 1000 * float(p50), "p99_ms": 1000 * float(p99)}


def memory_mb(pid: int, field: str) -> float:
    """``VmRSS``, resident memory now, or ``VmHWM``, its peak, in MB of 10^6 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"no {field} of process {pid}")


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its children, living and waited for."""
    tick, total = os.sysconf("SC_CLK_TCK"), 0.0
    living = [Path(f"/proc/{pid}"), *(Path(f"/proc/{child}") for child in _children(pid))]
    for process in living:
        fields = (process / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / tick
    return total


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text(encoding="ascii").split()]
