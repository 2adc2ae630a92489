"""A plain installation says what it lacks before it begins."""

from __future__ import annotations

import pytest

from fedsecure import extras
from fedsecure.errors import EnvironmentProblem


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    extras.require("torch", "jinja2")
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("torch", "jinja2") else object())
    extras.require("PIL")
    with pytest.raises(EnvironmentProblem, match="FS-1816") as caught:
        extras.require("torch", "PIL", "jinja2")
    assert "PIL" not in caught.value.found
    assert caught.value.cure == "pip install 'fedsecure[report,site]'"
