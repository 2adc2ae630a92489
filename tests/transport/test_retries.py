"""When a call is tried again: full jitter within doubling bounds, patience, and a server's word."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsecure.errors import RunError, TransportError
from fedsecure.transport.retries import BASE_SECONDS, MOST_ASKED_SECONDS, MOST_SECONDS, Retries
from fedsecure.transport.status import RETRY_AFTER, from_details, retry_after, to_details


def test_pauses_are_spread_over_doubling_bounds() -> None:
    retries = Retries(1e9, since=0.0)
    longest = [retries.pause(0.0, draw=lambda: 0.999999) or 0.0 for _ in range(8)]
    bounds = [min(MOST_SECONDS, BASE_SECONDS * 2**n) for n in range(8)]
    assert longest == pytest.approx(bounds, rel=1e-4)
    assert Retries(1.0, since=0.0).pause(0.0, draw=lambda: 0.0) == 0.0, "from nothing on"


def test_two_sites_do_not_come_back_together() -> None:
    assert len({Retries(60.0, since=0.0, failures=5).pause(0.0) for _ in range(20)}) == 20


@given(st.lists(st.floats(0.0, 20.0), max_size=40), st.floats(0.0, 100.0), st.floats(0.0, 50.0))
def test_nobody_waits_beyond_patience(lasting: list[float], patience: float, asked: float) -> None:
    """Whatever each attempt takes: no pause reaches beyond patience, and once it is over the call ends."""
    retries, now = Retries(patience, since=0.0), 0.0
    for seconds in lasting:
        now += seconds
        pause = retries.pause(now, asked=asked)
        if pause is None:
            assert now + min(asked, MOST_ASKED_SECONDS) + MOST_SECONDS > patience
            return
        now += pause
        assert now <= patience


def test_what_gets_on_is_not_given_up() -> None:
    stuck = Retries(10.0)
    assert stuck.pause(1000.0) is not None, "a long stream counts from its first failure"
    assert stuck.pause(1011.0) is None
    moving = Retries(10.0)
    for now in range(0, 1000, 9):
        assert moving.pause(float(now)) is not None
        moving.progressed()


def test_a_servers_word_comes_first_and_is_bounded() -> None:
    assert Retries(60.0, since=0.0).pause(0.0, asked=3.0, draw=lambda: 0.0) == 3.0
    assert Retries(60.0, since=0.0).pause(0.0, asked=1e9, draw=lambda: 0.0) == MOST_ASKED_SECONDS


@pytest.mark.parametrize("code", sorted(RETRY_AFTER))
def test_refusals_of_a_moment_say_when_to_come_again(code: str) -> None:
    details = to_details(TransportError(code, "a", expected="b", cure="c"))
    assert retry_after(details) == RETRY_AFTER[code]
    known = from_details(details)
    assert known is not None
    assert known.code == code


def test_refusals_for_good_do_not() -> None:
    assert retry_after(to_details(RunError("FS-1706", "a", expected="b", cure="c"))) is None
    of_version_1 = json.dumps({"code": "FS-1511", "found": "", "expected": "", "cure": ""})
    assert retry_after(of_version_1) == RETRY_AFTER["FS-1511"]


@pytest.mark.parametrize(
    "details",
    [
        None,
        "",
        "{",
        "[]",
        "7",
        '{"code": 7}',
        '{"code": []}',
        '{"code": "x", "retry_after": "1"}',
        '{"code": "x", "retry_after": NaN}',
        '{"code": "x", "retry_after": 1e999}',
        "[" * 9000,
    ],
)
def test_details_that_are_not_ours_ask_for_nothing(details: str | None) -> None:
    assert retry_after(details) is None
