"""``fedsecure members``: the coordinator's work on the folder with the CA, which can be offline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedsecure.cli.options import Json

if TYPE_CHECKING:
    from fedsecure.identity.authority import Authority
    from fedsecure.identity.requests import Request

members = typer.Typer(help="Who belongs to a federation; for the coordinator.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="The federation's folder, or its ca/.")]
Which = Annotated[str, typer.Argument(help="A request's file; or its site, where it lies in the drop box.")]
Out = Annotated[
    Path | None, typer.Option(help="The answer's file; beside the request's file by default.", show_default=False)
]
BoxFolder = Annotated[
    Path | None,
    typer.Option(
        "--box",
        help="The drop box: state/enrolment of the aggregator, or a copy that was carried here.",
        show_default=False,
    ),
]


@members.command()
def invite(
    folder: Folder,
    site: Annotated[str, typer.Argument(help="Id of the site that is to enrol.")],
    role: Annotated[Literal["train", "evaluate", "observe"], typer.Option(help="What the site may do.")] = "train",
    hours: Annotated[float, typer.Option(help="Until the invitation ends.")] = 72.0,
    address: Annotated[
        str, typer.Option(help="host:port of the aggregator's enrolment desk; none where requests go as files.")
    ] = "",
) -> None:
    """Print a one-time token for one site. Whoever has it can ask in its name, once, until it ends."""
    from fedsecure.cli.display import err, out
    from fedsecure.identity.authority import open_authority
    from fedsecure.identity.carrying import check_terms

    check_terms(hours, address)
    with open_authority(folder) as authority:
        token = authority.invite(site, role, hours=hours, address=address)
        print_ = authority.federation_print
    end = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(token.invitation.expires))
    out.print(token.text(), soft_wrap=True, highlight=False, markup=False)
    err.print(f"For {site}, to {role}, once, until {end}. Send it to {site} alone.", soft_wrap=True, highlight=False)
    err.print(f"Its screen must show this federation: {print_}", soft_wrap=True, highlight=False)


@members.command()
def pending(folder: Folder, box: BoxFolder = None, as_json: Json = False) -> None:
    """List the requests that wait in the drop box, and the invitations that are open."""
    from fedsecure.cli.display import print_json, say
    from fedsecure.identity.authority import open_authority
    from fedsecure.identity.carrying import box_of

    with open_authority(folder) as authority:
        invited = authority.open_invitations
    place = box_of(folder, box)
    waiting = place.pending() if place else []
    if as_json:
        requests = [
            {"kind": r.kind, "site": r.site, "fingerprint": r.fingerprint, "request": r.digest.hex()} for r in waiting
        ]
        print_json({"requests": requests, "invited": [{"site": i.site, "role": i.role} for i in invited]})
        return
    for request in waiting:
        say(f"{request.kind:<6} {request.site:<24} {request.fingerprint}   {request.digest.hex()[:16]}")
    for one in invited:
        end = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(one.expires))
        say(f"open   {one.site:<24} invited to {one.role}, until {end}")
    if not waiting and not invited:
        say("nobody waits, and nobody is invited")


@members.command()
def approve(
    folder: Folder,
    request: Which,
    yes: Annotated[
        str | None,
        typer.Option(
            help="The first three groups or more of the keys' fingerprint, as the site reads them out.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    box: BoxFolder = None,
) -> None:
    """Make a site a member, after its fingerprint was compared aloud. Uses its invitation up."""
    from fedsecure.cli.display import say
    from fedsecure.identity.authority import open_authority
    from fedsecure.identity.carrying import box_of, deliver, find

    place = box_of(folder, box)
    found = find(request, place)
    with open_authority(folder) as authority:
        found.request.check(authority.coordinator_key)
        _show(found.request, authority)
        confirmation = yes if yes is not None else typer.prompt("First three groups, as the site reads them out")
        welcome = authority.approve(found.request, confirmation=confirmation)
        written = deliver(welcome, found, authority=authority, folder=folder, box=place, out=out)
        say(f"{found.request.site} is a member from roster {authority.roster.version} on.")
    _show_files(written)


@members.command()
def renew(folder: Folder, request: Which, out: Out = None, box: BoxFolder = None) -> None:
    """Issue a certificate for a member's new TLS key. Its identity key has signed the request: no token, no call."""
    from fedsecure.cli.display import say
    from fedsecure.identity.authority import open_authority
    from fedsecure.identity.carrying import box_of, deliver, find

    place = box_of(folder, box)
    found = find(request, place)
    with open_authority(folder) as authority:
        welcome = authority.renew(found.request)
        written = deliver(welcome, found, authority=authority, folder=folder, box=place, out=out)
        hosts = f" for {', '.join(found.request.hosts)}" if found.request.hosts else ""
        say(f"{found.request.site} has a new certificate{hosts}, in roster {authority.roster.version}.")
    _show_files(written)


