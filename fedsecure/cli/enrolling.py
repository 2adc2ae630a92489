"""Commands of a machine that becomes or stays a member: ``enroll``, ``renew``. Its private keys never leave it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedsecure.identity.enrolling import Open
    from fedsecure.identity.provision import Identity

Folder = Annotated[Path, typer.Option(help="This machine's identity folder.")]
Out = Annotated[
    Path | None, typer.Option(help="Write the request to this file and leave; nothing is sent.", show_default=False)
]
Answer = Annotated[
    Path | None, typer.Option(help="The coordinator's answer, carried here as a file.", show_default=False)
]
Seconds = Annotated[float, typer.Option(help="Longest wait for the coordinator.", min=1.0)]
Address = Annotated[str, typer.Option(help="host:port of the enrolment desk, where the folder does not say.")]


def enroll(
    invitation: Annotated[
        str | None,
        typer.Argument(
            metavar="TOKEN",
            help="The invitation: its text, a file with it, or - for standard input.",
            show_default=False,
        ),
    ] = None,
    folder: Folder = Path("identity"),
    out: Out = None,
    welcome: Answer = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="A member: take up the newest roster.")] = False,
    roster: Annotated[
        Path | None, typer.Option(help="With --refresh: a roster carried here as a file.", show_default=False)
    ] = None,
    address: Address = "",
    seconds: Seconds = 600.0,
) -> None:
    """Become a member: make keys here, ask for a certificate, wait for the coordinator. Repeat it to go on."""
    from fedsecure.identity import enrolling, keys
    from fedsecure.identity.invitations import Token

    _one_of(refresh=refresh, welcome=welcome is not None, out=out is not None, invited=invitation is not None)
    if refresh or roster is not None:
        _refresh(folder, roster, address=address, seconds=seconds)
        return
    if welcome is not None:
        _show_member(enrolling.finish(folder, keys.read(welcome)))
        return
    opened = enrolling.begin(folder, Token.parse(_text(invitation))) if invitation else enrolling.resume(folder)
    _ask(opened, enrolling.finish, folder=folder, out=out, seconds=seconds)


def renew(
    folder: Folder = Path("identity"),
    out: Out = None,
    welcome: Answer = None,
    address: Address = "",
    seconds: Seconds = 600.0,
) -> None:
    """Get a certificate for a new TLS key before the old one ends. The old one works meanwhile."""
    from fedsecure.identity import enrolling, keys

    _one_of(welcome=welcome is not None, out=out is not None)
    if welcome is not None:
        _show_member(enrolling.finish_renewal(folder, keys.read(welcome)))
        return
    _ask(
        enrolling.begin_renewal(folder, address=address),
        enrolling.finish_renewal,
        folder=folder,
        out=out,
        seconds=seconds,
    )


def _one_of(*, invited: bool = False, **modes: bool) -> None:
    from fedsecure.errors import ConfigError

    chosen = [f"--{name}" for name, given in modes.items() if given]
    if len(chosen) > 1 or (invited and chosen not in ([], ["--out"])):
        raise ConfigError(
            "FS-1030",
            "these do not go together: " + ", ".join((["a token"] if invited else []) + chosen),
            expected="a token or the folder alone to ask, --out with it to write a file, or --welcome, or --refresh",
            cure="do one step at a time",
        )


def _text(given: str) -> str:
    """A token on the command line can be read by others on this machine; a file or standard input cannot."""
    import sys

    from fedsecure.identity import keys
    from fedsecure.identity.invitations import MAX_TOKEN

    if given == "-":
        return sys.stdin.read(2 * MAX_TOKEN)
    file = Path(given)
    return keys.read(file).decode(errors="replace") if len(given) < 500 and file.is_file() else given


def _ask(
    opened: Open, finish: Callable[[Path, bytes], Identity], *, folder: Path, out: Path | None, seconds: float
) -> None:
    from fedsecure.cli.display import say
    from fedsecure.files import write_whole

    request = opened.request
    say("Compare aloud with the coordinator, over a line you know:")
    say(f"  keys of {request.site:<20} {opened.site_print}")
    say(f"  the federation               {opened.federation_print}")
    if out is not None or not opened.address:
        target = out or folder / "request.json"
        write_whole(target, request.sealed(), mode=0o644)
        command = "enroll" if request.kind == "enrol" else "renew"
        say(f"Send {target} to the coordinator; it holds no secret. With the answer:")
        say(f"  fedsecure {command} --welcome welcome.json --folder {folder}")
        return
    from fedsecure.site.enrolment import answer_to

    say(f"Asking {opened.address}, then waiting at most {seconds:g} s for the coordinator.")
    _show_member(finish(folder, answer_to(opened, seconds=seconds)))


def _show_member(identity: Identity) -> None:
    from fedsecure.cli.display import say
    from fedsecure.identity import certificates

    end = certificates.parse(identity.certificate, "the certificate").not_valid_after_utc
    of = f"{identity.roster.federation}: roster {identity.roster.version}"
    say(f"{identity.site} is a member of {of}, certificate until {end:%Y-%m-%d}.")


def _refresh(folder: Path, roster: Path | None, *, address: str, seconds: float) -> None:
    from fedsecure.cli.display import say
    from fedsecure.site.enrolment import refresh

    now, changes = refresh(folder, address=address, seconds=seconds, file=roster)
    say(f"roster {now.version} of {now.federation}, {len(now.entries)} sites, hash {now.hash.hex()[:16]}")
    for line in changes or ["nothing changed"]:
        say(f"  {line}")
