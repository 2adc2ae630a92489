"""A second implementation of "fedsecure/secagg/v1", written from the design and sharing no code with the package.

Plain Python with hashlib and hmac; only X25519, Ed25519, AES-256 on single blocks and AES-GCM come from a library. It
is slow, has no states and checks nothing: it says what every byte of an honest round must be.
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
    return out + be(d["threshold"], d["min_survivors"], d["colluders"]) + bytes([d["graph"]])


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


class Round:
    """Everything that is determined by a case's descriptor, private values, inputs and drop-outs."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        d = case["descriptor"]
        self.case, self.cohort, self.t = case, d["cohort"], d["threshold"]
        self.canonical = canonical(d)
        self.ctx = sha(TAG, b"ctx\0", self.canonical)
        self.length = sum(s["length"] for s in d["segments"])
        self.bits = d["ring_bits"]
        self.modulus, self.word = 2**self.bits, self.bits // 8
        sites = {s["index"]: {**s, "site": name} for name, s in case["sites"].items()}
        self.sites, self.u1 = sites, sorted(sites)
        gone = {phase: set(names) for phase, names in case["drops"].items()}
        self.u2 = [i for i in self.u1 if sites[i]["site"] not in gone.get("shares", ())]
        self.u3 = [i for i in self.u2 if sites[i]["site"] not in gone.get("masked", ())]
        self.signers = [i for i in self.u3 if sites[i]["site"] not in gone.get("survivors", ())]
        left = self.u3 if d["mode"] == 1 else self.signers
        self.openers = [i for i in left if sites[i]["site"] not in gone.get("unmask", ())]
        self.c = {i: bytes.fromhex(s["cipher_private"]) for i, s in sites.items()}
        self.s = {i: bytes.fromhex(s["mask_private"]) for i, s in sites.items()}
        self.b = {i: bytes.fromhex(s["seed"]) for i, s in sites.items()}
        self.id = {i: bytes.fromhex(case["identity"][s["site"]]) for i, s in sites.items()}

        self.ad_body = {i: be(i) + public(self.c[i]) + public(self.s[i]) for i in self.u1}
        self.ad_signature = {i: self._sign(i, "advertise", self.ad_body[i]) for i in self.u1}
        self.t1 = self._list_hash("t1", self.u1, self.ad_body, self.ad_signature)
        self.shares = {
            (i, j): (
                polynomial(self.s[i], map(int, sites[i]["key_coefficients"]), j),
                polynomial(self.b[i], map(int, sites[i]["seed_coefficients"]), j),
            )
            for i in self.u2
            for j in self.u1
        }
        pairs = [(i, j) for i in self.u2 for j in self.u1 if i != j]
        self.share_key = {(i, j): self._share_key(i, j) for i, j in pairs}
        self.sealed = {(i, j): self._seal(i, j) for i, j in pairs}
        self.commitment = {i: sha(TAG, b"bcommit\0", self.ctx, be(i), self.b[i]) for i in self.u2}
        self.sealed_hash = {i: self._sealed_hash(i) for i in self.u2}
        self.header_body = {i: be(i) + self.t1 + self.commitment[i] + self.sealed_hash[i] for i in self.u2}
        self.header_signature = {i: self._sign(i, "shares", self.header_body[i]) for i in self.u2}
        self.t2 = self._list_hash("t2", self.u2, self.header_body, self.header_signature)

        self.pair_key = {(i, j): self._pair_key(i, j) for i in self.u2 for j in self.u2 if i < j}
        self.self_key = {i: hkdf(self.b[i], self.ctx, TAG + b"self-mask\0" + be(i)) for i in self.u2}
        self.masked = {i: self._mask(i) for i in self.u3}
        self.payload = {i: b"".join(w.to_bytes(self.word, "little") for w in y) for i, y in self.masked.items()}
        self.root = {i: self._root(raw) for i, raw in self.payload.items()}
        size = struct.pack(">QI", self.length, self.bits)
        self.masked_body = {i: be(i) + self.t1 + self.t2 + size + self.root[i] + be(0) for i in self.u3}
        self.masked_signature = {i: self._sign(i, "masked-input", self.masked_body[i]) for i in self.u3}
        self.survivors_body = self.t1 + self.t2 + sha(TAG, b"survivor-list\0", be(len(self.u3), *self.u3))
        self.survivor_signature = {i: self._sign(i, "survivors", self.survivors_body) for i in self.signers}
        self.unmask_body = {i: self._unmask_body(i) for i in self.openers}
        self.unmask_signature = {i: self._sign(i, "unmask", self.unmask_body[i]) for i in self.openers}

        inputs = [sites[i]["input"] for i in self.u3]
        self.sum = [sum(column) % self.modulus for column in zip(*inputs, strict=True)]
        self.sum_hash = sha(b"".join(w.to_bytes(self.word, "little") for w in self.sum))
        self.result_body = be(len(self.u3), *self.u3) + self.sum_hash
        aggregator = bytes.fromhex(case["identity"]["aggregator"])
        self.result_signature = sign(aggregator, "result", self.ctx, self.result_body)

    def lifted(self) -> list[int]:
        return [w - self.modulus if w >= self.modulus // 2 else w for w in self.sum]

    def unmasked(self) -> list[int]:
        """The sum again, from the masked vectors and t shares of every secret only."""
        total = [sum(column) % self.modulus for column in zip(*self.masked.values(), strict=True)]
        holders = self.openers[: self.t]
        for i in self.u3:
            seed = at_zero({j: self.shares[i, j][1] for j in holders})
            stream = self._stream(hkdf(seed, self.ctx, TAG + b"self-mask\0" + be(i)))
            total = [(a - b) % self.modulus for a, b in zip(total, stream, strict=True)]
        for i in set(self.u2) - set(self.u3):
            key = at_zero({j: self.shares[i, j][0] for j in holders})
            for j in self.u3:
                low, high = min(i, j), max(i, j)
                info = TAG + b"pair-mask\0" + be(low, high) + public(self.s[low]) + public(self.s[high])
                stream = self._stream(hkdf(dh(key, public(self.s[j])), self.ctx, info))
                sign_ = -1 if i > j else 1
                total = [(a + sign_ * b) % self.modulus for a, b in zip(total, stream, strict=True)]
        return total

    def _sign(self, i: int, kind: str, body: bytes) -> bytes:
        return sign(self.id[i], kind, self.ctx, body)

    def _list_hash(self, tag: str, who: list[int], bodies: Mapping[int, bytes], signed: Mapping[int, bytes]) -> bytes:
        return sha(TAG, tag.encode(), b"\0", self.ctx, be(len(who)), *(bodies[i] + signed[i] for i in who))

    def _share_key(self, i: int, j: int) -> bytes:
        info = TAG + b"share-enc\0" + be(i, j) + public(self.c[i]) + public(self.c[j])
        return hkdf(dh(self.c[i], public(self.c[j])), self.ctx, info)

    def _seal(self, i: int, j: int) -> bytes:
        nonce = bytes.fromhex(self.sites[i]["nonces"][str(j)])
        plain = be(i, j) + b"".join(self.shares[i, j])
        aad = self.ctx + self.t1 + be(i, j) + b"share"
        return nonce + AESGCM(self.share_key[i, j]).encrypt(nonce, plain, aad)

    def _sealed_hash(self, i: int) -> bytes:
        peers = [j for j in self.u1 if j != i]
        return sha(TAG, b"ciphertexts\0", be(len(peers)), *(be(j) + self.sealed[i, j] for j in peers))

    def _pair_key(self, i: int, j: int) -> bytes:
        info = TAG + b"pair-mask\0" + be(i, j) + public(self.s[i]) + public(self.s[j])
        return hkdf(dh(self.s[i], public(self.s[j])), self.ctx, info)

    def _stream(self, key: bytes) -> list[int]:
        return words(keystream(key, self.word * self.length), self.word)

    def _mask(self, i: int) -> list[int]:
        y = [a + b for a, b in zip(self.sites[i]["input"], self._stream(self.self_key[i]), strict=True)]
        for j in self.u2:
            if j != i:
                factor = 1 if j > i else -1
                stream = self._stream(self.pair_key[min(i, j), max(i, j)])
                y = [a + factor * b for a, b in zip(y, stream, strict=True)]
        return [w % self.modulus for w in y]

    def _root(self, payload: bytes) -> bytes:
        leaves = [sha(payload[k : k + 2**20]) for k in range(0, len(payload), 2**20)]
        return sha(TAG, b"root\0", len(payload).to_bytes(8, "big"), *leaves)

    def _unmask_body(self, i: int) -> bytes:
        absent = [j for j in self.u2 if j not in self.u3]
        seeds = b"".join(be(j) + self.shares[j, i][1] for j in self.u3)
        keys = b"".join(be(j) + self.shares[j, i][0] for j in absent)
        return be(i, len(self.u3)) + seeds + be(len(absent)) + keys
