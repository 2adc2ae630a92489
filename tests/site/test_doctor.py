"""``fedsecure doctor``: each thing that can be wrong is named by its own check, with a cure, and nothing is changed."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served_world import Served
from typer.testing import CliRunner

from fedsecure.cli.app import app
from fedsecure.identity import certificates
from fedsecure.messages import Event
from fedsecure.privacy.accounting import epsilon
from fedsecure.privacy.ledger import Ledger
from fedsecure.simulation.scaffold import to_toml
from fedsecure.site import doctor
from fedsecure.site.doctor import CHECKS, Finding, examine
from fedsecure.transport import probe


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path)
    yield service
    service.stop()


def site_file(served: Served, **changes: Any) -> Path:
    config = served.world.site_config("site-1", **{"aggregator": f"localhost:{served.port}", **changes})
    file = served.world.folder / "site.toml"
    file.write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
    return file


def examined(file: Path) -> dict[str, Finding]:
    found = {finding.check: finding for finding in examine(file, seconds=20.0)}
    assert list(found) == [check.name for check in CHECKS]
    return found


def failed(file: Path, name: str, code: str) -> Finding:
    """The one check that fails, everything that rests on it skipped."""
    found = examined(file)
    wrong = {check: finding.code for check, finding in found.items() if finding.state == "failed"}
    assert wrong == {name: code}
    assert found[name].expected
    assert found[name].cure
    sound = {check for check, finding in found.items() if finding.state in ("ok", "warning")}
    for check in CHECKS:
        assert (check.name in sound or check.name in wrong) == all(need in sound for need in check.needs), check.name
    return found[name]


def test_a_healthy_site_is_told_so_and_nothing_is_changed(served: Served) -> None:
    file = site_file(served)
    found = examined(file)
    assert {finding.state for finding in found.values()} == {"ok"}
    assert "of 3 sites" in found["keys"].found
    assert found["TLS"].found.startswith("TLSv1.3")
    assert "none yet" in found["ledger"].found
    assert not (served.world.folder / "site-1" / "ledger.db").exists()
    assert served.core.sessions.find("site-1") is None, "it has not joined"


def test_the_budget_of_a_used_ledger_is_looked_at(served: Served) -> None:
    file = site_file(served)
    path = served.world.folder / "site-1" / "ledger.db"
    with Ledger(path):
        pass
    before = path.read_bytes()
    found = examined(file)
    assert found["ledger"].found == "0 rows of an unbroken chain; site-1-train has spent ε 0.00 of 8"
    assert "would take ε to" in found["budget"].found
    assert path.read_bytes() == before
    failed(site_file(served, policy={"max_epsilon": 0.5, "unit": "record"}), "budget", "FS-1201")


@pytest.mark.parametrize(
    ("changes", "check", "code"),
    [
        ({"aggregator": "nowhere"}, "configuration", "FS-1019"),
        ({"aggregator": "localhost:0"}, "configuration", "FS-1019"),
        ({"aggregator": "no-such-host.invalid:8443"}, "name", "FS-1520"),
        ({"identity": "absent"}, "keys", "FS-1400"),
        ({"device": "cuda:7"}, "device", "FS-1607"),
        ({"encoder_file": "absent.npz"}, "encoder", "FS-1100"),
        ({"policy": {"max_epsilon": 8.0, "unit": "record", "min_cohort": 4}}, "limits", "FS-1331"),
        ({"policy": {"max_epsilon": 8.0, "unit": "patient"}}, "limits", "FS-1223"),
        ({"policy": {"max_epsilon": 8.0, "unit": "record", "noise": ["local"]}}, "limits", "FS-1221"),
        ({"policy": {"max_epsilon": 8.0, "unit": "record", "methods": ["linear"]}}, "limits", "FS-1342"),
    ],
)
def test_what_the_sites_file_has_wrong(served: Served, changes: dict[str, Any], check: str, code: str) -> None:
    failed(site_file(served, **changes), check, code)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    found = {finding.check: finding for finding in examine(tmp_path / "absent.toml")}
    assert found["configuration"].code == "FS-1001"
    assert found["packages"].state == "ok"
    assert {f.state for name, f in found.items() if name not in ("configuration", "packages")} == {"skipped"}


def test_a_data_set_that_the_run_cannot_use(served: Served) -> None:
    gone = {"name": "site-1-train", "path": str(served.world.folder / "absent.npz")}
    found = failed(site_file(served, train=gone), "data sets", "FS-1100")
    assert "absent.npz" in found.found
    many = {"name": "site-1-train", "path": str(served.world.features), "split": "train"}
    assert "units" in failed(site_file(served, train=many), "training data", "FS-1127").found


def test_another_sites_keys(served: Served) -> None:
    failed(
        site_file(served, identity=served.world.folder / "keys" / "sites" / "site-2" / "identity"), "keys", "FS-1005"
    )


# Of a service that nobody runs any more, and not one that a neighbour of this test may be given.
CLOSED = 1


def test_nobody_listens(served: Served) -> None:
    failed(site_file(served, aggregator=f"127.0.0.1:{CLOSED}"), "port", "FS-1521")


def test_records_and_ledger_are_looked_at_before_the_aggregator_serves(served: Served) -> None:
    path = served.world.folder / "site-1" / "ledger.db"
    event = Event("train", "training", 4.0, 4.0)
    with Ledger(path) as ledger:
        ledger.reserve(
            dataset="site-1-train", population="train", events=[event], run="ab" * 16, round=0, attempt=0,
            query_digest=bytes(32), limit_epsilon=8.0, delta=1e-5,
        )  # fmt: skip
    file = site_file(served, aggregator=f"127.0.0.1:{CLOSED}")
    found = examined(file)
    assert found["budget"].found == "needs aggregator"
    assert found["data sets"].found == "site-1-train: features, site-1-test: features"
    spent = epsilon([event], delta=1e-5)
    assert found["ledger"].found == f"1 rows of an unbroken chain; site-1-train has spent ε {spent:.2f} of 8"
    with closing(sqlite3.connect(path)) as database, database:
        (trigger,) = database.execute("SELECT sql FROM sqlite_master WHERE name = 'entries_stay'").fetchone()
        for statement in ("DROP TRIGGER entries_stay", "UPDATE entries SET round = 1", trigger):
            database.execute(statement)
    wrong = {name: finding.code for name, finding in examined(file).items() if finding.state == "failed"}
    assert wrong == {"port": "FS-1521", "ledger": "FS-1256"}


def test_the_clock_is_compared_whatever_the_roster_is(served: Served) -> None:
    served.core._identity = replace(served.core._identity, roster=replace(served.core.roster, version=2))
    found = failed(site_file(served), "aggregator", "FS-1452")
    assert "same signed roster" in found.expected
    assert examined(site_file(served))["clock"].state == "ok"


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server on a port of its own that treats every connection so."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        answer(connection)
                    except OSError:
                        continue

        threading.Thread(target=serve, daemon=True).start()
        yield int(server.getsockname()[1])
        # Wakes the thread, whose accept then fails.
        server.shutdown(socket.SHUT_RDWR)


def test_a_port_that_speaks_no_tls(served: Served) -> None:
    with listening(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        failed(site_file(served, aggregator=f"localhost:{port}"), "TLS", "FS-1522")


def tls_server(folder: Path, issued: certificates.Issued) -> Callable[[socket.socket], None]:
    folder.mkdir()
    (folder / "certificate.pem").write_bytes(issued.certificate)
    (folder / "key.pem").write_bytes(issued.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True):
            pass

    return answer


def test_a_box_that_opens_tls_is_named(served: Served, tmp_path: Path) -> None:
    proxy = certificates.make_authority("Hospital Web Filter", days=1)
    answer = tls_server(tmp_path / "proxy", certificates.issue_server(proxy, ["localhost"], days=1))
    with listening(answer) as port:
        found = failed(site_file(served, aggregator=f"localhost:{port}"), "TLS", "FS-1456")
    assert "Hospital Web Filter" in found.found
    assert "TLS inspection" in found.cure


def test_a_host_that_the_certificate_does_not_name(served: Served) -> None:
    failed(site_file(served, aggregator=f"127.0.0.1:{served.port}"), "TLS", "FS-1457")


def test_a_certificate_of_the_federation_that_is_not_the_aggregators(served: Served, tmp_path: Path) -> None:
    ca = served.world.folder / "keys" / "ca"
    authority = certificates.Issued((ca / "ca.pem").read_bytes(), (ca / "ca-key.pem").read_bytes())
    answer = tls_server(tmp_path / "other", certificates.issue_server(authority, ["localhost"], days=1))
    with listening(answer) as port:
        failed(site_file(served, aggregator=f"localhost:{port}"), "TLS", "FS-1457")


def test_a_clock_that_is_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now = site_file(served), time.time
    for ahead, state in ((100.0, "warning"), (-100.0, "warning"), (400.0, "failed")):
        with monkeypatch.context() as patch:
            patch.setattr(doctor, "wall_clock", lambda ahead=ahead: now() + ahead)
            found = examined(file)["clock"]
        assert found.state == state
        assert ("ahead of" if ahead > 0 else "behind") in found.found
        assert found.cure
    assert found.code == "FS-1818"


def test_what_ends_soon_or_is_nearly_full_is_a_warning(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    file = site_file(served)
    monkeypatch.setattr(doctor, "EXPIRY_NOTICE", dt.timedelta(days=400))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    found = examined(file)
    warned = {name for name, finding in found.items() if finding.state == "warning"}
    assert warned == {"keys", "certificate", "disk"}
    assert all(found[name].cure for name in warned)
    assert found["budget"].state == "ok", "a warning holds nothing up"


def test_a_package_that_does_not_load(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> None:
        if module == "opacus":
            raise OSError("libtorch_cuda.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", broken)
    assert "libtorch_cuda" in failed(site_file(served), "packages", "FS-1817").found


def test_what_is_printed(served: Served) -> None:
    file, runner = site_file(served), CliRunner()
    shown = runner.invoke(app, ["doctor", "--config", str(file)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("✓") == len(CHECKS)
    assert shown.output.rstrip().endswith(f"{len(CHECKS)} ok: ready")
    file = site_file(served, aggregator=f"localhost:{CLOSED}")
    shown = runner.invoke(app, ["doctor", "--config", str(file)])
    assert shown.exit_code == 1
    assert "✗ port" in shown.output
    assert "FS-1521" in shown.output
    assert "cure:" in shown.output
    assert "needs port" in shown.output
    told = json.loads(runner.invoke(app, ["doctor", "--config", str(file), "--json"]).stdout)
    assert told["ok"] is False
    assert [finding["check"] for finding in told["findings"]] == [check.name for check in CHECKS]


def test_findings_name_no_record_and_no_count(served: Served) -> None:
    text = json.dumps([finding.found for finding in examine(site_file(served), seconds=20.0)])
    with Ledger(served.world.folder / "probe.db"):
        pass
    assert "site-1-train" in text
    assert "declared 30 units" in text


@pytest.mark.parametrize(
    ("text", "host", "port"), [("a.b:1", "a.b", 1), ("[::1]:8443", "::1", 8443), ("10.0.0.1:65535", "10.0.0.1", 65535)]
)
def test_addresses(text: str, host: str, port: int) -> None:
    address = probe.Address.parse(text)
    assert (address.host, address.port, str(address)) == (host, port, text)
