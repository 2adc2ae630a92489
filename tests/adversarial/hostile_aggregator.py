"""An aggregator that attacks, with one site as its colluder: one method for each attack of secagg.md §2 and §2.7.

Each method does all that it needs, including the site's own gate where the attack has to pass it, and returns what it
has won: a victim's vector, or a state it must not be able to make. A check that holds raises out of the method.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from secagg_world import (
    BASE,
    CONFIG,
    Run,
    client_message,
    edit,
    federation,
    make_client,
    make_descriptor,
    make_query,
    make_vectors,
    server_message,
)

from fedsecure.identity import keys as identity_keys
from fedsecure.identity.roster import Roster
from fedsecure.messages import Query
from fedsecure.secagg import keys, policy, prg, shamir, transcript
from fedsecure.secagg.client import SecAggClient
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.secagg.server import Phase, SecAggServer
from fedsecure.secagg.spool import MemorySpool
from fedsecure.wire import secagg_pb2 as pb

Shares = dict[int, bytes]


def forge(descriptor: RoundDescriptor, **changes: object) -> RoundDescriptor:
    """A descriptor built without the constructor's checks."""
    fake = object.__new__(RoundDescriptor)
    for field in fields(RoundDescriptor):
        object.__setattr__(fake, field.name, changes.get(field.name, getattr(descriptor, field.name)))
    return fake


def survivor_list(members: list[int]) -> bytes:
    return pb.ServerMessage(survivor_list=pb.SurvivorList(survivors=members)).SerializeToString()


def signatures(items: dict[int, bytes]) -> bytes:
    message = pb.SurvivorSignatures()
    for index in sorted(items):
        message.signatures.add(index=index, signature=items[index])
    return pb.ServerMessage(survivor_signatures=message).SerializeToString()


