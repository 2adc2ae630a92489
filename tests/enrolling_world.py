"""A federation without sites' keys, and what its coordinator and its sites do, for tests of enrolment."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fedsecure.identity import enrolling
from fedsecure.identity.authority import open_authority
from fedsecure.identity.invitations import Token
from fedsecure.identity.provision import Identity, provision
from fedsecure.identity.roster import Roster

START = 1_900_000_000.0


@dataclass
class Clock:
    """Unix seconds that move when told."""

    at: float = START

    def __call__(self) -> float:
        return self.at


@dataclass
class Coordinated:
    """The coordinator's folder, and steps that are taken with it."""

    folder: Path
    clock: Clock | None = None
    sites: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        provision(self.folder, federation="test", sites={}, hosts=["localhost", "127.0.0.1"], authority_days=3650)

    @property
    def aggregator(self) -> Path:
        return self.folder / "aggregator" / "identity"

    def open(self):
        return open_authority(self.folder, now=self.clock) if self.clock else open_authority(self.folder)

    def invite(self, site: str, role: str = "train", *, hours: float = 72.0, address: str = "") -> Token:
        with self.open() as authority:
            return authority.invite(site, role, hours=hours, address=address)

    def begin(self, site: str, token: Token) -> enrolling.Open:
        self.sites[site] = self.folder.parent / f"{site}-identity"
        options = {"now": self.clock} if self.clock else {}
        return enrolling.begin(self.sites[site], token, **options)

    def approve(self, opened: enrolling.Open) -> bytes:
        with self.open() as authority:
            return authority.approve(opened.request, confirmation=opened.site_print).sealed()

    def renew(self, opened: enrolling.Open) -> bytes:
        with self.open() as authority:
            return authority.renew(opened.request).sealed()

    def enrol(self, site: str, role: str = "train") -> Identity:
        opened = self.begin(site, self.invite(site, role))
        return enrolling.finish(self.sites[site], self.approve(opened))

    def revoke(self, site: str) -> Roster:
        with self.open() as authority:
            return authority.revoke(site)

    @property
    def roster(self) -> Roster:
        with self.open() as authority:
            return authority.roster

    @property
    def sealed(self) -> bytes:
        return (self.folder / "ca" / "roster.json").read_bytes()


def changed(sealed: bytes, **fields: object) -> bytes:
    """A JSON file with some fields changed."""
    return json.dumps({**json.loads(sealed), **fields}).encode()
