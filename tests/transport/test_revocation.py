"""Real gRPC and mutual TLS: who is taken out of the roster is refused in the middle of what it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served_world import Served

from fedsecure.aggregator import health
from fedsecure.aggregator.limits import STRANGERS, Bucket, Share
from fedsecure.errors import IdentityError, RunError
from fedsecure.identity import keys
from fedsecure.identity.provision import load_identity
from fedsecure.identity.roster import Roster
from fedsecure.identity.standing import Standing
from fedsecure.transport import channel
from fedsecure.transport.base import CHUNK_BYTES
from fedsecure.transport.status import from_details
from fedsecure.transport.tls import grpc
from fedsecure.wire import federation_pb2 as pb

from grpc_health.v1 import health_pb2, health_pb2_grpc  # isort: skip -- after fedsecure.transport.tls


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path)
    aggregator = tmp_path / "keys" / "aggregator" / "identity"
    service.service._standing = Standing(load_identity(aggregator), aggregator / "roster.json")
    yield service
    service.stop()


def write_roster(served: Served, **changes: Any) -> None:
    """The next version, signed by the federation's coordinator, where the aggregator looks."""
    root = served.world.folder / "keys"
    coordinator = keys.load_private_key(root / "ca" / "coordinator.key")
    file = root / "aggregator" / "identity" / "roster.json"
    current = Roster.load(file, keys.public_bytes(coordinator))
    draft = file.with_name("draft")
    draft.write_bytes(replace(current, version=current.version + 1, **changes).sealed(coordinator))
    draft.replace(file)


def revoke(served: Served, site: str) -> None:
    entries = served.service._standing.roster.entries
    write_roster(served, entries=tuple(entry for entry in entries if entry.site != site))


def test_every_call_of_a_revoked_site_is_refused_and_others_go_on(served: Served) -> None:
    line, other = served.joined("site-1"), served.joined("site-2")
    token = served.tokens["site-1"]
    line.beat(pb.BeatRequest(session=token, leaving="none"))
    revoke(served, "site-1")
    calls = {
        "greet": lambda: line.greet(pb.GreetRequest(protocol=1)),
        "join": lambda: line.join(pb.JoinRequest(protocol=1, session=token)),
        "next": lambda: line.next(pb.NextRequest(session=token)),
        "beat": lambda: line.beat(pb.BeatRequest(session=token)),
        "send": lambda: line.send(pb.PhaseMessage(session=token)),
        "fetch": lambda: line.fetch(pb.FetchRequest(session=token, digest=bytes(32))),
        "upload": lambda: line.upload(pb.UploadHeader(session=token), memoryview(b"")),
    }
    for name, call in calls.items():
        with pytest.raises(IdentityError, match="FS-1460"):
            call()
        assert name
    with pytest.raises(RunError, match="FS-1704"):
        other.fetch(pb.FetchRequest(session=served.tokens["site-2"], digest=bytes(32)))
    assert other.greet(pb.GreetRequest(protocol=1)).roster_hash == served.core._identity.roster.hash, (
        "the run keeps its roster"
    )


def test_refusals_of_a_revoked_site_are_held_back_past_its_rate(served: Served) -> None:
    line, other = served.joined("site-1"), served.joined("site-2")
    revoke(served, "site-1")
    few = Share(Bucket.full(time.monotonic(), rate=1e-3, burst=2.0))
    served.within(lambda: served.service._limits._shares.update({STRANGERS: few}))

    def refused() -> float:
        begun = time.monotonic()
        with pytest.raises(IdentityError, match="FS-1460"):
            line.greet(pb.GreetRequest(protocol=1))
        return time.monotonic() - begun

    assert min(refused(), refused()) < 1.0
    assert few.bucket.tokens < 1.0, "both were counted"
    with ThreadPoolExecutor(max_workers=1) as pool:
        held = pool.submit(refused)
        while not few.held:
            assert not held.done()
            time.sleep(0.01)
        assert other.greet(pb.GreetRequest(protocol=1)).run == served.core.run
        assert held.result(30) >= 1.0
    assert few.held == 0


def test_health_counts_as_any_call(served: Served) -> None:
    revoke(served, "site-3")
    none = Share(Bucket.full(time.monotonic(), rate=1e-3, burst=1.0))
    served.within(lambda: served.service._limits._shares.update({"site-1": none}))
    request = health_pb2.HealthCheckRequest()
    with served.raw("site-1") as raw, served.raw("site-3") as revoked:
        ask = health_pb2_grpc.HealthStub(raw)
        assert ask.Check(request, timeout=20).status == health_pb2.HealthCheckResponse.SERVING
        refusals = [lambda: ask.Check(request, timeout=20), lambda: next(ask.Watch(request, timeout=20))]
        stranger = health_pb2_grpc.HealthStub(revoked)
        refusals += [lambda: stranger.Check(request, timeout=20), lambda: next(stranger.Watch(request, timeout=20))]
        codes = []
        for refusal in refusals:
            with pytest.raises(grpc.RpcError) as caught:
                refusal()
            error = from_details(caught.value.details())
            codes.append(error.code if error else None)
    assert codes == ["FS-1530", "FS-1530", "FS-1460", "FS-1460"]


