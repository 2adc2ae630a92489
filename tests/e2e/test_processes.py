"""The deployed system: kills, restarts and refusals over real sockets and mutual TLS."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.processes import Deployment, fedsecure

from fedsecure.aggregator.database import Database
from fedsecure.aggregator.store import RunStore
from fedsecure.identity.provision import provision
from fedsecure.privacy.ledger import Ledger


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Any]:
    made: list[Deployment] = []

    def make(**options: Any) -> Deployment:
        deployment = Deployment(tmp_path / f"d{len(made)}", **options)
        made.append(deployment)
        return deployment

    yield make
    for deployment in made:
        deployment.stop()


def rounds_of(deployment: Deployment) -> list[dict[str, Any]]:
    (folder,) = deployment.state.glob("runs/*")
    database = Database("", deployment.state)
    try:
        return RunStore(database, deployment.state, bytes.fromhex(folder.name)).attempts()
    finally:
        database.close()


@pytest.mark.slow
def test_the_aggregator_never_loads_torch_and_stays_small(deploy: Any) -> None:
    deployment = deploy(rounds=3)
    deployment.serve()
    for name in deployment.world.names:
        deployment.join(name)
    pid = deployment.children["aggregator"].pid
    deployment.until(lambda: deployment.status()["step"] >= 2, "two rounds")
    mapped = Path(f"/proc/{pid}/maps").read_text()
    assert "libtorch" not in mapped
    assert "numpy" in mapped, "the check must see what is loaded"
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    assert resident < 200e6
    assert deployment.wait("aggregator") == 0
    assert all(deployment.wait(name) == 0 for name in deployment.world.names)


@pytest.mark.slow
def test_killing_one_of_five_in_the_middle_of_a_round_does_not_lose_it(deploy: Any) -> None:
    deployment = deploy(sites=5, rounds=150)
    deployment.serve()
    for name in deployment.world.names:
        deployment.join(name)
    deployment.until(lambda: deployment.status()["step"] >= 2, "two rounds")
    deployment.kill("site-4")
    assert deployment.wait("aggregator") == 0, deployment.logs()
    for name in deployment.world.names:
        assert (deployment.wait(name) == 0) == (name != "site-4")
    records = rounds_of(deployment)
    assert not [r for r in records if "aborted" in r]
    assert len(records[0]["survivors"]) == 5
    assert len(records[-1]["survivors"]) == 4
    assert "site-4" not in records[-1]["survivors"]


@pytest.mark.slow
def test_killing_below_the_threshold_aborts_with_the_reason_and_the_next_attempt_is_new(deploy: Any) -> None:
    deployment = deploy(sites=3, rounds=100)
    deployment.serve()
    for name in deployment.world.names:
        deployment.join(name)
    deployment.until(lambda: deployment.status()["step"] >= 2, "two rounds")
    deployment.kill("site-2")
    deployment.until(lambda: any("aborted" in r for r in rounds_of(deployment)), "the aborted attempt")
    deployment.join("site-2")
    assert deployment.wait("aggregator") == 0, deployment.logs()
    assert all(deployment.wait(name) == 0 for name in deployment.world.names)
    records = rounds_of(deployment)
    aborted = [r for r in records if "aborted" in r]
    assert all("site-2" in r["aborted"] for r in aborted)
    following = [r for r in records if r["round"] == aborted[0]["round"] and r["attempt"] > aborted[0]["attempt"]]
    assert following
    assert len({r["context"] for r in records}) == len(records), "every attempt has a context, and keys, of its own"
    home = deployment.layout.sites["site-2"].parent
    with Ledger(home / "ledger.db") as ledger:
        ledger.verify()
        assert len(ledger.spent("site-2-train", "train")) >= deployment.world.rounds


@pytest.mark.slow
def test_the_aggregator_gone_is_one_clear_error_and_nothing_is_given_back(deploy: Any) -> None:
    deployment = deploy(rounds=400)
    deployment.serve()
    for name in deployment.world.names:
        deployment.join(name)
    deployment.until(lambda: deployment.status()["step"] >= 2, "two rounds")
    deployment.kill("aggregator")
    for name in deployment.world.names:
        assert deployment.wait(name, 120) == 1
        assert "FS-1501" in deployment.log(name)
        assert "Traceback" not in deployment.log(name)
    with Ledger(deployment.layout.sites["site-1"].parent / "ledger.db") as ledger:
        assert len(ledger.spent("site-1-train", "train")) >= 2


def test_a_port_in_use_is_said(deploy: Any) -> None:
    deployment = deploy()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        text = deployment.layout.federation.read_text()
        port = taken.getsockname()[1]
        deployment.layout.federation.write_text(text.replace("127.0.0.1:0", f"127.0.0.1:{port}"))
        done = fedsecure("serve", "--config", deployment.layout.federation)
    assert done.returncode == 1
    assert "FS-1801" in done.stderr
    assert str(port) in done.stderr


@pytest.mark.slow
def test_a_second_join_with_the_same_identity_is_refused(deploy: Any) -> None:
    deployment = deploy()
    deployment.serve()
    deployment.join("site-1")
    deployment.until(lambda: deployment.status().get("sites", {}).get("site-1"), "site-1 is there")
    done = fedsecure("join", "--config", deployment.layout.sites["site-1"])
    assert done.returncode == 1
    assert "FS-1703" in done.stderr
    assert deployment.children["site-1"].poll() is None, "the first process goes on"


@pytest.mark.slow
def test_a_certificate_of_another_federation_is_refused(deploy: Any, tmp_path: Path) -> None:
    deployment = deploy()
    deployment.serve()
    names = dict.fromkeys(deployment.world.names, "train")
    provision(tmp_path / "foreign", federation="world", sites=names, hosts=("127.0.0.1",))
    file = deployment.layout.sites["site-1"]
    own = file.parent / "identity"
    own.rename(file.parent / "old-identity")
    (tmp_path / "foreign" / "sites" / "site-1" / "identity").rename(own)
    done = fedsecure("join", "--config", file, timeout=240)
    assert done.returncode == 1
    assert "FS-1457" in done.stderr or "FS-1501" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_ledger_that_cannot_be_written_stops_the_site_before_anything(deploy: Any) -> None:
    deployment = deploy()
    deployment.serve()
    file = deployment.layout.sites["site-1"]
    (file.parent / "blocker").write_text("a file, no folder")
    file.write_text(file.read_text().replace('ledger = "ledger.db"', 'ledger = "blocker/ledger.db"'))
    done = fedsecure("join", "--config", file)
    assert done.returncode == 1
    assert "FS-125" in done.stderr or "FS-1802" in done.stderr
    assert not list(file.parent.glob("state/runs/*"))


@pytest.mark.slow
def test_a_wrong_model_is_refused_before_anything_is_charged(deploy: Any) -> None:
    deployment = deploy()
    deployment.serve()
    file = deployment.layout.sites["site-1"]
    other = file.parent / "other.npz"
    from federation_world import write_features

    write_features(other, seed=7)
    text = file.read_text()
    old = next(line for line in text.splitlines() if line.startswith("encoder_file"))
    file.write_text(text.replace(old, f'encoder_file = "{other}"'))
    done = fedsecure("join", "--config", file)
    assert done.returncode == 1
    assert "FS-1630" in done.stderr
    with Ledger(file.parent / "ledger.db") as ledger:
        assert not ledger.history()


def test_tls_12_is_refused(deploy: Any) -> None:
    import ssl

    deployment = deploy()
    host, port = deployment.serve().rsplit(":", 1)
    identity = deployment.layout.sites["site-1"].parent / "identity"

    def offer(version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(identity / "ca.pem"))
        context.load_cert_chain(identity / "certificate.pem", identity / "tls-key.pem")
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            return secured.version()

    assert offer(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises(ssl.SSLError):
        offer(ssl.TLSVersion.TLSv1_2)
