"""Each attack fails, and the same attack succeeds once the check that stops it is switched off."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hostile_aggregator import HostileAggregator
from secagg_world import BASE, CONFIG, federation, make_descriptor, make_query
from switches import forgetful, stolen, trusting

from fedsecure.config import PolicyConfig, RunSettings
from fedsecure.errors import FedsecureError, IdentityError, PrivacyError, ProtocolError
from fedsecure.messages import Event, Segment
from fedsecure.privacy.grid import distributed_segment
from fedsecure.privacy.noise import PrivacyRng
from fedsecure.privacy.policy import check_query
from fedsecure.secagg import keys, policy, sealing, transcript
from fedsecure.secagg.client import SecAggClient, State
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.latch import MemoryLatch

Patch = pytest.MonkeyPatch


def stateless(patch: Patch) -> None:
    """Switch the state machine off: any step at any time, and secrets are kept."""

    def step(self: SecAggClient, before: State, after: State, work: object) -> object:
        self._state = after
        return work()  # type: ignore[operator]

    patch.setattr(SecAggClient, "_step", step)


def test_overlapping_survivor_sets(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1320"):
        HostileAggregator().overlapping_survivor_sets()
    stateless(monkeypatch)
    with pytest.raises(ProtocolError, match="FS-1346"):  # the latch alone is enough
        HostileAggregator().overlapping_survivor_sets()
    forgetful(monkeypatch)
    assert stolen(HostileAggregator().overlapping_survivor_sets())


def test_split_view(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1323"):
        HostileAggregator(7).split_view()
    monkeypatch.setattr(SecAggClient, "_check_signatures", lambda *_: None)
    assert stolen(HostileAggregator(7).split_view())


def test_lowered_threshold(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1332"):
        HostileAggregator().lowered_threshold()
    monkeypatch.setattr(policy, "minimum_threshold", lambda *_, **__: 2)
    assert stolen(HostileAggregator().lowered_threshold())


def test_lowered_survivors(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1332"):
        HostileAggregator().lowered_survivors()
    monkeypatch.setattr(policy, "minimum_threshold", lambda *_, **__: 2)
    with pytest.raises(ProtocolError, match="FS-1333"):
        HostileAggregator().lowered_survivors()
    monkeypatch.setattr(HostileAggregator, "gate", lambda self, descriptor, query=None: descriptor)
    assert stolen(HostileAggregator().lowered_survivors())


def test_lowered_noise() -> None:
    """A round whose noise is worth less than its price; without the floor the sum is exact to the last digit."""
    host, base = HostileAggregator(), federation(5).roster
    settings = RunSettings(
        classes=("x", "y"),
        encoder={"dimension": 64, "fingerprint": "0" * 64},  # type: ignore[arg-type]
        sites={site: {"max_units": 100} for site in host.sites},  # type: ignore[misc]
    )
    loud = distributed_segment("gradient", 128, clip_norm=0.1, noise_multiplier=2.5, honest=3, sites=5, units=100)
    event = Event("train", "training", 2.5, 2.5 / 3**0.5)

    def attack(segment: Segment, *, floor: bool) -> bool:
        query = make_query(5, segments=(segment,), events=(event,))
        policy.check(
            make_descriptor(5, query=query),
            query,
            policy=policy.RoundPolicy(),
            roster=base,
            site=host.target,
            config_hash=CONFIG,
            base_hash=BASE,
            noise_floor=(lambda _, q: check_query(q, settings, PolicyConfig())) if floor else None,
        )
        secret = np.arange(128, dtype=np.int64)
        return bool(np.array_equal(secret + PrivacyRng().discrete_gaussian(128, segment.noise_variance), secret))

    silent = replace(loud, noise_variance=Fraction(0))
    assert attack(loud, floor=True) is False
    for cheaper in (silent, replace(loud, noise_variance=loud.noise_variance / 2)):
        with pytest.raises(PrivacyError, match="FS-1224"):
            attack(cheaper, floor=True)
    assert attack(silent, floor=False) is True


def test_key_substitution(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1323"):
        HostileAggregator().key_substitution()
    trusting(monkeypatch)
    assert stolen(HostileAggregator().key_substitution())


def test_sybils(monkeypatch: Patch, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="FS-1421"):
        HostileAggregator().sybils(tmp_path)
    (tmp_path / "roster.json").unlink()
    from fedsecure.identity import roster

    with monkeypatch.context() as patch:
        # Only the coordinator's signature on the roster; the rest of the protocol is in force.
        honest = roster.keys.verify
        patch.setattr(roster.keys, "verify", lambda k, p, b, s: p == roster.PURPOSE or honest(k, p, b, s))
        assert stolen(HostileAggregator().sybils(tmp_path))


@pytest.mark.parametrize("attack", ["replayed_descriptor", "round_rollback"])
def test_rounds_that_come_again(attack: str, monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1345"):
        getattr(HostileAggregator(), attack)(MemoryLatch())
    forgetful(monkeypatch)
    assert stolen(getattr(HostileAggregator(), attack)(MemoryLatch()))


def test_model_inconsistency(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1323"):
        HostileAggregator().model_inconsistency()
    with monkeypatch.context() as patch:
        # Without signatures the contexts still differ, and with them every key: nothing opens.
        trusting(patch)
        with pytest.raises(FedsecureError, match="FS-13(26|5[0-9])"):
            HostileAggregator().model_inconsistency()
    without_model = property(lambda self: hashlib.sha256(bytes(self.run_id) + bytes([self.attempt])).digest())
    monkeypatch.setattr(RoundDescriptor, "ctx", without_model)
    assert stolen(HostileAggregator().model_inconsistency())


def test_points_of_small_order(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1327"):
        HostileAggregator().small_order_point()
    honest = keys.exchange

    def careless(private: object, public: bytes) -> bytes:
        return bytes(32) if public == bytes(32) else honest(private, public)  # type: ignore[arg-type]

    monkeypatch.setattr(keys, "exchange", careless)
    guessed, used = HostileAggregator().small_order_point()
    assert guessed == used


@pytest.mark.parametrize("size", [0, 31, 33])
def test_malformed_points(size: int, monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1321"):
        HostileAggregator().malformed_point(size)
    monkeypatch.setattr(transcript, "require_sizes", lambda *_: None)
    HostileAggregator().malformed_point(size)  # the site goes on, with bytes that are no key
    with pytest.raises(ValueError):
        X25519PublicKey.from_public_bytes(bytes([9]) * size)


def test_swapped_shares(monkeypatch: Patch) -> None:
    """Sound, the swapped ciphertexts do not open and are reported; the forged secret stays shut."""
    with pytest.raises(AssertionError, match="too few shares"):
        HostileAggregator().swapped_shares()

    def seal(key: bytes, shares: Sequence[bytes], **_: object) -> bytes:
        nonce = hashlib.sha256(shares[0]).digest()[:12]
        return nonce + AESGCM(key).encrypt(nonce, bytes(8) + b"".join(shares), None)

    def unseal(key: bytes, sealed: bytes, **_: object) -> tuple[bytes, bytes]:
        plain = AESGCM(key).decrypt(sealed[:12], sealed[12:], None)
        return plain[8:41], plain[41:]

    def share_key(*_: object, recipient: int, **__: object) -> bytes:
        return hashlib.sha256(b"the recipient's, whoever sends" + bytes([recipient])).digest()

    monkeypatch.setattr(sealing, "seal", seal)
    monkeypatch.setattr(sealing, "unseal_all", unseal)
    monkeypatch.setattr(keys, "share_key", share_key)
    assert stolen(HostileAggregator().swapped_shares())


def test_truncated_shares(monkeypatch: Patch) -> None:
    """A cut share is reported and costs nothing; a site that took it for a share would ruin the sum or be blamed."""
    total, expected = HostileAggregator().truncated_shares()
    np.testing.assert_array_equal(total, expected)
    honest = sealing.unseal_all

    def careless(key: bytes, sealed: bytes, **names: object) -> tuple[bytes, bytes]:
        return honest(key, sealed, **names) or (bytes(33), bytes(33))  # type: ignore[arg-type]

    monkeypatch.setattr(sealing, "unseal_all", careless)
    with pytest.raises(AssertionError):
        HostileAggregator().truncated_shares()


def test_late_uploads(monkeypatch: Patch) -> None:
    assert not stolen(HostileAggregator().late_upload())
    # Single masking, as in the protocols that this attack broke: no seed is needed.
    monkeypatch.setattr(keys, "self_mask_key", lambda *_, **__: bytes(32))
    assert stolen(HostileAggregator().late_upload())
