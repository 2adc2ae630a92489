"""The frozen round on a k-regular graph: a second implementation and the package must both agree with it."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import make_graph_vectors
import pytest
from make_graph_vectors import GRAPHS, digest
from make_vectors import FOLDER
from secagg_reference import Round

from fedsecure.secagg.descriptor import RoundDescriptor

(NAME,) = GRAPHS


@lru_cache
def load() -> dict[str, Any]:
    return json.loads((FOLDER / f"{NAME}.json").read_text())


@lru_cache
def reference() -> Round:
    return Round(load())


def test_the_reference_gives_the_graph_and_the_sum() -> None:
    case, r = load(), reference()
    assert (r.canonical.hex(), r.ctx.hex(), r.t1.hex()) == (case["canonical"], case["ctx"], case["t1"])
    assert {str(i): peers for i, peers in r.setup.peers.items()} == case["peers"]
    assert {len(peers) for peers in case["peers"].values()} == {case["descriptor"]["neighbours"]}
    assert digest({r.cohort[i - 1]: r.setup.t2[i].hex() for i in r.u3}) == case["t2"]
    assert r.lifted() == case["sum"]
    assert r.unmasked() == r.sum


@pytest.mark.parametrize("phase", ["advertise", "shares", "masked", "unmask"])
def test_the_reference_gives_every_message(phase: str) -> None:
    case, r = load(), reference()
    index = {site: i for i, site in enumerate(r.cohort, 1)}
    for site, expected in case["messages"][phase].items():
        i = index[site]
        assert digest(r.message(phase, i) + (r.payload[i] if phase == "masked" else b"")) == expected
    for site, expected in case["broadcasts"].get(phase, {}).items():
        assert digest(r.broadcast(phase, index[site])) == expected
    assert r.result().hex() == case["result"]


@pytest.mark.slow
def test_the_package_reproduces_the_vector() -> None:
    assert make_graph_vectors.build(NAME) == load()
    assert RoundDescriptor.parse(bytes.fromhex(load()["canonical"])).ctx.hex() == load()["ctx"]


def test_drop_outs_are_where_the_case_says_and_had_neighbours() -> None:
    case, r = load(), reference()
    gone: set[str] = set()
    for phase in ("advertise", "shares", "masked", "unmask"):
        gone |= set(case["drops"].get(phase, ()))
        assert set(case["messages"][phase]) == set(case["descriptor"]["cohort"]) - gone
        assert case["drops"][phase]
    for i in set(r.u2) - set(r.u3):
        assert len([j for j in r.openers if i in r.given[j][1]]) >= r.t
    # Every share goes to a neighbour, and nobody holds one of its own.
    assert all(j in r.setup.peers[i] and i != j for i, j in r.shares)