class HostileAggregator:
    """Five sites; ``site-00`` is the victim, ``site-04`` the colluder, whose every secret the aggregator has."""

    victim, colluder = 1, 5

    def __init__(self, n: int = 5) -> None:
        self.n, self.query, self.descriptor = n, make_query(n), make_descriptor(n)
        self.sites = self.descriptor.cohort
        self.target = self.sites[self.victim - 1]

    # --- what the attacks are made of -----------------------------------------------------------------------------

    def gate(self, descriptor: RoundDescriptor, query: Query | None = None) -> RoundDescriptor:
        """The victim's own check of a round, with the default policy."""
        policy.check(
            descriptor,
            query or self.query,
            policy=policy.RoundPolicy(),
            roster=federation(self.n).roster,
            site=self.target,
            config_hash=CONFIG,
            base_hash=BASE,
        )
        return descriptor

    def sign(self, run: Run, index: int, kind: str, body: bytes) -> bytes:
        """The colluder's signature on whatever is wanted."""
        return transcript.sign(federation(self.n).keys[self.sites[index - 1]], kind, run.descriptor.ctx, body)

    def unmask(self, run: Run, index: int, signed: dict[int, bytes]) -> pb.Unmask:
        """Show an honest site signatures, and take what it gives away."""
        client = run.clients[self.sites[index - 1]]
        return client_message(client.unmask(signatures(signed))).unmask

    def survivors(self, run: Run, index: int, members: list[int]) -> bytes:
        client = run.clients[self.sites[index - 1]]
        return client_message(client.sign_survivors(survivor_list(members))).survivor_signature.signature

    def opened(self, run: Run, seeds: Shares, mask_keys: Shares, *, index: int = 0) -> np.ndarray:
        """x of a site from both of its secrets: what no one must ever be able to compute."""
        index, t = index or self.victim, run.descriptor.threshold
        ctx, site = run.descriptor.ctx, self.sites[(index or self.victim) - 1]
        ads = {ad.index: ad for ad in server_message(run.broadcast["advertise"][site]).advertisements.advertisements}
        members = {h.index for h in server_message(run.broadcast["shares"][site]).routed_shares.headers}
        assert min(len(seeds), len(mask_keys)) >= t, "too few shares to open a site"
        seed = shamir.reconstruct(dict(list(seeds.items())[:t]))
        private = X25519PrivateKey.from_private_bytes(shamir.reconstruct(dict(list(mask_keys.items())[:t])) or b"")
        x = np.frombuffer(run.uploads[site][1], dtype="<u4").copy()
        plus, minus = [], [keys.self_mask_key(seed or b"", ctx=ctx, index=index)]
        for j in sorted(members - {index}):
            key = keys.pair_mask_key(private, ads[j].mask_key, ctx=ctx, own=index, peer=j)
            (minus if j > index else plus).append(key)
        prg.add_masks(x, plus, minus)
        return x

    @staticmethod
    def gather(messages: dict[int, pb.Unmask], owner: int) -> tuple[Shares, Shares]:
        """(shares of the seed, shares of the mask key) of ``owner`` in what was given away."""
        seeds = {h: s.share for h, m in messages.items() for s in m.seed_shares if s.owner == owner}
        mask_keys = {h: s.share for h, m in messages.items() for s in m.mask_key_shares if s.owner == owner}
        return seeds, mask_keys

    def impersonate(self, roster: Roster, descriptor: RoundDescriptor, run_keys: dict, vectors: dict) -> np.ndarray:
        """A whole round in which the attacker plays every site but the victim; returns the victim's vector."""
        f = federation(self.n)
        forged = forged_roster(roster, {s: identity_keys.public_bytes(k) for s, k in run_keys.items()})
        server = SecAggServer(descriptor, roster=forged, signing_key=f.aggregator, spool=MemorySpool())
        clients = {
            site: SecAggClient(descriptor, site=site, signing_key=key, roster=forged, latch=MemoryLatch())
            for site, key in run_keys.items()
            if site != self.target
        }
        clients[self.target] = SecAggClient(
            descriptor, site=self.target, signing_key=f.keys[self.target], roster=roster, latch=MemoryLatch()
        )
        run = Run.__new__(Run)
        run.descriptor, run.drops, run.server, run.clients, run.vectors = descriptor, {}, server, clients, vectors
        run.live, run.sent, run.broadcast, run.uploads = list(descriptor.cohort), {}, {}, {}
        total = run.complete().total
        for site in run_keys:
            if site != self.target:
                total = total - vectors[site].astype(np.int64)
        return total.astype(np.uint32)

    # --- the attacks ----------------------------------------------------------------------------------------------

    def overlapping_survivor_sets(self) -> tuple[np.ndarray, np.ndarray]:
        """Open the victim's seed with one set and its mask key with another: the classic against one-shot release."""
        run = Run(self.gate(self.descriptor)).advertise().shares().masked()
        everyone, without = [1, 2, 3, 4, 5], [2, 3, 4, 5]
        mine = run.clients[self.sites[self.colluder - 1]]
        own_seed, own_key = mine._shares[self.victim][1], mine._shares[self.victim][0]
        given: list[dict[int, pb.Unmask]] = []
        for members in (everyone, without):
            signed = {i: self.survivors(run, i, members) for i in members}
            given.append({i: self.unmask(run, i, signed) for i in members if i != self.colluder})
        seeds, _ = self.gather(given[0], self.victim)
        _, mask_keys = self.gather(given[1], self.victim)
        seeds[self.colluder], mask_keys[self.colluder] = own_seed, own_key
        return self.opened(run, seeds, mask_keys), run.vectors[self.target]

    def split_view(self) -> tuple[np.ndarray, np.ndarray]:
        """n = 7, c = 2: every honest site hears of other drop-outs, so that a sum of fewer than u_min sites opens."""
        run = Run(self.gate(self.descriptor)).advertise().shares().masked()
        told = {1: [3, 4], 2: [3, 5], 3: [4, 5], 4: [3, 5], 5: [4]}
        held = {c: dict(run.clients[self.sites[c - 1]]._shares) for c in (6, 7)}
        views = {i: [k for k in range(1, 8) if k not in absent] for i, absent in told.items()}
        signed = {i: self.survivors(run, i, view) for i, view in views.items()}
        given = {}
        for i, view in views.items():
            body = transcript.survivors_body(run.clients[self.sites[0]]._t1, run.clients[self.sites[0]]._t2, view)
            shown = {k: s for k, s in signed.items() if k in view}
            shown |= {c: self.sign(run, c, "survivors", body) for c in (6, 7)}
            given[i] = self.unmask(run, i, shown)
        t, ctx = run.descriptor.threshold, run.descriptor.ctx
        ads = server_message(run.broadcast["advertise"][self.target]).advertisements.advertisements
        public = {ad.index: ad.mask_key for ad in ads}
        left = [1, 2, 6, 7]
        total = np.zeros(run.descriptor.length, dtype="<u4")
        plus, minus = [], []
        for i in left:
            total += np.frombuffer(run.uploads[self.sites[i - 1]][1], dtype="<u4")
            seeds = self.gather(given, i)[0] | {c: h[i][1] for c, h in held.items()}
            seed = shamir.reconstruct(dict(list(seeds.items())[:t])) or b""
            minus.append(keys.self_mask_key(seed, ctx=ctx, index=i))
        for gone in (3, 4, 5):
            shares = self.gather(given, gone)[1] | {c: h[gone][0] for c, h in held.items()}
            private = X25519PrivateKey.from_private_bytes(shamir.reconstruct(dict(list(shares.items())[:t])) or b"")
            for i in left:
                key = keys.pair_mask_key(private, public[i], ctx=ctx, own=gone, peer=i)
                (minus if gone > i else plus).append(key)
        prg.add_masks(total, plus, minus)
        for c in (6, 7):
            total -= run.vectors[self.sites[c - 1]]
        return total, run.vectors[self.sites[0]] + run.vectors[self.sites[1]]

    def lowered_threshold(self) -> tuple[np.ndarray, np.ndarray]:
        """t = 3 of 5 with one colluder: now two views of the survivors get t signatures each, all of them valid."""
        run = Run(self.gate(forge(self.descriptor, threshold=3))).advertise().shares().masked()
        views = {1: [1, 2, 3, 4, 5], 2: [1, 2, 3, 4, 5], 3: [2, 3, 4, 5], 4: [2, 3, 4, 5]}
        own_key, own_seed = run.clients[self.sites[self.colluder - 1]]._shares[self.victim]
        signed = {i: self.survivors(run, i, view) for i, view in views.items()}
        given = {}
        for i, view in views.items():
            one = run.clients[self.sites[i - 1]]
            forged = self.sign(run, 5, "survivors", transcript.survivors_body(one._t1, one._t2, view))
            shown = {k: s for k, s in signed.items() if views[k] == view} | {5: forged}
            given[i] = self.unmask(run, i, shown)
        seeds, mask_keys = self.gather(given, self.victim)
        seeds[5], mask_keys[5] = own_seed, own_key
        return self.opened(run, seeds, mask_keys), run.vectors[self.target]

    def lowered_survivors(self) -> tuple[np.ndarray, np.ndarray]:
        """t = u_min = 2: a sum of the victim and the colluder."""
        descriptor = self.gate(forge(self.descriptor, threshold=2, min_survivors=2))
        run = Run(descriptor, drops={Phase.MASKED: self.sites[1:4]})
        total = run.complete().total - run.vectors[self.sites[4]].astype(np.int64)
        return total.astype(np.uint32), run.vectors[self.target]

    def key_substitution(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys of the attacker in the place of every peer's, signed with keys of the attacker."""
        own = {site: identity_keys.generate() for site in self.sites if site != self.target}
        own[self.target] = federation(self.n).keys[self.target]
        vectors = make_vectors(self.descriptor)
        won = self.impersonate(federation(self.n).roster, self.gate(self.descriptor), own, vectors)
        return won, vectors[self.target]

    def sybils(self, folder: Path) -> tuple[np.ndarray, np.ndarray]:
        """A roster full of the attacker's sites, signed by nobody the victim knows."""
        real, coordinator, mallory = federation(self.n), identity_keys.generate(), identity_keys.generate()
        own = {site: identity_keys.generate() for site in self.sites if site != self.target}
        own[self.target] = real.keys[self.target]
        entries = tuple(
            replace(e, identity_key=identity_keys.public_bytes(own[e.site])) if e.site in own else e
            for e in real.roster.entries
        )
        stuffed = replace(real.roster, entries=entries)
        stuffed.save(folder / "roster.json", mallory)
        loaded = Roster.load(folder / "roster.json", identity_keys.public_bytes(coordinator))
        descriptor = replace(self.descriptor, roster_hash=loaded.hash)
        policy.check(
            descriptor,
            self.query,
            policy=policy.RoundPolicy(),
            roster=loaded,
            site=self.target,
            config_hash=CONFIG,
            base_hash=BASE,
        )
        vectors = make_vectors(descriptor)
        return self.impersonate(loaded, descriptor, own, vectors), vectors[self.target]

    def replayed_descriptor(self, latch: MemoryLatch) -> tuple[np.ndarray, np.ndarray]:
        """The same round again after a restart, with one upload lost: the difference of the sums is that site's."""
        return self._twice(self.descriptor, self.descriptor, latch)

    def round_rollback(self, latch: MemoryLatch) -> tuple[np.ndarray, np.ndarray]:
        """Round 5, and then round 3 on the same records."""
        fifth, third = (make_descriptor(self.n, query=make_query(self.n, round=r)) for r in (5, 3))
        return self._twice(fifth, third, latch)

    def _twice(self, one: RoundDescriptor, two: RoundDescriptor, latch: MemoryLatch) -> tuple[np.ndarray, np.ndarray]:
        """``latch`` is that of a site whose vector is wanted in the difference of two sums."""
        sums = []
        for descriptor, gone in ((one, ()), (two, (self.target,))):
            run = Run(descriptor, drops={Phase.MASKED: gone})
            run.clients[self.target] = make_client(descriptor, self.target, latch)
            sums.append(run.complete().total)
        return (sums[0] - sums[1]).astype(np.uint32), run.vectors[self.target]

    def model_inconsistency(self) -> tuple[np.ndarray, np.ndarray]:
        """A model for the others on which their gradients are zero; the victim gets the true one."""
        dead = make_query(self.n, inputs={"adapter": bytes(32)})
        others = make_descriptor(self.n, query=dead)
        run = Run(others)
        run.clients[self.target] = make_client(self.gate(self.descriptor), self.target)
        for site in self.sites[1:]:
            run.vectors[site] = np.zeros_like(run.vectors[site])
        return run.complete().total.astype(np.uint32), run.vectors[self.target]

    def small_order_point(self) -> tuple[bytes, bytes]:
        """The colluder advertises the point 0: whoever knows the messages knows the pair key with it."""
        run, point = Run(self.gate(self.descriptor)), bytes(32)
        ads = {i: client_message(run.clients[s].advertise()).advertisement for i, s in enumerate(self.sites, 1)}
        weak = ads[self.colluder]
        weak.mask_key = point
        weak.signature = self.sign(run, self.colluder, "advertise", transcript.advertisement_body(weak))
        raw = pb.ServerMessage(advertisements=pb.Advertisements(advertisements=ads.values())).SerializeToString()
        client, headers = run.clients[self.target], {}
        routed = {}
        for i, site in enumerate(self.sites, 1):
            message = pb.ClientMessage()
            if i == self.colluder:
                continue  # it has no private key for its point, and drops out with its shares
            message = client_message(run.clients[site].shares(raw))
            headers[i] = message.share_keys.header
            routed[i] = {s.recipient: s for s in message.share_keys.shares}
        # The colluder's header is its own affair: any commitment, signed.
        fake = pb.ShareHeader(
            index=5, advertisements_hash=headers[1].advertisements_hash, seed_commitment=bytes(32),
            ciphertexts_hash=bytes(32), signature=bytes(64),
        )  # fmt: skip
        fake.signature = self.sign(run, 5, "shares", transcript.header_body(fake))
        headers[5] = fake
        shares = [routed[i][self.victim] for i in (2, 3, 4)]
        down = pb.ServerMessage(routed_shares=pb.RoutedShares(headers=headers.values(), shares=shares))
        client.receive_shares(down.SerializeToString())
        used: list[bytes] = []
        original = keys.pair_mask_key

        def watch(*args: object, **names: object) -> bytes:
            used.append(original(*args, **names))  # type: ignore[arg-type]
            return used[-1]

        keys.pair_mask_key = watch  # type: ignore[assignment]
        try:
            client.mask(run.vectors[self.target])
        finally:
            keys.pair_mask_key = original
        low, high = ads[1].mask_key, point
        info = keys.PREFIX + b"pair-mask\0" + transcript.u32(1, 5) + low + high
        return keys.derive(bytes(32), run.descriptor.ctx, info), used[-1]

    def malformed_point(self, size: int) -> None:
        """A key of another length in a peer's advertisement, validly signed by the colluder."""
        run = Run(self.gate(self.descriptor)).advertise()

        def bend(message: pb.ServerMessage) -> None:
            ad = message.advertisements.advertisements[4]
            ad.mask_key = bytes([9]) * size
            body = transcript.u32(ad.index) + ad.cipher_key + ad.mask_key
            ad.signature = self.sign(run, 5, "advertise", body)

        run.clients[self.target].shares(edit(run.broadcast["advertise"][self.target], bend))

    def swapped_shares(self) -> tuple[np.ndarray, np.ndarray]:
        """The victim's sealed shares delivered as those of the colluder, which then drops out and is "opened"."""
        run = Run(self.gate(self.descriptor)).advertise().shares()
        for i, site in enumerate(self.sites[:4], 1):

            def swap(message: pb.ServerMessage, i: int = i) -> None:
                by_sender = {s.sender: s for s in message.routed_shares.shares}
                if i != self.victim:
                    by_sender[self.colluder].ciphertext = by_sender[self.victim].ciphertext

            run.broadcast["shares"][site] = edit(run.broadcast["shares"][site], swap)
        colluder = run.clients[self.sites[4]]
        colluder.receive_shares(run.broadcast["shares"][self.sites[4]])
        own_key, own_seed = colluder._shares[self.victim]
        run.drops = {Phase.MASKED: {self.sites[4]}}
        run.masked().survivors().unmask()
        given = {i: client_message(run.sent["unmask", s]).unmask for i, s in enumerate(self.sites[:4], 1)}
        seeds, _ = self.gather(given, self.victim)
        _, mask_keys = self.gather(given, self.colluder)
        mask_keys.pop(self.victim, None)  # it got the colluder's true share
        seeds[5], mask_keys[5] = own_seed, own_key
        return self.opened(run, seeds, mask_keys), run.vectors[self.target]

    def truncated_shares(self) -> tuple[np.ndarray, np.ndarray]:
        """A share cut short on its way, so that the holder has none, or gives away rubbish and is blamed for it."""
        run = Run(self.gate(self.descriptor)).advertise().shares()

        def cut(message: pb.ServerMessage) -> None:
            for share in message.routed_shares.shares:
                if share.sender == 2:
                    share.ciphertext = share.ciphertext[:-1]

        run.broadcast["shares"][self.target] = edit(run.broadcast["shares"][self.target], cut)
        run.masked().survivors().unmask()
        result = run.server.finish()
        assert result.unopened == {self.target: (self.sites[1],)}
        return result.total, run.expected(self.sites)

    def late_upload(self) -> tuple[np.ndarray, np.ndarray]:
        """The victim is declared gone, its mask key is opened by the rules, and then its vector is used after all."""
        run = Run(self.gate(self.descriptor)).advertise().shares()
        client = run.clients[self.target]
        client.receive_shares(run.broadcast["shares"][self.target])
        masked = client.mask(run.vectors[self.target])
        run.uploads[self.target] = (masked.header, masked.payload)
        run.live.remove(self.target)
        run.masked().survivors().unmask()
        given = {i: client_message(run.sent["unmask", s]).unmask for i, s in enumerate(self.sites[1:], 2)}
        seeds, mask_keys = self.gather(given, self.victim)
        assert not seeds
        guess = dict.fromkeys(range(1, 5), bytes(33))  # shares of a seed it does not have
        return self.opened(run, guess, mask_keys), run.vectors[self.target]


def forged_roster(real: Roster, own: dict[str, bytes]) -> Roster:
    """The attacker's copy of the roster, with its own keys and the true one's hash."""

    class Forged(Roster):
        hash = property(lambda self: real.hash)  # type: ignore[assignment]

    entries = tuple(replace(e, identity_key=own[e.site]) if e.site in own else e for e in real.entries)
    return Forged(real.federation, real.version, entries, real.aggregator_key, real.aggregator_fingerprint)
