"""The gRPC health service on the aggregator's port: for members, and nobody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fedsecure.aggregator.health import MAX_WATCHES, SERVICE, Call, Health, add_to
from fedsecure.identity.provision import Identity, load_identity, provision
from fedsecure.transport.tls import channel_credentials, grpc, server_credentials

from grpc_health.v1 import health_pb2, health_pb2_grpc  # isort: skip -- after fedsecure.transport.tls

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Port:
    """A server with nothing but the health service, in a thread of its own."""

    def __init__(self, identity: Identity, call: Call | None = None) -> None:
        self.loop = asyncio.new_event_loop()

        async def begin() -> None:
            self.server = grpc.aio.server()
            self.health: Health = add_to(self.server, call=call)
            self.port = self.server.add_secure_port("127.0.0.1:0", server_credentials(identity))
            await self.server.start()

        self.loop.run_until_complete(begin())
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def set(self, serving: bool) -> None:
        self.loop.call_soon_threadsafe(self.health.set, serving)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(grace=0), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture(scope="module")
def keys_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Identity]:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        sites = dict.fromkeys(("site-1", "site-2", "site-3"), "train")
        provision(folder / name, federation=name, sites=sites, hosts=("localhost",))  # type: ignore[arg-type]
    return lambda place: load_identity(folder / Path(place) / "identity")


@pytest.fixture
def port(keys_of: Callable[[str], Identity]) -> Iterator[Port]:
    made = Port(keys_of("ours/aggregator"))
    yield made
    made.stop()


def stub(port: Port, credentials: Any) -> tuple[Any, Any]:
    channel = (
        grpc.secure_channel(f"localhost:{port.port}", credentials)
        if credentials is not None
        else grpc.insecure_channel(f"localhost:{port.port}")
    )
    return health_pb2_grpc.HealthStub(channel), channel


def test_it_says_what_it_is_told(port: Port, keys_of: Callable[[str], Identity]) -> None:
    ask, channel = stub(port, channel_credentials(keys_of("ours/sites/site-1")))
    with channel:
        for name in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=name)
            assert ask.Check(request, timeout=20).status == NOT_SERVING
            seen = ask.Watch(request, timeout=60)
            assert next(seen).status == NOT_SERVING
            port.set(True)
            assert next(seen).status == SERVING
            assert ask.Check(request, timeout=20).status == SERVING
            port.set(False)
            assert next(seen).status == NOT_SERVING
            seen.cancel()
        unknown = health_pb2.HealthCheckRequest(service="other")
        with pytest.raises(grpc.RpcError) as refused:
            ask.Check(unknown, timeout=20)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert next(ask.Watch(unknown, timeout=20)).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.mark.parametrize("who", ["plaintext", "no certificate", "another federation"])
def test_nobody_else_is_answered(port: Port, keys_of: Callable[[str], Identity], who: str) -> None:
    ours = keys_of("ours/sites/site-1")
    theirs = keys_of("theirs/sites/site-1")
    credentials = {
        "plaintext": None,
        "no certificate": grpc.ssl_channel_credentials(root_certificates=ours.ca),
        "another federation": grpc.ssl_channel_credentials(
            root_certificates=ours.ca, private_key=theirs.tls_key, certificate_chain=theirs.certificate
        ),
    }[who]
    ask, channel = stub(port, credentials)
    with channel, pytest.raises(grpc.RpcError) as refused:
        ask.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_member_watches_a_few_times_at_most(keys_of: Callable[[str], Identity]) -> None:
    port = Port(keys_of("ours/aggregator"), lambda context: nullcontext("site-1"))
    try:
        ask, channel = stub(port, channel_credentials(keys_of("ours/sites/site-1")))
        with channel:
            watches = [ask.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(MAX_WATCHES)]
            assert [next(watch).status for watch in watches] == [NOT_SERVING] * MAX_WATCHES
            with pytest.raises(grpc.RpcError) as refused:
                next(ask.Watch(health_pb2.HealthCheckRequest(), timeout=20))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert ask.Check(health_pb2.HealthCheckRequest(), timeout=20).status == NOT_SERVING
    finally:
        port.stop()
