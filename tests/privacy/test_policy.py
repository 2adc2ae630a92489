"""The site's limits, and queries whose noise is not worth their price."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from fedsecure.config import PolicyConfig, RunSettings
from fedsecure.errors import PrivacyError
from fedsecure.messages import Event, Query, Segment
from fedsecure.privacy.grid import distributed_segment, exact_segment
from fedsecure.privacy.policy import check_query, collusion

SITES = ("a", "b", "c", "d", "e")
POLICY = PolicyConfig()
Z = 2.5


def settings(**privacy: Any) -> RunSettings:
    return RunSettings(
        classes=("x", "y"),
        encoder={"dimension": 64, "fingerprint": "0" * 64},  # type: ignore[arg-type]
        privacy=privacy,  # type: ignore[arg-type]
        sites={  # type: ignore[arg-type]
            **{site: {"max_units": 100} for site in SITES},
            "z": {"role": "evaluate", "evaluation_units": 50, "evaluation_public": True},
        },
    )


def segment(z: float = Z, honest: int = 3, name: str = "gradient") -> Segment:
    return distributed_segment(name, 128, clip_norm=0.1, noise_multiplier=z, honest=honest, sites=len(SITES), units=100)


def event(z: float = Z, honest: int = 3, **changes: Any) -> Event:
    return replace(Event("train", "training", z, z / math.sqrt(honest)), **changes)


def query(*, segments: tuple[Segment, ...] = (), events: tuple[Event, ...] = (), **changes: Any) -> Query:
    base = Query(bytes(16), 0, 0, "linear", "1", SITES, {}, segments or (segment(),), events or (event(),))
    return replace(base, **changes)


def test_what_is_agreed_is_allowed() -> None:
    assert collusion(settings(), 5) == (1, 4)
    check_query(query(), settings(), POLICY)
    local = query(segments=(exact_segment("change", 9, grid=1e-6, sites=5),), events=(event(honest=1, steps=10),))
    check_query(local, settings(noise="local"), POLICY)
    public = query(segments=(exact_segment("counts", 4, grid=1e-3, sites=5),), method="evaluate")
    check_query(replace(public, events=()), settings(), POLICY)


@pytest.mark.parametrize(
    ("code", "asked", "run", "policy"),
    [
        ("FS-1220", query(method="unheard-of"), {}, {}),
        ("FS-1221", query(), {}, {"noise": ("local",)}),
        ("FS-1222", query(), {}, {"min_noise_multiplier": 2.6}),
        ("FS-1223", query(), {"unit": "record"}, {}),
        ("FS-1226", query(), {}, {"min_cohort": 6}),
        ("FS-1226", query(), {}, {"min_colluders": 2}),
    ],
)
def test_each_limit_refuses(code: str, asked: Query, run: dict[str, Any], policy: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match=code) as caught:
        check_query(asked, settings(**run), PolicyConfig(**policy))
    assert "policy" in caught.value.found + caught.value.cure


def test_a_site_that_accepts_records_takes_both_units() -> None:
    check_query(query(), settings(unit="record"), PolicyConfig(unit="record"))


@pytest.mark.parametrize(
    "asked",
    [
        query(segments=(segment(z=Z * 0.999),)),
        query(segments=(segment(honest=4),)),
        query(events=(event(z=Z * 1.001),)),
        query(events=(event(local_noise_multiplier=Z / math.sqrt(2)),)),
        query(segments=(segment(), segment(name="second"))),
        query(events=(event(steps=2),)),
        query(segments=(replace(segment(), bound=0),)),
        query(segments=(replace(segment(), noise_variance=Fraction(0)),)),
        query(events=(event(), replace(event(), population="evaluation"))),
    ],
    ids=[
        "less noise",
        "more honest sites",
        "claim",
        "local claim",
        "two segments",
        "steps",
        "no bound",
        "no noise",
        "mixed",
    ],
)
def test_noise_worth_less_than_its_price_is_refused(asked: Query) -> None:
    with pytest.raises(PrivacyError, match=r"FS-122[47]"):
        check_query(asked, settings(), POLICY)


def test_segments_that_share_the_price_are_allowed() -> None:
    shared = (segment(z=Z * math.sqrt(2)), segment(z=Z * math.sqrt(2), name="second"))
    check_query(query(segments=shared), settings(), POLICY)
    each = (event(), event())
    check_query(query(segments=(segment(), segment(name="second")), events=each), settings(), POLICY)


def test_a_bound_below_the_clip_norm_is_refused() -> None:
    """The noise fits the bound, and the site's units would not."""
    with pytest.raises(PrivacyError, match="FS-1227"):
        check_query(query(), settings(max_grad_norm=0.2), POLICY)


def test_evaluation_noise_counts_for_this_site_alone() -> None:
    def counts(honest: int) -> Query:
        made = distributed_segment(
            "counts", 4, clip_norm=math.sqrt(2), noise_multiplier=Z, honest=honest, sites=5, units=100
        )
        return query(segments=(made,), events=(Event("evaluation", "counts", Z, Z),), method="evaluate")

    check_query(counts(1), settings(), POLICY)
    with pytest.raises(PrivacyError, match="FS-1224"):
        check_query(counts(3), settings(), POLICY)


@pytest.mark.parametrize(
    ("events", "run"),
    [
        ((event(),), {}),
        ((), {}),
        ((event(),), {"noise": "local"}),
    ],
)
def test_bare_segments_need_local_noise_or_public_sets(events: tuple[Event, ...], run: dict[str, Any]) -> None:
    secret = settings(**run)
    private = secret.model_copy(update={"sites": {s: e for s, e in secret.sites.items() if s != "z"}})
    asked = replace(query(), segments=(exact_segment("change", 9, grid=1e-6, sites=5),), events=events)
    with pytest.raises(PrivacyError, match="FS-1225"):
        check_query(asked, private, POLICY)


def test_a_ring_that_could_wrap_is_refused() -> None:
    with pytest.raises(PrivacyError, match="FS-1206"):
        check_query(query(segments=(replace(segment(), clamp=2**30),)), settings(), POLICY)
