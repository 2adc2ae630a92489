"""Writes the frozen vectors of prepared epochs: ``python tests/vectors/make_epoch_vectors.py``. As ``make_vectors``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from make_vectors import (
    FOLDER,
    LOW_ORDER,
    Drawn,
    as_json,
    descriptor_fields,
    dump,
    fixed,
    identity,
    make_descriptor,
    make_roster,
    names,
    nonces,
)

from fedsecure.secagg import keys, transcript
from fedsecure.secagg.client import SecAggClient
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch import Epochs
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.epoch_server import EpochServer
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.secagg.server import SecAggServer
from fedsecure.secagg.spool import MemorySpool
from fedsecure.secagg.thresholds import Mode
from fedsecure.wire import secagg_pb2 as pb

SLOTS = 3
Drops = dict[str, list[str]]
# Sites, mode, drop-outs of the set-up, (slot, drop-outs) of each round; slots left out are passed over.
EPOCHS: dict[str, tuple[int, Mode, Drops, list[tuple[int, Drops]]]] = {
    "epoch-n3": (3, Mode.ACTIVE, {}, [(0, {}), (2, {})]),
    "epoch-n3-hbc-drop-unmask": (3, Mode.HBC, {}, [(0, {}), (1, {"unmask": ["site-02"]}), (2, {})]),
    "epoch-n5-drop-advertise": (5, Mode.ACTIVE, {"advertise": ["site-03"]}, [(0, {}), (1, {}), (2, {})]),
    "epoch-n5-drop-shares": (5, Mode.ACTIVE, {"shares": ["site-01"]}, [(0, {}), (1, {}), (2, {})]),
    "epoch-n5-drop-rounds": (
        5,
        Mode.ACTIVE,
        {},
        [(0, {"masked": ["site-02"]}), (1, {"survivors": ["site-00"]}), (2, {"unmask": ["site-04"]})],
    ),
    "epoch-n5-tampered": (5, Mode.ACTIVE, {}, [(0, {}), (1, {}), (2, {})]),
}
TAMPERED = {"epoch-n5-tampered": [("site-00", "site-04")]}
BAD_CASE = "epoch-n5-drop-rounds"


class EpochReplay:
    """One case on the package's state machines."""

    def __init__(self, name: str, *, number: int = 11) -> None:
        self.name = name
        self.n, self.mode, self.drops, self.plan = EPOCHS[name]
        self.roster, self.drawn = make_roster(self.n), Drawn(f"{name} {number}")
        self.keys = {k: Ed25519PrivateKey.from_private_bytes(v) for k, v in identity(self.n).items()}
        self.descriptor = EpochDescriptor.choose(
            names(self.n),
            run_id=fixed("run")[:16],
            epoch=number,
            slots=SLOTS,
            roster=self.roster,
            config_hash=fixed("config"),
            mode=self.mode,
        )
        self.server = EpochServer(self.descriptor, roster=self.roster, signing_key=self.keys["aggregator"])
        self.sites = {
            site: Epochs(site=site, signing_key=self.keys[site], roster=self.roster, latch=MemoryLatch())
            for site in self.descriptor.cohort
        }
        self.clients = {site: epochs.set_up(self.descriptor) for site, epochs in self.sites.items()}
        self.messages: dict[str, dict[str, bytes]] = {}
        self.broadcasts: dict[str, dict[str, bytes]] = {}

    def produce(self, phase: str) -> None:
        """Let every live site answer; nothing reaches the server."""
        live = self.broadcasts.get("advertise", self.clients)
        out = {}
        for site in live:
            if site not in self.drops.get(phase, ()):
                with self.drawn.of(site):
                    client = self.clients[site]
                    out[site] = client.advertise() if phase == "advertise" else client.shares(live[site])
        self.messages[phase] = out

    def deliver(self, phase: str) -> None:
        for site, message in self.messages[phase].items():
            assert self.server.receive(site, message)
        self.broadcasts[phase] = dict(self.server.close())

    def set_up(self, *, before: str = "") -> EpochReplay:
        """Both phases and the arrival of the shares, or what comes before ``before``."""
        for phase in ("advertise", "shares"):
            if phase == before:
                return self
            self.produce(phase)
            self.deliver(phase)
        if before != "done":
            for site, message in self.broadcasts["shares"].items():
                self.clients[site].receive_shares(self.spoilt(site, message))
        return self

    def spoilt(self, site: str, raw: bytes) -> bytes:
        """The shares as they arrive: the last byte of a tampered one is flipped."""
        senders = [sender for sender, recipient in TAMPERED.get(self.name, ()) if recipient == site]
        message = pb.ServerMessage.FromString(raw)
        for share in message.routed_shares.shares:
            if self.descriptor.cohort[share.sender - 1] in senders:
                share.ciphertext = share.ciphertext[:-1] + bytes([share.ciphertext[-1] ^ 1])
        return message.SerializeToString()

    def descriptor_of(self, slot: int, **changes: Any) -> RoundDescriptor:
        base = make_descriptor(self.n, self.mode)
        return replace(base, **{"round": 7 + slot, "epoch": self.descriptor.ctx, "slot": slot} | changes)

    def round(self, slot: int, drops: Drops) -> dict[str, Any]:
        """One round of the vector, on the slot."""
        d = self.descriptor_of(slot)
        server = self.server.round(d, spool=MemorySpool())
        clients = {site: self.sites[site].round(d) for site in self.server.members}
        words = np.frombuffer(fixed("inputs", slot) * 8, dtype="<u4").astype(np.uint32)
        inputs = {site: np.roll(words, k)[:7] * np.uint32(k + 1) for k, site in enumerate(d.cohort)}
        messages: dict[str, dict[str, Any]] = {}
        broadcasts: dict[str, dict[str, bytes]] = {}
        live, heard = list(clients), dict[str, bytes]()
        for phase in ("masked", "survivors", "unmask") if self.mode is Mode.ACTIVE else ("masked", "unmask"):
            live = [site for site in live if site not in drops.get(phase, ())]
            messages[phase] = {site: _answer(clients[site], phase, heard.get(site, b""), inputs[site]) for site in live}
            for site, message in messages[phase].items():
                _deliver(server, site, message)
            if phase != "unmask":
                heard = broadcasts[phase] = dict(server.close())
        result = server.finish()
        return {
            "descriptor": descriptor_fields(d),
            "canonical": d.canonical(),
            "ctx": d.ctx,
            "drops": drops,
            "inputs": {site: [int(w) for w in inputs[site]] for site in clients},
            "messages": messages,
            "broadcasts": broadcasts,
            "result": result.result_message,
            "sum": [int(x) for x in result.total],
        }

    def derived(self, d: RoundDescriptor) -> dict[str, Any]:
        """Mask keys of a slot, from the package's own derivation."""
        log = {d.index(site): entry for site, entry in self.drawn.log.items()}
        members = [d.index(site) for site in self.server.members]
        private = {i: X25519PrivateKey.from_private_bytes(log[i]["key"][1 + d.slot]) for i in members}
        public = {i: key.public_key().public_bytes_raw() for i, key in private.items()}
        return {
            "pair_keys": {
                f"{i},{j}": keys.pair_mask_key(private[i], public[j], ctx=d.ctx, own=i, peer=j)
                for i in members
                for j in members
                if i < j
            },
            "self_keys": {str(i): keys.self_mask_key(log[i]["seed"][d.slot], ctx=d.ctx, index=i) for i in members},
        }