def test_a_revocation_ends_a_watch_of_the_health(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_SECONDS", 0.05)
    request = health_pb2.HealthCheckRequest()
    with served.raw("site-1") as raw, served.raw("site-2") as other:
        watch = health_pb2_grpc.HealthStub(raw).Watch(request, timeout=30)
        stays = health_pb2_grpc.HealthStub(other).Watch(request, timeout=30)
        assert next(watch).status == next(stays).status == health_pb2.HealthCheckResponse.SERVING
        revoke(served, "site-1")
        with pytest.raises(grpc.RpcError) as ended:
            next(watch)
        assert (error := from_details(ended.value.details())) is not None
        assert error.code == "FS-1460"
        assert stays.is_active()
        stays.cancel()


@pytest.mark.parametrize("revoked", [True, False])
def test_a_revocation_ends_an_upload_between_two_chunks(
    served: Served, monkeypatch: pytest.MonkeyPatch, revoked: bool
) -> None:
    line = served.joined("site-1")
    buffer, counted = memoryview(bytearray(4 * CHUNK_BYTES)), []
    monkeypatch.setattr(served.core, "expect_upload", lambda *_: buffer)
    monkeypatch.setattr(served.core, "upload", lambda site, *_: counted.append(site))
    payload = memoryview(bytes([1]) * len(buffer))
    second, go_on = threading.Event(), threading.Event()
    whole = channel.pb.UploadPart

    def slow(**part: Any) -> pb.UploadPart:
        if "chunk" in part and part["chunk"].offset == 2 * CHUNK_BYTES:
            second.set()
            assert go_on.wait(30)
        return whole(**part)

    class Stubs:
        def __getattr__(self, name: str) -> Any:
            return slow if name == "UploadPart" else getattr(pb, name)

    monkeypatch.setattr(channel, "pb", Stubs())
    caught: list[BaseException] = []

    def upload() -> None:
        try:
            line.upload(pb.UploadHeader(session=served.tokens["site-1"], size=len(payload)), payload)
        except BaseException as error:
            caught.append(error)

    sending = threading.Thread(target=upload)
    sending.start()
    assert second.wait(30)
    if revoked:
        revoke(served, "site-1")
    go_on.set()
    sending.join(30)
    if revoked:
        (error,) = caught
        assert isinstance(error, IdentityError)
        assert error.code == "FS-1460"
        assert counted == [], "nothing of it counts"
        assert not any(buffer[2 * CHUNK_BYTES :]), "no chunk was taken after the revocation"
    else:
        assert (caught, counted) == ([], ["site-1"])
        assert buffer == payload


def test_a_revocation_ends_a_download_between_two_chunks(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    line = served.joined("site-1")
    monkeypatch.setattr(served.core, "fetch", lambda *_: bytes(3 * CHUNK_BYTES))
    request = pb.FetchRequest(session=served.tokens["site-1"], digest=bytes(32))
    assert len(line.fetch(request)) == 3 * CHUNK_BYTES
    looks = iter([*["site-1"] * 2, IdentityError("FS-1460", "gone", expected="a member", cure="ask")])

    def site_of(_: bytes) -> str:
        found = next(looks)
        if isinstance(found, IdentityError):
            raise found
        return found

    monkeypatch.setattr(served.service._standing, "site_of", site_of)
    with pytest.raises(IdentityError, match="FS-1460"):
        line.fetch(request)


def test_a_revocation_during_a_wait_withholds_the_answer(served: Served) -> None:
    line = served.joined("site-1")
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            line.next(pb.NextRequest(session=served.tokens["site-1"]))
        except BaseException as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not served.service._limits.calls("site-1"):
        threading.Event().wait(0.01)
    revoke(served, "site-1")
    # The others complete the cohort, which would be the first question's moment.
    for name in ("site-2", "site-3"):
        served.joined(name)
    waiting.join(30)
    (error,) = caught
    assert isinstance(error, IdentityError)
    assert error.code == "FS-1460"


def test_an_observer_may_look_and_not_take_part(served: Served) -> None:
    """A member that the run's settings do not name sees the run's state, and is no part of it."""
    from fedsecure.identity import certificates

    root = served.world.folder / "keys"
    authority = certificates.Issued((root / "ca" / "ca.pem").read_bytes(), (root / "ca" / "ca-key.pem").read_bytes())
    issued = certificates.issue_site(authority, "ward-o", days=1)
    signing = keys.generate()
    roster = served.service._standing.roster
    entry = replace(
        roster.entries[0],
        site="ward-o",
        role="observe",
        identity_key=keys.public_bytes(signing),
        tls_fingerprint=certificates.fingerprint(issued.certificate),
    )
    write_roster(served, entries=tuple(sorted((*roster.entries, entry), key=lambda e: e.site)))
    member = load_identity(root / "sites" / "site-1" / "identity")
    observer = replace(member, site="ward-o", signing_key=signing, certificate=issued.certificate, tls_key=issued.key)
    line = channel.GrpcTransport(f"localhost:{served.port}", observer, connect_seconds=20.0)
    served.lines.append(line)
    assert "waiting for" in line.greet(pb.GreetRequest(protocol=1)).waiting
    with pytest.raises(IdentityError, match="FS-1451"):
        line.join(pb.JoinRequest(protocol=1, session=bytes(16), roster_hash=roster.hash))
    with pytest.raises(RunError, match="FS-1705"):
        line.fetch(pb.FetchRequest(session=bytes(16), digest=bytes(32)))
