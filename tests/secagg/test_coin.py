"""The toss for a run's draw: what an aggregator or a site can do to it, and what each attack wins without its check."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from secagg_world import federation

from fedsecure.errors import FedsecureError, ProtocolError, RoundAborted
from fedsecure.identity import keys
from fedsecure.secagg import coin
from fedsecure.secagg.coin import CoinServer, CoinSite, Record, Toss

SITES = 5


def make_toss(number: int = 0, *, run: bytes = b"r" * 16, required: int = 4) -> Toss:
    world = federation(SITES)
    parties = world.sites
    return Toss(run, world.roster.hash, bytes(32), number, parties, required)


class Table:
    """Five sites and an aggregator, step by step."""

    def __init__(self, toss: Toss | None = None) -> None:
        world = federation(SITES)
        self.toss, self.roster = toss or make_toss(), world.roster
        self.sites = {
            site: CoinSite(self.toss, site=site, signing_key=world.keys[site], roster=self.roster)
            for site in self.toss.parties
        }
        self.server = CoinServer(self.toss, roster=self.roster)

    def commit(self, *absent: str) -> Mapping[str, bytes]:
        for site, one in self.sites.items():
            if site not in absent:
                self.server.receive(site, one.commit())
        return self.server.close()

    def reveal(self, shown: Mapping[str, bytes], *absent: str) -> None:
        for site in shown:
            if site not in absent:
                self.server.receive(site, self.sites[site].reveal(shown[site]))
        self.server.close()

    def record(self) -> Record:
        self.reveal(self.commit())
        return self.server.record()


def test_everybody_reads_the_same_seed_from_the_record() -> None:
    table = Table()
    record = table.record()
    read = Record.parse(record.pack(), roster=table.roster)
    assert read == record
    assert read.seed == record.seed
    assert len(read.seed) == 32
    for site in table.sites.values():
        site.check(read)
    assert Toss.parse(table.toss.canonical()) == table.toss
    assert Table().record().seed != record.seed, "fresh nonces"


def test_who_does_not_commit_is_left_out_and_who_does_not_reveal_ends_the_toss() -> None:
    table = Table()
    last = table.toss.parties[-1]
    shown = table.commit(last)
    assert last not in shown
    table.reveal(shown)
    assert set(table.server.record().reveals) == set(table.toss.parties) - {last}
    table.sites[last].check(table.server.record())

    table = Table()
    with pytest.raises(RoundAborted, match=f"FS-1396.*{last}"):
        table.reveal(table.commit(), last)
    assert table.server.withheld() == (last,)

    table = Table()
    with pytest.raises(RoundAborted, match="FS-1396"):
        table.commit(*table.toss.parties[:2])
    assert table.server.withheld() == ()


def test_nonces_stay_hidden_until_all_have_committed() -> None:
    table = Table()
    shown = table.commit()
    nonces = [site._nonce for site in table.sites.values()]
    assert not any(nonce in raw for raw in shown.values() for nonce in nonces)


Forgery = Callable[[Table, Mapping[str, bytes]], bytes]


def without_me(table: Table, shown: Mapping[str, bytes]) -> bytes:
    return coin.pack_list({site: table.server._commitments[site] for site in table.toss.parties[1:]})


def too_few(table: Table, shown: Mapping[str, bytes]) -> bytes:
    return coin.pack_list({site: table.server._commitments[site] for site in table.toss.parties[:3]})


def of_another_run(table: Table, shown: Mapping[str, bytes]) -> bytes:
    other = Table(make_toss(run=b"o" * 16))
    other.commit()
    mine = {table.toss.parties[0]: table.server._commitments[table.toss.parties[0]]}
    return coin.pack_list({**other.server._commitments, **mine})


def my_commitment_changed(table: Table, shown: Mapping[str, bytes]) -> bytes:
    me = table.toss.parties[0]
    other = CoinSite(table.toss, site=me, signing_key=federation(SITES).keys[me], roster=table.roster)
    raw = other.commit()
    return coin.pack_list({**table.server._commitments, me: coin.Signed(raw[:32], raw[32:])})


def out_of_order(table: Table, shown: Mapping[str, bytes]) -> bytes:
    return coin.pack_list({site: table.server._commitments[site] for site in reversed(table.toss.parties)})


def endless(table: Table, shown: Mapping[str, bytes]) -> bytes:
    return struct.pack(">I", 1 << 31)


LISTS: dict[Forgery, str] = {
    without_me: "FS-1393",
    my_commitment_changed: "FS-1393",
    too_few: "FS-1394",
    of_another_run: "FS-1392",
    out_of_order: "FS-1391",
    endless: "FS-1391",
}


@pytest.mark.parametrize("forge", LISTS, ids=lambda f: f.__name__)
def test_a_list_that_is_not_everybodys_is_not_answered(forge: Forgery) -> None:
    table = Table()
    shown = table.commit()
    me = table.toss.parties[0]
    with pytest.raises(ProtocolError, match=LISTS[forge]):
        table.sites[me].reveal(forge(table, shown))
    # Nothing was given away, and the true list is answered.
    table.server.receive(me, table.sites[me].reveal(shown[me]))


def test_two_lists_in_one_toss_are_not_both_answered() -> None:
    table = Table()
    everybody = table.commit()
    first = table.toss.parties[0]
    fewer = coin.pack_list({site: table.server._commitments[site] for site in table.toss.parties[:4]})
    table.sites[first].reveal(everybody[first])
    assert table.sites[first].reveal(everybody[first]), "the same again, after a lost reply"
    with pytest.raises(ProtocolError, match="FS-1395"):
        table.sites[first].reveal(fewer)


def test_two_sites_shown_different_lists_cannot_be_in_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each sees a list with itself in it and enough sites; the reveals are signed for different lists.
    table = Table()
    table.commit()
    given = table.server._commitments
    one, other = table.toss.parties[:2]
    lists = {
        site: coin.pack_list({s: given[s] for s in table.toss.parties if s != (other if site == one else one)})
        for site in table.toss.parties
    }
    reveals = {site: table.sites[site].reveal(lists[site]) for site in table.toss.parties}
    common = [site for site in table.toss.parties if site != other]
    record = Record(
        table.toss,
        {site: given[site] for site in common},
        {site: coin.Signed(reveals[site][:32], reveals[site][32:]) for site in common},
    )
    with pytest.raises(ProtocolError, match="FS-1392"):
        Record.parse(record.pack(), roster=table.roster)
    # The positive control: it is the signature over the list, and nothing else, that shows it.
    monkeypatch.setattr(coin.keys, "verify", lambda *_: True)
    Record.parse(record.pack(), roster=table.roster)


def swapped_nonce(record: Record) -> Record:
    world = federation(SITES)
    site = record.toss.parties[-1]
    nonce = bytes(32)
    body = record.toss.ctx + record.list_hash + nonce
    signed = coin.Signed(nonce, keys.sign(world.keys[site], coin._REVEAL, body))
    return replace(record, reveals={**record.reveals, site: signed})


def unsigned_nonce(record: Record) -> Record:
    site = record.toss.parties[0]
    return replace(record, reveals={**record.reveals, site: coin.Signed(record.reveals[site].value, bytes(64))})


def short(record: Record) -> Record:
    kept = record.toss.parties[:3]
    return replace(
        record,
        commitments={site: record.commitments[site] for site in kept},
        reveals={site: record.reveals[site] for site in kept},
    )


def replayed(record: Record) -> Record:
    return replace(record, toss=make_toss(run=b"n" * 16))


RECORDS: dict[Callable[[Record], Record], str] = {
    swapped_nonce: "FS-1392",  # a colluder that chooses its nonce after it saw the others'
    unsigned_nonce: "FS-1392",
    short: "FS-1394",
    replayed: "FS-1392",  # the toss of an earlier run under a new run's name
}


@pytest.mark.parametrize("forge", RECORDS, ids=lambda f: f.__name__)
def test_a_record_that_is_not_of_this_toss_is_refused(forge: Callable[[Record], Record]) -> None:
    table = Table()
    record = table.record()
    with pytest.raises(ProtocolError, match=RECORDS[forge]):
        Record.parse(forge(record).pack(), roster=table.roster)
    Record.parse(record.pack(), roster=table.roster)


def test_without_the_commitment_a_colluder_would_choose_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The positive control of the swapped nonce: signatures alone let it through, with another seed.
    table = Table()
    record = table.record()
    monkeypatch.setattr(coin, "compare_digest", lambda *_: True)
    assert Record.parse(swapped_nonce(record).pack(), roster=table.roster).seed != record.seed


def test_a_reveal_that_was_dropped_is_missed_by_its_site() -> None:
    table = Table()
    shown = table.commit()
    first = table.toss.parties[0]
    table.reveal(shown)
    # The aggregator's colluders sign again, for a list without the first.
    again = Table(table.toss)
    record = (again.reveal(again.commit(first)), again.server.record())[1]
    Record.parse(record.pack(), roster=table.roster)
    with pytest.raises(ProtocolError, match="FS-1393"):
        table.sites[first].check(record)
    table.sites[first].check(table.server.record())


def test_a_message_of_a_stranger_or_of_another_size_is_refused() -> None:
    table = Table()
    first, second, *_ = table.toss.parties
    with pytest.raises(ProtocolError, match="FS-1391"):
        table.server.receive(first, bytes(95))
    with pytest.raises(ProtocolError, match="FS-1392"):
        table.server.receive(second, table.sites[first].commit())
    table.server.receive("stranger", bytes(96))
    assert table.server.waiting_for() == table.toss.parties


@pytest.mark.parametrize("raw", [b"", b"\0" * 40, coin._TOSS, coin._RECORD, coin._RECORD + bytes(4)])
def test_bytes_that_are_none_are_one_typed_refusal(raw: bytes) -> None:
    with pytest.raises(FedsecureError, match="FS-1391"):
        Toss.parse(raw)
    with pytest.raises(FedsecureError, match="FS-1391"):
        Record.parse(raw, roster=federation(SITES).roster)


def test_every_changed_byte_of_a_record_is_noticed() -> None:
    table = Table()
    raw = table.record().pack()
    for position in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[position] ^= 1
        with pytest.raises(FedsecureError):
            Record.parse(bytes(changed), roster=table.roster)
