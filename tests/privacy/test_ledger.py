"""The ledger: never less than the truth, never over the limit, and only a void gives anything back."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_world import DELTA, PAYLOAD, RUN, event, reserve

from fedsecure.errors import BudgetExceeded, LedgerError
from fedsecure.messages import Event
from fedsecure.privacy import accounting, ledger_store
from fedsecure.privacy.ledger import Ledger, Limit, Reservation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger.db"


def test_two_processes_may_make_the_file_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second makes it whole while the first looks whether it is there."""
    original, others = sqlite3.connect, list[threading.Thread]()

    def make() -> None:
        Ledger(path).close()

    def between(statement: str) -> None:
        if "sqlite_master" in statement and not others:
            others.append(threading.Thread(target=make))
            others[0].start()
            others[0].join(0.5)

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        made = original(*arguments, **options)
        if threading.current_thread() is threading.main_thread():
            made.set_trace_callback(between)
        return made

    monkeypatch.setattr(ledger_store.sqlite3, "connect", connect)
    with Ledger(path) as ledger:
        others[0].join()
        with Ledger(path) as other:
            assert ledger.key == other.key


def test_a_charge_survives_closing(path: Path) -> None:
    with Ledger(path) as ledger:
        made = reserve(ledger)
        ledger.commit(made, PAYLOAD)
        key = ledger.key
    with Ledger(path) as ledger:
        assert ledger.spent("xrays", "train") == (event(),)
        assert ledger.epsilon("xrays", "train", DELTA) == made.epsilon == accounting.epsilon([event()], delta=DELTA)
        assert [entry.state for entry in ledger.history()] == ["RESERVED", "COMMITTED"]
        assert ledger.history()[1].payload_sha256 == PAYLOAD.hex()
        assert ledger.datasets() == ("xrays",)
        assert ledger.key == key
        assert len(key) == 32


def test_refused_before_anything_is_written(path: Path) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, 0, z=1.0)
        before = ledger.head()
        with pytest.raises(
            BudgetExceeded, match=r"FS-1201.*ε = 6\.\d+ \(spent so far 4\.377\).*at most ε = 5"
        ) as caught:
            reserve(ledger, 1, z=1.0, limit_epsilon=5.0)
        assert "policy" in caught.value.cure
        assert ledger.head() == before
        assert ledger.spent("xrays", "train") == (event(1.0),)


def test_reserved_committed_and_void(path: Path) -> None:
    with Ledger(path) as ledger:
        first, second, third = (reserve(ledger, number) for number in range(3))
        ledger.commit(first, PAYLOAD)
        ledger.void(second.id, "the aggregator's certificate had expired; nothing was sent")
        assert ledger.spent("xrays", "train") == (event(), event())
        assert [e.final for e in ledger.history() if e.state == "RESERVED"] == ["COMMITTED", "VOID", "RESERVED"]
        for ended in (first, second):
            with pytest.raises(LedgerError, match="FS-1258"):
                ledger.void(ended, "too late")
            with pytest.raises(LedgerError, match="FS-1258"):
                ledger.commit(ended, PAYLOAD)
        with pytest.raises(LedgerError, match="FS-1258"):
            ledger.commit("f" * 32, PAYLOAD)
        with pytest.raises(LedgerError, match="FS-1259"):
            ledger.void(third, " ")
        assert ledger.verify() == 5


def test_one_charge_per_attempt_and_population(path: Path) -> None:
    with Ledger(path) as ledger:
        made = reserve(ledger)
        ledger.void(made, "nothing left")
        with pytest.raises(LedgerError, match="FS-1257"):
            reserve(ledger)
        reserve(ledger, attempt=1)
        reserve(ledger, dataset="scans")
        reserve(ledger, population="evaluation", events=(event(population="evaluation"),))
        reserve(ledger, run="cd" * 16)


