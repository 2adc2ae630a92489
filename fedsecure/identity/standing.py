"""Who may call now: the newest signed roster, taken up while the aggregator runs.

A roster replaces another only if the pinned coordinator signed it for the same federation and its version is higher. A
certificate that has left the roster is refused from the next look on, whatever it was doing. The looks are made by
whoever asks, so that no answer is older than the file.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fedsecure.errors import EnvironmentProblem, IdentityError
from fedsecure.files import write_whole
from fedsecure.identity import keys
from fedsecure.identity.provision import Identity
from fedsecure.identity.roster import Roster

log = logging.getLogger("fedsecure.identity")
_Mark = tuple[int, int, int]


def newer(current: Roster, sealed: bytes, coordinator_key: bytes, *, name: str = "the roster") -> Roster:
    """The roster of a file's bytes, where it may follow ``current``; ``current`` itself where it is the same.

    Raises:
        IdentityError: FS-1420 to FS-1422 no roster of this coordinator, FS-1473 older, another of the same version, or
            of another federation.
    """
    roster = Roster.opened(sealed, coordinator_key, name=name)
    if roster == current:
        return current
    if roster.federation != current.federation or roster.version <= current.version:
        raise IdentityError(
            "FS-1473",
            f"{name} is version {roster.version} of {roster.federation!r}, beside version {current.version} here",
            expected=f"a later version of {current.federation!r}: rosters never go back",
            cure="ask the coordinator for the newest roster; if this is it, the ca/ folder was set back: restore it",
        )
    return roster


def differences(old: Roster, new: Roster) -> list[str]:
    """What changed, a line each."""
    before, after = ({e.site: e for e in roster.entries} for roster in (old, new))
    lines = [f"{site} joined as {after[site].role}" for site in sorted(set(after) - set(before))]
    lines += [f"{site} left" for site in sorted(set(before) - set(after))]
    for site in sorted(set(before) & set(after)):
        one, other = before[site], after[site]
        if one.identity_key != other.identity_key:
            lines.append(f"{site} has another identity key")
        if one.role != other.role:
            lines.append(f"{site}: {one.role} is now {other.role}")
        if one.tls_fingerprint != other.tls_fingerprint:
            lines.append(f"{site} has a new certificate")
        elif one.previous != other.previous:
            lines.append(f"{site}: its earlier certificate is no longer accepted")
    if old.aggregator_key != new.aggregator_key:
        lines.append("the aggregator has another identity key")
    if old.aggregator_fingerprint != new.aggregator_fingerprint:
        lines.append("the aggregator has a new certificate")
    return lines


class Standing:
    """The members of a federation, as the newest roster has them.

    Args:
        identity: the own one; its roster is where it begins.
        file: the roster's file, looked at on every question; None for a roster that stays.
        floor: where the highest version is remembered across restarts.

    Raises:
        IdentityError: FS-1473, the roster is older than one that was in force before.
    """

    def __init__(self, identity: Identity, file: Path | None = None, *, floor: Path | None = None) -> None:
        self._coordinator_key = identity.coordinator_key
        self._file, self._floor = file, floor
        self._mark: _Mark | None = None
        self._members: dict[bytes, str] = {}
        self._former: dict[bytes, str] = {}
        lowest = _lowest(floor)
        if identity.roster.version < lowest:
            raise IdentityError(
                "FS-1473",
                f"the roster is version {identity.roster.version}, and version {lowest} was in force here",
                expected="a roster that is not older: a revoked site would be back",
                cure="put the coordinator's newest roster.json into the identity folder",
            )
        self._take(identity.roster, keys.read(file) if file is not None else b"")

    @property
    def roster(self) -> Roster:
        """The newest; a run that has begun keeps its own."""
        self._look()
        return self._roster

    @property
    def sealed(self) -> bytes:
        """The newest roster's file."""
        self._look()
        return self._sealed

    def site_of(self, tls_fingerprint: bytes) -> str:
        """The site whose certificate has this SHA-256, now.

        Raises:
            IdentityError: FS-1460 no member any more, FS-1454 none that was ever known here.
        """
        self._look()
        site = self._members.get(tls_fingerprint)
        if site is not None:
            return site
        if tls_fingerprint in self._former:
            raise IdentityError(
                "FS-1460",
                f"the certificate of {self._former[tls_fingerprint]!r} was taken out of the roster",
                expected=f"a certificate of roster version {self._roster.version}",
                cure="ask the coordinator why; new keys take a new invitation",
            )
        raise IdentityError(
            "FS-1454",
            "the client certificate is not in the roster",
            expected="the certificate enrolled for the site",
            cure="use the identity folder that was enrolled, or enrol again",
        )

    def adopt(self, sealed: bytes) -> list[str]:
        """Take up a newer roster, and keep it in the file; what changed, if anything. Raises as :func:`newer`."""
        before = self.roster
        roster = newer(before, sealed, self._coordinator_key)
        if roster is before:
            return []
        if self._file is not None:
            write_whole(self._file, sealed, mode=0o644)
        self._take(roster, sealed)
        return differences(before, roster)

    def _look(self) -> None:
        """Take up the file where it has changed; a bad one is said once and changes nothing."""
        if self._file is None:
            return
        try:
            found = self._file.stat()
        except OSError:
            return
        mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        if mark == self._mark:
            return
        self._mark = mark
        try:
            sealed = keys.read(self._file)
            roster = newer(self._roster, sealed, self._coordinator_key, name=str(self._file))
        except IdentityError as error:
            log.error("the roster in force stays: %s", error)
            return
        if roster is not self._roster:
            changes = differences(self._roster, roster)
            self._take(roster, sealed)
            log.warning("roster version %d: %s", roster.version, "; ".join(changes))

    def _take(self, roster: Roster, sealed: bytes) -> None:
        members = {print_: entry.site for entry in roster.entries for print_ in entry.fingerprints}
        self._former = {p: s for p, s in {**self._former, **self._members}.items() if p not in members}
        self._roster, self._members, self._sealed = roster, members, sealed
        if self._floor is not None and roster.version > _lowest(self._floor):
            try:
                write_whole(self._floor, str(roster.version).encode())
            except EnvironmentProblem as error:
                # The change holds all the same: a full disk must not keep a revoked site in.
                log.error("%s", error)


def _lowest(floor: Path | None) -> int:
    try:
        return int(floor.read_text()) if floor is not None else 0
    except (OSError, ValueError):
        return 0
