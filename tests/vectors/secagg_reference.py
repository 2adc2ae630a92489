"""A second implementation of "fedsecure/secagg/v1", written from the design and sharing no code with the package.

Plain Python with hashlib and hmac; only X25519, Ed25519, AES-256 on single blocks and AES-GCM come from a library. It
has no states and checks nothing: it says what every byte of an honest round must be.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

P = 2**256 + 297
TAG = b"fedsecure/secagg/v1/"


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def be(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "big") for value in values)


def counted(raw: bytes) -> bytes:
    return be(len(raw)) + raw


def hkdf(ikm: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, one block of output."""
    return hmac.digest(hmac.digest(salt, ikm, "sha256"), info + b"\x01", "sha256")


def public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def dh(private: bytes, peer: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(peer))


def sign(seed: bytes, kind: str, ctx: bytes, body: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).sign(TAG + kind.encode() + b"\0" + ctx + body)


def keystream(key: bytes, size: int) -> bytes:
    """Counter mode by hand: AES-256 of 0, 1, 2, … as 128-bit big-endian numbers."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return b"".join(block.update(i.to_bytes(16, "big")) for i in range(-(-size // 16)))[:size]


def words(raw: bytes, size: int) -> list[int]:
    return [int.from_bytes(raw[k : k + size], "little") for k in range(0, len(raw), size)]


def polynomial(secret: bytes, coefficients: Iterable[int], x: int) -> bytes:
    """Coefficients from the highest power down, the secret last."""
    terms = [*coefficients, int.from_bytes(secret, "big")]
    return (sum(c * x ** (len(terms) - 1 - k) for k, c in enumerate(terms)) % P).to_bytes(33, "big")


def at_zero(shares: Mapping[int, bytes]) -> bytes:
    total = 0
    for x, share in shares.items():
        top = bottom = 1
        for other in shares:
            if other != x:
                top, bottom = top * other, bottom * (other - x)
        total += int.from_bytes(share, "big") * top * pow(bottom, P - 2, P)
    return (total % P).to_bytes(32, "big")


def canonical(d: Mapping[str, Any]) -> bytes:
    def number(text: str) -> bytes:
        value = int(text)
        return counted(value.to_bytes((value.bit_length() + 7) // 8, "big"))

    out = be(1, d["mode"]) + counted(bytes.fromhex(d["run_id"])) + counted(bytes.fromhex(d["roster_hash"]))
    out += struct.pack(">QI", d["round"], d["attempt"])
    for name in ("model_hash", "base_hash", "config_hash"):
        out += counted(bytes.fromhex(d[name]))
    length = sum(s["length"] for s in d["segments"])
    out += length.to_bytes(8, "big") + bytes([d["ring_bits"], d["prg_id"]]) + be(len(d["segments"]))
    for s in d["segments"]:
        out += counted(s["name"].encode()) + struct.pack(">Q", s["length"])
        out += struct.pack(">d", float.fromhex(s["grid"])) + struct.pack(">QQ", s["bound"], s["clamp"])
        out += counted(bytes.fromhex(s["rotation_seed"])) + number(s["variance"][0]) + number(s["variance"][1])
    out += counted(bytes.fromhex(d["query_hash"])) + be(len(d["cohort"]))
    out += b"".join(counted(site.encode()) for site in d["cohort"])
    out += be(d["threshold"], d["min_survivors"], d["colluders"]) + bytes([d["graph"]])
    out += be(d["neighbours"]) if d["graph"] == 2 else b""
    return out + (counted(bytes.fromhex(d["epoch"])) + be(d["slot"]) if d.get("epoch") else b"")


def canonical_epoch(d: Mapping[str, Any]) -> bytes:
    out = be(1, d["mode"])
    for name in ("run_id", "roster_hash", "config_hash"):
        out += counted(bytes.fromhex(d[name]))
    out += struct.pack(">QII", d["epoch"], d["slots"], len(d["cohort"]))
    out += b"".join(counted(site.encode()) for site in d["cohort"])
    return out + be(d["threshold"], d["min_survivors"], d["colluders"])


def fields(raw: bytes) -> dict[int, list[Any]]:
    """Protobuf wire format: field number → values; a varint as int, the rest as bytes."""
    out: dict[int, list[Any]] = {}
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = raw[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(raw):
        key = varint()
        if key & 7 == 0:
            value: Any = varint()
        else:
            assert key & 7 == 2
            size = varint()
            value = raw[position : position + size]
            position += size
        out.setdefault(key >> 3, []).append(value)
    return out


def message(*numbered: tuple[int, Any]) -> bytes:
    """Protobuf wire format, fields in ascending order: int, bytes, or a list of either (numbers are packed)."""

    def varint(value: int) -> bytes:
        low = value & 127
        return bytes([low]) if value < 128 else bytes([low | 128]) + varint(value >> 7)

    out = b""
    for number, value in numbered:
        if isinstance(value, list) and value and isinstance(value[0], int):
            value = b"".join(map(varint, value))
        for item in value if isinstance(value, list) else [value] if value else []:
            if isinstance(item, int):
                out += varint(number << 3) + varint(item)
            else:
                out += varint(number << 3 | 2) + varint(len(item)) + item
    return out


class SetUp:
    """R0 and R1 of one round, or of an epoch with R slots, on the complete graph or on a k-regular one."""

    def __init__(self, ctx: bytes, case: Mapping[str, Any], *, cohort: list[str], threshold: int, k: int = 0) -> None:
        self.ctx, self.cohort, self.t, self.k = ctx, cohort, threshold, k
        sites = {s["index"]: {**s, "site": name} for name, s in case["sites"].items()}
        slots = {i: s.get("slots", [s]) for i, s in sites.items()}
        self.sites, self.u1 = sites, sorted(sites)
        gone = case["drops"].get("shares", ())
        self.u2 = [i for i in self.u1 if sites[i]["site"] not in gone]
        self.spoilt = {tuple(cohort.index(name) + 1 for name in pair) for pair in case.get("tampered", ())}
        self.id = {i: bytes.fromhex(case["identity"][s["site"]]) for i, s in sites.items()}
        self.aggregator = bytes.fromhex(case["identity"]["aggregator"])
        self.c = {i: bytes.fromhex(s["cipher_private"]) for i, s in sites.items()}
        self.s = {i: [bytes.fromhex(slot["mask_private"]) for slot in slots[i]] for i in sites}
        self.b = {i: [bytes.fromhex(slot["seed"]) for slot in slots[i]] for i in sites}

        self.s_pub = {i: b"".join(map(public, self.s[i])) for i in self.u1}
        self.ad_body = {i: be(i) + public(self.c[i]) + self.s_pub[i] for i in self.u1}
        self.ad_signature = {i: self._sign(i, "advertise", self.ad_body[i]) for i in self.u1}
        self.t1 = self._list_hash("t1", self.u1, self.ad_body, self.ad_signature)
        self.ring = self._ring()
        self.peers = {i: self._peers(i) for i in self.u1}
        self.shares = {
            (i, j): [
                (
                    polynomial(s, map(int, slot["key_coefficients"]), j),
                    polynomial(b, map(int, slot["seed_coefficients"]), j),
                )
                for s, b, slot in zip(self.s[i], self.b[i], slots[i], strict=True)
            ]
            for i in self.u2
            for j in (self.peers[i] if k else self.u1)
        }
        pairs = [(i, j) for i in self.u2 for j in self.peers[i]]
        self.share_key = {(i, j): self._share_key(i, j) for i, j in pairs}
        self.sealed = {(i, j): self._seal(i, j) for i, j in pairs}
        bound = {i: TAG + b"bcommit\0" + ctx + be(i) for i in self.u2}
        self.commitment = {i: b"".join(sha(bound[i], b) for b in self.b[i]) for i in self.u2}
        self.sealed_hash = {i: self._sealed_hash(i) for i in self.u2}
        self.header_body = {i: be(i) + self.t1 + self.commitment[i] + self.sealed_hash[i] for i in self.u2}
        self.header_signature = {i: self._sign(i, "shares", self.header_body[i]) for i in self.u2}
        self.near = {i: sorted({i, *self.peers[i]} & set(self.u2)) for i in self.u2}
        self.t2 = {
            i: self._list_hash("t2", self.near[i], self.header_body, self.header_signature)
            for i in (self.u2 if k else self.u2[:1])
        }
        self.t2 |= {i: self.t2[self.u2[0]] for i in self.u2 if i not in self.t2}

    def invalid(self, i: int) -> list[int]:
        """Senders whose sealed shares do not open at ``i``: they were spoilt on their way."""
        return [j for j in self.near[i] if (j, i) in self.spoilt]

    def message(self, phase: str, i: int) -> bytes:
        if phase == "advertise":
            return message((1, self._advertisement(i)))
        return message((2, message((1, self._header(i)), (2, [self._sealed_share(i, j) for j in self.peers[i]]))))

    def broadcast(self, phase: str, i: int) -> bytes:
        """As the aggregator sends it; a spoilt share has its last byte flipped on its way to the site, not here."""
        if phase == "advertise":
            return message((1, message((1, [self._advertisement(j) for j in self.u1]))))
        senders = [j for j in self.near[i] if j != i]
        headers = [self._header(j) for j in self.near[i]]
        return message((2, message((1, headers), (2, [self._sealed_share(j, i) for j in senders]))))

    def _advertisement(self, i: int) -> bytes:
        return message((1, i), (2, public(self.c[i])), (3, self.s_pub[i]), (4, self.ad_signature[i]))

    def _header(self, i: int) -> bytes:
        hashes = (self.t1, self.commitment[i], self.sealed_hash[i], self.header_signature[i])
        return message((1, i), *enumerate(hashes, start=2))

    def _sealed_share(self, i: int, j: int) -> bytes:
        return message((1, i), (2, j), (3, self.sealed[i, j]))

    def _ring(self) -> list[int]:
        """U1 in the order of one AES block each under the ring's seed."""
        stream = keystream(sha(TAG, b"graph\0", self.ctx, self.t1), 16 * len(self.u1))
        return [i for _, i in sorted((stream[16 * p : 16 * p + 16], i) for p, i in enumerate(self.u1))]

    def _peers(self, i: int) -> list[int]:
        if not self.k:
            return [j for j in self.u1 if j != i]
        at, n = self.ring.index(i), len(self.ring)
        return sorted(self.ring[(at + side * step) % n] for step in range(1, self.k // 2 + 1) for side in (-1, 1))

    def _sign(self, i: int, kind: str, body: bytes) -> bytes:
        return sign(self.id[i], kind, self.ctx, body)

    def _list_hash(self, tag: str, who: list[int], bodies: Mapping[int, bytes], signed: Mapping[int, bytes]) -> bytes:
        return sha(TAG, tag.encode(), b"\0", self.ctx, be(len(who)), *(bodies[i] + signed[i] for i in who))

    def _share_key(self, i: int, j: int) -> bytes:
        info = TAG + b"share-enc\0" + be(i, j) + public(self.c[i]) + public(self.c[j])
        return hkdf(dh(self.c[i], public(self.c[j])), self.ctx, info)

    def _seal(self, i: int, j: int) -> bytes:
        nonce = bytes.fromhex(self.sites[i]["nonces"][str(j)])
        plain = be(i, j) + b"".join(of_s + of_b for of_s, of_b in self.shares[i, j])
        aad = self.ctx + self.t1 + be(i, j) + b"share"
        return nonce + AESGCM(self.share_key[i, j]).encrypt(nonce, plain, aad)

    def _sealed_hash(self, i: int) -> bytes:
        peers = self.peers[i]
        return sha(TAG, b"ciphertexts\0", be(len(peers)), *(be(j) + self.sealed[i, j] for j in peers))


def epoch(case: Mapping[str, Any]) -> SetUp:
    """The set-up of an epoch."""
    d = case["epoch"]
    ctx = sha(TAG, b"epoch\0", canonical_epoch(d))
    return SetUp(ctx, case, cohort=d["cohort"], threshold=d["threshold"])


class Round:
    """Everything that is determined by a case's descriptor, private values, inputs and drop-outs.

    With the ``setup`` of an epoch, a round of it: the descriptor names the slot, the case holds the inputs.
    """

    def __init__(self, case: Mapping[str, Any], setup: SetUp | None = None) -> None:
        d = case["descriptor"]
        self.case, self.cohort, self.t, self.hbc = case, d["cohort"], d["threshold"], d["mode"] == 1
        self.canonical = canonical(d)
        self.ctx = sha(TAG, b"ctx\0", self.canonical)
        self.length = sum(s["length"] for s in d["segments"])
        self.bits = d["ring_bits"]
        self.modulus, self.word = 2**self.bits, self.bits // 8
        slot = d["slot"] if setup else 0
        k = d.get("neighbours", 0)
        self.setup = up = setup or SetUp(self.ctx, case, cohort=self.cohort, threshold=self.t, k=k)
        inputs = case["inputs"] if setup else {name: site["input"] for name, site in case["sites"].items()}
        name, drops = {i: s["site"] for i, s in up.sites.items()}, case["drops"]
        self.u1, self.u2, self.id, self.c = up.u1, up.u2, up.id, up.c
        self.u3 = [i for i in self.u2 if name[i] not in drops.get("masked", ())]
        self.signers = [i for i in self.u3 if name[i] not in drops.get("survivors", ())]
        self.openers = [i for i in (self.u3 if self.hbc else self.signers) if name[i] not in drops.get("unmask", ())]
        self.s = {i: keys[slot] for i, keys in up.s.items()}
        self.b = {i: seeds[slot] for i, seeds in up.b.items()}
        self.shares = {pair: both[slot] for pair, both in up.shares.items()}
        self.ad_signature, self.t1, self.t2 = up.ad_signature, up.t1, up.t2[up.u2[0]]
        self.share_key, self.sealed, self.commitment = up.share_key, up.sealed, up.commitment
        self.sealed_hash, self.header_signature = up.sealed_hash, up.header_signature

        self.pair_key = {(i, j): self._pair_key(i, j) for i in self.u2 for j in up.near[i] if i < j}
        self.self_key = {i: hkdf(self.b[i], self.ctx, TAG + b"self-mask\0" + be(i)) for i in self.u2}
        self.inputs = {i: inputs[name[i]] for i in self.u3}
        self.masked = {i: self._mask(i) for i in self.u3}
        self.payload = {i: b"".join(w.to_bytes(self.word, "little") for w in y) for i, y in self.masked.items()}
        self.root = {i: self._root(raw) for i, raw in self.payload.items()}
        size = struct.pack(">QI", self.length, self.bits)
        reported = {i: be(len(up.invalid(i)), *up.invalid(i)) for i in self.u3}
        self.masked_body = {i: be(i) + self.t1 + up.t2[i] + size + self.root[i] + reported[i] for i in self.u3}
        self.masked_signature = {i: self._sign(i, "masked-input", self.masked_body[i]) for i in self.u3}
        self.survivors_body = self.t1 + self.t2 + sha(TAG, b"survivor-list\0", be(len(self.u3), *self.u3))
        self.survivor_signature = {i: self._sign(i, "survivors", self.survivors_body) for i in self.signers}
        self.given = {i: self._given(i) for i in self.openers}
        self.unmask_body = {i: self._unmask_body(i) for i in self.openers}
        self.unmask_signature = {i: self._sign(i, "unmask", self.unmask_body[i]) for i in self.openers}

        self.sum = [sum(column) % self.modulus for column in zip(*self.inputs.values(), strict=True)]
        self.sum_hash = sha(b"".join(w.to_bytes(self.word, "little") for w in self.sum))
        self.result_body = be(len(self.u3), *self.u3) + self.sum_hash
        self.result_signature = sign(up.aggregator, "result", self.ctx, self.result_body)

    def lifted(self) -> list[int]:
        return [w - self.modulus if w >= self.modulus // 2 else w for w in self.sum]

    def unmasked(self) -> list[int]:
        """The sum again, from the masked vectors and t shares of every secret only."""
        total = [sum(column) % self.modulus for column in zip(*self.masked.values(), strict=True)]
        for i in self.u3:
            holders = [j for j in self.openers if i in self.given[j][0]][: self.t]
            seed = at_zero({j: self.shares[i, j][1] for j in holders})
            stream = self._stream(hkdf(seed, self.ctx, TAG + b"self-mask\0" + be(i)))
            total = [(a - b) % self.modulus for a, b in zip(total, stream, strict=True)]
        for i in set(self.u2) - set(self.u3):
            holders = [j for j in self.openers if i in self.given[j][1]][: self.t]
            key = at_zero({j: self.shares[i, j][0] for j in holders})
            for j in set(self.u3) & set(self.setup.near[i]):
                low, high = min(i, j), max(i, j)
                info = TAG + b"pair-mask\0" + be(low, high) + public(self.s[low]) + public(self.s[high])
                stream = self._stream(hkdf(dh(key, public(self.s[j])), self.ctx, info))
                sign_ = -1 if i > j else 1
                total = [(a + sign_ * b) % self.modulus for a, b in zip(total, stream, strict=True)]
        return total

    def message(self, phase: str, i: int) -> bytes:
        """What site ``i`` sends."""
        if phase in ("advertise", "shares"):
            return self.setup.message(phase, i)
        if phase == "masked":
            known = (i, self.t1, self.setup.t2[i], self.length, self.bits, self.root[i], self.setup.invalid(i))
            return message((3, message(*enumerate((*known, self.masked_signature[i]), start=1))))
        if phase == "survivors":
            return message((4, message((1, i), (2, self.survivor_signature[i]))))
        lists = [[message((1, owner), (2, share)) for owner, share in kind.items()] for kind in self.given[i]]
        return message((5, message((1, i), (2, lists[0]), (3, lists[1]), (4, self.unmask_signature[i]))))

    def broadcast(self, phase: str, i: int) -> bytes:
        """What site ``i`` hears at the end of a phase."""
        if phase in ("advertise", "shares"):
            return self.setup.broadcast(phase, i)
        if phase == "masked":
            return message((3, message((1, self.u3))))
        items = [message((1, j), (2, self.survivor_signature[j])) for j in self.signers]
        return message((4, message((1, items))))

    def result(self) -> bytes:
        return message((5, message((1, self.ctx), (2, self.u3), (3, self.sum_hash), (4, self.result_signature))))

    def _sign(self, i: int, kind: str, body: bytes) -> bytes:
        return sign(self.id[i], kind, self.ctx, body)

    def _pair_key(self, i: int, j: int) -> bytes:
        info = TAG + b"pair-mask\0" + be(i, j) + public(self.s[i]) + public(self.s[j])
        return hkdf(dh(self.s[i], public(self.s[j])), self.ctx, info)

    def _stream(self, key: bytes) -> list[int]:
        return words(keystream(key, self.word * self.length), self.word)

    def _mask(self, i: int) -> list[int]:
        y = [a + b for a, b in zip(self.inputs[i], self._stream(self.self_key[i]), strict=True)]
        for j in self.setup.near[i]:
            if j != i:
                factor = 1 if j > i else -1
                stream = self._stream(self.pair_key[min(i, j), max(i, j)])
                y = [a + factor * b for a, b in zip(y, stream, strict=True)]
        return [w % self.modulus for w in y]

    def _root(self, payload: bytes) -> bytes:
        leaves = [sha(payload[k : k + 2**20]) for k in range(0, len(payload), 2**20)]
        return sha(TAG, b"root\0", len(payload).to_bytes(8, "big"), *leaves)

    def _given(self, i: int) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """Shares of b of the survivors, and of s of the others, that ``i`` holds."""
        held = [j for j in self.setup.near[i] if (j, i) in self.shares and j not in self.setup.invalid(i)]
        seeds = {j: self.shares[j, i][1] for j in held if j in self.u3}
        return seeds, {j: self.shares[j, i][0] for j in held if j not in self.u3}

    def _unmask_body(self, i: int) -> bytes:
        return be(i) + b"".join(be(len(kind)) + b"".join(be(j) + s for j, s in kind.items()) for kind in self.given[i])
