"""Every happening of a run as a log line, with run, round and site as fields (docs/observability.md)."""

from __future__ import annotations

import logging

from fedsecure.aggregator.happenings import Happening
from fedsecure.logs import FIELDS

log = logging.getLogger("fedsecure.run")
_WARNINGS = {"attempt-aborted", "site-refused", "alarm"}


class LogLines:
    """A listener that logs: INFO, or WARNING where something was refused, aborted or odd."""

    def __call__(self, happening: Happening) -> None:
        facts = happening.facts
        extra = {name: facts[name] for name in FIELDS if name in facts and name != "run"}
        reason = facts.get("reason")
        said = [str(facts[name]) for name in ("site", "code") if facts.get(name)]
        words = " ".join([happening.kind.replace("-", " "), *said]) + (f": {reason}" if reason else "")
        failed = happening.kind == "run-ended" and not facts.get("complete")
        level = logging.WARNING if failed or happening.kind in _WARNINGS else logging.INFO
        log.log(level, "%s", words, extra={**extra, "event": happening.kind, "run": happening.run})


__all__ = ["LogLines"]
