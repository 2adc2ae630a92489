"""An aggregator that attacks prepared epochs, with one site of five as its colluder (secagg.md §2.7, §3.7).

As in :mod:`hostile_aggregator`, each method does all that the attack needs and returns what it has won beside what it
was after; a check that holds raises out of it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from epoch_world import EpochWorld, SlotRun
from hostile_aggregator import HostileAggregator, Shares, forge, forged_roster, signatures, survivor_list
from secagg_world import BASE, CONFIG, client_message, edit, federation, make_query, make_vectors

from fedsecure.errors import ProtocolError
from fedsecure.identity import keys as identity_keys
from fedsecure.secagg import keys, prg, recovery, shamir, transcript
from fedsecure.secagg.client import SecAggClient
from fedsecure.secagg.collection import PublicKeys
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch import EpochClient, Epochs
from fedsecure.secagg.epoch_server import EpochServer
from fedsecure.secagg.server import Phase
from fedsecure.wire import secagg_pb2 as pb

N = 5
Won = tuple[np.ndarray, np.ndarray]


class HostileEpochs:
    """Five sites and an epoch of two slots; ``site-00`` is the victim."""

    def __init__(self, *, colluder: int = 5) -> None:
        self.world = EpochWorld(N, slots=2)
        self.sites = federation(N).sites
        self.target, self.colluder = self.sites[0], colluder
        self.mole = self.sites[colluder - 1]

    # --- what the attacks are made of -----------------------------------------------------------------------------

    def epoch(self, site: str) -> EpochClient:
        (epoch,) = self.world.sites[site]._epochs.values()
        return epoch

    def public(self, slot: int = 0) -> PublicKeys:
        return self.world.server._collection.public_keys(slot)

    def begin(self, descriptor: RoundDescriptor, sites: Collection[str]) -> dict[str, tuple[SecAggClient, np.ndarray]]:
        """Ask these sites for a round without an honest server in the way; returns their uploads."""
        out, vectors = {}, make_vectors(self.world.round(descriptor.round, slot=0), descriptor.round)
        for site in sites:
            client = self.world.sites[site].round(descriptor)
            masked = client.mask(vectors[site])
            out[site] = client, np.frombuffer(masked.payload, dtype="<u4")
        return out

    def agreed(self, begun: dict[str, tuple[SecAggClient, np.ndarray]], members: list[int]) -> bytes:
        """The signatures of these sites on one survivor set, and the colluder's, as the message that opens it."""
        signed, clients = {}, [client for client, _ in begun.values()]
        for client in clients:
            signature = client_message(client.sign_survivors(survivor_list(members))).survivor_signature
            signed[signature.index] = signature.signature
        one, d = clients[0], clients[0]._descriptor
        if d.index(self.mole) in members:
            body = transcript.survivors_body(one._t1, one._t2, members)
            signed[d.index(self.mole)] = transcript.sign(federation(N).keys[self.mole], "survivors", d.ctx, body)
        return signatures(signed)

    def held(self, slot: int = 0) -> dict[int, tuple[bytes, bytes]]:
        """The colluder's own shares of a slot: owner → (of s, of b)."""
        return dict(self.epoch(self.mole)._slots[slot].shares)

    def gathered(self, given: dict[int, pb.Unmask], held: dict[int, tuple[bytes, bytes]], owner: int) -> list[Shares]:
        """Shares of the mask key and of the seed of ``owner``, by the holder's number in the epoch."""
        seeds, mask_keys = HostileAggregator.gather(given, owner)
        return [{**mask_keys, self.colluder: held[owner][0]}, {**seeds, self.colluder: held[owner][1]}]

    def peel(self, total: np.ndarray, ctx: bytes, *, within: list[int], shares: dict[int, list[Shares]]) -> np.ndarray:
        """Remove every mask from the sum of the uploads of the sites ``within``, with the server's own means."""
        public = self.public()
        masks = recovery.open_masks(
            ctx=ctx,
            threshold=self.world.descriptor.threshold,
            survivors=within,
            key_shares={owner: pair[0] for owner, pair in shares.items()},
            seed_shares={owner: pair[1] for owner, pair in shares.items()},
            commitments=public.commitments,
            mask_keys=public.mask_keys,
            commitment_ctx=public.ctx,
        )
        out = total.astype("<u4")
        prg.add_masks(out, masks.plus, masks.minus)
        return out

    # --- the attacks ----------------------------------------------------------------------------------------------

    def slot_replay(self) -> Won:
        """One slot for two rounds: the first opens the victim's seed, the second, without it, its mask key."""
        world = self.world.set_up()
        held = self.held()
        run = SlotRun(world, world.round(0)).masked().survivors().unmask()
        given = {i: client_message(run.sent["unmask", s]).unmask for i, s in enumerate(self.sites, 1)}
        seeds = self.gathered(given, held, 1)[1]
        again = self.begin(world.round(1, slot=0), self.sites[1:4])
        members = [2, 3, 4, 5]
        shown = self.agreed(again, members)
        second = {i: client_message(again[self.sites[i - 1]][0].unmask(shown)).unmask for i in (2, 3, 4)}
        mask_keys = self.gathered(second, held, 1)[0]
        t, ctx, public = world.descriptor.threshold, run.descriptor.ctx, self.public()
        seed = shamir.reconstruct(dict(list(seeds.items())[:t])) or b""
        private = X25519PrivateKey.from_private_bytes(shamir.reconstruct(dict(list(mask_keys.items())[:t])) or b"")
        pair = [keys.pair_mask_key(private, public.mask_keys[j], ctx=ctx, own=1, peer=j) for j in members]
        x = np.frombuffer(run.uploads[self.target][1], dtype="<u4").copy()
        prg.add_masks(x, [], [keys.self_mask_key(seed, ctx=ctx, index=1), *pair])
        return x, run.vectors[self.target]

    def overlapping_survivors(self) -> Won:
        """One round on two slots, with and without the victim: the difference of two honest sums is its vector."""
        world = self.world.set_up()
        return self._difference(
            SlotRun(world, world.round(0)), lambda: SlotRun(world, world.round(0, slot=1, attempt=0))
        )

    def stale_epoch(self) -> Won:
        """After a power cut the same epoch is set up again, and the same round asked for again on its slot."""
        first = SlotRun(self.world.set_up(), self.world.round(0))

        def again() -> SlotRun:
            f, world = federation(N), self.world
            world.sites = {site: world.start(site) for site in self.sites}
            world.server = EpochServer(world.descriptor, roster=f.roster, signing_key=f.aggregator)
            return SlotRun(world.set_up(), world.round(0))

        return self._difference(first, again)

    def _difference(self, run: SlotRun, again: object) -> Won:
        everybody = run.masked().survivors().unmask().server.finish().total
        second: SlotRun = again()  # type: ignore[operator]
        second.drops = {Phase.MASKED: [self.target]}
        others = second.masked().survivors().unmask().server.finish().total
        return (everybody - others).astype(np.uint32), run.vectors[self.target]

    def changed_cohort(self) -> Won:
        """Keys for five, rounds for three: the colluder sits in both cohorts, and a sum of two honest sites opens."""
        world = self.world.set_up()
        held, mole = self.held(), self.colluder
        cohorts = self.sites[:3], self.sites[2:]
        descriptors = [
            RoundDescriptor.from_query(
                make_query(N, cohort=cohort),
                roster=federation(N).roster,
                config_hash=CONFIG,
                base_hash=BASE,
                epoch=world.descriptor.ctx,
            )
            for cohort in cohorts
        ]
        uploads, given = {}, {}
        for descriptor in descriptors:
            honest = self.begin(descriptor, [site for site in descriptor.cohort if site != self.mole])
            shown = self.agreed(honest, [1, 2, 3])
            for site, (client, upload) in honest.items():
                uploads[site] = upload
                given[self.sites.index(site) + 1] = client_message(client.unmask(shown)).unmask
        shares = {owner: self.gathered(given, held, owner) for owner in (1, 2, 4, 5)}
        # Its own key the colluder knows; here as shares that give it back.
        own = shamir.share(self.key.private_bytes_raw(), world.descriptor.threshold, points=(1, 2, 4, 5))
        shares[mole] = [own, {}]
        total = uploads[self.sites[0]] + uploads[self.sites[1]]
        vectors = make_vectors(world.round(0, slot=0), 0)
        won = self.peel(total, descriptors[0].ctx, within=[1, 2], shares=shares)
        return won, vectors[self.sites[0]] + vectors[self.sites[1]]

    def lowered_threshold(self) -> Won:
        """Keys for t = u_min = 4, a round with t = u_min = 2: every site hears another set, and the victim opens."""
        world = self.world.set_up()
        held = self.held()
        descriptor = forge(world.round(0), threshold=2, min_survivors=2)
        uploads = self.begin(descriptor, self.sites[:4])
        given = {}
        for i, site in enumerate(self.sites[:4], 1):
            shown = self.agreed({site: uploads[site]}, sorted({1, i, 5}))
            given[i] = client_message(uploads[site][0].unmask(shown)).unmask
        shares = {owner: self.gathered(given, held, owner) for owner in range(1, 5)}
        shares[5] = [shamir.share(self.key.private_bytes_raw(), 4, points=(1, 2, 3, 4)), {}]
        won = self.peel(uploads[self.target][1], descriptor.ctx, within=[1], shares=shares)
        return won, make_vectors(descriptor, 0)[self.target]

    def model_inconsistency(self) -> Won:
        """Keys are there before any model is: the others use the same slot for a model of zero gradients."""
        world = self.world.set_up()
        true = world.round(0)
        dead = replace(true, model_hash=bytes(32))
        begun = self.begin(true, self.sites[:1]) | self.begin(dead, self.sites[1:])
        others = {site: begun[site] for site in self.sites[1:]}
        shown = self.agreed(others, [1, 2, 3, 4, 5])
        given = {i: client_message(begun[self.sites[i - 1]][0].unmask(shown)).unmask for i in (2, 3, 4, 5)}
        total, own = np.zeros(true.length, dtype="<u4"), []
        for i, site in enumerate(self.sites, 1):
            total += begun[site][1]
            seed = shamir.reconstruct(HostileAggregator.gather(given, i)[0]) or b""
            own.append(keys.self_mask_key(seed, ctx=begun[site][0].ctx, index=i))
        prg.add_masks(total, [], own)
        vectors = make_vectors(true, 0)
        for site in others:
            total -= vectors[site]  # zero, in truth
        return total, vectors[self.target]

    def late_upload(self) -> Won:
        """On a slot: declared gone, the victim's mask key is opened by the rules, and then its vector comes."""
        world = self.world.set_up()
        held, public = self.held(), self.public()
        run = SlotRun(world, world.round(0))
        masked = run.clients[self.target].mask(run.vectors[self.target])
        run.live.remove(self.target)
        run.masked().survivors().unmask()
        given = {i: client_message(run.sent["unmask", site]).unmask for i, site in enumerate(self.sites[1:], 2)}
        mask_keys, seeds = self.gathered(given, held, 1)
        assert len(seeds) == 1, "the colluder's own"
        with pytest.raises(ProtocolError, match="FS-1325"):
            run.server.receive_masked(self.target, masked.header, masked.payload)
        t, ctx = world.descriptor.threshold, run.descriptor.ctx
        private = X25519PrivateKey.from_private_bytes(shamir.reconstruct(dict(list(mask_keys.items())[:t])) or b"")
        pair = [keys.pair_mask_key(private, public.mask_keys[j], ctx=ctx, own=1, peer=j) for j in range(2, N + 1)]
        x = np.frombuffer(masked.payload, dtype="<u4").copy()
        prg.add_masks(x, [], [keys.self_mask_key(bytes(32), ctx=ctx, index=1), *pair])
        return x, run.vectors[self.target]

    def key_substitution(self) -> Won:
        """The attacker sets the epoch up with the victim alone, and plays all others."""
        f, world = federation(N), self.world
        own = {site: identity_keys.generate() for site in self.sites if site != self.target}
        forged = forged_roster(f.roster, {site: identity_keys.public_bytes(key) for site, key in own.items()})
        for site, key in own.items():
            world.sites[site] = Epochs(site=site, signing_key=key, roster=forged, latch=world.latches[site])
        world.server = EpochServer(world.descriptor, roster=forged, signing_key=f.aggregator)
        run = SlotRun(world.set_up(), world.round(0))
        total = run.masked().survivors().unmask().server.finish().total
        return (total - run.expected(own)).astype(np.uint32), run.vectors[self.target]

    def split_advertisements(self) -> set[bytes]:
        """The colluder signs two advertisements, and half of the sites hear either; returns its keys in their slots."""
        world, (clients, raw) = self.world, self._advertised()
        other = Epochs(
            site=self.mole, signing_key=federation(N).keys[self.mole], roster=federation(N).roster, latch=_NoLatch()
        )
        double = client_message(other.set_up(world.descriptor).advertise()).advertisement
        for site, message in raw.items():
            assert world.server.receive(site, message)
        relayed = dict(world.server.close())

        def swap(message: pb.ServerMessage) -> None:
            message.advertisements.advertisements[self.colluder - 1].CopyFrom(double)

        honest = self.sites[:4]
        for site in honest[2:]:
            relayed[site] = edit(relayed[site], swap)
        sent = {site: client_message(clients[site].shares(relayed[site])).share_keys for site in self.sites}
        for i, site in enumerate(honest, 1):
            down = pb.RoutedShares(headers=[sent[s].header for s in self.sites])
            for k, peer in enumerate(self.sites, 1):
                if k != i:
                    sealed = next(share for share in sent[peer].shares if share.recipient == i)
                    down.shares.append(sealed)
            clients[site].receive_shares(pb.ServerMessage(routed_shares=down).SerializeToString())
        return {self.epoch(site)._slots[0].peer_keys[self.colluder] for site in honest}

    def split_headers(self) -> set[tuple[int, ...]]:
        """Half of the sites hear that the colluder shared keys, half that it did not; returns the views they opened."""
        world, (clients, raw) = self.world, self._advertised()
        for site, message in raw.items():
            world.server.receive(site, message)
        for site, message in world.server.close().items():
            world.server.receive(site, clients[site].shares(message))

        def leave_out(message: pb.ServerMessage) -> None:
            routed = message.routed_shares
            headers = [h for h in routed.headers if h.index != self.colluder]
            shares = [s for s in routed.shares if s.sender != self.colluder]
            del routed.headers[:], routed.shares[:]
            routed.headers.extend(headers)
            routed.shares.extend(shares)

        honest = self.sites[:4]
        for site, message in world.server.close().items():
            clients[site].receive_shares(edit(message, leave_out) if site in honest[2:] else message)
        begun = self.begin(world.round(0), honest)
        shown = self.agreed(begun, [1, 2, 3, 4])
        views = {site: begun[site][0]._members for site in honest}
        for site in honest:
            begun[site][0].unmask(shown)
        return set(views.values())

    @property
    def key(self) -> X25519PrivateKey:
        """The colluder's own mask key of slot 0, which it has not used."""
        return self.epoch(self.mole)._slots[0].mask_key

    def _advertised(self) -> tuple[dict[str, EpochClient], dict[str, bytes]]:
        clients = {site: epochs.set_up(self.world.descriptor) for site, epochs in self.world.sites.items()}
        return clients, {site: client.advertise() for site, client in clients.items()}


class _NoLatch:
    """The colluder remembers nothing."""

    def begin(self, run: bytes, round: int, attempt: int, ctx: bytes) -> None: ...
    def mark_signed(self, ctx: bytes) -> None: ...
    def mark_consumed(self, ctx: bytes) -> None: ...
