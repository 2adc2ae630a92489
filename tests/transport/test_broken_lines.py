"""What a site makes of a line that fails: what repetition cannot mend is said at once, all else is tried again."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from served_world import Served

from fedsecure.errors import IdentityError, TransportError
from fedsecure.identity import certificates
from fedsecure.identity.provision import Identity, load_identity, provision
from fedsecure.transport.channel import GrpcTransport
from fedsecure.wire import federation_pb2 as pb


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path)
    yield service
    service.stop()


def own(served: Served) -> Identity:
    return load_identity(served.world.folder / "keys" / "sites" / "site-1" / "identity")


def greet(address: str, identity: Identity, *, seconds: float) -> pb.GreetReply:
    line = GrpcTransport(address, identity, connect_seconds=seconds)
    try:
        return line.greet(pb.GreetRequest(protocol=1))
    finally:
        line.close()


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that treats every connection so."""
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
        yield f"localhost:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def hangs_up(connection: socket.socket) -> None:
    """As an aggregator that is killed while somebody connects."""
    connection.recv(10)


def breaks_off(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"\x16\x03\x03\x00\x7a\x02\x00")


@pytest.mark.parametrize("answer", [socket.socket.close, hangs_up, breaks_off])
def test_a_handshake_that_breaks_off_is_tried_until_patience_ends(
    served: Served, answer: Callable[[socket.socket], None]
) -> None:
    with answering(answer) as address, pytest.raises(TransportError, match="FS-1501"):
        greet(address, own(served), seconds=1.0)


def test_another_federations_certificate_is_said_at_once(served: Served, tmp_path: Path) -> None:
    made = provision(tmp_path / "other", federation="x", sites={"site-1": "train"}, hosts=("localhost",))
    with pytest.raises(IdentityError, match="FS-1456"):
        greet(f"localhost:{served.port}", load_identity(made.sites["site-1"]), seconds=3600.0)


def test_a_host_that_the_certificate_does_not_name_is_said_at_once(served: Served) -> None:
    with pytest.raises(IdentityError, match="FS-1457"):
        greet(f"127.0.0.1:{served.port}", own(served), seconds=3600.0)


def speaks_http(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 10)
    # Until the other side has read it, and closes.
    connection.recv(4096)


def test_a_port_without_tls_is_said_at_once(served: Served) -> None:
    with answering(speaks_http) as address, pytest.raises(TransportError, match="FS-1522"):
        greet(address, own(served), seconds=3600.0)


def test_a_line_that_works(served: Served) -> None:
    assert greet(f"localhost:{served.port}", own(served), seconds=60.0).run == served.core.run


def test_a_box_that_opens_tls_is_named_by_join_itself(served: Served, tmp_path: Path) -> None:
    """gRPC alone says that a handshake failed; the site says who made the certificate it was shown."""
    box = certificates.make_authority("Hospital Web Filter", days=1)
    issued = certificates.issue_server(box, ["localhost"], days=1)
    (tmp_path / "certificate.pem").write_bytes(issued.certificate)
    (tmp_path / "key.pem").write_bytes(issued.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    context.set_alpn_protocols(["h2"])

    def opens(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True):
            pass

    with answering(opens) as address:
        line = GrpcTransport(address, own(served), connect_seconds=3600.0)
        client = served.world.client("site-1", transport=line)
        with pytest.raises(IdentityError, match="FS-1456.*Hospital Web Filter.*TLS inspection"), client:
            pass
        line.close()


def test_a_site_whose_own_certificate_is_refused_is_told_so(served: Served, tmp_path: Path) -> None:
    """The aggregator is the roster's; what it does not accept is what this site shows."""
    made = provision(tmp_path / "other", federation="x", sites={"site-1": "train"}, hosts=("localhost",))
    stranger = load_identity(made.sites["site-1"])
    mixed = replace(own(served), tls_key=stranger.tls_key, certificate=stranger.certificate)
    with pytest.raises(IdentityError, match="FS-1453.*certificate of this site"):
        greet(f"localhost:{served.port}", mixed, seconds=5.0)
