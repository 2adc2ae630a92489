"""Frozen vectors of prepared epochs: a second implementation and the package must both agree with them."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import make_epoch_vectors
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from make_epoch_vectors import BAD_CASE, EPOCHS, TAMPERED, EpochReplay
from make_vectors import FOLDER
from secagg_reference import Round, SetUp, be, canonical_epoch, epoch
from secagg_rules import Rules, parses

from fedsecure.errors import ProtocolError
from fedsecure.secagg.client import State
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch_descriptor import EpochDescriptor

BAD = json.loads((FOLDER / "bad-epoch.json").read_text())


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@lru_cache
def reference(name: str) -> tuple[SetUp, tuple[Round, ...]]:
    case = load(name)
    return epoch(case), tuple(Round(entry, epoch(case)) for entry in case["rounds"])


def index(case: dict[str, Any], site: str) -> int:
    return case["epoch"]["cohort"].index(site) + 1


# --- good vectors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EPOCHS)
def test_the_reference_gives_every_derived_value(name: str) -> None:
    case, (up, rounds) = load(name), reference(name)
    assert canonical_epoch(case["epoch"]).hex() == case["canonical"]
    assert (up.ctx.hex(), up.t1.hex(), up.t2[up.u2[0]].hex()) == (case["ctx"], case["t1"], case["t2"])
    for r, entry in zip(rounds, case["rounds"], strict=True):
        assert (r.canonical.hex(), r.ctx.hex()) == (entry["canonical"], entry["ctx"])
        assert {f"{i},{j}": key.hex() for (i, j), key in r.pair_key.items()} == entry["derived"]["pair_keys"]
        assert {str(i): key.hex() for i, key in r.self_key.items()} == entry["derived"]["self_keys"]
        assert r.lifted() == entry["sum"]
        assert r.unmasked() == r.sum


@pytest.mark.parametrize("name", EPOCHS)
def test_the_reference_gives_every_message_byte_for_byte(name: str) -> None:
    case, (up, rounds) = load(name), reference(name)
    for phase in ("advertise", "shares"):
        assert {s: up.message(phase, index(case, s)).hex() for s in case["messages"][phase]} == case["messages"][phase]
        heard = case["broadcasts"][phase]
        assert {s: up.broadcast(phase, index(case, s)).hex() for s in heard} == heard
    for r, entry in zip(rounds, case["rounds"], strict=True):
        for phase, sent in entry["messages"].items():
            for site, raw in sent.items():
                i = index(case, site)
                expected = [r.message(phase, i).hex(), r.payload[i].hex()] if phase == "masked" else r.message(phase, i)
                assert raw == (expected if phase == "masked" else expected.hex())
        for phase, heard in entry["broadcasts"].items():
            assert {s: r.broadcast(phase, index(case, s)).hex() for s in heard} == heard
        assert r.result().hex() == entry["result"]


@pytest.mark.parametrize("name", EPOCHS)
def test_the_package_reproduces_the_vectors(name: str) -> None:
    assert make_epoch_vectors.build(name) == load(name)


@pytest.mark.parametrize("name", EPOCHS)
def test_every_drop_out_is_where_the_case_says(name: str) -> None:
    case = load(name)
    cohort, dropped = set(case["epoch"]["cohort"]), set[str]()
    for phase in ("advertise", "shares"):
        dropped |= set(case["drops"].get(phase, ()))
        assert set(case["messages"][phase]) == cohort - dropped
    for entry in case["rounds"]:
        gone = set(dropped)
        for phase, sent in entry["messages"].items():
            gone |= set(entry["drops"].get(phase, ()))
            assert set(sent) == cohort - gone


def test_there_is_a_drop_out_in_every_phase_and_slots_are_used_once() -> None:
    cases = [load(name) for name in EPOCHS if name.startswith("epoch-n5")]
    drops = [part["drops"] for case in cases for part in (case, *case["rounds"])]
    assert {phase for part in drops for phase in part} == {"advertise", "shares", "masked", "survivors", "unmask"}
    for name in EPOCHS:
        streams = [key for r in load(name)["rounds"] for kind in r["derived"].values() for key in kind.values()]
        slots = [r["descriptor"]["slot"] for r in load(name)["rounds"]]
        assert len(set(streams)) == len(streams), "a mask key that serves twice"
        assert slots == sorted(set(slots))


def test_a_tampered_share_is_reported_in_every_round_and_never_used() -> None:
    (name,) = TAMPERED
    case, (up, rounds) = load(name), reference(name)
    sender, recipient = (index(case, site) for site in TAMPERED[name][0])
    sealed = up.sealed[sender, recipient]
    aad = up.ctx + up.t1 + be(sender, recipient) + b"share"
    key = AESGCM(up.share_key[sender, recipient])
    assert key.decrypt(sealed[:12], sealed[12:], aad)
    with pytest.raises(InvalidTag):
        key.decrypt(sealed[:12], sealed[12:-1] + bytes([sealed[-1] ^ 1]), aad)
    for r in rounds:
        assert [i for i in r.u3 if up.invalid(i)] == [recipient]
        assert sender not in {**r.given[recipient][0], **r.given[recipient][1]}


# --- bad vectors -------------------------------------------------------------------------------------------------


def begun(entry: dict[str, Any]) -> list[RoundDescriptor]:
    """The rounds before it."""
    replay = EpochReplay(BAD_CASE)
    return [replay.descriptor_of(slot) for slot in entry["used"]]


@pytest.mark.parametrize("entry", BAD, ids=lambda entry: entry["name"].replace(" ", "_"))
def test_the_reference_refuses_every_bad_vector(entry: dict[str, Any]) -> None:
    rules, raw, sender = Rules(load(BAD_CASE)), bytes.fromhex(entry["message"]), entry["sender"]
    if entry["to"] == "descriptor":
        assert not parses(raw)
    elif entry["to"] == "round":
        assert not rules.round(entry["descriptor"], [(d.slot, d.round, d.attempt) for d in begun(entry)])
    else:
        first = entry["phase"] in ("advertise", "shares") and entry["to"] == "server"
        names = {"advertise": "advertisement", "shares": "shares" if first else "advertisements", "done": "headers"}
        assert not getattr(rules, names[entry["phase"]])(sender, raw)


def test_the_reference_accepts_every_good_message() -> None:
    """Or its refusals would be worth nothing."""
    for name in EPOCHS:
        case = load(name)
        rules, seen = Rules(case), list[tuple[int, int, int]]()
        assert parses(bytes.fromhex(case["canonical"]))
        for rule, part, phase in (
            (rules.advertisement, "messages", "advertise"),
            (rules.shares, "messages", "shares"),
            (rules.advertisements, "broadcasts", "advertise"),
            (rules.headers, "broadcasts", "shares"),
        ):
            assert all(rule(site, bytes.fromhex(raw)) for site, raw in case[part][phase].items())
        for entry in case["rounds"]:
            d = entry["descriptor"]
            assert rules.round(d, seen)
            seen.append((d["slot"], d["round"], d["attempt"]))


@pytest.mark.parametrize("entry", BAD, ids=lambda entry: entry["name"].replace(" ", "_"))
def test_bad_vectors_are_refused_with_their_code(entry: dict[str, Any]) -> None:
    raw, sender, code = bytes.fromhex(entry["message"]), entry["sender"], entry["code"]
    if entry["to"] == "descriptor":
        with pytest.raises(ProtocolError, match=code):
            EpochDescriptor.parse(raw)
        return
    if entry["to"] == "round":
        replay = EpochReplay(BAD_CASE).set_up()
        for descriptor in begun(entry):
            replay.sites[sender].round(descriptor)
        left = replay.clients[sender].slots_left
        with pytest.raises(ProtocolError, match=code):
            replay.sites[sender].round(RoundDescriptor.parse(raw))
        assert replay.clients[sender].slots_left == left
        return
    replay = EpochReplay(BAD_CASE).set_up(before=entry["phase"])
    if entry["to"] == "client":
        client = replay.clients[sender]
        with pytest.raises(ProtocolError, match=code):
            (client.shares if entry["phase"] == "shares" else client.receive_shares)(raw)
        assert (client.state, client.slots_left) == (State.ABORTED, 0)
        return
    waiting = replay.server.waiting_for()
    with pytest.raises(ProtocolError, match=code):
        replay.server.receive(sender, raw)
    assert replay.server.waiting_for() == waiting
    # Nothing stuck: the good messages are still taken, and the first round's sum comes out.
    for phase in ("advertise", "shares")[entry["phase"] == "shares" :]:
        replay.produce(phase)
        replay.deliver(phase)
    for site, message in replay.broadcasts["shares"].items():
        replay.clients[site].receive_shares(message)
    assert replay.round(*replay.plan[0])["sum"] == load(BAD_CASE)["rounds"][0]["sum"]


def test_the_bad_vectors_are_what_the_generator_writes() -> None:
    assert make_epoch_vectors.bad() == BAD
    assert len({entry["name"] for entry in BAD}) == len(BAD) >= 50
