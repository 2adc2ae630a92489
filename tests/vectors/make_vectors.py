"""Writes the frozen vectors beside it: ``python tests/vectors/make_vectors.py``. For a new protocol version only.

The package has no hooks for fixed keys; randomness is replaced from outside, per site, while its state machine runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsecure.identity import keys as identity_keys
from fedsecure.identity.roster import Roster, RosterEntry
from fedsecure.messages import Segment
from fedsecure.secagg import client as client_module
from fedsecure.secagg import keys, keysetup, prg, transcript
from fedsecure.secagg.client import SecAggClient
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.secagg.record import RecordingServer
from fedsecure.secagg.spool import MemorySpool
from fedsecure.secagg.thresholds import Mode, Thresholds
from fedsecure.wire import secagg_pb2 as pb

FOLDER = Path(__file__).parent
GOLDEN = FOLDER / "golden-n5-drop-masked.transcript"
CASES: dict[str, tuple[int, Mode, dict[str, list[str]]]] = {
    "n3": (3, Mode.ACTIVE, {}),
    "n3-b16": (3, Mode.ACTIVE, {}),
    "n3-hbc-drop-unmask": (3, Mode.HBC, {"unmask": ["site-02"]}),
    "n5-drop-advertise": (5, Mode.ACTIVE, {"advertise": ["site-03"]}),
    "n5-drop-shares": (5, Mode.ACTIVE, {"shares": ["site-01"]}),
    "n5-drop-masked": (5, Mode.ACTIVE, {"masked": ["site-02"]}),
    "n5-drop-survivors": (5, Mode.ACTIVE, {"survivors": ["site-00"]}),
    "n5-drop-unmask": (5, Mode.ACTIVE, {"unmask": ["site-04"]}),
}


def fixed(*label: object) -> bytes:
    return hashlib.sha256(f"fedsecure test vectors {label}".encode()).digest()


def names(n: int) -> tuple[str, ...]:
    width = max(2, len(str(n)))
    return tuple(f"site-{i:0{width}d}" for i in range(n))


def identity(n: int) -> dict[str, bytes]:
    return {name: fixed("identity", name) for name in (*names(n), "aggregator")}


def make_roster(n: int) -> Roster:
    public = {
        name: identity_keys.public_bytes(Ed25519PrivateKey.from_private_bytes(k)) for name, k in identity(n).items()
    }
    aggregator = public.pop("aggregator")
    entries = tuple(RosterEntry(site, "train", key, fixed("tls", site)) for site, key in public.items())
    return Roster("vectors", 1, entries, aggregator, fixed("tls", "aggregator"))


def make_descriptor(n: int, mode: Mode, *, bits: int = 32) -> RoundDescriptor:
    limits = Thresholds.choose(n, mode=mode)
    return RoundDescriptor(
        mode=mode,
        run_id=fixed("run")[:16],
        roster_hash=make_roster(n).hash,
        round=7,
        attempt=1,
        model_hash=fixed("model"),
        base_hash=fixed("base"),
        config_hash=fixed("config"),
        segments=(
            Segment("delta", 5, 2.0**-10, 2**20, 2**20, Fraction(2**40, 3), fixed("rotation")),
            Segment("counts", 2, 1.0, 0, 2**10),
        ),
        query_hash=fixed("query"),
        cohort=names(n),
        threshold=limits.threshold,
        min_survivors=limits.min_survivors,
        colluders=limits.colluders,
        ring_bits=bits,
    )


class Drawn:
    """Replaces the randomness of one site at a time, and keeps what it drew."""

    def __init__(self, case: str) -> None:
        self.case, self.site, self.step = case, "", 0
        self.log: dict[str, dict[str, list[Any]]] = {}

    def bytes(self, kind: str, size: int) -> bytes:
        entry = self.log.setdefault(self.site, {}).setdefault(kind, [])
        value = fixed(self.case, self.site, kind, len(entry))[:size]
        entry.append(value)
        return value

    def urandom(self, size: int) -> bytes:
        return self.bytes("seed" if size == 32 else "nonce", size)

    def randbelow(self, bound: int) -> int:
        return int.from_bytes(self.bytes("coefficient", 32), "big") % bound

    def generate(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.bytes("key", 32))

    @contextmanager
    def of(self, site: str) -> Iterator[None]:
        self.site = site
        generator = SimpleNamespace(generate=self.generate)
        with (
            patch.object(os, "urandom", self.urandom),
            patch.object(secrets, "randbelow", self.randbelow),
            patch.object(client_module, "X25519PrivateKey", generator),
            patch.object(keysetup, "X25519PrivateKey", generator),
        ):
            yield


class Replay:
    """One case on the package's state machines, phase by phase."""

    def __init__(
        self, name: str, descriptor: RoundDescriptor | None = None, drops: dict[str, list[str]] | None = None
    ) -> None:
        self.name = name
        if descriptor is None:
            n, mode, drops = CASES[name]
            descriptor = make_descriptor(n, mode, bits=16 if name.endswith("b16") else 32)
        self.descriptor, self.drops = descriptor, drops or {}
        self.n, self.mode = len(descriptor.cohort), descriptor.mode
        self.roster, self.drawn = make_roster(self.n), Drawn(name)
        self.keys = {k: Ed25519PrivateKey.from_private_bytes(v) for k, v in identity(self.n).items()}
        self.transcript = bytearray()
        self.server = RecordingServer(
            self.descriptor,
            roster=self.roster,
            signing_key=self.keys["aggregator"],
            spool=MemorySpool(),
            write=self.transcript.extend,
            payloads=True,
        )
        self.clients = {
            site: SecAggClient(
                self.descriptor, site=site, signing_key=self.keys[site], roster=self.roster, latch=MemoryLatch()
            )
            for site in self.descriptor.cohort
        }
        word = np.dtype(f"u{self.descriptor.ring_bits // 8}")
        words = np.frombuffer(fixed("inputs") * 8, dtype=word.newbyteorder("<")).astype(word)
        self.inputs = {site: np.roll(words, k)[:7] * word.type(k + 1) for k, site in enumerate(self.descriptor.cohort)}
        self.live = list(self.descriptor.cohort)
        self.messages: dict[str, dict[str, Any]] = {}
        self.broadcasts: dict[str, dict[str, bytes]] = {}

    def phases(self) -> list[str]:
        middle = ["survivors"] if self.mode is Mode.ACTIVE else []
        return ["advertise", "shares", "masked", *middle, "unmask"]

    def produce(self, phase: str) -> None:
        """Let every live site answer; nothing reaches the server."""
        self.live = [site for site in self.live if site not in self.drops.get(phase, ())]
        before = {"shares": "advertise", "masked": "shares", "survivors": "masked"}
        before["unmask"] = "survivors" if self.mode is Mode.ACTIVE else "masked"
        out: dict[str, Any] = {}
        for site in self.live:
            client, got = self.clients[site], self.broadcasts.get(before.get(phase, ""), {}).get(site, b"")
            with self.drawn.of(site):
                if phase == "advertise":
                    out[site] = client.advertise()
                elif phase == "shares":
                    out[site] = client.shares(got)
                elif phase == "masked":
                    client.receive_shares(got)
                    masked = client.mask(self.inputs[site])
                    out[site] = (masked.header, bytes(masked.payload))
                elif phase == "survivors":
                    out[site] = client.sign_survivors(got)
                else:
                    out[site] = client.unmask(got)
        self.messages[phase] = out

    def deliver(self, phase: str) -> None:
        for site, message in self.messages[phase].items():
            if phase == "masked":
                assert self.server.receive_masked(site, *message)
            else:
                assert self.server.receive(site, message)
        if phase != "unmask":
            self.broadcasts[phase] = dict(self.server.close())

    def run(self, *, before: str = "") -> Replay:
        """All phases, or those before one."""
        for phase in self.phases():
            if phase == before:
                break
            self.produce(phase)
            self.deliver(phase)
        return self


