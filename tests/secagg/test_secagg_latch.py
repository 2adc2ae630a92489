"""What a site remembers over restarts, and what happens when it cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from secagg_world import Run, federation, make_descriptor, make_query

from fedsecure.errors import ProtocolError
from fedsecure.secagg.client import SecAggClient, State
from fedsecure.secagg.latch import FileLatch, MemoryLatch, RoundLatch

RUN, A, B = bytes(16), bytes([1] * 32), bytes([2] * 32)


@pytest.fixture(params=["memory", "file"])
def latch(request: pytest.FixtureRequest, tmp_path: Path) -> RoundLatch:
    return MemoryLatch() if request.param == "memory" else FileLatch(tmp_path / "latch.json")


@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_round_and_attempt_only_rise(pairs: list[tuple[int, int]]) -> None:
    latch, highest = MemoryLatch(), (-1, -1)
    for pair in pairs:
        if pair > highest:
            latch.begin(RUN, *pair, A)
            highest = pair
        else:
            with pytest.raises(ProtocolError, match="FS-1345"):
                latch.begin(RUN, *pair, A)


def test_runs_are_apart(latch: RoundLatch) -> None:
    latch.begin(RUN, 5, 0, A)
    latch.begin(bytes([1] * 16), 0, 0, B)
    latch.mark_signed(A)
    latch.mark_signed(B)


def test_each_mark_once_and_only_for_the_current_attempt(latch: RoundLatch) -> None:
    with pytest.raises(ProtocolError, match="FS-1347"):
        latch.mark_signed(A)
    latch.begin(RUN, 0, 0, A)
    latch.mark_signed(A)
    latch.mark_consumed(A)
    for mark in (latch.mark_signed, latch.mark_consumed):
        with pytest.raises(ProtocolError, match="FS-1346"):
            mark(A)
    latch.begin(RUN, 0, 1, B)
    with pytest.raises(ProtocolError, match="FS-1347"):
        latch.mark_consumed(A)
    latch.mark_consumed(B)


def test_marks_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "latch.json"
    FileLatch(path).begin(RUN, 1, 2, A)
    FileLatch(path).mark_signed(A)
    with pytest.raises(ProtocolError, match="FS-1345"):
        FileLatch(path).begin(RUN, 1, 2, B)
    with pytest.raises(ProtocolError, match="FS-1346"):
        FileLatch(path).mark_signed(A)
    FileLatch(path).begin(RUN, 1, 3, B)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"runs": {"00": {}}}', '{"runs": {"00": 1}}', "\x00"])
def test_a_damaged_file_stops_the_site(tmp_path: Path, text: str) -> None:
    path = tmp_path / "latch.json"
    path.write_text(text)
    with pytest.raises(ProtocolError, match="FS-1348"):
        FileLatch(path).begin(RUN, 0, 0, A)
    assert path.read_text() == text


def test_a_failed_write_leaves_the_old_file_and_nothing_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latch.json"
    latch = FileLatch(path)
    latch.begin(RUN, 0, 0, A)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ProtocolError, match="FS-1349"):
            latch.mark_signed(A)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latch.json", "latch.json.lock"]
    latch.mark_signed(A)


def test_a_site_that_cannot_persist_gives_no_shares_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(make_descriptor(3))
    site = run.descriptor.cohort[0]
    f = federation(3)
    run.clients[site] = SecAggClient(
        run.descriptor,
        site=site,
        signing_key=f.keys[site],
        roster=f.roster,
        latch=FileLatch(tmp_path / "latch.json"),
    )
    run.advertise().shares().masked().survivors()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProtocolError, match="FS-1349"):
        run.clients[site].unmask(run.broadcast["survivors"][site])
    assert run.clients[site].state is State.ABORTED
    assert run.clients[site]._shares == {}


def test_a_restarted_site_never_resumes_an_attempt(tmp_path: Path) -> None:
    f, descriptor = federation(3), make_descriptor(3)
    site = f.sites[0]

    def start(d=descriptor) -> SecAggClient:
        latch = FileLatch(tmp_path / "latch.json")
        return SecAggClient(d, site=site, signing_key=f.keys[site], roster=f.roster, latch=latch)

    start().advertise()
    with pytest.raises(ProtocolError, match="FS-1345"):
        start().advertise()
    start(make_descriptor(3, query=make_query(3, attempt=1))).advertise()
    with pytest.raises(ProtocolError, match="FS-1345"):
        start().advertise()
