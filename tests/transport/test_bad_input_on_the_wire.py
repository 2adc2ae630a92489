"""Bad input over real sockets: refused with a typed error where there is a caller to tell, logged once, and the run of
the other sites goes on and completes.

Each attacker is a member that has joined, was asked in the first round, has left it, and goes on attacking with its
identity and session; or a stranger without any. The other three sites are bystanders: their run completes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served_world import Served

from fedsecure.aggregator.limits import BURST, MAX_CALLS, allow_connections
from fedsecure.transport.base import CHUNK_BYTES
from fedsecure.transport.status import from_details
from fedsecure.transport.tls import grpc
from fedsecure.wire import federation_pb2 as pb
from fedsecure.wire import federation_pb2_grpc as rpc

ATTACKER = "site-4"
REPEATED = 5


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path, sites=4, rounds=1)
    yield service
    service.stop()


def goes_on(served: Served, attack: Callable[[], None], *, asked: bool = True) -> None:
    """Run three sites beside an attack that begins before their run and lasts as long; it must do itself no favour."""
    bystanders = [name for name in served.world.names if name != ATTACKER]
    ready, over = threading.Event(), threading.Event()

    def besiege() -> None:
        line = served.joined(ATTACKER)
        if asked:
            while line.next(pb.NextRequest(session=served.tokens[ATTACKER])).WhichOneof("kind") not in (
                "ask",
                "prepare",
            ):
                pass
        line.beat(pb.BeatRequest(session=served.tokens[ATTACKER], leaving="FS-1720"))
        while True:
            attack()
            ready.set()
            if over.is_set():
                return

    def takes_part(name: str) -> Callable[[], None]:
        part = served.world.take_part(name, transport=served.line(name))

        def whole() -> None:
            part()

        return whole

    attacking = ThreadPoolExecutor(1)
    result = attacking.submit(besiege)
    try:
        served.world.run(*(takes_part(name) for name in bystanders))
    finally:
        over.set()
        result.result(120)
        attacking.shutdown()
    assert ready.is_set(), "the attack took place"
    assert not served.world.errors
    assert served.core.outcome is not None
    assert served.core.outcome["complete"]
    assert all(set(bystanders) <= set(a["survivors"]) for a in served.core.outcome["attempts"] if "survivors" in a)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    known = from_details(caught.value.details())
    return known.code if known is not None else caught.value.code().name


Attack = Callable[[Served, Any, grpc.Channel], str]


def raw(method: str, message: bytes) -> Attack:
    def send(served: Served, stub: Any, channel: grpc.Channel) -> str:
        return refused(lambda: channel.unary_unary(f"/fedsecure.v1.Federation/{method}")(message, timeout=30))

    return send


def stream(*parts: bytes) -> Attack:
    def send(served: Served, stub: Any, channel: grpc.Channel) -> str:
        return refused(lambda: channel.stream_unary("/fedsecure.v1.Federation/Upload")(iter(parts), timeout=30))

    return send


def upload(**changes: Any) -> Attack:
    def send(served: Served, stub: Any, channel: grpc.Channel) -> str:
        fields = {"session": served.tokens[ATTACKER], "ctx": bytes(32), "header": b"h", "size": 64, **changes}
        header = pb.UploadPart(header=pb.UploadHeader(**fields))
        return refused(lambda: stub.Upload(iter([header, pb.UploadPart(chunk=pb.Chunk(data=bytes(64)))]), timeout=30))

    return send


def call(method: str, request: Callable[[Served], Any]) -> Attack:
    def send(served: Served, stub: Any, channel: grpc.Channel) -> str:
        def made() -> Any:
            reply = getattr(stub, method)(request(served), timeout=30)
            return list(reply) if method == "Fetch" else reply

        return refused(made)

    return send


MALFORMED = b"\xff\xff\xff\xff"
ATTACKS: dict[str, tuple[Attack, str]] = {
    "a join that is no protobuf": (raw("Join", MALFORMED), "FS-1535"),
    "a message that is no protobuf": (raw("Send", MALFORMED), "FS-1535"),
    "an upload that is no protobuf": (stream(MALFORMED), "FS-1535"),
    "a message above the limit": (raw("Send", bytes(9 << 20)), "RESOURCE_EXHAUSTED"),
    "a method that does not exist": (raw("Steal", b""), "UNIMPLEMENTED"),
    "another session": (call("Next", lambda s: pb.NextRequest(session=os.urandom(16))), "FS-1705"),
    "another round": (call("Send", lambda s: pb.PhaseMessage(session=s.tokens[ATTACKER], ctx=bytes(32))), "FS-1706"),
    "an upload of another round": (upload(), "FS-1706"),
    "an upload of no session": (upload(session=b""), "FS-1705"),
    "a status of another round": (
        call("UploadStatus", lambda s: pb.UploadHeader(session=s.tokens[ATTACKER], ctx=bytes(32))),
        "FS-1706",
    ),
    "a tensor that is not there": (
        call("Fetch", lambda s: pb.FetchRequest(session=s.tokens[ATTACKER], digest=b"x")),
        "FS-1704",
    ),
    "a request id of another size": (
        call("Send", lambda s: pb.PhaseMessage(session=s.tokens[ATTACKER], request=b"x")),
        "FS-1532",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_member_must_not_send(served: Served, name: str, caplog: pytest.LogCaptureFixture) -> None:
    attack, code = ATTACKS[name]
    with (
        caplog.at_level(logging.INFO, logger="fedsecure.aggregator"),
        served.raw(ATTACKER) as channel,
    ):
        stub = rpc.FederationStub(channel)

        def repeatedly() -> None:
            assert {attack(served, stub, channel) for _ in range(REPEATED)} == {code}

        goes_on(served, repeatedly)
    if code.startswith("FS-"):
        lines = [r for r in caplog.records if f"refused {ATTACKER}: {code}" in r.getMessage()]
        assert len(lines) == 1, "once, not once for each"
    assert not [record for record in caplog.records if record.exc_info], "no defect of ours"


def test_a_chunk_that_is_not_what_its_hash_says(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the signed header passes and a chunk is damaged: a vector of two chunks, whose second one is wrong."""
    core, seen = served.core, list[str]()
    expect, accepts = core.expect_upload, core.accepts_upload
    size = CHUNK_BYTES + 8

    def room(site: str, header: pb.UploadHeader, now: float) -> Any:
        return memoryview(bytearray(size)) if site == ATTACKER else expect(site, header, now)

    monkeypatch.setattr(core, "expect_upload", room)
    monkeypatch.setattr(core, "accepts_upload", lambda ctx: ctx == b"attack" or accepts(ctx))
    header = pb.UploadHeader(session=served.tokens[ATTACKER], ctx=b"attack", header=b"h", size=size)
    chunks = [pb.Chunk(data=bytes(CHUNK_BYTES)), pb.Chunk(offset=CHUNK_BYTES, data=bytes(8), sha256=bytes(32))]
    parts = [pb.UploadPart(header=header), *(pb.UploadPart(chunk=chunk) for chunk in chunks)]
    with served.raw(ATTACKER) as channel:
        stub = rpc.FederationStub(channel)

        def damaged() -> None:
            seen.append(refused(lambda: stub.Upload(iter(parts), timeout=30)))

        goes_on(served, damaged)
        assert set(seen) == {"FS-1533"}
        assert served.within(lambda: core.accepts_upload(b"attack"))