def _answer(client: SecAggClient, phase: str, heard: bytes, vector: np.ndarray) -> Any:
    if phase == "masked":
        masked = client.mask(vector)
        return [masked.header, bytes(masked.payload)]
    return client.sign_survivors(heard) if phase == "survivors" else client.unmask(heard)


def _deliver(server: SecAggServer, site: str, message: Any) -> None:
    assert server.receive_masked(site, *message) if isinstance(message, list) else server.receive(site, message)


def build(name: str) -> dict[str, Any]:
    replay = EpochReplay(name).set_up()
    d, t = replay.descriptor, replay.descriptor.threshold
    sites: dict[str, Any] = {}
    for site, log in replay.drawn.log.items():
        drawn = [str(int.from_bytes(c, "big")) for c in log.get("coefficient", [])]
        parts = [drawn[start : start + t - 1] for start in range(0, len(drawn), t - 1)] or [[]] * (2 * SLOTS)
        sites[site] = {
            "index": d.cohort.index(site) + 1,
            "cipher_private": log["key"][0],
            "slots": [
                {
                    "mask_private": log["key"][1 + k],
                    "seed": log["seed"][k],
                    "key_coefficients": parts[2 * k],
                    "seed_coefficients": parts[2 * k + 1],
                }
                for k in range(SLOTS)
            ],
            "nonces": nonces(replay.messages["shares"].get(site, b"")),
        }
    rounds = [replay.round(slot, drops) for slot, drops in replay.plan]
    for (slot, _), entry in zip(replay.plan, rounds, strict=True):
        entry["derived"] = replay.derived(replay.descriptor_of(slot))
    ads = {d.cohort.index(s) + 1: pb.ClientMessage.FromString(m) for s, m in replay.messages["advertise"].items()}
    kept = {d.cohort.index(s) + 1: pb.ClientMessage.FromString(m) for s, m in replay.messages["shares"].items()}
    fields = ("run_id", "roster_hash", "config_hash", "epoch", "slots", "threshold", "min_survivors", "colluders")
    return as_json(
        {
            "name": name,
            "drops": replay.drops,
            "tampered": TAMPERED.get(name, []),
            "epoch": {f: getattr(d, f) for f in fields} | {"mode": d.mode.value, "cohort": list(d.cohort)},
            "canonical": d.canonical(),
            "ctx": d.ctx,
            "t1": transcript.advertisements_hash(d.ctx, {i: m.advertisement for i, m in ads.items()}, SLOTS),
            "t2": transcript.headers_hash(d.ctx, {i: m.share_keys.header for i, m in kept.items()}, SLOTS),
            "roster": replay.roster.canonical(),
            "identity": identity(replay.n),
            "sites": sites,
            "messages": replay.messages,
            "broadcasts": replay.broadcasts,
            "rounds": rounds,
        }
    )


