"""Enrolment from invitation to identity, without sockets: each step's forgeries are refused, interruptions resumed."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from enrolling_world import Clock, Coordinated, changed
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.errors import FedsecureError, IdentityError
from fedsecure.files import write_whole
from fedsecure.identity import answers, certificates, enrolling, invitations, keys
from fedsecure.identity.invitations import Token
from fedsecure.identity.provision import load_identity
from fedsecure.identity.requests import Request, enrolment, renewal
from fedsecure.identity.spoken import confirm, federation_print, site_print

SECRET_FILES = ("identity.key", "tls-key.pem", "tls-key.next.pem", "coordinator.key", "ca-key.pem")


@pytest.fixture
def world(tmp_path: Path) -> Coordinated:
    return Coordinated(tmp_path / "federation")


def test_a_site_enrols_with_keys_that_it_made(world: Coordinated) -> None:
    assert world.roster.entries == ()
    token = world.invite("ward-a", "evaluate")
    opened = world.begin("ward-a", Token.parse(token.text()))
    identity = enrolling.finish(world.sites["ward-a"], world.approve(opened))
    assert identity.certificate == load_identity(world.sites["ward-a"]).certificate
    assert identity.site == "ward-a"
    assert identity.roster.version == 2
    assert identity.roster.find("ward-a").role == "evaluate"
    assert not (world.sites["ward-a"] / "enrolment.json").exists()
    assert identity.roster == world.roster
    assert opened.federation_print == federation_print(identity.coordinator_key, certificates.der(identity.ca))
    for name in ("identity.key", "tls-key.pem"):
        assert (world.sites["ward-a"] / name).stat().st_mode & 0o077 == 0


def test_private_keys_and_the_token_are_in_nothing_that_leaves(world: Coordinated) -> None:
    token = world.invite("ward-a")
    opened = world.begin("ward-a", token)
    home = world.sites["ward-a"]
    answer = world.approve(opened)
    enrolling.finish(home, answer)
    again = enrolling.begin_renewal(home)
    secrets = [(home / name).read_bytes() for name in SECRET_FILES if (home / name).exists()]
    secrets += [(world.folder / "ca" / name).read_bytes() for name in ("coordinator.key", "ca-key.pem")]
    secrets = [b"".join(secret.splitlines()[1:-1]) for secret in secrets]
    raw = keys.load_private_key(home / "identity.key").private_bytes_raw()
    secrets += [raw, raw.hex().encode(), token.secret, token.secret.hex().encode(), token.text().encode()[40:80]]
    secrets += [token.key().private_bytes_raw().hex().encode()]
    leaving = {
        "request": opened.request.sealed(),
        "renewal": again.request.sealed(),
        "answer": answer,
        "welcome of a renewal": world.renew(again),
        **{f.name: f.read_bytes() for f in (world.folder / "ca").iterdir() if f.name not in SECRET_FILES},
        **{f.name: f.read_bytes() for f in home.iterdir() if f.name not in SECRET_FILES},
    }
    assert "register.json" in leaving
    for name, content in leaving.items():
        flat = content.replace(b"\\n", b"").replace(b"\n", b"")
        assert not [secret for secret in secrets if secret in content or secret in flat], name
    assert secrets[0] in (home / "identity.key").read_bytes().replace(b"\n", b""), "the search can find"


@given(position=st.integers(4, 700), letter=st.sampled_from("AZaz09-_"))
def test_a_token_with_one_wrong_letter_is_none(token_text: str, position: int, letter: str) -> None:
    bent = token_text[:position] + letter + token_text[position + 1 :]
    if bent == token_text:
        assert Token.parse(bent).text() == token_text
        return
    with pytest.raises(IdentityError, match="FS-1461"):
        Token.parse(bent)


@pytest.fixture(scope="session")
def token_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = Coordinated(tmp_path_factory.mktemp("tokens") / "f").invite("ward-a", address="localhost:1").text()
    assert len(text) < 900
    wrapped = "\n  ".join(text[i : i + 60] for i in range(0, len(text), 60))
    assert Token.parse(wrapped) == Token.parse(text)
    return text


@pytest.mark.parametrize("text", ["", "fs1-", "fs2-AAAA", "x" * 100_000, "fs1-" + "A" * 5000, "fs1-\x00ä"])
def test_what_is_no_token_is_one_clear_error(text: str) -> None:
    with pytest.raises(IdentityError, match="FS-1461"):
        Token.parse(text)


def test_a_token_admits_one_request(world: Coordinated, tmp_path: Path) -> None:
    token = world.invite("ward-a")
    first = world.begin("ward-a", token)
    thief = enrolling.begin(tmp_path / "thief", token)
    answer = world.approve(first)
    with world.open() as authority, pytest.raises(IdentityError, match="FS-1464"):
        authority.approve(thief.request, confirmation=thief.site_print)
    version = world.roster.version
    again = world.approve(first)
    assert json.loads(again)["certificate"] == json.loads(answer)["certificate"], "the same request, the same answer"
    assert world.roster.version == version


def test_an_invitation_ends(tmp_path: Path) -> None:
    world = Coordinated(tmp_path / "federation", Clock())
    assert world.clock
    token = world.invite("ward-a", hours=1)
    opened = world.begin("ward-a", token)
    world.clock.at += 3601
    with pytest.raises(IdentityError, match="FS-1463"):
        world.approve(opened)
    with pytest.raises(IdentityError, match="FS-1463"):
        world.begin("ward-a", token)
    # A new invitation goes on with the same keys.
    later = world.begin("ward-a", world.invite("ward-a", hours=1))
    assert later.site_print == opened.site_print
    assert later.request != opened.request
    world.approve(later)


def test_an_invitation_is_for_its_site_and_role(world: Coordinated) -> None:
    token = world.invite("ward-a", "observe")
    for change in ({"site": "ward-b"}, {"role": "train"}, {"expires": token.invitation.expires + 1}):
        forged = replace(token, invitation=replace(token.invitation, **change))
        request = enrolment(forged, keys.generate(), ec.generate_private_key(ec.SECP256R1()), now=0)
        with world.open() as authority, pytest.raises(IdentityError, match="FS-1462"):
            authority.approve(request, confirmation=request.fingerprint)
    own = keys.generate()
    stranger = invitations.invite(
        "ward-b", "train", expires=1 << 40, address="", coordinator=own, authority=token.authority
    )
    request = enrolment(stranger, keys.generate(), ec.generate_private_key(ec.SECP256R1()), now=0)
    request.check(keys.public_bytes(own))
    with world.open() as authority, pytest.raises(IdentityError, match="FS-1462"):
        authority.approve(request, confirmation=request.fingerprint)


def test_every_altered_field_of_a_request_is_noticed(world: Coordinated) -> None:
    opened = world.begin("ward-a", world.invite("ward-a"))
    other = world.begin("ward-b", world.invite("ward-b")).request
    request, key = opened.request, opened.coordinator_key
    Request.opened(request.sealed()).check(key)
    raw = json.loads(request.sealed())
    another = json.loads(other.sealed())
    fields = ("site", "identity_key", "csr", "made", "invitation", "identity_signature", "token_signature")
    for name in fields:
        value = raw["made"] + 1 if name == "made" else another[name]
        with pytest.raises(IdentityError, match=r"FS-146[25]"):
            Request.opened(changed(request.sealed(), **{name: value})).check(key)
    for inner in ("site", "role", "expires", "verifier", "signature"):
        value = {"role": "observe", "expires": 1 << 40}.get(inner, another["invitation"][inner])
        bent = {**raw["invitation"], inner: value}
        with pytest.raises(IdentityError, match=r"FS-146[25]"):
            Request.opened(changed(request.sealed(), invitation=bent)).check(key)
    with pytest.raises(IdentityError, match="FS-1465"):
        Request.opened(changed(request.sealed(), kind="renew", invitation=None)).check(key)


def test_keys_are_bound_to_one_another(world: Coordinated) -> None:
    """A CSR taken from somebody else's request certifies nothing in one's own name."""
    token = world.invite("ward-a")
    theirs = world.begin("ward-a", token).request
    mine = keys.generate()
    stolen = replace(theirs, identity_key=keys.public_bytes(mine))
    stolen = replace(
        stolen,
        identity_signature=keys.sign(mine, "fedsecure/certificate-request/v1", stolen.body()),
        token_signature=keys.sign(token.key(), "fedsecure/invited-request/v1", stolen.body()),
    )
    with pytest.raises(IdentityError, match="FS-1465.*CSR"):
        stolen.check(token.coordinator_key)
    theirs.check(token.coordinator_key)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b"{", b"[" * 10_000, b"x" * (17 << 10), b'{"format": "fedsecure-request-1"}', b"\xff"]
)
def test_what_is_no_request_is_one_clear_error(raw: bytes) -> None:
    with pytest.raises(IdentityError, match="FS-1465"):
        Request.opened(raw)


def test_the_confirmation_is_what_the_site_reads_out(world: Coordinated) -> None:
    opened = world.begin("ward-a", world.invite("ward-a"))
    groups = opened.site_print.split(" ")
    assert [len(group) for group in groups] == [4] * 5
    other = "2" if groups[2][-1] != "2" else "3"
    for wrong in ("", "yes", groups[0], " ".join(groups[:2]), " ".join(groups[:3])[:-1] + other, " ".join(groups[1:])):
        with world.open() as authority, pytest.raises(IdentityError, match="FS-1469"):
            authority.approve(opened.request, confirmation=wrong)
    assert world.roster.entries == ()
    with world.open() as authority:
        authority.approve(opened.request, confirmation="-".join(groups[:3]).lower())


def test_letters_that_sound_alike_are_one() -> None:
    confirm("0110 AAAA BBBB CCCC DDDD", "OIL0 aaaa-bbbb")
    with pytest.raises(IdentityError, match="FS-1469"):
        confirm("0110 AAAA BBBB CCCC DDDD", "OIL0 aaaa-bbbc")


@given(one=st.binary(min_size=1, max_size=40), other=st.binary(min_size=1, max_size=40))
def test_fingerprints_are_of_all_their_parts(one: bytes, other: bytes) -> None:
    assert site_print("a", one, other) == site_print("a", one, other)
    assert site_print("a", one, other) != site_print("a", one + other[:1], other[1:])
    assert site_print("a", one, other) != site_print("b", one, other)
    assert federation_print(one, other) != site_print("", one, other)


def test_an_altered_answer_changes_nothing(world: Coordinated, tmp_path: Path) -> None:
    opened = world.begin("ward-a", world.invite("ward-a"))
    home = world.sites["ward-a"]
    answer = world.approve(opened)
    other_world = Coordinated(tmp_path / "other" / "federation")
    other_world.enrol("ward-a")
    foreign_ca = (other_world.folder / "ca" / "ca.pem").read_text()
    second = world.begin("ward-b", world.invite("ward-b"))
    theirs = world.approve(second)
    their = json.loads(theirs)
    before = {p.name: p.read_bytes() for p in home.iterdir()}
    for forged in (
        changed(answer, certificate=their["certificate"]),
        changed(answer, ca=foreign_ca),
        changed(answer, version=1),
        changed(answer, request=their["request"]),
        changed(answer, signature=their["signature"]),
        changed(answer, roster=other_world.sealed.decode()),
        changed(answer, kind="refusal", reason="no"),
        changed(theirs, request=json.loads(answer)["request"]),
        theirs,
        b"",
        b"[]",
        b"[" * 100_000,
    ):
        with pytest.raises(IdentityError, match=r"FS-14(66|21)"):
            enrolling.finish(home, forged)
        assert {p.name: p.read_bytes() for p in home.iterdir()} == before
    enrolling.finish(home, answer)


def test_a_man_in_the_middle_has_neither_ca_nor_coordinator(world: Coordinated, tmp_path: Path) -> None:
    """Another federation answers with everything of its own: nothing of it is what the token pinned."""
    opened = world.begin("ward-a", world.invite("ward-a"))
    middle = Coordinated(tmp_path / "middle" / "federation")
    own = middle.begin("ward-a", middle.invite("ward-a"))
    forged = changed(middle.approve(own), request=opened.request.digest.hex())
    with pytest.raises(IdentityError, match="FS-1466"):
        enrolling.finish(world.sites["ward-a"], forged)
    assert own.federation_print != opened.federation_print


def test_an_older_roster_in_an_answer_is_refused(world: Coordinated) -> None:
    old = world.sealed
    opened = world.begin("ward-a", world.invite("ward-a"))
    answer = world.approve(opened)
    with pytest.raises(IdentityError, match=r"FS-1466.*older"):
        enrolling.finish(world.sites["ward-a"], changed(answer, roster=old.decode()))
    world.enrol("ward-b")
    newest = changed(answer, roster=world.sealed.decode())
    assert enrolling.finish(world.sites["ward-a"], newest).roster.version == 3


def test_a_refusal_uses_the_invitation_up(world: Coordinated) -> None:
    opened = world.begin("ward-a", world.invite("ward-a"))
    with world.open() as authority:
        refusal = authority.refuse(opened.request, "unknown caller").sealed()
    with pytest.raises(IdentityError, match="FS-1467.*unknown caller"):
        enrolling.finish(world.sites["ward-a"], refusal)
    with pytest.raises(IdentityError, match="FS-1464"):
        world.approve(opened)
    with pytest.raises(IdentityError, match="FS-1466"):
        enrolling.finish(world.sites["ward-a"], changed(refusal, reason="another"))
    # Nor does it refuse the next one.
    later = world.begin("ward-a", world.invite("ward-a"))
    with pytest.raises(IdentityError, match="FS-1466"):
        enrolling.finish(world.sites["ward-a"], refusal)
    enrolling.finish(world.sites["ward-a"], world.approve(later))


def test_a_withdrawn_invitation_and_a_member_are_refused(world: Coordinated) -> None:
    opened = world.begin("ward-a", world.invite("ward-a"))
    with world.open() as authority:
        assert authority.withdraw("ward-a") == 1
        assert authority.open_invitations == []
    with pytest.raises(IdentityError, match="FS-1464"):
        world.approve(opened)
    world.enrol("ward-b")
    with pytest.raises(IdentityError, match="FS-1476"):
        world.invite("ward-b")
    for bad, role in (("../x", "train"), ("aggregator", "train"), ("ward-c", "boss")):
        with pytest.raises(IdentityError, match="FS-1422"):
            world.invite(bad, role)


def test_a_revoked_key_stays_out(world: Coordinated, tmp_path: Path) -> None:
    world.enrol("ward-a")
    world.enrol("ward-b")
    gone = world.revoke("ward-a")
    assert [entry.site for entry in gone.entries] == ["ward-b"]
    with pytest.raises(IdentityError, match="FS-1423"):
        world.revoke("ward-a")
    home = world.sites["ward-a"]
    again = tmp_path / "again"
    again.mkdir(mode=0o700)
    shutil.copy(home / "identity.key", again / "identity.key")
    opened = enrolling.begin(again, world.invite("ward-a"))
    with world.open() as authority, pytest.raises(IdentityError, match="FS-1468"):
        authority.approve(opened.request, confirmation=opened.site_print)
    fresh = enrolling.begin(tmp_path / "fresh", world.invite("ward-a"))
    with world.open() as authority:
        authority.approve(fresh.request, confirmation=fresh.site_print)
    assert [entry.site for entry in world.roster.entries] == ["ward-a", "ward-b"]


@pytest.mark.parametrize("stop", range(12))
def test_an_interrupted_enrolment_goes_on_with_the_same_keys(
    world: Coordinated, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """The machine dies before each of the files is written, and the command is repeated."""
    token = world.invite("ward-a")
    home = world.folder.parent / "ward-a-identity"
    world.sites["ward-a"] = home
    written: list[str] = []

    def dies(path: Path, data: bytes, *, mode: int = 0o600) -> None:
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(path.name)
        write_whole(path, data, mode=mode)

    def whole() -> None:
        opened = enrolling.begin(home, token)
        enrolling.finish(home, world.approve(opened))

    before: set[bytes] = set()
    with monkeypatch.context() as patch:
        patch.setattr(enrolling, "write_whole", dies)
        try:
            whole()
        except KeyboardInterrupt:
            before = {(home / name).read_bytes() for name in ("identity.key", "tls-key.pem") if (home / name).exists()}
    assert len(written) == min(stop, 8), "each of the eight files is a place to die at"
    if not (home / "certificate.pem").exists() or (home / "enrolment.json").exists():
        whole()
    identity = load_identity(home)
    assert before <= {(home / name).read_bytes() for name in ("identity.key", "tls-key.pem")}
    assert identity.roster.version == 2, "approved once"


def test_a_folder_in_use_is_not_taken(world: Coordinated, tmp_path: Path) -> None:
    world.enrol("ward-a")
    with pytest.raises(IdentityError, match="FS-1470"):
        world.begin("ward-a", world.invite("ward-b"))
    started = world.begin("ward-b", world.invite("ward-b"))
    other = Coordinated(tmp_path / "other" / "f")
    with pytest.raises(IdentityError, match="FS-1470"):
        enrolling.begin(world.sites["ward-b"], other.invite("ward-b"))
    assert enrolling.resume(world.sites["ward-b"]) == started
    with pytest.raises(IdentityError, match="FS-1471"):
        enrolling.resume(tmp_path)
    (world.sites["ward-b"] / "enrolment.json").write_text("{")
    with pytest.raises(IdentityError, match="FS-1471"):
        enrolling.resume(world.sites["ward-b"])


def test_an_approval_that_dies_is_whole_or_not_there(world: Coordinated, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsecure.identity import authority as module

    opened = world.begin("ward-a", world.invite("ward-a"))

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    old = world.sealed
    with monkeypatch.context() as patch:
        patch.setattr("fedsecure.identity.register.write_whole", dies)
        with pytest.raises(KeyboardInterrupt):
            world.approve(opened)
    assert world.sealed == old
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", dies)
        with pytest.raises(KeyboardInterrupt):
            world.approve(opened)
    assert world.sealed == old, "the copy was not written"
    assert world.roster.version == 2, "and the register says what is so"
    assert world.sealed != old
    enrolling.finish(world.sites["ward-a"], world.approve(opened))
    assert world.roster.version == 2


def test_a_register_that_cannot_be_read_stops_everything(world: Coordinated) -> None:
    world.invite("ward-a")
    file = world.folder / "ca" / "register.json"
    for text in ("", "[]", '{"format": "fedsecure-register-1"}'):
        file.write_text(text)
        with pytest.raises(IdentityError, match="FS-1479"):
            world.invite("ward-b")
    with pytest.raises(IdentityError, match="FS-1479"), enrolling_open(world.folder / "nowhere"):
        pass


def enrolling_open(folder: Path):
    from fedsecure.identity.authority import open_authority

    return open_authority(folder)


# --- renewal --------------------------------------------------------------------------------------------------------


def test_a_renewal_changes_the_certificate_and_keeps_the_identity(world: Coordinated) -> None:
    before = world.enrol("ward-a")
    home = world.sites["ward-a"]
    opened = enrolling.begin_renewal(home)
    assert enrolling.begin_renewal(home) == opened, "repeated, it is the same"
    answer = world.renew(opened)
    # The roster accepts both, so whichever side changes first, nobody is locked out.
    enrolling.adopt(home, world.sealed)
    assert load_identity(home).certificate == before.certificate
    after = enrolling.finish_renewal(home, answer)
    assert after.certificate == load_identity(home).certificate
    assert after.tls_key != before.tls_key
    assert after.roster.version == before.roster.version + 1
    assert after.roster.find("ward-a").identity_key == before.roster.find("ward-a").identity_key
    prints = [certificates.fingerprint(identity.certificate) for identity in (after, before)]
    assert list(after.roster.find("ward-a").fingerprints) == prints
    assert not list(home.glob("*next*"))
    assert not (home / "renewal.json").exists()


def test_the_aggregator_renews_for_the_same_hosts(world: Coordinated) -> None:
    before = load_identity(world.aggregator)
    opened = enrolling.begin_renewal(world.aggregator)
    assert opened.request.hosts == ["localhost", "127.0.0.1"]
    after = enrolling.finish_renewal(world.aggregator, world.renew(opened))
    assert after.site == "aggregator"
    assert after.roster.aggregator_previous == certificates.fingerprint(before.certificate)
    assert after.roster.aggregator_fingerprint == certificates.fingerprint(after.certificate)


def test_only_the_members_own_key_renews(world: Coordinated) -> None:
    identity = world.enrol("ward-a")
    tls_key = ec.generate_private_key(ec.SECP256R1())
    for site, key in (("ward-a", keys.generate()), ("ward-b", keys.generate()), ("aggregator", identity.signing_key)):
        request = renewal(site, key, tls_key, hosts=(), now=0)
        with world.open() as authority, pytest.raises(IdentityError, match="FS-1462"):
            authority.renew(request)
    opened = world.begin("ward-b", world.invite("ward-b"))
    with world.open() as authority, pytest.raises(IdentityError, match="FS-1462"):
        authority.renew(opened.request)
    with world.open() as authority, pytest.raises(IdentityError, match="FS-1462"):
        authority.approve(renewal("ward-a", identity.signing_key, tls_key, hosts=(), now=0), confirmation="")
    world.revoke("ward-a")
    with pytest.raises(IdentityError, match="FS-1462"):
        world.renew(enrolling.begin_renewal(world.sites["ward-a"]))


def test_a_replayed_renewal_changes_nothing(tmp_path: Path) -> None:
    world = Coordinated(tmp_path / "f", Clock(time.time()))
    assert world.clock
    home = tmp_path / "ward-a-identity"
    world.enrol("ward-a")
    never_sent = renewal(
        "ward-a", keys.load_private_key(home / "identity.key"), ec.generate_private_key(ec.SECP256R1()), hosts=(), now=5
    )
    first = enrolling.begin_renewal(home, now=world.clock)
    answer = world.renew(first)
    version = world.roster.version
    assert world.renew(first) == answer
    assert world.roster.version == version
    with world.open() as authority, pytest.raises(IdentityError, match="FS-1465.*older"):
        authority.renew(never_sent)


def test_the_old_certificate_leaves_after_its_grace(tmp_path: Path) -> None:
    world = Coordinated(tmp_path / "f", Clock(time.time()))
    assert world.clock
    world.enrol("ward-a")
    world.renew(enrolling.begin_renewal(world.sites["ward-a"], now=world.clock))
    world.clock.at += 13 * 86_400
    world.approve(world.begin("ward-b", world.invite("ward-b")))
    assert world.roster.find("ward-a").previous
    world.clock.at += 2 * 86_400
    world.approve(world.begin("ward-c", world.invite("ward-c")))
    assert not world.roster.find("ward-a").previous
    assert world.roster.find("ward-b").previous == b""


@pytest.mark.parametrize("stop", range(5))
def test_an_interrupted_renewal_goes_on(world: Coordinated, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    world.enrol("ward-a")
    home = world.sites["ward-a"]
    count = [0]

    def dies(path: Path, data: bytes, *, mode: int = 0o600) -> None:
        if count[0] == stop:
            raise KeyboardInterrupt
        count[0] += 1
        write_whole(path, data, mode=mode)

    def whole() -> None:
        enrolling.finish_renewal(home, world.renew(enrolling.begin_renewal(home)))

    with monkeypatch.context() as patch:
        patch.setattr(enrolling, "write_whole", dies)
        with pytest.raises(KeyboardInterrupt):
            whole()
    assert count[0] == stop
    whole()
    identity = load_identity(home)
    assert certificates.fingerprint(identity.certificate) == identity.roster.find("ward-a").tls_fingerprint
    assert identity.roster.version == 3


def test_an_ended_certificate_is_renewed_all_the_same(tmp_path: Path) -> None:
    world = Coordinated(tmp_path / "f")
    world.enrol("ward-a")
    end = certificates.parse((world.sites["ward-a"] / "certificate.pem").read_bytes(), "it").not_valid_after_utc
    world.clock = Clock(end.timestamp() + 86_400)
    opened = enrolling.begin_renewal(world.sites["ward-a"], now=world.clock)
    welcome = json.loads(world.renew(opened))
    fresh = certificates.parse(welcome["certificate"].encode(), "it")
    assert fresh.not_valid_after_utc.timestamp() > world.clock() + 300 * 86_400


def test_no_certificate_outlives_its_ca(tmp_path: Path) -> None:
    world = Coordinated(tmp_path / "f")
    world.enrol("ward-a")
    ca = certificates.parse((world.folder / "ca" / "ca.pem").read_bytes(), "it")
    world.clock = Clock(ca.not_valid_after_utc.timestamp() - 86_400)
    opened = enrolling.begin_renewal(world.sites["ward-a"], now=world.clock)
    fresh = certificates.parse(json.loads(world.renew(opened))["certificate"].encode(), "it")
    assert fresh.not_valid_after_utc == ca.not_valid_after_utc


def test_the_end_is_announced_ahead(world: Coordinated) -> None:
    identity = world.enrol("ward-a")
    end = certificates.parse(identity.certificate, "it").not_valid_after_utc
    month = certificates.NOTICE
    assert certificates.ending(identity.certificate, identity.ca, now=end - month) == []
    (sentence,) = certificates.ending(identity.certificate, identity.ca, now=end - month / 2)
    assert f"{end:%Y-%m-%d}" in sentence
    assert "fedsecure renew" in sentence


def test_the_end_is_announced_once_a_day(world: Coordinated) -> None:
    identity = world.enrol("ward-a")
    end = certificates.parse(identity.certificate, "it").not_valid_after_utc
    notices, hour = certificates.Notices(identity.certificate, identity.ca), dt.timedelta(hours=1)
    start = end - certificates.NOTICE - 3 * hour
    said = [bool(notices.due(start + hours * hour)) for hours in range(80)]
    assert [hours for hours, spoken in enumerate(said) if spoken] == [24, 48, 72]


@settings(max_examples=30)
@given(data=st.binary(max_size=300))
def test_answers_from_anywhere_are_refused_in_one_way(data: bytes) -> None:
    with pytest.raises(FedsecureError, match="FS-1466"):
        answers.opened(data, request=bytes(32), coordinator_key=bytes(32))