def test_data_sets_and_populations_pay_apart(path: Path) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, 0, z=2.0)
        reserve(ledger, 1, z=3.0, dataset="scans")
        reserve(ledger, 2, population="evaluation", events=(event(4.0, "evaluation"),))
        assert ledger.spent("xrays", "train") == (event(2.0),)
        assert ledger.spent("scans", "train") == (event(3.0),)
        assert ledger.spent("xrays", "evaluation") == (event(4.0, "evaluation"),)


@pytest.mark.parametrize(
    "changes",
    [
        {"population": "evaluation"},
        {"population": "tuning"},
        {"dataset": ""},
        {"query_digest": b"short"},
    ],
)
def test_wrong_arguments_are_refused(path: Path, changes: dict[str, object]) -> None:
    with Ledger(path) as ledger, pytest.raises(LedgerError, match="FS-1259"):
        reserve(ledger, **changes)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["reserve", "commit", "void", "reopen"]), st.floats(0.8, 30), st.integers(0, 5)),
        min_size=1,
        max_size=25,
    )
)
def test_epsilon_is_the_truth_never_falls_without_a_void_and_never_passes_the_limit(
    steps: list[tuple[str, float, int]],
) -> None:
    limit = 6.0
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.db")
        open_, paid, epsilon = list[Reservation](), dict[str, Event](), 0.0
        for number, (what, z, choice) in enumerate(steps):
            if what == "reserve":
                before = ledger.head()
                try:
                    made = reserve(ledger, number, z=z, limit_epsilon=limit)
                except BudgetExceeded:
                    assert accounting.epsilon([*paid.values(), event(z)], delta=DELTA) > limit
                    assert ledger.head() == before
                else:
                    open_.append(made)
                    paid[made.id] = event(z)
            elif what == "reopen":
                ledger.close()
                ledger = Ledger(Path(folder) / "ledger.db")
            elif open_:
                ended = open_.pop(choice % len(open_))
                if what == "commit":
                    ledger.commit(ended, PAYLOAD)
                else:
                    ledger.void(ended, "nothing left")
                    del paid[ended.id]
                    epsilon = 0.0
            now = ledger.epsilon("xrays", "train", DELTA)
            assert now == pytest.approx(accounting.epsilon(paid.values(), delta=DELTA))
            assert epsilon <= now <= limit * (1 + 1e-9)
            epsilon = now
        ledger.verify()
        ledger.close()


CHILD = """
import hashlib, os, signal, sys
from fedsecure.messages import Event
from fedsecure.privacy.ledger import Ledger
from fedsecure.errors import BudgetExceeded
digest = hashlib.sha256(b"query").digest()
ledger = Ledger(sys.argv[1], wait_seconds=60)
def reserve(number, z):
    return ledger.reserve(dataset="xrays", population="train", events=(Event("train", "t", z, z),), run=sys.argv[2],
                          round=number, attempt=0, query_digest=digest, limit_epsilon=4.0, delta=1e-5)
"""


def test_a_reservation_survives_a_kill(path: Path) -> None:
    script = CHILD + "reserve(0, 5.0); os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", script, str(path), RUN], check=False)
    assert done.returncode == -signal.SIGKILL
    with Ledger(path) as ledger:
        assert ledger.spent("xrays", "train") == (Event("train", "t", 5.0, 5.0),)
        assert ledger.history()[0].final == "RESERVED"


def test_processes_that_reserve_at_once_do_not_overspend(path: Path) -> None:
    """Each of four processes could spend the budget alone; the file does not exist when they start."""
    script = (
        CHILD
        + """
made = 0
for number in range(12):
    try:
        reserve(number, 5.0)
        made += 1
    except BudgetExceeded:
        pass
print(made)
"""
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(path), f"{k:032x}"], stdout=subprocess.PIPE, text=True)
        for k in range(4)
    ]
    made = [int(child.communicate(timeout=240)[0]) for child in children]
    alone = max(k for k in range(60) if accounting.epsilon([event(5.0)] * k, delta=DELTA) <= 4.0)
    assert sum(made) == alone
    with Ledger(path) as ledger:
        assert ledger.verify() == alone
        assert ledger.epsilon("xrays", "train", DELTA) <= 4.0