def private_values(replay: Replay) -> dict[str, Any]:
    """What each site drew, and its input."""
    sites, t = dict[str, Any](), replay.descriptor.threshold
    for site, log in replay.drawn.log.items():
        coefficients = [str(int.from_bytes(c, "big")) for c in log.get("coefficient", [])]
        sites[site] = {
            "index": replay.descriptor.index(site),
            "cipher_private": log["key"][0],
            "mask_private": log["key"][1],
            "seed": log["seed"][0],
            "key_coefficients": coefficients[: t - 1],
            "seed_coefficients": coefficients[t - 1 :],
            "nonces": nonces(replay.messages["shares"].get(site, b"")),
            "input": [int(w) for w in replay.inputs[site]],
        }
    return sites


def nonces(message: bytes) -> dict[str, bytes]:
    """Recipient → nonce of the sealed shares in an R1 message."""
    return {str(s.recipient): s.ciphertext[:12] for s in pb.ClientMessage.FromString(message).share_keys.shares}


def descriptor_fields(d: RoundDescriptor) -> dict[str, Any]:
    fields = ("run_id", "roster_hash", "round", "attempt", "model_hash", "base_hash", "config_hash", "query_hash")
    fields += ("threshold", "min_survivors", "colluders", "ring_bits", "prg_id")
    segments = [
        {
            "name": s.name,
            "length": s.length,
            "grid": s.grid.hex(),
            "bound": s.bound,
            "clamp": s.clamp,
            "variance": [str(s.noise_variance.numerator), str(s.noise_variance.denominator)],
            "rotation_seed": s.rotation_seed or b"",
        }
        for s in d.segments
    ]
    out = {f: getattr(d, f) for f in fields}
    out |= {"mode": d.mode.value, "segments": segments, "cohort": list(d.cohort), "graph": 1}
    out |= {"graph": 2, "neighbours": d.neighbours} if d.neighbours else {}
    return out | ({"epoch": d.epoch, "slot": d.slot} if d.epoch else {})


