"""The units: what systemd itself says of them, and when a process is started again."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def settings(file: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def analyze(file: Path, folder: Path, *arguments: str, change: tuple[str, str] = ("", "")) -> tuple[int, str]:
    """What systemd-analyze says, with a program that is there in the place of fedsecure."""
    name = file.name.replace("@.", "@hospital-a.")
    text = file.read_text(encoding="utf-8").replace("/opt/fedsecure/bin/fedsecure", "/bin/true")
    # The user is made by sysusers.d on the machine that the unit is for.
    (folder / name).write_text(re.sub(r"(?m)^(User|Group)=.*$", r"\1=daemon", text.replace(*change)))
    command = ["systemd-analyze", *arguments, str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@needs_systemd
@pytest.mark.parametrize("file", UNITS, ids=lambda f: f.name)
def test_systemd_reads_the_unit_without_complaint(file: Path, tmp_path: Path) -> None:
    status, said = analyze(file, tmp_path, "verify", "--man=no")
    assert status == 0, said
    ours = [line for line in said.splitlines() if "fedsecure" in line]
    assert ours == []


@needs_systemd
def test_a_mistake_in_a_unit_is_noticed(tmp_path: Path) -> None:
    _, said = analyze(UNITS[0], tmp_path, "verify", "--man=no", change=("ProtectHome=yes", "ProtectHomes=yes"))
    assert "ProtectHomes" in said


@needs_systemd
@pytest.mark.parametrize(("name", "most"), [("fedsecure-aggregator.service", 13), ("fedsecure-site@.service", 15)])
def test_exposure_is_low(tmp_path: Path, name: str, most: int) -> None:
    """Tenths of systemd's scale from 0 to 10; some of what is left is the network that both need."""
    arguments = ("security", "--offline=true", "--no-pager", f"--threshold={most}")
    status, said = analyze(FOLDER / name, tmp_path, *arguments)
    assert status == 0, said
    change = ("NoNewPrivileges=yes\nCapabilityBoundingSet=\n", "")
    assert analyze(FOLDER / name, tmp_path, *arguments, change=change)[0] != 0, "the scale notices what is left out"


@pytest.mark.parametrize("file", UNITS, ids=lambda f: f.name)
def test_a_killed_process_is_started_again_and_a_run_that_is_over_is_not(file: Path) -> None:
    found = settings(file)
    assert found["Restart"] == ["on-failure"]
    assert "3" in found["RestartPreventExitStatus"][0].split()
    assert float(found["RestartSec"][0]) >= 5
    assert not {"0", "root"} & set(found["User"])


@pytest.mark.parametrize(
    ("code", "status", "over"), [("exited", 0, True), ("exited", 3, True), ("exited", 1, False), ("killed", 9, False)]
)
def test_the_end_of_a_run_is_written_down(tmp_path: Path, code: str, status: int, over: bool) -> None:
    """As the next boot, and whoever starts the unit, must not begin another run by mistake."""
    found = settings(FOLDER / "fedsecure-aggregator.service")
    assert found["ConditionPathExists"] == ["!/var/lib/fedsecure/ended"]
    (line,) = found["ExecStopPost"]
    match = re.fullmatch(r"/bin/sh -c '(.*)' \$\{EXIT_CODE\} \$\{EXIT_STATUS\}", line)
    assert match is not None
    text = match[1].replace("$$", "$").replace("/var/lib/fedsecure", str(tmp_path))
    subprocess.run(["/bin/sh", "-c", text, code, str(status)], check=True, timeout=60)
    assert (tmp_path / "ended").exists() == over