def test_a_held_ledger_is_waited_for_and_then_named(path: Path) -> None:
    with Ledger(path, wait_seconds=0.2) as ledger, contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match=r"FS-1254.*0\.2 s"):
            reserve(ledger)
        other.rollback()
        reserve(ledger)


def test_a_closed_ledger_says_so(path: Path) -> None:
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="FS-1260"):
        reserve(ledger)


def test_summary_and_opening_what_is_not_there(path: Path) -> None:
    with pytest.raises(LedgerError, match="FS-1261"):
        Ledger.open_existing(path)
    assert not path.exists()
    with Ledger(path) as ledger:
        reserve(ledger, 0)
        reserve(ledger, 1)
        ledger.void(reserve(ledger, 2), "nothing left")
        ledger.void(reserve(ledger, 3, dataset="scans"), "nothing left")
    with Ledger.open_existing(path) as ledger:
        epsilon = accounting.epsilon([event()] * 2, delta=DELTA)
        assert ledger.epsilon("xrays", "train", DELTA) == epsilon
        assert ledger.epsilon("scans", "train", DELTA) == 0.0


class Clock:
    """A machine's clock, as the test sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger_store, "utc_now", lambda: self.now)

    def set(self, *when: int) -> None:
        self.now = datetime(*when, tzinfo=UTC)  # type: ignore[misc, arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_clock_that_is_corrected_is_noted_and_stops_nothing(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with Ledger(path) as ledger:
        clock.set(2026, 5, 4, 12, 0)
        reserve(ledger, 0)
        assert not caplog.records
        clock.set(2026, 5, 4, 11, 1)
        reserve(ledger, 1)
        clock.set(2026, 5, 4, 12, 1)
        reserve(ledger, 2)
        times = [(entry.utc, entry.note) for entry in ledger.history()]
    assert times == [
        ("2026-05-04T12:00:00+00:00", ""),
        ("2026-05-04T12:00:00+00:00", "the clock had gone back: it read 2026-05-04T11:01:00+00:00"),
        ("2026-05-04T12:01:00+00:00", ""),
    ]
    assert "clock has gone back" in caplog.text
    with Ledger(path) as ledger:
        assert ledger.verify() == 3


def test_a_clock_that_went_back_charges_nothing_until_it_is_set_right(path: Path, clock: Clock) -> None:
    with Ledger(path) as ledger:
        clock.set(2026, 5, 4, 12, 0)
        made = reserve(ledger, 0)
        clock.set(1970, 1, 1)
        # What was charged before is ended all the same, and that does not pass for the time of a charge.
        ledger.commit(made, PAYLOAD)
        head, spent = ledger.head(), ledger.spent("xrays", "train")
        for ask in (lambda: reserve(ledger, 1), lambda: affordable(ledger)):
            with pytest.raises(LedgerError, match=r"FS-1270.*reads 1970-01-01.*last charge.*2026-05-04 12:00"):
                ask()
        assert (ledger.head(), ledger.spent("xrays", "train")) == (head, spent)
        clock.set(2026, 5, 4, 12, 5)
        reserve(ledger, 1)


def test_after_a_clock_that_was_ahead_an_officer_says_go_on(path: Path, clock: Clock) -> None:
    with Ledger(path) as ledger:
        clock.set(2062, 5, 4)
        reserve(ledger, 0)
        clock.set(2026, 5, 4)
        with pytest.raises(LedgerError, match=r"FS-1270.*fedsecure budget set"):
            reserve(ledger, 1)
        ledger.set_limit("xrays", "train", Limit(8.0, DELTA), reason="the clock was 36 years ahead in spring")
        affordable(ledger)
        reserve(ledger, 1)
        # From here on the right time counts.
        clock.set(2026, 5, 3)
        with pytest.raises(LedgerError, match="FS-1270"):
            reserve(ledger, 2)
    with Ledger(path) as ledger:
        assert ledger.verify() == 3


def affordable(ledger: Ledger) -> float:
    return ledger.afford(dataset="xrays", population="train", events=(event(),), limit_epsilon=8.0, delta=DELTA)