def as_json(vector: object) -> Any:
    """With bytes as hexadecimal."""
    return json.loads(json.dumps(vector, default=lambda raw: bytes(raw).hex()))


def build(name: str) -> tuple[dict[str, Any], bytes]:
    """The good vector of a case, and its transcript."""
    replay = Replay(name).run()
    result = replay.server.finish()
    d, ctx = replay.descriptor, replay.descriptor.ctx
    sites = private_values(replay)
    ads = {d.index(s): pb.ClientMessage.FromString(m).advertisement for s, m in replay.messages["advertise"].items()}
    kept = {d.index(s): pb.ClientMessage.FromString(m).share_keys for s, m in replay.messages["shares"].items()}
    uploads = {d.index(s): pb.ClientMessage.FromString(m[0]).masked_input for s, m in replay.messages["masked"].items()}
    t1 = transcript.advertisements_hash(ctx, ads)
    t2 = transcript.headers_hash(ctx, {i: k.header for i, k in kept.items()})
    private = {
        s["index"]: tuple(X25519PrivateKey.from_private_bytes(s[k]) for k in ("cipher_private", "mask_private"))
        for s in sites.values()
    }
    seeds = {s["index"]: s["seed"] for s in sites.values()}
    pairs = {
        f"{i},{j}": keys.pair_mask_key(private[i][1], ads[j].mask_key, ctx=ctx, own=i, peer=j)
        for i in kept
        for j in kept
        if i < j
    }
    own = {str(i): keys.self_mask_key(seeds[i], ctx=ctx, index=i) for i in kept}
    vector = {
        "name": name,
        "drops": replay.drops,
        "descriptor": descriptor_fields(d),
        "canonical": d.canonical(),
        "ctx": ctx,
        "roster": replay.roster.canonical(),
        "identity": identity(replay.n),
        "sites": sites,
        "messages": {
            phase: {s: list(m) if isinstance(m, tuple) else m for s, m in by_site.items()}
            for phase, by_site in replay.messages.items()
        },
        "broadcasts": replay.broadcasts,
        "result": result.result_message,
        "sum": [int(x) for x in result.total],
        "derived": {
            "t1": t1,
            "t2": t2,
            "share_keys": {
                f"{i},{j}": keys.share_key(
                    private[i][0], ads[j].cipher_key, ctx=ctx, sender=i, recipient=j, sending=True
                )
                for i in kept
                for j in ads
                if i != j
            },
            "ciphertexts": {f"{i},{s.recipient}": s.ciphertext for i, k in kept.items() for s in k.shares},
            "commitments": {str(i): keys.commit(seeds[i], ctx=ctx, index=i) for i in kept},
            "pair_keys": pairs,
            "self_keys": own,
            "keystreams": {k: prg.keystream(key, 8).tobytes() for k, key in (pairs | own).items()},
            "roots": {str(i): u.root for i, u in uploads.items()},
            "survivors_body": transcript.survivors_body(t1, t2, uploads),
        },
    }
    return as_json(vector), bytes(replay.transcript)


