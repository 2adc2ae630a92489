"""Protocol versions: both sides choose the same one; where there is none, both ranges and the older side are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served_world import Served

from fedsecure.errors import TransportError
from fedsecure.transport import versions
from fedsecure.transport.versions import OURS, Versions, accept_answer, agree, asked_for
from fedsecure.wire import federation_pb2 as pb
from fedsecure.wire import federation_pb2_grpc as rpc

ranges = st.tuples(st.integers(1, 6), st.integers(0, 5)).map(lambda r: Versions(r[0], r[0] + r[1]))


@given(ranges, ranges)
def test_the_highest_version_that_both_speak(site: Versions, aggregator: Versions) -> None:
    both = set(range(site.lowest, site.highest + 1)) & set(range(aggregator.lowest, aggregator.highest + 1))
    if both:
        assert agree(site, ours=aggregator) == max(both)
        assert accept_answer(max(both), ours=site) == max(both)
        return
    with pytest.raises(TransportError, match="FS-1503") as caught:
        agree(site, ours=aggregator)
    assert f"the site speaks protocol {site}, the aggregator {aggregator}" in caught.value.found
    older = "site" if site.highest < aggregator.lowest else "aggregator"
    assert caught.value.cure == f"install a newer fedsecure release at the {older}"


@given(st.integers(0, 1 << 32), st.integers(0, 1 << 32))
def test_an_aggregators_answer_outside_the_range_is_refused(lowest: int, answer: int) -> None:
    ours = Versions(lowest, lowest + 2)
    if lowest <= answer <= lowest + 2:
        assert accept_answer(answer, ours=ours) == answer
    else:
        with pytest.raises(TransportError, match="FS-1503"):
            accept_answer(answer, ours=ours)


def test_what_a_site_of_the_first_version_says() -> None:
    assert asked_for(pb.JoinRequest(protocol=1)) == Versions(1, 1)
    assert asked_for(pb.GreetRequest(protocol=1, newest=3)) == Versions(1, 3)
    assert asked_for(pb.GreetRequest(protocol=4, newest=2)) == Versions(4, 4), "upside down: what it names first"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path)
    yield service
    service.stop()


def test_over_the_line(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    line = served.joined("site-1")
    assert line._version == OURS.highest
    with served.raw("site-2") as channel:
        stub = rpc.FederationStub(channel)
        assert stub.Greet(pb.GreetRequest(protocol=1)).protocol == 1
        assert stub.Join(served.join_request("site-2")).protocol == 1, "a site that knows version 1 only"
    # An aggregator that knows the first version only, and one that has forgotten what this site speaks.
    monkeypatch.setattr("fedsecure.aggregator.service.agree", lambda theirs: agree(theirs, ours=Versions(1, 1)))
    old = served.line("site-3")
    old.join(served.join_request("site-3"))
    assert old._version == 1
    monkeypatch.setattr("fedsecure.aggregator.service.agree", lambda theirs: agree(theirs, ours=Versions(7, 9)))
    with pytest.raises(TransportError, match="FS-1503.*protocol 1 to 2, the aggregator 7 to 9.*release at the site"):
        served.line("site-3").greet(pb.GreetRequest())


def test_every_version_has_its_line_in_the_proto() -> None:
    proto = Path(versions.__file__).parents[2] / "protos" / "fedsecure" / "v1" / "federation.proto"
    text = proto.read_text(encoding="utf-8")
    for version in range(OURS.lowest, OURS.highest + 1):
        assert f"\n//   {version}  " in text
