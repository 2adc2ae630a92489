"""A run of which a site would refuse a question is refused when the site joins it, and the others wait for nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from federation_world import World

from fedsecure.config import PolicyConfig
from fedsecure.errors import FedsecureError
from fedsecure.identity.provision import load_identity
from fedsecure.methods.agenda import question, starting_state
from fedsecure.site.questions import rehearse

OPEN: dict[str, Any] = {"max_epsilon": 8.0, "unit": "record", "max_evaluation_epsilon": 8.0}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"min_cohort": 4}, "FS-1331"),
        ({"min_colluders": 2}, "FS-1334"),
        ({"min_threshold": 4}, "FS-1332"),
        ({"methods": ("linear",)}, "FS-1342"),
        ({"methods": ("evaluate",)}, "FS-1342"),
        ({"noise": ("local",)}, "FS-1221"),
        ({"min_noise_multiplier": 1e6}, "FS-1222"),
        ({"unit": "patient"}, "FS-1223"),
        ({"max_wrap_log2": -1e300}, "FS-1341"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_a_limit_that_the_run_breaks(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    world = World(tmp_path, rounds=2)
    world.start()
    policy = PolicyConfig(**{**OPEN, **changes})
    with pytest.raises(FedsecureError, match=code):
        world.take_part("site-1", changes={"policy": policy})()
    session = world.coordinator.sessions.find("site-1")
    assert session is not None
    assert session.leaving == code, "the aggregator is told why"
    assert not (tmp_path / "site-1" / "state" / "runs").exists()


@pytest.mark.parametrize(("method", "rounds"), [("linear", 4), ("clip2fl", 4), ("prototypes", 1)])
def test_every_kind_of_question_is_judged(
    tmp_path: Path, method: str, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is judged has the layouts and prices of all questions that the run will ask."""
    world = World(tmp_path, rounds=rounds, adapter=method)
    settings, roster = world.settings, load_identity(world.site_config("site-1").identity).roster
    judged = list[Any]()
    monkeypatch.setattr("fedsecure.site.questions.check_query", lambda query, *_: judged.append(query))
    start, number = starting_state(settings), 0
    rehearse(settings, start=start, run=bytes(16), roster=roster, config=world.site_config("site-1"))
    while (ask := question(settings, number, start=start)) is not None:
        number += 1
        assert any((q.method, q.segments, q.events) == (ask.method, ask.segments, ask.events) for q in judged)
    assert number >= 3
