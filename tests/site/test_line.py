"""Of the reasons for which a site leaves, others hear those that have nothing to do with any record."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedsecure.errors import BudgetExceeded, ConfigError, DataError, FedsecureError, LedgerError, PrivacyError, RunError
from fedsecure.site.line import Line
from fedsecure.wire import federation_pb2 as pb

WORDS = {"expected": "another", "cure": "mend it"}


def heard(error: BaseException) -> list[str]:
    """What an aggregator hears from a site that is about to stop for that reason."""
    told: list[str] = []
    transport: Any = SimpleNamespace(
        beat=lambda request: told.append(request.leaving), join=lambda request: pb.JoinReply()
    )
    line = Line(transport, wait_seconds=1.0, progress=lambda moment: None)
    line.join(b"roster")
    line.say_why(error)
    return told


@pytest.mark.parametrize(
    "error",
    [
        DataError("FS-1110", "row 7 is not finite", **WORDS),
        DataError("FS-1113", "a patient without images", **WORDS),
        PrivacyError("FS-1207", "a sum that is not finite", **WORDS),
        PrivacyError("FS-1229", "3 patients in both sets", **WORDS),
        PrivacyError("FS-1243", "not finite", **WORDS),
        PrivacyError("FS-1246", "no patient ids", **WORDS),
        LedgerError("FS-1265", "none of the units of before", **WORDS),
        RunError("FS-1719", "ValueError", **WORDS),
        ValueError("row 7"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_reasons_about_records_are_not_told(error: BaseException) -> None:
    assert heard(error) == []


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("FS-1007", "no data to train on", **WORDS),
        BudgetExceeded("FS-1201", "ε = 9", **WORDS),
        PrivacyError("FS-1222", "too little noise", **WORDS),
        LedgerError("FS-1270", "the clock went back", **WORDS),
    ],
    ids=repr,
)
def test_reasons_from_settings_and_limits_are_told_as_a_code_only(error: FedsecureError) -> None:
    assert heard(error) == [error.code]