# --- bad vectors -------------------------------------------------------------------------------------------------


def _edit(kind: type[Any], raw: bytes, change: Callable[[Any], Any]) -> bytes:
    message = kind.FromString(raw)
    change(message)
    return message.SerializeToString()


def _flip(raw: bytes, at: int = -1) -> bytes:
    at %= len(raw)
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def bad() -> list[dict[str, Any]]:
    """What must be refused, with its code: in the set-up of ``BAD_CASE``, and as a round on its slots."""
    good, other = EpochReplay(BAD_CASE).set_up(), EpochReplay(BAD_CASE, number=12).set_up()
    d, who, peer = good.descriptor, "site-00", "site-01"
    out: list[dict[str, Any]] = []

    def add(name: str, to: str, phase: str, message: bytes, code: str, *, sender: str = who, **more: Any) -> None:
        entry = {"name": name, "to": to, "phase": phase, "sender": sender, "message": message, "code": code}
        out.append(entry | more)

    def cheat(phase: str, change: Callable[[Any], Any]) -> bytes:
        """site-00's message with something changed, and signed again by its own key."""
        first = phase == "advertise"
        message = pb.ClientMessage.FromString(good.messages[phase][who])
        content = message.advertisement if first else message.share_keys.header
        change(content if first else message.share_keys)
        parts = (content.cipher_key, content.mask_key) if first else ()
        parts = parts or (content.advertisements_hash, content.seed_commitment, content.ciphertexts_hash)
        body = transcript.u32(content.index) + b"".join(parts)
        content.signature = transcript.sign(good.keys[who], phase, d.ctx, body)
        return message.SerializeToString()

    for phase in ("advertise", "shares"):
        raw = good.messages[phase][who]
        add(
            f"{phase}: last byte flipped", "server", phase, _flip(raw), "FS-1323" if phase == "advertise" else "FS-1321"
        )
        add(f"{phase}: truncated", "server", phase, raw[:-1], "FS-1321")
        add(f"{phase}: oversize", "server", phase, raw + bytes(transcript.size_limit(5, SLOTS)), "FS-1321")
        add(f"{phase}: of another site", "server", phase, raw, "FS-1322", sender=peer)
        add(f"{phase}: of another epoch", "server", phase, other.messages[phase][who], "FS-1323")
    for k in range(SLOTS):
        at = slice(32 * k, 32 * k + 32)
        for p, point in enumerate(LOW_ORDER):

            def weaken(ad: pb.Advertisement, at: slice = at, point: bytes = point) -> None:
                ad.mask_key = ad.mask_key[: at.start] + point + ad.mask_key[at.stop :]

            add(f"advertise: slot {k} of low order {p}", "server", "advertise", cheat("advertise", weaken), "FS-1327")

    def repeat(ad: pb.Advertisement) -> None:
        ad.mask_key = ad.mask_key[:32] * SLOTS

    def widen(ad: pb.Advertisement) -> None:
        ad.mask_key += fixed("one more")

    def narrow(ad: pb.Advertisement) -> None:
        ad.mask_key = ad.mask_key[:-32]

    add("advertise: one key for all slots", "server", "advertise", cheat("advertise", repeat), "FS-1327")
    add("advertise: one slot more", "server", "advertise", cheat("advertise", widen), "FS-1321")
    add("advertise: one slot less", "server", "advertise", cheat("advertise", narrow), "FS-1321")

    def fewer(message: pb.ShareKeys) -> None:
        message.header.seed_commitment = message.header.seed_commitment[:-32]

    def short(message: pb.ShareKeys) -> None:
        message.shares[0].ciphertext = message.shares[0].ciphertext[:-66]

    def swap(message: pb.ShareKeys) -> None:
        one, two = message.shares[:2]
        one.ciphertext, two.ciphertext = two.ciphertext, one.ciphertext

    def elsewhere(message: pb.ShareKeys) -> None:
        message.header.advertisements_hash = bytes(32)

    for name, change, code in (
        ("a commitment less", fewer, "FS-1321"),
        ("shares of a slot less", short, "FS-1321"),
        ("two swapped", swap, "FS-1321"),
        ("one missing", lambda message: message.shares.pop(), "FS-1321"),
        ("for other advertisements", elsewhere, "FS-1326"),
    ):
        add(f"shares: {name}", "server", "shares", cheat("shares", change), code)
    upload = good.round(0, {})["messages"]["masked"][who][0]
    add("set-up: a message of a round", "server", "advertise", upload, "FS-1321")

    ads, routed = good.broadcasts["advertise"][who], good.broadcasts["shares"][who]

    def substitute(message: pb.ServerMessage) -> None:
        ad = message.advertisements.advertisements[1]
        ad.mask_key = ad.mask_key[:64] + fixed("attacker")

    def few(message: pb.ServerMessage) -> None:
        del message.advertisements.advertisements[3:]

    def commitment(message: pb.ServerMessage) -> None:
        header = message.routed_shares.headers[1]
        header.seed_commitment = header.seed_commitment[:32] + bytes(32) + header.seed_commitment[64:]

    for name, raw, code in (
        ("signature flipped", _flip(ads), "FS-1323"),
        ("truncated", ads[:-1], "FS-1321"),
        ("the last slot's key substituted", _edit(pb.ServerMessage, ads, substitute), "FS-1323"),
        ("of another epoch", other.broadcasts["advertise"][who], "FS-1323"),
        ("too few", _edit(pb.ServerMessage, ads, few), "FS-1344"),
        ("another kind of message", routed, "FS-1321"),
    ):
        add(f"ads: {name}", "client", "shares", raw, code)
    for name, raw, code in (
        ("truncated", routed[:-1], "FS-1321"),
        ("of another epoch", other.broadcasts["shares"][who], "FS-1323"),
        ("a slot's commitment altered", _edit(pb.ServerMessage, routed, commitment), "FS-1323"),
        ("routed for another site", good.broadcasts["shares"][peer], "FS-1321"),
    ):
        add(f"headers: {name}", "client", "done", raw, code)

    for name, used, changes, code in (
        ("slot used twice", [0], {"slot": 0}, "FS-1356"),
        ("slot used twice by another round", [0], {"slot": 0, "round": 99}, "FS-1356"),
        ("slot out of order", [2], {"slot": 1, "round": 99}, "FS-1356"),
        ("slot beyond the last", [], {"slot": 3}, "FS-1359"),
        ("slot of a foreign epoch", [], {"slot": 0, "epoch": other.descriptor.ctx}, "FS-1358"),
        ("attempt begun before", [0], {"slot": 1, "round": 7}, "FS-1345"),
        ("earlier round", [1], {"slot": 2, "round": 7}, "FS-1345"),
        ("cohort in another order", [], {"slot": 0, "cohort": d.cohort[::-1]}, "FS-1357"),
        ("least survivors raised", [], {"slot": 0, "min_survivors": 5}, "FS-1357"),
        ("colluders and threshold raised", [], {"slot": 0, "colluders": 2, "min_survivors": 4}, "FS-1357"),
        ("mode of the weaker claim", [], {"slot": 0, "mode": Mode.HBC}, "FS-1357"),
        ("other settings", [], {"slot": 0, "config_hash": bytes(32)}, "FS-1357"),
    ):
        asked = good.descriptor_of(**changes)
        add(f"round: {name}", "round", "", asked.canonical(), code, used=used, descriptor=descriptor_fields(asked))
    raw = d.canonical()
    slots_at = len(raw) - 12 - sum(4 + len(site) for site in d.cohort) - 8
    for name, data, code in (
        ("truncated", raw[:-1], "FS-1314"),
        ("one byte more", raw + b"\0", "FS-1314"),
        ("version 2", b"\0\0\0\2" + raw[4:], "FS-1314"),
        ("no slots", raw[:slots_at] + bytes(4) + raw[slots_at + 4 :], "FS-1314"),
        ("1025 slots", raw[:slots_at] + transcript.u32(1025) + raw[slots_at + 4 :], "FS-1314"),
        ("a site twice", raw.replace(b"site-01", b"site-00"), "FS-1314"),
        ("threshold 1", raw[:-12] + transcript.u32(1) + raw[-8:], "FS-1301"),
        ("no colluders", raw[:-4] + bytes(4), "FS-1301"),
    ):
        add(f"descriptor: {name}", "descriptor", "", data, code)
    return as_json(out)


def main() -> None:
    for name in EPOCHS:
        (FOLDER / f"{name}.json").write_text(dump(build(name)))
    (FOLDER / "bad-epoch.json").write_text(dump(bad()))


if __name__ == "__main__":
    main()
