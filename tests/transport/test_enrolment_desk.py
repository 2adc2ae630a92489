"""The enrolment desk over real gRPC and TLS: what strangers, thieves and men in the middle get from it."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from enrolling_world import Coordinated, changed

from fedsecure.aggregator import enrolment as module
from fedsecure.aggregator.enrolment import Desk, Limiter, listen
from fedsecure.errors import FedsecureError, IdentityError, RunError
from fedsecure.identity import carrying, certificates, enrolling, keys
from fedsecure.identity.box import MAX_PENDING, Box
from fedsecure.identity.invitations import Token
from fedsecure.identity.provision import load_identity
from fedsecure.identity.requests import MAX_REQUEST, Request, enrolment, renewal
from fedsecure.identity.standing import Standing
from fedsecure.site.enrolment import answer_to, refresh
from fedsecure.transport.desk import DeskLine
from fedsecure.transport.tls import grpc, stranger_credentials
from fedsecure.wire import enrolment_pb2 as pb
from fedsecure.wire import enrolment_pb2_grpc as rpc


class Listening:
    """A desk behind gRPC, in a thread of its own."""

    def __init__(self, world: Coordinated) -> None:
        self.world = world
        identity = load_identity(world.aggregator)
        self.standing = Standing(identity, world.aggregator / "roster.json")
        self.box = Box(world.folder / "aggregator" / "state" / "enrolment")
        self.box.folder.mkdir(parents=True)
        self.desk = Desk(identity, self.standing, self.box)
        self.loop = asyncio.new_event_loop()
        self.open = self.loop.run_until_complete(listen(self.desk, identity, "127.0.0.1:0"))
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.address = f"localhost:{self.open.port}"

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.open.close(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    def ask(self, raw: bytes) -> bytes:
        ca = (self.world.folder / "ca" / "ca.pem").read_bytes()
        with DeskLine(self.address, ca, seconds=20.0) as line:
            return line.ask(raw)

    def deliver(self, opened: enrolling.Open) -> None:
        """What ``fedsecure members approve`` (or renew) does beside this aggregator."""
        found = carrying.find(opened.request.site, self.box)
        with self.world.open() as authority:
            if found.request.kind == "renew":
                answer = authority.renew(found.request)
            else:
                answer = authority.approve(found.request, confirmation=opened.site_print)
            carrying.deliver(answer, found, authority=authority, folder=self.world.folder, box=self.box, out=None)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Listening]:
    desk = Listening(Coordinated(tmp_path / "federation"))
    yield desk
    desk.stop()


def test_a_site_enrols_renews_and_refreshes_over_the_line(listening: Listening) -> None:
    world = listening.world
    opened = world.begin("ward-a", world.invite("ward-a", address=listening.address))
    home = world.sites["ward-a"]
    with pytest.raises(IdentityError, match="FS-1474"):
        answer_to(opened, seconds=1.0, poll=2.0)
    assert [one.site for one in listening.box.pending()] == ["ward-a"]
    answers: list[bytes] = []
    waiting = threading.Thread(target=lambda: answers.append(answer_to(opened, seconds=30.0, poll=0.3)))
    waiting.start()
    listening.deliver(opened)
    waiting.join(30)
    identity = enrolling.finish(home, answers[0])
    assert listening.standing.site_of(certificates.fingerprint(identity.certificate)) == "ward-a"
    assert listening.box.pending() == []

    again = enrolling.begin_renewal(home)
    assert again.address == listening.address, "the folder knows where it was enrolled"
    assert listening.ask(again.request.sealed()) == b""
    listening.deliver(again)
    renewed = enrolling.finish_renewal(home, answer_to(again, seconds=20.0))
    for one in (identity, renewed):
        assert listening.standing.site_of(certificates.fingerprint(one.certificate)) == "ward-a"

    world.enrol("ward-b")
    carrying_roster(listening)
    roster, changes = refresh(home, seconds=20.0)
    assert changes == ["ward-b joined as train"]
    assert roster == world.roster
    assert load_identity(home).roster == roster
    assert refresh(home, seconds=20.0)[1] == []
    world.revoke("ward-a")
    carrying_roster(listening)
    with pytest.raises(IdentityError, match="FS-1462"):
        refresh(home, seconds=20.0)
    sealed = world.folder / "ca" / "roster.json"
    assert refresh(home, seconds=1.0, file=sealed)[1] == ["ward-a left"]


def carrying_roster(listening: Listening) -> None:
    """The drop box alone is carried; the desk takes the roster up from it."""
    (listening.box.folder / "roster.json").write_bytes(listening.world.sealed)


def test_the_same_request_gets_the_same_answer_and_another_none(listening: Listening, tmp_path: Path) -> None:
    world = listening.world
    token = world.invite("ward-a", address=listening.address)
    first = world.begin("ward-a", token)
    thief = enrolling.begin(tmp_path / "thief", token)
    for _ in range(3):
        assert listening.ask(first.request.sealed()) == b""
    assert len(listening.box.pending()) == 1
    with pytest.raises(IdentityError, match="FS-1464"):
        listening.ask(thief.request.sealed())
    listening.deliver(first)
    certificate = json.loads(listening.ask(first.request.sealed()))["certificate"]
    world.enrol("ward-b")
    carrying_roster(listening)
    replayed = json.loads(listening.ask(first.request.sealed()))
    assert replayed["certificate"] == certificate
    assert json.loads(replayed["roster"])["version"] == world.roster.version, "with the newest roster"
    version = world.roster.version
    assert world.roster.version == version, "a replay makes nobody a member twice"


def test_altered_requests_and_strangers_are_refused(listening: Listening) -> None:
    world = listening.world
    opened = world.begin("ward-a", world.invite("ward-a"))
    raw = json.loads(opened.request.sealed())
    for fields in (
        {"site": "ward-b"},
        {"identity_key": "11" * 32},
        {"made": raw["made"] + 1},
        {"token_signature": "00" * 64},
        {"invitation": {**raw["invitation"], "role": "observe"}},
        {"kind": "renew", "invitation": None},
    ):
        with pytest.raises(IdentityError, match=r"FS-146[25]"):
            listening.ask(changed(opened.request.sealed(), **fields))
    for junk in (b"", b"{}", b"[" * 9000, b"x" * (MAX_REQUEST + 1)):
        with pytest.raises(IdentityError, match="FS-1465"):
            listening.ask(junk)
    assert listening.box.pending() == []
    assert listening.ask(opened.request.sealed()) == b""


def test_nobody_learns_who_is_a_member(listening: Listening) -> None:
    """Renewals and questions for a member, a stranger and the aggregator by a wrong key get one and the same answer."""
    world = listening.world
    world.enrol("ward-a")
    carrying_roster(listening)
    said = set()
    ca = (world.folder / "ca" / "ca.pem").read_bytes()
    for site in ("ward-a", "ward-x", "aggregator"):
        key = keys.generate()
        request = renewal(site, key, ec.generate_private_key(ec.SECP256R1()), hosts=(), now=int(time.time()))
        with pytest.raises(IdentityError) as caught:
            listening.ask(request.sealed())
        said.add(str(caught.value))
        made = int(time.time())
        purpose, body = enrolling.roster_request(site, made)
        with DeskLine(listening.address, ca, seconds=20.0) as line, pytest.raises(IdentityError) as caught:
            line.roster(site, made, keys.sign(key, purpose, body))
        said.add(str(caught.value))
    assert len(said) == 1
    assert "FS-1462" in said.pop()
    # A member's own signature is answered, for five minutes.
    home, now = world.sites["ward-a"], int(time.time())
    own = keys.load_private_key(home / "identity.key")
    with DeskLine(listening.address, ca, seconds=20.0) as line:
        assert line.roster("ward-a", now, keys.sign(own, *enrolling.roster_request("ward-a", now))) == world.sealed
        old = now - module.CLOCK_SECONDS - 1
        with pytest.raises(IdentityError, match="FS-1462"):
            line.roster("ward-a", old, keys.sign(own, *enrolling.roster_request("ward-a", old)))


def test_a_late_invitation_is_refused(listening: Listening) -> None:
    world = listening.world
    token = world.invite("ward-a", hours=1)
    opened = world.begin("ward-a", token)
    listening.desk._now = lambda: token.invitation.expires + 1.0
    with pytest.raises(IdentityError, match="FS-1463"):
        listening.ask(opened.request.sealed())
    listening.desk._now = time.time
    assert listening.ask(opened.request.sealed()) == b""


def test_a_man_in_the_middle_hears_nothing(listening: Listening, tmp_path: Path) -> None:
    """Another CA answers at the address: the site stops at the handshake, before its request."""
    heard: list[bytes] = []
    middle = Coordinated(tmp_path / "middle" / "federation")
    other = Listening(middle)
    other.desk.ask = lambda raw: heard.append(raw) or b""  # type: ignore[method-assign]
    try:
        opened = listening.world.begin("ward-a", listening.world.invite("ward-a", address=other.address))
        with pytest.raises(IdentityError, match="FS-1478"):
            answer_to(opened, seconds=20.0)
        assert heard == []
        own = middle.begin("ward-a", middle.invite("ward-a", address=other.address))
        with pytest.raises(IdentityError, match="FS-1474"):
            answer_to(own, seconds=1.0, poll=2.0)
        assert heard == [own.request.sealed()], "whoever trusts it is heard"
    finally:
        other.stop()


def test_a_members_certificate_is_no_desks(listening: Listening, tmp_path: Path) -> None:
    """A site of the federation has a certificate of the same CA; it does not stand for the aggregator's host."""
    identity = listening.world.enrol("ward-a")
    posing = replace(
        load_identity(listening.world.aggregator), certificate=identity.certificate, tls_key=identity.tls_key
    )

    async def start():
        return await listen(listening.desk, posing, "127.0.0.1:0")

    opened = asyncio.run_coroutine_threadsafe(start(), listening.loop).result(10)
    try:
        line = DeskLine(f"localhost:{opened.port}", identity.ca, seconds=5.0)
        with line, pytest.raises(IdentityError, match="FS-1478"):
            line.ask(b"")
    finally:
        asyncio.run_coroutine_threadsafe(opened.close(), listening.loop).result(10)


