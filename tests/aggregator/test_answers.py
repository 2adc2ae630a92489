"""A repeated request gets the answer of the first and changes nothing; ids are not shared by requests or sessions."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsecure.aggregator.answers import Answers
from fedsecure.errors import ProtocolError, TransportError
from fedsecure.wire import federation_pb2 as pb


def message(content: bytes = b"x", *, request: bytes | None = None, session: bytes = bytes(16)) -> pb.PhaseMessage:
    return pb.PhaseMessage(session=session, payload=content, request=os.urandom(16) if request is None else request)


class Counting:
    """What a call does; counts how often."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self) -> pb.Ack:
        self.done += 1
        return pb.Ack()


def test_once() -> None:
    answers, act, asked = Answers(), Counting(), message()
    replies = [answers.once("a", asked, act) for _ in range(3)]
    assert act.done == 1
    assert all(reply is replies[0] for reply in replies)


def test_a_refusal_is_an_answer_too() -> None:
    answers, asked, done = Answers(), message(), []

    def act() -> pb.Ack:
        done.append(1)
        raise ProtocolError("FS-1325", "late", expected="b", cure="c")

    for _ in range(3):
        with pytest.raises(ProtocolError, match="FS-1325: late"):
            answers.once("a", asked, act)
    assert len(done) == 1


@pytest.mark.parametrize(
    "error", [AssertionError("a defect"), TransportError("FS-1510", "busy", expected="b", cure="c")]
)
def test_what_is_no_answer_is_done_again(error: Exception) -> None:
    answers, asked, act = Answers(), message(), Counting()

    def breaks() -> pb.Ack:
        raise error

    with pytest.raises(type(error)):
        answers.once("a", asked, breaks)
    answers.once("a", asked, act)
    assert act.done == 1


def test_an_id_with_other_bytes_is_refused_and_not_done() -> None:
    answers, act, name = Answers(), Counting(), os.urandom(16)
    answers.once("a", message(b"one", request=name), act)
    for other in (message(b"two", request=name), pb.BeatRequest(session=bytes(16), leaving="FS-1720", request=name)):
        with pytest.raises(TransportError, match="FS-1531"):
            answers.once("a", other, act)
    assert act.done == 1


def test_ids_belong_to_a_session_of_a_site() -> None:
    answers, act, name = Answers(), Counting(), os.urandom(16)
    for site, session in (("a", bytes(16)), ("b", bytes(16)), ("a", bytes(15) + b"\1"), ("a", bytes(15))):
        answers.once(site, message(request=name, session=session), act)
    assert act.done == 4


def test_sites_of_version_1_name_no_request() -> None:
    answers, act = Answers(), Counting()
    for _ in range(2):
        answers.once("a", message(request=b""), act)
    assert act.done == 2


@pytest.mark.parametrize("size", [1, 15, 17, 1000])
def test_ids_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(TransportError, match="FS-1532"):
        Answers().once("a", message(request=bytes(size)), Counting())


@given(st.lists(st.integers(0, 20), max_size=120))
def test_the_last_few_are_kept_and_no_more(calls: list[int]) -> None:
    answers, act, kept = Answers(kept=8), Counting(), list[int]()
    for number in calls:
        asked = message(bytes([number]), request=bytes(15) + bytes([number]))
        before = act.done
        answers.once("a", asked, act)
        assert (act.done == before) == (number in kept[-8:])
        if act.done > before:
            kept.append(number)
        assert len(answers._answers["a"]) <= 8
