"""Who lied about a share in a round that gave its sum all the same is told to the operator."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from federation_world import World

from fedsecure.secagg import transcript
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb
from fedsecure.wire import secagg_pb2


class Lying(MemoryTransport):
    """Gives away one wrong share, well signed, in every round of its own keys."""

    key: Any
    lies = 0

    def send(self, message: pb.PhaseMessage) -> None:
        said = secagg_pb2.ClientMessage.FromString(message.payload)
        if said.WhichOneof("kind") == "unmask":
            self.lies += 1
            said.unmask.seed_shares[-1].share = bytes(33)
            body = transcript.unmask_body(said.unmask)
            said.unmask.signature = transcript.sign(self.key, "unmask", message.ctx, body)
            message = pb.PhaseMessage(session=message.session, ctx=message.ctx, payload=said.SerializeToString())
        super().send(message)


@pytest.mark.parametrize("honest", [False, True])
def test_a_wrong_share_is_in_the_record_of_the_round(
    honest: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path, sites=5, rounds=1, public_evaluation=False)
    world.start()
    transport = Lying(world.coordinator, "site-1", world.gate)
    with caplog.at_level(logging.WARNING, logger="fedsecure.aggregator"):
        if honest:
            world.run(*(world.take_part(name) for name in world.names))
        else:

            def lies() -> None:
                with world.client("site-1", transport=transport) as client:
                    transport.key = client._identity.signing_key
                    client.run()

            world.run(lies, *(world.take_part(name) for name in world.names[1:]))
    assert not world.errors
    lines = world.coordinator._store.attempts()
    assert all(line["survivors"] == world.names for line in lines)
    groups = [group for line in lines for group in line.get("bad_shares", [])]
    assert ("shares that do not fit" in caplog.text) is not honest
    if honest:
        assert not groups
        return
    assert len(groups) == transport.lies == len(lines)
    assert all("site-1" in group and len(group) > 1 for group in groups)
    # The summary, which goes to all sites, accuses nobody.
    assert world.coordinator.outcome is not None
    assert not any("bad_shares" in attempt for attempt in world.coordinator.outcome["attempts"])