def test_the_desk_speaks_tls_13_only(listening: Listening) -> None:
    def offer(version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(listening.world.folder / "ca" / "ca.pem"))
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", listening.open.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            return secured.version()

    assert offer(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises(ssl.SSLError):
        offer(ssl.TLSVersion.TLSv1_2)


def test_nobody_at_the_address_is_said_in_time(tmp_path: Path) -> None:
    world = Coordinated(tmp_path / "federation")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    opened = world.begin("ward-a", world.invite("ward-a", address=f"127.0.0.1:{port}"))
    with pytest.raises(IdentityError, match="FS-1477"):
        answer_to(opened, seconds=1.0)


def test_the_drop_box_is_bounded(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    world = listening.world
    requests = []
    for number in range(3):
        token = world.invite(f"ward-{number}")
        requests.append(enrolment(token, keys.generate(), ec.generate_private_key(ec.SECP256R1()), now=number))
    monkeypatch.setattr(module, "MAX_PENDING", 2)
    for request in requests[:2]:
        assert listening.desk.ask(request.sealed()) == b""
    with pytest.raises(IdentityError, match="FS-1475"):
        listening.desk.ask(requests[2].sealed())
    assert listening.desk.ask(requests[0].sealed()) == b"", "who waits already is not turned away"
    assert MAX_PENDING == 64


def test_a_newer_renewal_takes_the_place_of_an_older_one(listening: Listening) -> None:
    world = listening.world
    identity = world.enrol("ward-a")
    carrying_roster(listening)

    def made(at: int) -> Request:
        return renewal("ward-a", identity.signing_key, ec.generate_private_key(ec.SECP256R1()), hosts=(), now=at)

    old, new = made(10), made(20)
    for request in (old, new):
        assert listening.desk.ask(request.sealed()) == b""
    assert listening.box.pending() == [new]
    with pytest.raises(IdentityError, match="FS-1465"):
        listening.desk.ask(old.sealed())
    assert listening.box.pending() == [new]


def test_a_forged_answer_in_the_drop_box_is_not_handed_out(listening: Listening, tmp_path: Path) -> None:
    world = listening.world
    opened = world.begin("ward-a", world.invite("ward-a"))
    assert listening.ask(opened.request.sealed()) == b""
    middle = Coordinated(tmp_path / "middle" / "federation")
    own = middle.begin("ward-a", middle.invite("ward-a"))
    forged = changed(middle.approve(own), request=opened.request.digest.hex())
    listening.box.reply(opened.request.digest, forged)
    assert listening.ask(opened.request.sealed()) == b""
    (listening.box.folder / "roster.json").write_bytes(middle.sealed)
    listening.desk.look()
    assert listening.standing.roster.entries == ()


def test_one_caller_cannot_starve_others() -> None:
    limiter = Limiter()
    for _ in range(int(module.PEER_BURST)):
        limiter.take("ipv4:10.0.0.1", 0.0)
    for _ in range(1000):
        with pytest.raises(IdentityError, match="FS-1475"):
            limiter.take("ipv4:10.0.0.1", 0.0)
    limiter.take("ipv4:10.0.0.2", 0.0)
    limiter.take("ipv4:10.0.0.1", 1.0 / module.PEER_RATE)
    for number in range(10_000):
        try:
            limiter.take(f"ipv4:10.1.{number}", 1.0)
        except IdentityError:
            break
    else:
        pytest.fail("no bound for all together")
    for number in range(10_000):
        limiter.take(f"ipv4:10.2.{number}", 1e6 + number)
    assert len(limiter._peers) <= module.MAX_PEERS


def test_a_flood_of_one_connection_is_refused_with_a_code(listening: Listening) -> None:
    ca = (listening.world.folder / "ca" / "ca.pem").read_bytes()
    with grpc.secure_channel(listening.address, stranger_credentials(ca)) as line:
        stub, codes = rpc.EnrolmentStub(line), []
        for _ in range(60):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Ask(pb.EnrolmentRequest(request=b"x"), timeout=20)
            codes.append(json.loads(caught.value.details())["code"])
    assert set(codes) == {"FS-1465", "FS-1475"}
    assert codes.count("FS-1465") >= module.PEER_BURST


def test_more_than_a_request_holds_is_not_even_read(listening: Listening) -> None:
    ca = (listening.world.folder / "ca" / "ca.pem").read_bytes()
    with (
        grpc.secure_channel(listening.address, stranger_credentials(ca)) as line,
        pytest.raises(grpc.RpcError) as caught,
    ):
        rpc.EnrolmentStub(line).Ask(pb.EnrolmentRequest(request=bytes(10 * MAX_REQUEST)), timeout=20)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_defect_inside_is_a_code_outside(listening: Listening, caplog: pytest.LogCaptureFixture) -> None:
    def breaks(_: bytes) -> bytes:
        raise AssertionError("a path")

    listening.desk.ask = breaks  # type: ignore[method-assign]
    with pytest.raises(RunError, match="FS-1718") as caught:
        listening.ask(b"")
    assert "a path" not in str(caught.value)
    assert "a path" in caplog.text


def test_an_answer_carried_as_a_file(tmp_path: Path) -> None:
    """Neither a desk nor a network: the request goes out and the welcome comes back as files."""
    world = Coordinated(tmp_path / "federation")
    opened = world.begin("ward-a", Token.parse(world.invite("ward-a").text()))
    request = tmp_path / "request.json"
    request.write_bytes(opened.request.sealed())
    found = carrying.find(str(request), None)
    with world.open() as authority:
        answer = authority.approve(found.request, confirmation=opened.site_print)
        written = carrying.deliver(answer, found, authority=authority, folder=world.folder, box=None, out=None)
    assert tmp_path / "welcome.json" in written
    assert world.aggregator / "roster.json" in written, "the aggregator beside the CA has the new roster at once"
    identity = enrolling.finish(world.sites["ward-a"], (tmp_path / "welcome.json").read_bytes())
    assert identity.roster == world.roster == load_identity(world.aggregator).roster
    for wrong in (tmp_path / "nothing.json", "ward-a"):
        with pytest.raises(IdentityError, match="FS-1472"):
            carrying.find(str(wrong), None)


@pytest.mark.parametrize("hours", [0.0, -1.0, 1e9, float("nan")])
def test_terms_out_of_range(hours: float) -> None:
    with pytest.raises(FedsecureError, match="FS-1031"):
        carrying.check_terms(hours, "")


@pytest.mark.parametrize(
    "address", ["host", "host:0", "host:70000", "host:x", ":1", "a b:1", "[::1]", "x" * 300 + ":1"]
)
def test_addresses_out_of_range(address: str) -> None:
    with pytest.raises(FedsecureError, match="FS-1031"):
        carrying.check_terms(1.0, address)
    for good in ("", "host:1", "[::1]:8444", "10.0.0.1:65535"):
        carrying.check_terms(1.0, good)
