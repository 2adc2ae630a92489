"""The container images: what their recipe must and must not say, and what the aggregator's first process does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deploy" / "docker" / "Dockerfile"
TEXT = FILE.read_text(encoding="utf-8")
FIRST = ROOT / "deploy" / "docker" / "aggregator.py"


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction with its words, continued lines joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Each stage's instructions, those of the stage that it begins with first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions(text):
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            found[name] = [*found.get(image, []), (word, rest)]
        elif name:
            found[name].append((word, rest))
    return found


def faults(text: str) -> set[str]:
    """Rules that a recipe breaks."""
    found, all_of_them = set(), instructions(text)
    images = [rest.split()[0] for word, rest in all_of_them if word == "FROM"]
    arguments = dict(rest.split("=", 1) for word, rest in all_of_them if word == "ARG" and "=" in rest)
    for image in images:
        for name, value in arguments.items():
            image = image.replace(f"${{{name}}}", value)
        if image not in stages(text) and (":" not in image or image.endswith(":latest")):
            found.add("a base image without a version")
    for word, rest in all_of_them:
        if word == "ADD":
            found.add("ADD")
        for command in (one for one in rest.split("&&") if re.search(r"\bpip\b.* install ", one)):
            if "--no-cache-dir" not in command:
                found.add("pip with a cache")
            if "--constraint" not in command:
                found.add("versions that are not pinned")
        if word in ("ENV", "ARG") and re.search(r"(?i)password|secret|token|api_key", rest):
            found.add("a secret")
        if word == "RUN" and re.search(r"\b(curl|wget|sudo)\b", rest):
            found.add("something fetched by hand")
    for target in ("aggregator", "site"):
        words = stages(text).get(target, [])
        users = [rest for word, rest in words if word == "USER"]
        if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
            found.add("a user that is root, or has no number")
        if "HEALTHCHECK" not in [word for word, _ in words]:
            found.add("no word on health")
        if any(word == "RUN" and re.search(r"apt-get install|build-essential|gcc", rest) for word, rest in words):
            found.add("build tools")
    return found


def test_the_recipe_keeps_the_rules() -> None:
    assert faults(TEXT) == set()
    assert {"aggregator", "site"} <= set(stages(TEXT))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("USER 10001:10001", "USER root", "a user that is root, or has no number"),
        ("USER 10001:10001", "USER fedsecure", "a user that is root, or has no number"),
        ("ARG PYTHON=3.12-slim", "ARG PYTHON=latest", "a base image without a version"),
        ("FROM python:${PYTHON} AS base", "FROM python AS base", "a base image without a version"),
        ("COPY fedsecure", "ADD https://example.org/x", "ADD"),
        ("--no-cache-dir", "", "pip with a cache"),
        ("--constraint constraints.txt", "", "versions that are not pinned"),
        ("PYTHONUNBUFFERED=1", "DB_PASSWORD=x", "a secret"),
        ("python -m pip uninstall --yes pip", "apt-get install gcc", "build tools"),
        ("python -m venv", "curl -O x; python -m venv", "something fetched by hand"),
    ],
)
def test_each_rule_can_be_broken(old: str, new: str, fault: str) -> None:
    assert old in TEXT
    assert fault in faults(TEXT.replace(old, new))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_has_no_complaint() -> None:
    done = subprocess.run(["hadolint", FILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_reaches_the_build_is_listed_and_exists() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert all((ROOT / name).exists() for name in allowed)
    assert {"**/*.key", "**/*.pem"} <= set(rules)
    for word, rest in instructions(TEXT):
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert any(source == name or source.startswith(f"{name}/") for name in allowed), source


# --- the first process --------------------------------------------------------------------------------------------


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], int]]]:
    """Starts ``aggregator.py`` beside a ``fedsecure`` that is the given shell script; returns it and its port."""
    children: list[subprocess.Popen[str]] = []

    def start(script: str) -> tuple[subprocess.Popen[str], int]:
        program = tmp_path / "bin" / "fedsecure"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "FEDSECURE_HOME": str(tmp_path),
            "FEDSECURE_HEALTH_PORT": str(port),
        }
        command = [sys.executable, FIRST, "--config", "federation.toml"]
        children.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return children[-1], port

    yield start
    for child in children:
        child.kill()
        child.communicate()


def ask(port: int, path: str) -> tuple[int, str]:
    """Status and words of an answer; waits for the port."""
    give_up = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            assert time.monotonic() < give_up
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 3])
def test_after_a_run_that_is_over_no_other_begins(tmp_path: Path, first: Callable[..., object], status: int) -> None:
    script = f'echo "$@" >> {tmp_path}/calls; exit {status}'
    for _ in range(2):  # as Docker and Kubernetes do: started again, whatever it ended with
        child, port = first(script)  # type: ignore[misc]
        assert ask(port, "/healthz") == (200, "ok\n")
        code, said = ask(port, "/readyz")
        assert code == 503
        assert "the run is over" in said
        assert subprocess.run([sys.executable, FIRST, "--healthy", str(port)], timeout=60).returncode == 0
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    assert (tmp_path / "calls").read_text() == "serve --quiet --config federation.toml\n", "once"
    (tmp_path / "ended").unlink()
    _, port = first(script)  # type: ignore[misc]
    ask(port, "/readyz")
    assert len((tmp_path / "calls").read_text().splitlines()) == 2, "the next run, since somebody removed the file"


@pytest.mark.parametrize(("script", "status"), [("exit 1", 1), ("kill -9 $$", 137)])
def test_a_run_that_goes_on_is_started_again(
    tmp_path: Path, first: Callable[..., object], script: str, status: int
) -> None:
    child, port = first(script)  # type: ignore[misc]
    assert child.wait(60) == status
    assert not (tmp_path / "ended").exists()
    assert subprocess.run([sys.executable, FIRST, "--healthy", str(port)], timeout=60).returncode == 1


def test_signals_reach_the_aggregator(tmp_path: Path, first: Callable[..., object]) -> None:
    script = f"trap 'touch {tmp_path}/told; exit 1' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    child, _ = first(script)  # type: ignore[misc]
    give_up = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 1
    assert (tmp_path / "told").exists()
