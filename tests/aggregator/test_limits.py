"""What one site may take at a time: counts are exact, sites are apart from each other, and logs stay short."""

from __future__ import annotations

import contextlib
import logging
import resource
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsecure.aggregator import limits as module
from fedsecure.aggregator.limits import MAX_CALLS, MAX_FETCHES, MAX_HELD, Bucket, Limits, allow_connections
from fedsecure.aggregator.refusals import QUIET_SECONDS, Refusals
from fedsecure.aggregator.sessions import span
from fedsecure.errors import TransportError


@given(st.lists(st.floats(0.0, 3.0), max_size=200), st.floats(0.5, 50.0), st.floats(1.0, 40.0))
def test_a_bucket_lets_no_more_through_than_its_rate(gaps: list[float], rate: float, burst: float) -> None:
    now, taken = 0.0, 0
    bucket = Bucket.full(now, rate=rate, burst=burst)
    for gap in gaps:
        now += gap
        taken += bucket.take(now)
        assert taken <= burst + rate * now + 1e-6
        assert 0.0 <= bucket.tokens <= burst


def test_a_clock_that_steps_back_gives_nothing() -> None:
    bucket = Bucket.full(10.0, rate=1.0, burst=1.0)
    assert bucket.take(10.0)
    assert not bucket.take(0.0)
    assert bucket.take(1.5)


def test_calls_of_one_site_are_bounded_in_number_and_in_time() -> None:
    limits = Limits()
    for _ in range(MAX_CALLS):
        limits.enter("a", 0.0)
    with pytest.raises(TransportError, match="FS-1510"):
        limits.enter("a", 0.0)
    limits.enter("b", 0.0)
    limits.leave("a")
    limits.enter("a", 0.0)
    assert (limits.calls("a"), limits.calls("b"), limits.calls("c")) == (MAX_CALLS, 1, 0)


def test_a_flood_of_short_calls_is_bounded_and_its_neighbour_is_not() -> None:
    limits = Limits()
    through = 0
    for _ in range(5000):
        with contextlib.suppress(TransportError):
            limits.enter("a", 1.0)
            through += 1
            limits.leave("a")
    assert through == module.BURST
    with pytest.raises(TransportError, match="FS-1530"):
        limits.enter("a", 1.0)
    limits.enter("b", 1.0)


def test_all_who_are_no_members_share_the_rate_of_one_site() -> None:
    limits = Limits()
    assert [limits.turn_away(1.0) for _ in range(int(module.BURST) + 1)] == [False] * int(module.BURST) + [True]
    assert not limits.turn_away(1.1)
    limits.enter("a", 1.0)
    with limits.holding(module.STRANGERS) as held:
        assert held


def test_downloads_and_held_refusals_are_bounded() -> None:
    limits = Limits()
    limits.enter("a", 0.0)
    with limits.fetching("a"):
        contexts: list[Any] = [limits.fetching("a") for _ in range(MAX_FETCHES)]
        for context in contexts[:-1]:
            context.__enter__()
        with pytest.raises(TransportError, match="FS-1510"), contexts[-1]:
            pass
    held = [limits.holding("a") for _ in range(MAX_HELD + 1)]
    assert [context.__enter__() for context in held] == [True] * MAX_HELD + [False]
    held[0].__exit__(None, None, None)
    with limits.holding("a") as again, limits.holding("a stranger") as stranger:
        assert again
        assert not stranger


def test_connections_are_allowed_up_to_what_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    for have, allowed in (
        ((1024, 4096), 4096),
        ((1024, unlimited), 65_536),
        ((70_000, 80_000), 70_000),
        ((unlimited, unlimited), 65_536),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, have=have: have)
        assert allow_connections() == allowed
    assert asked == [(4096, 4096), (65_536, unlimited)]

    def refuses(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(resource, "setrlimit", refuses)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert allow_connections() == 1024


def test_a_refusal_is_logged_once_and_then_counted(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    error = TransportError("FS-1533", "a chunk\n\x1b[2J", expected="b", cure="c")
    with caplog.at_level(logging.INFO, logger="fedsecure.aggregator"):
        for packet in range(1000):
            refusals.note("a", error, packet * QUIET_SECONDS / 1001)
        refusals.note("b", error, 1.0)
        refusals.note("", error, 1.0)
        refusals.note("a", error, QUIET_SECONDS + 1.0)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert lines[0].startswith("refused a: FS-1533: a chunk")
    assert lines[2].startswith("refused a stranger: ")
    assert "999 more" in lines[3]
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1.0, "0 s"),
        (0.4, "0 s"),
        (89.4, "89 s"),
        (90.0, "2 min"),
        (240.0, "4 min"),
        (3600.0, "60 min"),
        (5400.0, "2 h"),
        (86_400.0, "24 h"),
        (172_800.0, "2 days"),
        (864_000.0, "10 days"),
    ],
)
def test_times_in_the_unit_that_people_would_use(seconds: float, said: str) -> None:
    assert span(seconds) == said
