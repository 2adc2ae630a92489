"""What an honest party accepts in the set-up of an epoch and on its slots: the second implementation's half of the bad
vectors, from the protocol's rules (secagg.md §3.2, §3.3, §3.5, §3.7). It says yes or no; why is the package's word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from secagg_reference import TAG, be, dh, epoch, fields, sha


def careful(rule: Callable[..., bool]) -> Callable[..., bool]:
    """What cannot be read breaks a rule too."""

    @wraps(rule)
    def judge(*arguments: Any) -> bool:
        try:
            return rule(*arguments)
        except (AssertionError, IndexError, KeyError, UnicodeDecodeError, ValueError, InvalidSignature):
            return False

    return judge


class Rules:
    """The rules of one epoch."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        self.d, self.up = case["epoch"], epoch(case)
        self.n, self.slots, self.least = len(self.d["cohort"]), self.d["slots"], self.d["min_survivors"]
        private = {name: Ed25519PrivateKey.from_private_bytes(bytes.fromhex(k)) for name, k in case["identity"].items()}
        self.known = {i: private[site].public_key() for i, site in enumerate(self.d["cohort"], 1)}

    @careful
    def advertisement(self, sender: str, raw: bytes) -> bool:
        """R0 at the aggregator."""
        ad = self._read(self._sized(raw)[1][0], 32, 32 * self.slots, 64)
        return ad[1] == self._index(sender) and self._fresh([self._advertisement(ad)])

    @careful
    def shares(self, sender: str, raw: bytes) -> bool:
        """R1 at the aggregator."""
        message, i = fields(self._sized(raw)[2][0]), self._index(sender)
        header = self._header(message[1][0])
        sealed = {share[2]: share[3] for share in map(self._share, message[2])}
        senders = {self._share(share)[1] for share in message[2]}
        peers = self.up.peers[i]
        hashed = sha(TAG, b"ciphertexts\0", be(len(peers)), *(be(j) + sealed[j] for j in peers))
        right = header[1] == i and senders == {i} and header[2] == self.up.t1 and header[4] == hashed
        return right and len(message[2]) == len(peers) == len(sealed)

    @careful
    def advertisements(self, site: str, raw: bytes) -> bool:
        """Everybody's R0 at a site."""
        ads = [self._read(ad, 32, 32 * self.slots, 64) for ad in fields(self._sized(raw)[1][0])[1]]
        own = [ad for ad in ads if ad[1] == self._index(site)]
        i = self._index(site)
        mine = own == [{1: i, 2: self.up.ad_body[i][4:36], 3: self.up.s_pub[i], 4: self.up.ad_signature[i]}]
        return mine and self._fresh([self._advertisement(ad) for ad in ads]) and len(self._once(ads)) >= self.least

    @careful
    def headers(self, site: str, raw: bytes) -> bool:
        """Everybody's R1 at a site; whether the shares open is another matter."""
        message, i = fields(self._sized(raw)[2][0]), self._index(site)
        headers = [self._header(header) for header in message[1]]
        shares = [self._share(share) for share in message.get(2, [])]
        own = [header for header in headers if header[1] == i]
        mine = len(own) == 1 and own[0][5] == self.up.header_signature[i]
        one_view = all(header[2] == self.up.t1 for header in headers)
        for_me = all(share[2] == i and share[1] != i for share in shares) and len({s[1] for s in shares}) == len(shares)
        return mine and one_view and for_me and len(self._once(headers)) >= self.least

    def round(self, asked: Mapping[str, Any], used: Iterable[tuple[int, int, int]]) -> bool:
        """A round on a slot, after those ``used``: (slot, round, attempt)."""
        same = ("run_id", "roster_hash", "config_hash", "cohort", "mode", "threshold", "min_survivors", "colluders")
        fits = all(asked[name] == self.d[name] for name in same) and asked["epoch"] == self.up.ctx.hex()
        later = all(
            asked["slot"] > slot and (asked["round"], asked["attempt"]) > (round_, attempt)
            for slot, round_, attempt in used
        )
        return fits and later and asked["slot"] < self.slots

    def _sized(self, raw: bytes) -> dict[int, list[Any]]:
        assert len(raw) <= 1024 + (512 + 128 * (self.slots - 1)) * self.n
        return fields(raw)

    def _index(self, site: str) -> int:
        return list(self.d["cohort"]).index(site) + 1

    def _read(self, raw: bytes, *sizes: int) -> dict[int, Any]:
        """A number and byte strings of these sizes, each once."""
        values = fields(raw)
        assert [len(values[k]) for k in range(1, len(sizes) + 2)] == [1] * (len(sizes) + 1)
        assert all(len(values[k][0]) == size for k, size in enumerate(sizes, 2))
        return {k: value[0] for k, value in values.items()}

    def _share(self, raw: bytes) -> dict[int, Any]:
        values = {k: value[0] for k, value in fields(raw).items()}
        assert len(values[3]) == 12 + 8 + 66 * self.slots + 16
        return values

    def _advertisement(self, ad: Mapping[int, Any]) -> list[bytes]:
        """Its public keys, if it is signed."""
        self._verify(ad[1], b"advertise", be(ad[1]) + ad[2] + ad[3], ad[4])
        return [ad[2], *(ad[3][k : k + 32] for k in range(0, len(ad[3]), 32))]

    def _header(self, raw: bytes) -> dict[int, Any]:
        header = self._read(raw, 32, 32 * self.slots, 32, 64)
        self._verify(header[1], b"shares", be(header[1]) + header[2] + header[3] + header[4], header[5])
        return header

    def _verify(self, i: int, kind: bytes, body: bytes, signature: bytes) -> None:
        self.known[i].verify(signature, TAG + kind + b"\0" + self.up.ctx + body)

    def _fresh(self, groups: list[list[bytes]]) -> bool:
        """No key twice, and none that gives a shared secret of zeros (``dh`` refuses those)."""
        keys = [key for group in groups for key in group]
        return len(set(keys)) == len(keys) and all(any(dh(bytes(range(32)), key)) for key in keys)

    def _once(self, items: list[dict[int, Any]]) -> set[int]:
        said = {item[1] for item in items}
        assert len(said) == len(items)
        assert said <= set(self.known)
        return said


@careful
def parses(raw: bytes) -> bool:
    """Whether these are the canonical bytes of an epoch's descriptor, its numbers within bounds."""
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        assert at + size <= len(raw)
        at += size
        return raw[at - size : at]

    def number(size: int = 4) -> int:
        return int.from_bytes(take(size), "big")

    proto, mode = number(), number()
    sizes = [len(take(number())) for _ in range(3)]
    number(8)
    slots, n = number(), number()
    assert n <= 128
    names = [take(number()).decode() for _ in range(n)]
    t, u, c = number(), number(), number()
    least = (n + c) // 2 + 1 if mode == 2 else max(c + 1, n // 2 + 1)
    formed = at == len(raw) and (proto, sizes) == (1, [16, 32, 32]) and mode in (1, 2)
    bounded = n >= 3 and c >= 1 and least <= t <= n and max(t, c + 2) <= u <= n and 1 <= slots <= 1024
    return formed and bounded and len(set(names)) == n
