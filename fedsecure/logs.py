"""Log lines for people or for machines, which never hold a secret, a tensor or a control character.

A record's arguments are let through by kind: words, numbers and this package's own errors as they are; bytes, arrays
and everything else as the name of its type. An exception is shown by type and place; its own words only if it is one
of :mod:`fedsecure.errors`, since other libraries put values into theirs. What is being worked on (run, round, site) is
a context variable, so that every line says it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any, Literal

from fedsecure.errors import FedsecureError

Format = Literal["text", "json"]
# What a line may say beside its message: given with `extra=`, or known to the context.
FIELDS = ("run", "site", "round", "attempt", "stage", "phase", "event", "code")
MOST = 8192
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_context: ContextVar[Mapping[str, str | int]] = ContextVar("fedsecure_log_context")


def work_on(**facts: str | int) -> None:
    """From now on this thread's, or task's, lines say so: ``run``, ``site``, ``round``, ``attempt``."""
    unknown = set(facts) - set(FIELDS)
    if unknown:
        raise ValueError(f"no field of a log line: {sorted(unknown)}")
    _context.set({**_context.get({}), **facts})


def done() -> None:
    """This thread's, or task's, lines say nothing of that any more."""
    _context.set({})


def set_up(format: Format, *, level: int | None = None) -> None:
    """Send the process's log to stderr, in one format; replaces what :mod:`logging` was told before.

    Args:
        level: of this package's own lines; by default INFO as JSON, for machines that select, and WARNING as text.
            Other packages' lines are shown from WARNING on.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    own = logging.INFO if format == "json" else logging.WARNING
    logging.getLogger("fedsecure").setLevel(own if level is None else level)


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, then those of :data:`FIELDS` that are
    known, and ``error`` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        line |= _known(record)
        if error := _error(record):
            line["error"] = error
        return json.dumps(line)


class TextLines(logging.Formatter):
    """``time level logger message``, with what is known in brackets; an exception's frames follow, indented."""

    def format(self, record: logging.LogRecord) -> str:
        known = " ".join(f"{name}={value}" for name, value in _known(record).items())
        text = f"{_time(record)} {record.levelname} {record.name} {_message(record)}" + (f" [{known}]" if known else "")
        text = _escape(text)
        if error := _error(record):
            text += "".join(f"\n  at {frame}" for frame in error["frames"])
            text += "\n" + _escape(f"  {error['type']}" + (f": {error['message']}" if error["message"] else ""))
        return text


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    """The message with what its arguments may show; one that does not fit them is shown without."""
    if not isinstance(record.msg, str):
        return _bounded(str(shown(record.msg)))
    if not record.args:
        return _bounded(record.msg)
    given = record.args
    args = {k: shown(v) for k, v in given.items()} if isinstance(given, Mapping) else tuple(shown(v) for v in given)
    try:
        return _bounded(record.msg % args)
    except (TypeError, ValueError, KeyError):
        return _bounded(record.msg)


def shown(value: Any) -> Any:
    """What a log line shows of an argument: itself if it is a word, a number or an error made on purpose."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, FedsecureError | PurePath):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping) and len(value) <= 100:
        return {str(shown(k)): shown(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and len(value) <= 200:
        # A list of numbers is a vector.
        return [shown(part) if not isinstance(part, float) else "<number>" for part in value]
    return f"<{type(value).__name__}>"


def _known(record: logging.LogRecord) -> dict[str, str | int]:
    known = dict(_context.get({}))
    for name in FIELDS:
        value = getattr(record, name, None)
        if isinstance(value, str | int) and not isinstance(value, bool):
            known[name] = value
    return {name: _bounded(v) if isinstance(v, str) else v for name, v in sorted(known.items())}


def _error(record: logging.LogRecord) -> dict[str, Any] | None:
    if not record.exc_info or record.exc_info[1] is None:
        return None
    error = record.exc_info[1]
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    own = isinstance(error, FedsecureError)
    return {
        "type": type(error).__name__,
        "message": _bounded(str(error)) if own else "",
        "frames": [_bounded(frame) for frame in frames[-50:]],
    }


def _bounded(text: str) -> str:
    return _escape(text if len(text) <= MOST else text[:MOST] + "…")


def _escape(text: str) -> str:
    """No character that a terminal or a log reader would act on; once is enough."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


__all__ = ["FIELDS", "Format", "JsonLines", "TextLines", "done", "set_up", "shown", "work_on"]