def _flip(raw: bytes, at: int = -1) -> bytes:
    at %= len(raw)
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def _edit(raw: bytes, change: Any, kind: type = pb.ServerMessage) -> bytes:
    message = kind.FromString(raw)
    change(message)
    return message.SerializeToString()


LOW_ORDER = [bytes(32), b"\x01" + bytes(31), bytes.fromhex("ec" + "ff" * 30 + "7f")]


def bad() -> list[dict[str, Any]]:
    """Messages that must be refused, by the site or aggregator they go to in case ``n5-drop-unmask``, and the code."""
    good = Replay("n5-drop-unmask").run()
    good.server.finish()
    other = Replay("n5-drop-survivors").run()  # other ephemeral keys, the same context
    d, who, peer = good.descriptor, "site-00", "site-01"
    out: list[dict[str, Any]] = []

    def add(
        name: str, to: str, phase: str, message: bytes, code: str, *, sender: str = who, payload: bytes = b""
    ) -> None:
        entry = {"name": name, "to": to, "phase": phase, "sender": sender, "message": message.hex(), "code": code}
        out.append(entry | ({"payload": payload.hex()} if payload else {}))

    def signed(kind: str, name: str, body: Any, change: Any) -> bytes:
        """A message of site-00 with something changed and signed again by its own key: a site that cheats."""

        def apply(message: pb.ClientMessage) -> None:
            content = getattr(message, name)
            content = content.header if name == "share_keys" else content
            change(content)
            content.signature = transcript.sign(good.keys[who], kind, d.ctx, body(content))

        raw = good.messages[phase][who]
        return _edit(raw[0] if isinstance(raw, tuple) else raw, apply, pb.ClientMessage)

    for phase in ("advertise", "shares", "survivors", "unmask"):
        raw = good.messages[phase][who]
        add(f"{phase}: last byte flipped", "server", phase, _flip(raw), "FS-1323" if phase != "shares" else "FS-1321")
        add(f"{phase}: truncated", "server", phase, raw[:-1], "FS-1321")
        add(f"{phase}: empty", "server", phase, b"", "FS-1321")
        add(f"{phase}: oversize", "server", phase, raw + bytes(1024 + 512 * 5), "FS-1321")
        add(f"{phase}: of another site", "server", phase, raw, "FS-1322", sender=peer)
        add(f"{phase}: from a stranger", "server", phase, raw, "FS-1322", sender="site-99")
    phase = "advertise"
    for k, point in enumerate(LOW_ORDER):
        for key in ("cipher_key", "mask_key"):
            message = signed(
                "advertise", "advertisement", transcript.advertisement_body, lambda m, p=point, f=key: setattr(m, f, p)
            )
            add(f"advertise: {key} of low order {k}", "server", phase, message, "FS-1327")
    message = signed(
        "advertise", "advertisement", transcript.advertisement_body, lambda m: setattr(m, "cipher_key", m.mask_key)
    )
    add("advertise: one key twice", "server", phase, message, "FS-1327")
    phase = "shares"
    message = signed(
        "shares", "share_keys", transcript.header_body, lambda m: setattr(m, "advertisements_hash", bytes(32))
    )
    add("shares: for other advertisements", "server", phase, message, "FS-1326")
    message = _edit(good.messages[phase][who], lambda m: m.share_keys.shares.pop(), pb.ClientMessage)
    add("shares: one missing", "server", phase, message, "FS-1321")

    def swap(message: pb.ClientMessage) -> None:
        first, second = message.share_keys.shares[:2]
        first.ciphertext, second.ciphertext = second.ciphertext, first.ciphertext

    add("shares: two swapped", "server", phase, _edit(good.messages[phase][who], swap, pb.ClientMessage), "FS-1321")
    phase = "masked"
    header, payload = good.messages[phase][who]
    add("masked: header flipped", "server", phase, _flip(header), "FS-1323", payload=payload)
    add("masked: word flipped", "server", phase, header, "FS-1329", payload=_flip(payload))
    add("masked: truncated", "server", phase, header, "FS-1329", payload=payload[:-1])
    add("masked: one word more", "server", phase, header, "FS-1329", payload=payload + bytes(4))
    add("masked: of another site", "server", phase, header, "FS-1322", payload=payload, sender=peer)
    for field, value, code in (("headers_hash", bytes(32), "FS-1326"), ("length", 2**40, "FS-1329")):
        message = signed(
            "masked-input", "masked_input", transcript.masked_body, lambda m, f=field, v=value: setattr(m, f, v)
        )
        add(f"masked: {field} of a liar", "server", phase, message, code, payload=payload)
    phase = "unmask"

    def both(message: pb.Unmask) -> None:
        message.mask_key_shares.add(owner=2, share=bytes(33))

    add("unmask: both kinds", "server", phase, signed("unmask", "unmask", transcript.unmask_body, both), "FS-1321")

    ads = good.broadcasts["advertise"][who]
    add("ads: signature flipped", "client", "shares", _flip(ads), "FS-1323")
    add("ads: truncated", "client", "shares", ads[:-1], "FS-1321")
    add("ads: of another attempt's keys", "client", "shares", other.broadcasts["advertise"][who], "FS-1326")

    def substitute(message: pb.ServerMessage) -> None:
        message.advertisements.advertisements[1].mask_key = fixed("attacker")

    add("ads: key substituted", "client", "shares", _edit(ads, substitute), "FS-1323")

    def few(message: pb.ServerMessage) -> None:
        del message.advertisements.advertisements[3:]

    add("ads: too few", "client", "shares", _edit(ads, few), "FS-1344")
    add("ads: another kind of message", "client", "shares", good.broadcasts["shares"][who], "FS-1321")
    routed = good.broadcasts["shares"][who]
    add("headers: truncated", "client", "masked", routed[:-1], "FS-1321")
    add("headers: of other keys", "client", "masked", other.broadcasts["shares"][who], "FS-1326")

    def commitment(message: pb.ServerMessage) -> None:
        message.routed_shares.headers[1].seed_commitment = bytes(32)

    add("headers: commitment altered", "client", "masked", _edit(routed, commitment), "FS-1323")
    add("headers: routed for another site", "client", "masked", good.broadcasts["shares"][peer], "FS-1321")
    for name, members in (
        ("too few", [1, 2, 3]),
        ("without me", [2, 3, 4, 5]),
        ("twice", [1, 2, 2, 3, 4]),
        ("stranger", [1, 2, 3, 4, 6]),
    ):
        message = pb.ServerMessage(survivor_list=pb.SurvivorList(survivors=members)).SerializeToString()
        add(f"survivors: {name}", "client", "survivors", message, "FS-1328")
    signatures = good.broadcasts["survivors"][who]
    add("signatures: flipped", "client", "unmask", _flip(signatures), "FS-1323")
    add("signatures: of other keys", "client", "unmask", other.broadcasts["survivors"][peer], "FS-1323")

    def fewer(message: pb.ServerMessage) -> None:
        del message.survivor_signatures.signatures[3:]

    add("signatures: too few", "client", "unmask", _edit(signatures, fewer), "FS-1328")
    raw = d.canonical()
    for name, data, code in (
        ("truncated", raw[:-1], "FS-1311"),
        ("one byte more", raw + b"\0", "FS-1311"),
        ("version 2", b"\0\0\0\2" + raw[4:], "FS-1311"),
        ("threshold 1", raw[:-13] + b"\0\0\0\1" + raw[-9:], "FS-1301"),
        ("no colluders", raw[:-5] + b"\0\0\0\0" + raw[-1:], "FS-1301"),
    ):
        add(f"descriptor: {name}", "descriptor", "", data, code)
    return out


def dump(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def main() -> None:
    for name in CASES:
        vector, recorded = build(name)
        (FOLDER / f"{name}.json").write_text(dump(vector))
        if name == "n5-drop-masked":
            GOLDEN.write_bytes(recorded)
    (FOLDER / "bad.json").write_text(dump(bad()))


if __name__ == "__main__":
    main()
