"""A federation whose sites make their own keys: real processes enrol, run, and one is revoked in the middle."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from e2e.processes import COMMAND, Deployment, fedsecure
from federation_world import World

from fedsecure.config import SiteConfig, load
from fedsecure.identity.provision import load_identity
from fedsecure.simulation.scaffold import Layout, to_toml

SECRETS = ("identity.key", "tls-key.pem", "ca-key.pem", "coordinator.key")


class Enrolled(Deployment):
    """As its parent, but laid out by ``fedsecure init --no-site-keys``."""

    def __init__(self, folder: Path, **options: Any) -> None:
        (folder / "world").mkdir(parents=True)
        self.world = World(folder / "world", **options)
        file = folder / "settings.toml"
        file.write_text(to_toml(self.world.settings.model_dump(mode="json", exclude_none=True)))
        self.home = folder / "federation"
        listen = ("--listen", "127.0.0.1:0", "--enrolment", "127.0.0.1:0")
        self.ran("init", self.home, "--settings", file, "--no-site-keys", *listen)
        sites = {name: self.home / "sites" / name / "site.toml" for name in self.world.names}
        self.layout = Layout(self.home, self.home / "aggregator" / "federation.toml", sites, roles={})
        self.state = self.home / "aggregator" / "state"
        self.children: dict[str, subprocess.Popen[str]] = {}

    @staticmethod
    def ran(*arguments: str | Path) -> str:
        done = fedsecure(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    def open_desk(self) -> str:
        """Start ``fedsecure serve``, which waits for the sites; the desk's address."""
        self._spawn("aggregator", "serve", self.layout.federation)
        self.until(lambda: "desk listens" in self.log("aggregator"), "the desk listens")
        found = re.search(r"desk listens on 127\.0\.0\.1:(\d+)", self.log("aggregator"))
        assert found
        return f"localhost:{found[1]}"

    def serve_at(self, address: str) -> None:
        """Start ``fedsecure serve`` again, where it was."""
        text = self.layout.federation.read_text()
        self.layout.federation.write_text(text.replace('listen = "127.0.0.1:0"', f'listen = "{address}"'))
        self._spawn("aggregator", "serve", self.layout.federation)

    def site(self, name: str) -> Path:
        return self.layout.sites[name].parent

    def enroll(self, name: str, desk: str) -> None:
        """From the invitation to the identity, as three people at three machines do it."""
        token = self.site(name) / "token"
        token.write_text(self.ran("members", "invite", self.home, name, "--address", desk))
        command = [*COMMAND, "enroll", str(token), "--folder", str(self.site(name) / "identity"), "--seconds", "120"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
            assert child.stdout is not None
            said: list[str] = []
            reading = threading.Thread(target=lambda: said.extend(child.stdout or ()))
            reading.start()
            self.until(lambda: any("waiting at most" in line for line in said) or child.poll() is not None, "asks")
            (aloud,) = re.findall(rf"keys of {name} +(\w{{4}} \w{{4}} \w{{4}}) ", "".join(said))
            self.until(lambda: name in self.pending() or child.poll() is not None, "the request is in the drop box")
            self.ran("members", "approve", self.home, name, "--yes", aloud)
            assert child.wait(120) == 0, "".join(said)
            reading.join(10)
        assert f"{name} is a member of world" in "".join(said)
        token.unlink()

    def pending(self) -> list[str]:
        shown = json.loads(self.ran("members", "pending", self.home, "--json"))
        return [one["site"] for one in shown["requests"]]

    def configure(self, name: str, address: str) -> None:
        """What a site's operator completes: records, and where the aggregator is."""
        config = self.world.site_config(name).model_dump(mode="json", exclude_none=True)
        home = self.site(name)
        own = {"aggregator": address, "identity": str(home / "identity"), "state": "state", "ledger": "ledger.db"}
        self.layout.sites[name].write_text(to_toml({**config, **own}))
        load(self.layout.sites[name], SiteConfig)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sites_enrol_run_and_one_is_revoked_meanwhile(tmp_path: Path) -> None:
    federation = Enrolled(tmp_path, sites=4, rounds=40, waits={"silence_seconds": 8.0})
    names = federation.world.names
    template = load(federation.layout.sites["site-1"], SiteConfig)
    assert not template.identity.exists(), "no key of a site was made by init"
    try:
        desk = federation.open_desk()
        assert "waiting for the enrolment of 4 of 4 sites" in federation.log("aggregator")
        for name in names:
            federation.enroll(name, desk)
        secrets = {
            "".join(file.read_text().splitlines()[1:-1])
            for name in names
            for file in (federation.site(name) / "identity").iterdir()
            if file.name in SECRETS
        }
        assert len(secrets) == 2 * len(names)
        elsewhere = [f for part in ("ca", "aggregator") for f in (federation.home / part).rglob("*") if f.is_file()]
        assert len(elsewhere) > 15
        for file in elsewhere:
            flat = file.read_bytes().replace(b"\\n", b"").replace(b"\n", b"")
            assert not [one for one in secrets if one.encode() in flat], file

        federation.until(lambda: (federation.state / "address").exists(), "the run opens once all are there")
        address = (federation.state / "address").read_text()
        for name in names:
            # Who enrolled earlier has an earlier roster.
            federation.ran("enroll", "--refresh", "--folder", federation.site(name) / "identity")
            assert load_identity(federation.site(name) / "identity").roster.version == 5
            federation.configure(name, address)
            federation.join(name)
        federation.until(lambda: federation.status()["step"] >= 2, "two rounds with all four")
        federation.ran("members", "revoke", federation.home, "site-4")
        assert federation.wait("site-4") == 1
        assert "FS-1460" in federation.log("site-4")
        # The run keeps the roster that it began with: without site-4's certificate it goes on, whatever happens.
        federation.kill("aggregator")
        federation.serve_at(address)
        for name in ("site-1", "site-2", "site-3", "aggregator"):
            assert federation.wait(name) == 0, federation.logs()
    finally:
        federation.stop()
    status = federation.status()
    assert status["outcome"]["complete"]
    assert status["step"] == 40
    attempts = status["outcome"]["attempts"]
    trained = [attempt for attempt in attempts if attempt["stage"] == "training" and attempt.get("survivors")]
    assert trained[0]["survivors"] == names
    assert trained[-1]["survivors"] == names[:3]
    assert "roster version 6: site-4 left" in federation.log("aggregator")