@members.command()
def refuse(
    folder: Folder,
    request: Which,
    reason: Annotated[str, typer.Option(help="What the site is told.")] = "the fingerprints differ",
    out: Out = None,
    box: BoxFolder = None,
) -> None:
    """Answer no. The invitation is used up by it."""
    from fedsecure.cli.display import say
    from fedsecure.identity.authority import open_authority
    from fedsecure.identity.carrying import box_of, deliver, find

    place = box_of(folder, box)
    found = find(request, place)
    with open_authority(folder) as authority:
        answer = authority.refuse(found.request, reason)
        written = deliver(answer, found, authority=authority, folder=folder, box=place, out=out)
    say(f"the request of {found.request.site} is answered.")
    _show_files(written)


@members.command("list")
def list_(folder: Folder, as_json: Json = False) -> None:
    """List members with their roles, and who was revoked."""
    from fedsecure.cli.display import print_json, say
    from fedsecure.identity.authority import open_authority

    with open_authority(folder) as authority:
        roster, lines, revoked = authority.roster, authority.members, authority.revoked
        print_ = authority.federation_print
    if as_json:
        rows = [{"site": m.site, "role": m.role, "until": m.until, "previous_accepted": m.previous} for m in lines]
        gone = [{"site": r.site, "when": r.when} for r in revoked]
        print_json({"federation": roster.federation, "version": roster.version, "members": rows, "revoked": gone})
        return
    say(f"{roster.federation}, roster {roster.version}, hash {roster.hash.hex()[:16]}, {print_}")
    for one in lines:
        end = time.strftime("until %Y-%m-%d", time.gmtime(one.until)) if one.until else "as provisioned"
        note = ", the certificate before it is still accepted" if one.previous else ""
        say(f"{one.site:<24} {one.role:<10} {end}{note}")
    for gone_ in revoked:
        say(f"{gone_.site:<24} revoked    {time.strftime('%Y-%m-%d', time.gmtime(gone_.when))}")


@members.command()
def revoke(
    folder: Folder,
    site: Annotated[str, typer.Argument(help="Id of the site.")],
    box: BoxFolder = None,
) -> None:
    """Take a site out of the roster for good, and withdraw its invitations. Its keys are never admitted again."""
    from fedsecure.cli.display import say
    from fedsecure.identity.authority import open_authority
    from fedsecure.identity.carrying import box_of, publish

    with open_authority(folder) as authority:
        withdrawn = authority.withdraw(site)
        if not withdrawn or any(member.site == site for member in authority.members):
            authority.revoke(site)
        written = publish(authority, folder=folder, box=box_of(folder, box))
        say(f"{site} is no member; roster {authority.roster.version}. Bring it to the aggregator now.")
    _show_files(written)


def _show(request: Request, authority: Authority) -> None:
    from fedsecure.cli.display import say

    role = request.invitation.role if request.invitation else ""
    say(f"{request.site} asks to {role}. Call it by a number you know, and have it read out what its screen shows:")
    say(f"  keys of {request.site:<20} {request.fingerprint}")
    say(f"  the federation               {authority.federation_print}")


def _show_files(files: list[Path]) -> None:
    from fedsecure.cli.display import say

    for file in files:
        say(f"  {file}")