def test_a_request_id_that_was_used_for_something_else(served: Served) -> None:
    used = os.urandom(16)
    with served.raw("site-1") as channel:
        stub = rpc.FederationStub(channel)
        joining = served.join_request("site-1")
        joining.request = used
        assert stub.Join(joining).run == stub.Join(joining).run
        other = pb.PhaseMessage(session=served.tokens["site-1"], request=used)
        assert refused(lambda: stub.Send(other, timeout=30)) == "FS-1531"


def test_a_repeated_message_is_done_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.joined("site-1")
    done = list[bytes]()
    monkeypatch.setattr(served.core, "send", lambda site, message, now: done.append(message.payload))
    with served.raw("site-1") as channel:
        stub = rpc.FederationStub(channel)
        message = pb.PhaseMessage(session=served.tokens["site-1"], payload=b"x", request=os.urandom(16))
        for _ in range(3):
            stub.Send(message, timeout=30)
        assert done == [b"x"]
        message.request = b""
        stub.Send(message, timeout=30)
        assert done == [b"x", b"x"], "without an id the coordinator's own state tells, as for sites of version 1"


# --- floods ---------------------------------------------------------------------------------------------------------


def test_a_flood_of_calls_is_refused_and_the_others_complete(served: Served) -> None:
    codes = set[str]()
    with served.raw(ATTACKER) as channel, ThreadPoolExecutor(2 * MAX_CALLS) as pool:
        stub = rpc.FederationStub(channel)

        def one(_: int) -> str:
            try:
                stub.Greet(pb.GreetRequest(protocol=1), timeout=60)
            except grpc.RpcError as error:
                known = from_details(error.details())
                return known.code if known else str(error)
            return ""

        def flood() -> None:
            # Beyond the bucket of calls, which fills no more: a slow machine's flood is one too.
            if "FS-1530" not in codes:
                bucket = served.service._limits._shares[ATTACKER].bucket
                bucket.rate, bucket.tokens = 0.0, 3.0
            codes.update(pool.map(one, range(4 * MAX_CALLS)))

        goes_on(served, flood)
    assert "FS-1530" in codes or "FS-1510" in codes
    # gRPC itself refuses what is above its streams of one connection.
    assert {code for code in codes if "RST_STREAM with error code 7" not in code} <= {"", "FS-1530", "FS-1510"}
    assert BURST > 4 * MAX_CALLS, "an ordinary site is never near it"


