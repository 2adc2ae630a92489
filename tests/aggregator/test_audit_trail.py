"""The aggregator's audit log: every kind of happening as a line, whatever its facts are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from fedsecure.aggregator.audit_trail import AuditTrail
from fedsecure.aggregator.happenings import Happening, Kind
from fedsecure.audit_log import PURPOSE, AuditLog, entries, verify
from fedsecure.identity import keys

RUN = "ab" * 16


def happening(kind: Any, at: float = 1000.0, **facts: Any) -> Happening:
    return Happening(kind, RUN, at, facts)


def test_every_kind_is_a_line_in_order(tmp_path: Path) -> None:
    trail = AuditTrail(AuditLog(tmp_path / "audit.log"))
    for number, kind in enumerate(get_args(Kind)):
        trail(happening(kind, at=1000.0 + number, site="site-1", round=number))
    lines = list(entries(tmp_path / "audit.log"))
    assert [line.event for line in lines] == list(get_args(Kind))
    assert [line.at for line in lines] == [1000.0 + number for number in range(len(lines))]
    assert all(line.facts["run"] == RUN for line in lines)


def test_facts_become_scalars_and_words(tmp_path: Path) -> None:
    trail = AuditTrail(AuditLog(tmp_path / "audit.log"))
    facts = {
        "survivors": ("site-1", "site-2"),
        "suspects": {"bad_shares": [["site-1", "site-2"], ["site-3"]], "unopened": {"site-1": ["site-2"]}},
        "seconds": 1.25,
        "accuracy": float("nan"),
        "hits": [1.0, 2.0],
        "complete": True,
        "none": None,
        "run": "somebody else's",
    }
    trail(happening("attempt-summed", **facts))
    (line,) = entries(tmp_path / "audit.log")
    assert line.facts == {
        "survivors": ["site-1", "site-2"],
        "suspects.bad_shares": ["site-1+site-2", "site-3"],
        "suspects.unopened.site-1": ["site-2"],
        "seconds": 1.25,
        "accuracy": None,
        "hits": None,
        "complete": True,
        "none": None,
        "run": RUN,
    }


@pytest.mark.parametrize("secret", [b"\x01" * 32, np.arange(4.0), object(), [b"key"], [np.ones(2)]])
def test_no_bytes_and_no_array_ever(tmp_path: Path, secret: Any) -> None:
    AuditTrail(AuditLog(tmp_path / "audit.log"))(happening("alarm", code="FS-1100", secret=secret))
    (line,) = entries(tmp_path / "audit.log")
    assert line.facts["secret"] is None


def test_the_end_of_a_run_is_signed(tmp_path: Path) -> None:
    key = keys.generate()
    trail = AuditTrail(AuditLog(tmp_path / "audit.log", sign=lambda body: keys.sign(key, PURPOSE, body)))
    trail(happening("run-started", sites=["a"], method="linear", rounds=1))
    trail(happening("run-ended", complete=True))
    public = keys.public_bytes(key)
    found = verify(tmp_path / "audit.log", check=lambda body, s: keys.verify(public, PURPOSE, body, s))
    assert (found.head.lines, found.signed) == (3, 1)
