"""A set-up of keys fits into one call of the transport, at any size that settings may ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from federation_world import World

from fedsecure.config import MAX_PREPARED, RoundsConfig, RunSettings, SiteEntry
from fedsecure.errors import ProtocolError
from fedsecure.secagg import transcript
from fedsecure.secagg.epoch_descriptor import MAX_SLOTS, EpochDescriptor
from fedsecure.secagg.sealing import sealed_size
from fedsecure.secagg.thresholds import MAX_SITES, Mode, Thresholds
from fedsecure.transport.tls import LIMITS
from fedsecure.wire import federation_pb2 as pb
from fedsecure.wire import secagg_pb2 as inner

ENVELOPE = 256  # of a directive or phase message around it


def epoch(sites: int, slots: int) -> EpochDescriptor:
    limits = Thresholds.choose(sites, mode=Mode.ACTIVE)
    names = tuple(f"site-{i:03d}" for i in range(sites))
    numbers = (limits.threshold, limits.min_survivors, limits.colluders)
    return EpochDescriptor(Mode.ACTIVE, bytes(16), bytes(32), bytes(32), 0, slots, names, *numbers)


@pytest.mark.parametrize("sites", [3, 10, 58, 59, 64, 100, MAX_SITES])
def test_what_is_decoded_can_be_carried(sites: int) -> None:
    slots = min(MAX_SLOTS, MAX_PREPARED // sites)
    epoch(sites, slots)
    assert all(transcript.size_limit(sites, slots) + ENVELOPE <= limit for _, limit in LIMITS)
    if slots < MAX_SLOTS:
        with pytest.raises(ProtocolError, match="FS-1314"):
            epoch(sites, slots + 1)


def test_the_largest_message_of_a_set_up_is_within_both_bounds() -> None:
    """All headers, and a sealed message of every peer, at the boundary; without the bound it is above the limit."""

    def largest(sites: int, slots: int) -> int:
        routed = inner.RoutedShares()
        for i in range(1, sites + 1):
            routed.headers.add(
                index=i,
                advertisements_hash=bytes(32),
                seed_commitment=bytes(32 * slots),
                ciphertexts_hash=bytes(32),
                signature=bytes(64),
            )
            routed.shares.add(sender=i, recipient=sites, ciphertext=bytes(sealed_size(slots)))
        payload = inner.ServerMessage(routed_shares=routed).SerializeToString()
        relay = pb.Relay(ctx=bytes(32), phase="masked", payload=payload)
        size = pb.Directive(sequence=1 << 40, relay=relay).ByteSize()
        assert len(payload) <= transcript.size_limit(sites, slots)
        assert size <= len(payload) + ENVELOPE
        return size

    limit = min(limit for _, limit in LIMITS)
    assert largest(MAX_SITES, MAX_PREPARED // MAX_SITES) <= limit
    assert largest(MAX_SITES, MAX_SLOTS) > limit


def settings(world: World, sites: int, prepared: int) -> RunSettings:
    entry = SiteEntry(max_units=30, evaluation_units=30, evaluation_public=True)
    fields = world.settings.model_dump()
    fields["sites"] = {f"site-{i:03d}": entry for i in range(sites)}
    fields["rounds"] = RoundsConfig(prepared_rounds=prepared)
    return RunSettings.model_validate(fields)


def test_settings_beyond_the_bound_are_refused_when_they_are_read(tmp_path: Path) -> None:
    world = World(tmp_path)
    most = MAX_PREPARED // MAX_SITES
    assert settings(world, MAX_SITES, most).rounds.prepared_rounds == most
    with pytest.raises(
        ValueError, match=f"prepared_rounds = {most + 1} for {MAX_SITES} training sites, at most {most}"
    ):
        settings(world, MAX_SITES, most + 1)


def test_a_site_refuses_a_longer_set_up_before_it_makes_keys() -> None:
    raw = bytearray(epoch(MAX_SITES, MAX_PREPARED // MAX_SITES).canonical())
    at = raw.index((MAX_PREPARED // MAX_SITES).to_bytes(4, "big") + MAX_SITES.to_bytes(4, "big"))
    raw[at : at + 4] = MAX_SLOTS.to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="FS-1314"):
        EpochDescriptor.parse(bytes(raw))
    with pytest.raises(ProtocolError, match="FS-1314"):
        replace(epoch(MAX_SITES, 1), slots=MAX_SLOTS)