def test_a_flood_of_uploads_is_refused_and_the_others_complete(served: Served) -> None:
    codes = set[str]()
    header = pb.UploadHeader(session=served.tokens[ATTACKER], ctx=bytes(32), header=b"h", size=1 << 40)
    open_ended = threading.Event()

    def parts() -> Iterator[pb.UploadPart]:
        open_ended.wait(30)
        yield pb.UploadPart(header=header)

    with served.raw(ATTACKER) as channel:
        stub = rpc.FederationStub(channel)
        streams = list[Any]()

        def flood() -> None:
            if not streams:
                # They hold every call that this site may have.
                streams.extend(stub.Upload.future(parts(), timeout=120) for _ in range(MAX_CALLS))
            with contextlib.suppress(AssertionError, pytest.fail.Exception):
                codes.add(refused(lambda: stub.Greet(pb.GreetRequest(protocol=1), timeout=30)))

        goes_on(served, flood)
        open_ended.set()
        ends = {refused(stream.result) for stream in streams}
    assert "FS-1510" in codes
    assert ends <= {"FS-1706", "FS-1510"}


# --- strangers ------------------------------------------------------------------------------------------------------


def plain(served: Served, message: bytes) -> bytes:
    """What the port answers to bytes that are no TLS, until it closes."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(message)
        heard = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(4096):
                heard += data
        return heard


HTTP_1 = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
HTTP_2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64)


@pytest.mark.slow
@pytest.mark.parametrize("message", [HTTP_1, HTTP_2, os.urandom(4096), b"\x16\x03\x01\xff\xff" + bytes(70_000)])
def test_bytes_that_are_no_tls(served: Served, message: bytes, caplog: pytest.LogCaptureFixture) -> None:
    def knock() -> None:
        for _ in range(REPEATED):
            heard = plain(served, message)
            assert b"grpc" not in heard
            assert b"settings" not in heard
            assert len(heard) < 100, "an alert at most"

    goes_on(served, knock)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [HTTP_1, os.urandom(4096), HTTP_2[:24] + b"\xff" * 4096])
def test_garbage_after_the_handshake(served: Served, garbage: bytes) -> None:
    """A member's own TLS, and nothing of HTTP/2 within."""
    folder = served.world.folder / "keys" / "sites" / ATTACKER / "identity"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / "certificate.pem", folder / "tls-key.pem")
    context.set_alpn_protocols(["h2"])

    def babble() -> None:
        for _ in range(REPEATED):
            with (
                socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection,
                context.wrap_socket(connection, server_hostname="localhost") as secured,
            ):
                heard = b""
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    secured.sendall(garbage)
                    while data := secured.recv(4096):
                        heard += data
                assert len(heard) < 4096, "settings and a goodbye at most"

    goes_on(served, babble)


def test_a_certificate_without_tls_1_3_or_without_any_is_no_way_in(served: Served) -> None:
    folder = served.world.folder / "keys" / "sites" / ATTACKER / "identity"
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(folder / "ca.pem")
    old.load_cert_chain(folder / "certificate.pem", folder / "tls-key.pem")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(connection, server_hostname="localhost")
    ca = (folder / "ca.pem").read_bytes()
    with grpc.secure_channel(f"localhost:{served.port}", grpc.ssl_channel_credentials(ca)) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            rpc.FederationStub(channel).Greet(pb.GreetRequest(protocol=1), timeout=30)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


# In a process of its own: a process has no more descriptors for both ends.
HOLDS_OPEN = """
import resource, socket, sys
port, wanted = int(sys.argv[1]), int(sys.argv[2])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = []
for index in range(wanted):
    held.append(socket.create_connection(("127.0.0.1", port), timeout=60))
    if index % 3 == 0:
        held[-1].sendall(b"\\x16\\x03\\x01\\x02\\x00\\x01")  # half a greeting
print(len(held), flush=True)
sys.stdin.readline()
ended = 0
for silent in held:
    silent.settimeout(60)
    try:
        ended += silent.recv(1) == b""
    except ConnectionError:
        ended += 1
print(ended, flush=True)
"""


@pytest.mark.slow
def test_ten_thousand_half_open_connections_keep_nobody_out(served: Served) -> None:
    wanted = 10_000
    if allow_connections() < wanted + 500:
        pytest.skip("this system allows too few open files")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_OPEN, str(served.port), str(wanted)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as stranger:
        assert stranger.stdin is not None
        assert stranger.stdout is not None
        assert int(stranger.stdout.readline()) == wanted
        goes_on(served, lambda: None)
        # And they end by themselves once a handshake's time is over.
        stranger.stdin.write("\n")
        stranger.stdin.flush()
        assert int(stranger.stdout.readline()) == wanted
