"""What a site holds to on its own: floors of its policy, types in its latch, numbers beyond every float."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from federation_world import World
from secagg_world import BASE, CONFIG, federation, make_descriptor, make_query

from fedsecure.config import PolicyConfig, RunSettings, SiteConfig, load
from fedsecure.errors import ConfigError, FedsecureError, ProtocolError
from fedsecure.messages import Query, Segment
from fedsecure.privacy.ledger import Ledger
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.latch import MAX_BYTES, FileLatch
from fedsecure.secagg.policy import RoundPolicy, check, wrap_log2
from fedsecure.site.questions import floors

A = bytes([1] * 32)


def gate(descriptor: RoundDescriptor, query: Query, policy: RoundPolicy) -> None:
    f = federation(5)
    check(descriptor, query, policy=policy, roster=f.roster, site=f.sites[0], config_hash=CONFIG, base_hash=BASE)


@pytest.mark.parametrize(
    "floors",
    [
        {"min_cohort": 2},
        {"min_colluders": 0},
        {"modes": ()},
        {"max_wrap_log2": -39.0},
        {"max_wrap_log2": math.nan},
        {"min_cohort": math.nan},
    ],
)
def test_a_policy_below_the_protocol_is_refused(floors: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="FS-1390"):
        RoundPolicy(**floors)  # type: ignore[arg-type]


def test_the_floors_hold_without_assertions() -> None:
    """``python -O`` drops assertions; a floor must not go with them."""
    code = (
        "from fedsecure.errors import ProtocolError\n"
        "from fedsecure.secagg.policy import RoundPolicy\n"
        "try:\n    RoundPolicy(min_cohort=2)\nexcept ProtocolError as error:\n    print(error.code)\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "FS-1390", done.stderr


def test_an_own_threshold() -> None:
    query, descriptor = make_query(5), make_descriptor(5)
    gate(descriptor, query, RoundPolicy(min_threshold=4))
    with pytest.raises(ProtocolError, match="FS-1332"):
        gate(descriptor, query, RoundPolicy(min_threshold=5))


def test_noise_beyond_every_float_is_a_ring_that_overflows() -> None:
    query = make_query(5, segments=(Segment("delta", 5, 1.0, 1, 1, Fraction(2**5000)),))
    descriptor = make_descriptor(5, query=query)
    assert wrap_log2(descriptor) == 0.0
    with pytest.raises(ProtocolError, match="FS-1341"):
        gate(descriptor, query, RoundPolicy())


def test_a_tensor_with_a_name_that_no_encoding_knows() -> None:
    query = make_query(5, inputs={"\ud800": bytes(32)})
    with pytest.raises(ProtocolError, match="FS-1338"):
        gate(make_descriptor(5), query, RoundPolicy())


def test_a_segment_with_a_name_that_no_encoding_knows() -> None:
    query = Query.from_json(make_query(5).to_json().replace('"name":"delta"', '"name":"\\ud800"'))
    with pytest.raises(FedsecureError):
        _ = make_descriptor(5, query=query).ctx


@pytest.mark.parametrize(
    "change",
    [
        {"consumed": None},
        {"consumed": 0},
        {"signed": "no"},
        {"attempt": "0"},
        {"round": 1.0},
        {"round": -1},
        {"round": True},
        {"ctx": "zz"},
        {"ctx": 7},
        {"extra": 1},
    ],
)
def test_a_latch_with_a_mark_of_another_type_stops_the_site(change: dict[str, object], tmp_path: Path) -> None:
    """``"consumed": null`` must not read as "not yet given away"."""
    path = tmp_path / "latch.json"
    latch = FileLatch(path)
    latch.begin(bytes(16), 1, 0, A)
    latch.mark_consumed(A)
    raw = json.loads(path.read_text())
    raw["runs"][bytes(16).hex()].update(change)
    path.write_text(json.dumps(raw))
    for act in (lambda: latch.mark_consumed(A), lambda: latch.begin(bytes(16), 2, 0, A)):
        with pytest.raises(ProtocolError, match="FS-1348"):
            act()


def test_a_latch_that_is_huge_or_nested_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latch.json"
    for text in ("[" * 100_000, " " * (MAX_BYTES + 1)):
        path.write_text(text)
        with pytest.raises(ProtocolError, match="FS-1348"):
            FileLatch(path).begin(bytes(16), 0, 0, A)


# What a site's own file says, each floor alone: the code it refuses with, a value that refuses the round of five sites
# with c = 1, t = 4, u_min = 4, and one that allows it.
FLOORS: dict[str, tuple[str, object, object]] = {
    "min_cohort": ("FS-1331", 6, 5),
    "min_colluders": ("FS-1334", 2, 1),
    "min_threshold": ("FS-1332", 5, 4),
    "min_survivors": ("FS-1333", 5, 4),
    "max_wrap_log2": ("FS-1341", -1e30, -40.0),
    "methods": ("FS-1342", ("another",), ("facmic",)),
}


def noisy_query() -> Query:
    """Noise that wraps the ring with a chance of about 2^-45: below the protocol's limit, and not below every one."""
    return make_query(5, segments=(Segment("delta", 5, 1.0, 1, 1, Fraction(2**31 // 20) ** 2),))


@pytest.mark.parametrize("key", FLOORS)
def test_a_floor_of_the_sites_file_refuses_and_the_lower_one_accepts(key: str) -> None:
    code, high, low = FLOORS[key]
    query = replace(noisy_query(), method="facmic")
    descriptor = make_descriptor(5, query=query)
    assert (descriptor.colluders, descriptor.threshold, descriptor.min_survivors) == (1, 4, 4)
    with pytest.raises(ProtocolError, match=code):
        gate(descriptor, query, floors(PolicyConfig(**{key: high})))  # type: ignore[arg-type]
    gate(descriptor, query, floors(PolicyConfig(**{key: low})))  # type: ignore[arg-type]


def test_the_ring_floor_has_a_middle() -> None:
    query = replace(noisy_query(), method="facmic")
    descriptor = make_descriptor(5, query=query)
    chance = wrap_log2(descriptor)
    assert -70 < chance < -41
    gate(descriptor, query, floors(PolicyConfig(max_wrap_log2=chance + 0.5)))
    with pytest.raises(ProtocolError, match="FS-1341"):
        gate(descriptor, query, floors(PolicyConfig(max_wrap_log2=chance - 0.5)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_cohort", 2),
        ("min_colluders", 0),
        ("min_threshold", 1),
        ("min_threshold", 129),
        ("min_survivors", 2),
        ("max_wrap_log2", -39.9),
        ("max_wrap_log2", "nan"),
        ("max_wrap_log2", "-inf"),
        ("min_survivor", 4),
    ],
)
def test_a_floor_out_of_range_is_one_clear_error(key: str, value: object, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    known = 'site = "a"\naggregator = "x:1"\nidentity = "i"\nstate = "s"\nledger = "l"\n[policy]\n'
    file.write_text(f"{known}{key} = {value}\n")
    with pytest.raises(ConfigError, match=rf"FS-1003.*policy\.{key}"):
        load(file, SiteConfig)
    file.write_text(f"{known}min_threshold = 3\nmin_survivors = 3\nmax_wrap_log2 = -64.5\n")
    assert floors(load(file, SiteConfig).policy).max_wrap_log2 == -64.5


@pytest.mark.parametrize("prepared", [0, 16])
@pytest.mark.parametrize(("key", "code"), [("min_threshold", "FS-1332"), ("min_survivors", "FS-1333")])
def test_a_site_refuses_a_run_below_its_floors_before_anything_is_charged(
    tmp_path: Path, key: str, code: str, prepared: int
) -> None:
    world = World(tmp_path, rounds=1, waits={"prepared_rounds": prepared})
    raw = world.settings.model_dump()
    raw["evaluation"] = {"when": ()}
    world.settings = RunSettings.model_validate(raw)
    world.start()
    policy = world.site_config("site-1").policy.model_copy(update={key: 4})
    takes_part = world.take_part("site-1", changes={"policy": policy})

    def refuses() -> None:
        try:
            takes_part()
        finally:
            world.hurry()  # the others cannot do without it

    world.run(refuses, *(world.take_part(name) for name in world.names[1:]))
    assert [error.code for error in world.errors.values() if isinstance(error, ProtocolError)] == [code]
    with Ledger(tmp_path / "site-1" / "ledger.db") as ledger:
        assert not ledger.history()
