"""Real processes over real sockets: lays out a federation on disk, starts and kills its members."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from federation_world import World

from fedsecure.config import SiteConfig, load
from fedsecure.simulation.scaffold import SitePlan, lay_out

# Started in the background of a shell, tests inherit that Ctrl-C is ignored, and so would every child.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

COMMAND = [sys.executable, "-W", "error::ResourceWarning", "-m", "fedsecure"]


def fedsecure(*arguments: str | Path, timeout: float = 240, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        **changes,
    )


class Deployment:
    """Aggregator and sites of a generated feature federation, each a process that can be killed."""

    def __init__(self, folder: Path, **options: Any) -> None:
        (folder / "world").mkdir(parents=True)
        self.world = World(folder / "world", **options)
        plans = {}
        for name in self.world.names:
            config = self.world.site_config(name)
            plans[name] = SitePlan(
                train=config.train,
                evaluation=config.evaluation,
                policy=config.policy,
                encoder_file=config.encoder_file,
                connect_seconds=10.0,
            )
        self.layout = lay_out(
            folder / "deployed",
            self.world.settings,
            sites=plans,
            listen="127.0.0.1:0",
            hosts=("127.0.0.1", "localhost"),
        )
        self.state = self.layout.federation.parent / "state"
        self.children: dict[str, subprocess.Popen[str]] = {}

    def serve(self) -> str:
        (self.state / "address").unlink(missing_ok=True)
        self._spawn("aggregator", "serve", self.layout.federation)
        self.until(lambda: (self.state / "address").exists(), "the aggregator listens")
        address = (self.state / "address").read_text()
        for file in self.layout.sites.values():
            text = file.read_text()
            old = load(file, SiteConfig).aggregator
            file.write_text(text.replace(f'aggregator = "{old}"', f'aggregator = "{address}"'))
        return address

    def join(self, name: str) -> None:
        self._spawn(name, "join", self.layout.sites[name])

    def kill(self, name: str) -> None:
        self.children[name].send_signal(signal.SIGKILL)
        self.children[name].wait()

    def status(self) -> dict[str, Any]:
        files = sorted(self.state.glob("runs/*/status.json"), key=lambda f: f.stat().st_mtime)
        return json.loads(files[-1].read_text()) if files else {"stage": "", "step": 0, "outcome": None}

    def until(self, condition: Any, what: str, seconds: float = 240) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, f"in vain: {what}\n{self.logs()}"
            time.sleep(0.02)

    def wait(self, name: str, seconds: float = 240) -> int:
        try:
            return self.children[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} does not end\n{self.logs()}") from None

    def logs(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in self.state.parent.parent.glob("*.log"))

    def log(self, name: str) -> str:
        return (self.state.parent.parent / f"{name}.log").read_text()

    def stop(self) -> None:
        for child in self.children.values():
            if child.poll() is None:
                child.kill()
                child.wait()

    def _spawn(self, name: str, command: str, file: Path) -> None:
        with (self.state.parent.parent / f"{name}.log").open("a") as log:
            self.children[name] = subprocess.Popen(
                [*COMMAND, command, "--config", str(file), "--quiet"],
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
