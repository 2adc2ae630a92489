"""The service over real sockets and mutual TLS: what breaks inside stays inside, and one site's flood is its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from served_world import Served

from fedsecure.aggregator.limits import MAX_CALLS
from fedsecure.errors import EnvironmentProblem, FedsecureError, RunError, TransportError
from fedsecure.messages import digest_tensor
from fedsecure.transport.channel import GrpcTransport
from fedsecure.transport.status import from_details, printable, to_details
from fedsecure.transport.tensors import unpack_tensor
from fedsecure.wire import federation_pb2 as pb


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path)
    yield service
    service.stop()


def test_a_defect_inside_is_a_code_outside_and_the_service_goes_on(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    line = served.joined("site-1")

    def breaks(*_: Any) -> None:
        raise AssertionError("a path, a key, a count")

    with monkeypatch.context() as patch:
        patch.setattr(served.core, "send", breaks)
        with pytest.raises(RunError, match="FS-1718") as caught:
            line.send(pb.PhaseMessage(session=served.tokens["site-1"]))
    assert "a path" not in str(caught.value)
    assert "a path" in caplog.text, "the aggregator's own log has it"
    line.beat(pb.BeatRequest(session=served.tokens["site-1"], leaving="none"))


def test_a_full_disk_inside_is_no_reason_for_a_site_to_leave(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    line, join, calls = served.line("site-1"), served.core.join, []

    def full_once(*arguments: Any, **options: Any) -> pb.JoinReply:
        calls.append(1)
        if len(calls) == 1:
            raise EnvironmentProblem("FS-1820", "/state/audit.log cannot be written", expected="room", cure="make some")
        return join(*arguments, **options)

    monkeypatch.setattr(served.core, "join", full_once)
    roster = served.core._identity.roster
    request = pb.JoinRequest(protocol=1, session=served.tokens["site-1"], roster_hash=roster.hash)
    assert line.join(request).run == served.core.run
    assert len(calls) == 2, "the first answer is not kept for the repeated request"


def question(served: Served) -> tuple[dict[str, GrpcTransport], pb.Ask]:
    lines = {name: served.joined(name) for name in served.world.names}
    directive = lines["site-1"].next(pb.NextRequest(session=served.tokens["site-1"]))
    assert directive.WhichOneof("kind") == "ask"
    return lines, directive.ask


def test_tensors_travel_whole(served: Served) -> None:
    lines, ask = question(served)
    value = np.zeros((3, 16), np.float32)
    digest = digest_tensor("D", value)
    blob = lines["site-2"].fetch(pb.FetchRequest(session=served.tokens["site-2"], digest=digest))
    np.testing.assert_array_equal(unpack_tensor("D", digest, blob), value)
    with pytest.raises(RunError, match="FS-1704"):
        lines["site-2"].fetch(pb.FetchRequest(session=served.tokens["site-2"], digest=bytes(32)))
    with pytest.raises(RunError, match="FS-1705"):
        lines["site-2"].fetch(pb.FetchRequest(session=bytes(16), digest=digest))
    assert ask.descriptor


def header_for(served: Served, size: int) -> pb.UploadHeader:
    assert served.core.engine.attempt is not None
    return pb.UploadHeader(session=served.tokens["site-1"], ctx=served.core.engine.attempt.ctx, header=b"x", size=size)


def test_an_upload_that_does_not_fit_is_refused_at_its_header(served: Served) -> None:
    lines, _ = question(served)
    assert served.core.engine.attempt is not None
    size = 4 * served.core.engine.attempt.query.length
    with pytest.raises(TransportError, match="FS-1504"):
        lines["site-1"].upload(header_for(served, 1 << 40), memoryview(bytes(8)))
    with pytest.raises(FedsecureError, match="FS-1321"):
        lines["site-1"].upload(header_for(served, size), memoryview(bytes(size)))


@pytest.mark.slow
def test_one_sites_flood_of_calls_is_refused_and_others_are_served(served: Served) -> None:
    flood = served.joined("site-1")
    flood._patience = 2.0
    request = pb.NextRequest(session=served.tokens["site-1"])
    with ThreadPoolExecutor(max_workers=MAX_CALLS) as pool:
        polls = [pool.submit(flood.next, request) for _ in range(MAX_CALLS)]
        give_up = time.monotonic() + 20
        while served.service._limits.calls("site-1") < MAX_CALLS:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        with pytest.raises(TransportError, match="FS-1510"):
            # Tried again for two seconds, as long as the line is busy.
            flood.next(request)
        others = [served.joined(name) for name in ("site-2", "site-3")]
        assert len(others) == 2
        assert all(poll.result(30).WhichOneof("kind") == "ask" for poll in polls), (
            "all were woken by the first question"
        )
    give_up = time.monotonic() + 20
    while served.service._limits.calls("site-1"):
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_nobodys_exit_waits_for_a_channel_that_does_not_close(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    line = served.joined("site-1")
    channel, stuck = line._channel, threading.Event()
    monkeypatch.setattr(line, "_channel", SimpleNamespace(close=stuck.wait))
    monkeypatch.setattr("fedsecure.transport.channel._CLOSE_SECONDS", 0.05)
    line.close()
    stuck.set()
    channel.close()


def test_errors_cross_the_line_bounded_and_without_control_characters() -> None:
    error = RunError("FS-1702", "\x1b[2J\n" + "x" * 10_000, expected="a\x07b", cure="c")
    arrived = from_details(to_details(error))
    assert isinstance(arrived, RunError)
    assert arrived.code == "FS-1702"
    assert str(arrived).isprintable()
    assert len(str(arrived)) < 5000


@pytest.mark.parametrize("details", [None, "", "{", "[" * 9000, "[]", '{"code": ["FS-17"]}', '{"code": "FS-9999"}'])
def test_details_that_are_not_ours_are_no_error_of_ours(details: str | None) -> None:
    assert from_details(details) is None


def test_printable_keeps_letters_of_all_languages() -> None:
    assert printable("Größe 脳腫瘍 ε = 3") == "Größe 脳腫瘍 ε = 3"
    assert printable("a\x1b[31mb\r\n\u202ec") == "a�[31mb���c"
    assert len(printable("x" * 9000)) == 2000
