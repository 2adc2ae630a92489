"""Frozen vectors of "fedsecure/secagg/v1": an independent implementation and the package must both agree with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import make_vectors
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from make_epoch_vectors import EPOCHS
from make_graph_vectors import GRAPHS
from make_vectors import CASES, FOLDER, Replay
from secagg_reference import Round, fields, hkdf, keystream, public

from fedsecure.errors import FedsecureError, ProtocolError
from fedsecure.secagg import keys
from fedsecure.secagg.client import State
from fedsecure.secagg.descriptor import RoundDescriptor


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


BAD = json.loads((FOLDER / "bad.json").read_text())


# --- the reference against published vectors, so that it is no copy of the package's mistakes --------------------


def test_the_reference_agrees_with_the_standards() -> None:
    # RFC 5869, test case 1, first block.
    okm = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    # RFC 7748 §5.2, first iteration: scalar and point are both 9.
    nine = public(bytes([9]) + bytes(31))
    assert nine.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    # NIST SP 800-38A F.1.5: AES-256 of one block, which is what the counter mode here is made of.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    block = (
        Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(bytes.fromhex("6bc1bee22e409f96e93d7e117393172a"))
    )
    assert block.hex() == "f3eed1bdb5d2a03c064b5a7e3db181f8"
    # The protocol's own known answer (secagg.md §3.4).
    ctx = hashlib.sha256(b"fedsecure test ctx").digest()
    low, high = bytes(range(32)), bytes(range(32, 64))
    info = b"fedsecure/secagg/v1/pair-mask\0\0\0\0\1\0\0\0\2" + public(low) + public(high)
    from secagg_reference import dh

    k = hkdf(dh(low, public(high)), ctx, info)
    assert k.hex() == "8c1bbf2e839e932f3c37ce3b1802a2b78e2f9616867798dbbb9820d9c8265425"
    assert keystream(k, 16).hex() == "c42177f7ac607ecdad679162b76728b0"


# --- good vectors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_reference_gives_every_derived_value(name: str) -> None:
    case = load(name)
    r, derived = Round(case), case["derived"]
    assert r.canonical.hex() == case["canonical"]
    assert r.ctx.hex() == case["ctx"]
    assert hashlib.sha256(bytes.fromhex(case["roster"])).hexdigest() == case["descriptor"]["roster_hash"]
    assert (r.t1.hex(), r.t2.hex()) == (derived["t1"], derived["t2"])
    assert {f"{i},{j}": k.hex() for (i, j), k in r.share_key.items()} == derived["share_keys"]
    assert {f"{i},{j}": c.hex() for (i, j), c in r.sealed.items()} == derived["ciphertexts"]
    assert {str(i): c.hex() for i, c in r.commitment.items()} == derived["commitments"]
    assert {f"{i},{j}": k.hex() for (i, j), k in r.pair_key.items()} == derived["pair_keys"]
    assert {str(i): k.hex() for i, k in r.self_key.items()} == derived["self_keys"]
    streams = {f"{i},{j}": keystream(k, 32).hex() for (i, j), k in r.pair_key.items()}
    assert streams | {str(i): keystream(k, 32).hex() for i, k in r.self_key.items()} == derived["keystreams"]
    assert {str(i): root.hex() for i, root in r.root.items()} == derived["roots"]
    assert r.survivors_body.hex() == derived["survivors_body"]
    assert r.lifted() == case["sum"]
    assert r.unmasked() == r.sum


@pytest.mark.parametrize("name", CASES)
def test_the_reference_gives_every_message(name: str) -> None:
    """Field by field, signatures included: Ed25519 is deterministic."""
    case = load(name)
    r = Round(case)
    index = {site: k for k, site in enumerate(case["descriptor"]["cohort"], start=1)}

    def inner(raw: str, kind: int) -> dict[int, list[Any]]:
        return fields(fields(bytes.fromhex(raw))[kind][0])

    phases = case["messages"]
    for site, raw in phases["advertise"].items():
        i, ad = index[site], inner(raw, 1)
        assert [ad[1], ad[2], ad[3], ad[4]] == [[i], [public(r.c[i])], [public(r.s[i])], [r.ad_signature[i]]]
    for site, raw in phases["shares"].items():
        i, message = index[site], inner(raw, 2)
        header = fields(message[1][0])
        assert [header[2], header[3]] == [[r.t1], [r.commitment[i]]]
        assert [header[4], header[5]] == [[r.sealed_hash[i]], [r.header_signature[i]]]
        sent = [fields(share) for share in message[2]]
        assert {share[2][0]: share[3][0] for share in sent} == {j: r.sealed[i, j] for j in r.u1 if j != i}
    for site, (raw, payload) in phases["masked"].items():
        i, header = index[site], inner(raw, 3)
        assert [header[2], header[3], header[6]] == [[r.t1], [r.t2], [r.root[i]]]
        assert header[8] == [r.masked_signature[i]]
        assert payload == r.payload[i].hex()
    for site, raw in phases.get("survivors", {}).items():
        assert inner(raw, 4)[2] == [r.survivor_signature[index[site]]]
    for site, raw in phases["unmask"].items():
        i, message = index[site], inner(raw, 5)
        shares = {fields(s)[1][0]: fields(s)[2][0] for s in message.get(2, [])}
        assert shares == {j: r.shares[j, i][1] for j in r.u3}
        shares = {fields(s)[1][0]: fields(s)[2][0] for s in message.get(3, [])}
        assert shares == {j: r.shares[j, i][0] for j in r.u2 if j not in r.u3}
        assert message[4] == [r.unmask_signature[i]]
    assert set(phases["unmask"]) == {r.cohort[i - 1] for i in r.openers}
    result = inner(case["result"], 5)
    assert [result[1], result[3], result[4]] == [[r.ctx], [r.sum_hash], [r.result_signature]]


@pytest.mark.parametrize("name", CASES)
def test_the_package_reproduces_the_vectors(name: str) -> None:
    vector, _ = make_vectors.build(name)
    assert vector == load(name)


def test_descriptors_parse_and_hash() -> None:
    for name in CASES:
        case = load(name)
        parsed = RoundDescriptor.parse(bytes.fromhex(case["canonical"]))
        assert parsed.ctx.hex() == case["ctx"]


@pytest.mark.parametrize("name", CASES)
def test_every_drop_out_is_where_the_case_says(name: str) -> None:
    """The vectors would be worth little if nobody dropped out in them."""
    case = load(name)
    gone: set[str] = set()
    for phase in ("advertise", "shares", "masked", "survivors", "unmask"):
        gone |= set(case["drops"].get(phase, ()))
        sent = case["messages"].get(phase)
        if sent is None:
            assert (phase, case["descriptor"]["mode"]) == ("survivors", 1)
            continue
        assert set(sent) == set(case["descriptor"]["cohort"]) - gone
    assert len(gone) == (0 if name in ("n3", "n3-b16") else 1)


# --- bad vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", BAD, ids=lambda entry: entry["name"].replace(" ", "_"))
def test_bad_vectors_are_refused_with_their_code(entry: dict[str, Any]) -> None:
    raw, payload = bytes.fromhex(entry["message"]), bytes.fromhex(entry.get("payload", ""))
    if entry["to"] == "descriptor":
        with pytest.raises(ProtocolError) as caught:
            RoundDescriptor.parse(raw)
        assert caught.value.code == entry["code"]
        return
    replay = Replay("n5-drop-unmask").run(before=entry["phase"])
    if entry["to"] == "client":
        client = replay.clients[entry["sender"]]
        step = {
            "shares": client.shares,
            "masked": client.receive_shares,
            "survivors": client.sign_survivors,
            "unmask": client.unmask,
        }[entry["phase"]]
        with pytest.raises(FedsecureError) as caught:
            step(raw)
        assert caught.value.code == entry["code"]
        assert client.state is State.ABORTED
        return
    waiting = replay.server.waiting_for()
    masked = entry["phase"] == "masked"
    arguments = (entry["sender"], raw, payload) if masked else (entry["sender"], raw)
    with pytest.raises(FedsecureError) as caught:
        (replay.server.receive_masked if masked else replay.server.receive)(*arguments)
    assert caught.value.code == entry["code"]
    assert replay.server.waiting_for() == waiting
    # Nothing stuck: the good messages are still taken, and the sum comes out.
    for phase in replay.phases()[replay.phases().index(entry["phase"]) :]:
        replay.produce(phase)
        replay.deliver(phase)
    assert [int(x) for x in replay.server.finish().total] == load("n5-drop-unmask")["sum"]


def test_there_is_no_duplicate_bad_vector() -> None:
    assert len({entry["name"] for entry in BAD}) == len(BAD) >= 60


@pytest.mark.parametrize("point", make_vectors.LOW_ORDER, ids=["zero", "one", "minus-one"])
def test_points_of_low_order_give_no_key(point: bytes) -> None:
    private = make_vectors.X25519PrivateKey.from_private_bytes(bytes(range(32)))
    with pytest.raises(ProtocolError, match="FS-1327"):
        keys.exchange(private, point)


def test_the_files_are_what_the_generator_writes() -> None:
    written = {path.stem for path in Path(FOLDER).glob("*.json")}
    assert written == {"bad", "bad-epoch", *CASES, *EPOCHS, *GRAPHS}
