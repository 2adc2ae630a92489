"""Log lines: one JSON object or one line of text each, that never holds a secret, a tensor or a control character."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import World
from hypothesis import given
from hypothesis import strategies as st

from fedsecure import logs
from fedsecure.aggregator.happenings import Happening
from fedsecure.aggregator.log_lines import LogLines
from fedsecure.errors import RunError
from fedsecure.logs import JsonLines, TextLines

FORMATTERS = (JsonLines(), TextLines())


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("fedsecure")
    before = list(root.handlers), root.level, own.level
    yield
    root.handlers[:], root.level, own.level = before
    logs.done()


def lines(message: str, *args: Any, **options: Any) -> tuple[dict[str, Any], str]:
    """One record in both formats."""
    logger, stream = logging.Logger("fedsecure.test"), [io.StringIO(), io.StringIO()]
    for formatter, into in zip(FORMATTERS, stream, strict=True):
        handler = logging.StreamHandler(into)
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.warning(message, *args, **options)
    told, text = stream[0].getvalue(), stream[1].getvalue()
    assert told.count("\n") == 1
    return json.loads(told), text


def test_a_line_says_when_what_and_where() -> None:
    logs.work_on(run="ab" * 16, site="site-1", round=3)
    told, text = lines("%s of %d", "waiting", 5, extra={"code": "FS-1350", "round": 4})
    assert datetime.fromisoformat(told.pop("time")).tzinfo is not None
    assert told == {
        "level": "WARNING",
        "logger": "fedsecure.test",
        "message": "waiting of 5",
        "run": "ab" * 16,
        "site": "site-1",
        "round": 4,
        "code": "FS-1350",
    }
    assert "waiting of 5 [" in text
    assert "site=site-1" in text
    logs.done()
    assert "site" not in lines("x")[0]
    with pytest.raises(ValueError, match="password"):
        logs.work_on(password="x")


@given(st.text())
def test_no_control_character_passes(words: str) -> None:
    told, text = lines("%s", words)
    assert text.count("\n") == 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u202e]", text[:-1])
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u202e]", told["message"])
    assert len(told["message"]) <= 7 * logs.MOST


SECRET = bytes(range(32))
VECTOR = np.array([0.123456789, 0.987654321])


@pytest.mark.parametrize(
    "value",
    [SECRET, bytearray(SECRET), memoryview(SECRET), VECTOR, VECTOR.tolist(), [VECTOR], {"key": SECRET}, (SECRET, 1),
     VECTOR[0], ValueError("0.123456789"), KeyError(SECRET), {"a": [0.123456789]}, {0.123456789}],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_bytes_arrays_and_foreign_errors_are_named_only(value: Any) -> None:
    for told in (str(lines("%s", value)[0]), lines("%r", value)[1], str(lines(value)[0])):
        assert "123456789" not in told
        assert "\\x01" not in told
        assert "\x01" not in told


def test_words_numbers_and_own_errors_pass() -> None:
    own = RunError("FS-1701", "2 of 3", expected="3", cure="wait")
    told, _ = lines("%s %s %d %.2f %s %s", "a", ["b", 3], 4, 0.25, Path("/x"), own)
    assert told["message"] == "a ['b', 3] 4 0.25 /x FS-1701: 2 of 3. Expected 3. Cure: wait"
    assert lines("%(who)s", {"who": "a"})[0]["message"] == "a"
    assert lines("100 % %d", "x")[0]["message"] == "100 % %d"
    assert lines("%d", SECRET)[0]["message"] == "%d"


def test_an_exception_is_its_type_and_place() -> None:
    def fail(feature: float) -> None:
        raise ValueError(f"cannot use {feature}")

    try:
        fail(0.123456789)
    except ValueError:
        told, text = lines("a call failed", exc_info=True)
    assert told["error"]["type"] == "ValueError"
    assert told["error"]["frames"][-1].endswith(" fail")
    assert "123456789" not in str(told) + text
    assert "fail" in text
    try:
        raise RunError("FS-1701", "2 of 3", expected="3", cure="wait")
    except RunError:
        told, text = lines("a call failed", exc_info=True)
    assert told["error"]["message"].startswith("FS-1701")
    assert "FS-1701" in text


def test_the_process_is_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("json")
    logging.getLogger("fedsecure.client").info("own")
    logging.getLogger("grpc").info("foreign")
    logging.getLogger("grpc").warning("foreign warning")
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["own", "foreign warning"]
    logs.set_up("text")
    logging.getLogger("fedsecure.client").info("own")
    assert capsys.readouterr().err == ""


def test_happenings_as_lines() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("fedsecure.run")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        facts = {"round": 3, "attempt": 1, "stage": "training", "code": "FS-1350", "reason": "too few", "seconds": 2.0}
        LogLines()(Happening("attempt-aborted", "ab" * 16, 0.0, facts))
        LogLines()(Happening("run-ended", "ab" * 16, 0.0, {"complete": True}))
        LogLines()(Happening("site-left", "ab" * 16, 0.0, {"site": "site-1", "code": "FS-1720", "payload": SECRET}))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    assert (first["level"], second["level"]) == ("WARNING", "INFO")
    assert first["message"] == "attempt aborted FS-1350: too few"
    assert (first["run"], first["round"], first["attempt"], first["event"]) == ("ab" * 16, 3, 1, "attempt-aborted")
    assert (third["site"], third["message"]) == ("site-1", "site left site-1 FS-1720")


# --- a whole run ------------------------------------------------------------------------------------------------------


def secrets_of(world: World, tokens: list[bytes]) -> dict[str, str]:
    """What must stand in no log: session tokens and private keys in every common spelling, and feature values."""
    found: dict[str, str] = {}
    keys = [file for pattern in ("identity.key", "*-key.pem", "*.key") for file in world.folder.rglob(pattern)]
    assert len(keys) > len(world.names)
    for number, token in enumerate(tokens):
        found |= {f"token {number} hex": token.hex(), f"token {number} repr": repr(token)[2:-1]}
        found |= {f"token {number} base64": base64.b64encode(token).decode().rstrip("=")}
    for file in keys:
        found |= {f"{file.name} line {i}": line for i, line in enumerate(file.read_text("latin-1").splitlines()) if i}
        found |= {f"{file.name} hex": file.read_bytes().hex()[:64]}
    values = np.load(world.features)["train_x"].ravel()
    found |= {f"feature {i}": repr(float(value))[:9] for i, value in enumerate(values) if abs(value) > 1e-3}
    return {what: text for what, text in found.items() if len(text) >= 9}


def leaks(text: str, secrets: dict[str, str]) -> list[str]:
    return [what for what, secret in secrets.items() if secret in text]


def test_a_runs_logs_hold_no_token_key_or_feature(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2)
    stream = io.StringIO()
    root, own = logging.getLogger(), logging.getLogger("fedsecure")
    for formatter in FORMATTERS:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    own.setLevel(logging.DEBUG)
    world.start()
    tokens: list[bytes] = []

    def whole(name: str) -> None:
        with world.client(name) as client:
            tokens.append(client._line._place.session)
            for query in client.queries():
                client.answer(query)
                own.warning("answered %s", client)

    def interrupted() -> None:
        with world.client("site-3") as client:
            tokens.append(client._line._place.session)
            for query in client.queries():
                if query.round == 1:
                    raise ValueError(str(np.load(world.features)["train_x"][0]))
                client.answer(query)

    def shown() -> None:
        try:
            interrupted()
        except ValueError:
            own.exception("a site of the world failed")
        whole("site-3")

    world.run(lambda: whole("site-1"), lambda: whole("site-2"), shown)
    text, secrets = stream.getvalue(), secrets_of(world, tokens)
    assert len(tokens) == 4
    assert "a site of the world failed" in text
    assert leaks(text, secrets) == []
    assert len(secrets) > 1000
    for what, secret in list(secrets.items())[:20] + list(secrets.items())[-20:]:
        assert what in leaks(text + secret, secrets), "the scan sees what is there"
    runs = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    answered = [line for line in runs if line["message"].startswith("answered")]
    assert {(line["site"], line["run"]) for line in answered} == {
        (name, world.coordinator.run.hex()) for name in world.names
    }
    assert {line["round"] for line in answered} == {0, 1, 2, 3}
