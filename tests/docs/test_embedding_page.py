"""docs/embedding.md runs as it stands: its Python blocks, against a real aggregator process where they need one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from docs_pages import DOCS, blocks, page
from federation_world import World
from typer.main import get_command
from typer.testing import CliRunner

import fedsecure
from fedsecure.cli.app import app
from fedsecure.config import DatasetConfig, FederationConfig, PolicyConfig, SiteConfig, load
from fedsecure.privacy.ledger import Ledger
from fedsecure.simulation.scaffold import SitePlan, lay_out

SNIPPETS = {block.name: block.text for block in blocks(page("embedding.md"), "python")}
SITES = ("hospital-a", "hospital-b", "hospital-c")


def run_snippet(name: str) -> tuple[dict[str, Any], list[str]]:
    """Execute a block by itself; returns its variables and what it printed."""
    printed: list[str] = []
    space: dict[str, Any] = {"__name__": name}
    space["print"] = lambda *values, sep=" ": printed.append(sep.join(map(str, values)))
    exec(compile(SNIPPETS[name], f"docs/embedding.md:{name}", "exec"), space)
    return space, printed


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A federation of three hospitals on disk; the working directory is its folder."""
    world = World(tmp_path, rounds=2)
    trial = tmp_path / "trial"
    trial.mkdir()
    file = world.features.rename(trial / "embeddings.npz")
    # The page's snippets hand in the whole file, 90 records.
    entries = [world.settings.sites[name].model_copy(update={"max_units": 90}) for name in world.names]
    renamed = dict(zip(SITES, entries, strict=True))
    plans = {
        site: SitePlan(
            train=DatasetConfig(name="mri-2026", path=file, split="train", rows=(index, 3)),
            evaluation=DatasetConfig(name="mri-2026-test", path=file, split="test", rows=(index, 3), public=True),
            policy=PolicyConfig(unit="record"),
            encoder_file=file,
            connect_seconds=1.0,
        )
        for index, site in enumerate(SITES)
    }
    settings = world.settings.model_copy(update={"sites": renamed})
    lay_out(trial, settings, sites=plans, listen="127.0.0.1:0", hosts=("127.0.0.1",))
    monkeypatch.chdir(trial)
    return trial


@pytest.fixture
def aggregator(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``fedsecure serve`` as a process; the sites' files name its port."""
    command = [sys.executable, "-m", "fedsecure", "serve", "--config", "aggregator/federation.toml", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ}) as child:
        try:
            address = home / "aggregator" / "state" / "address"
            give_up = time.monotonic() + 240
            while not address.exists() and time.monotonic() < give_up and child.poll() is None:
                time.sleep(0.05)
            for toml in home.glob("sites/*/site.toml"):
                toml.write_text(toml.read_text().replace("127.0.0.1:0", address.read_text()))
            yield child
        finally:
            child.kill()


@pytest.mark.slow
def test_the_snippets_take_part_in_a_real_run(home: Path, aggregator: subprocess.Popen[bytes]) -> None:
    done: dict[str, Any] = {}

    def guarded(name: str, action: Any) -> threading.Thread:
        def work() -> None:
            try:
                done[name] = action()
            except BaseException as error:
                done[name] = error

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def third() -> None:
        with fedsecure.Client.from_config("sites/hospital-c/site.toml") as client:
            client.run()

    threads = [guarded("run", lambda: run_snippet("run")), guarded("third", third)]
    space, printed = run_snippet("loop")
    for thread in threads:
        thread.join(240)
    outcome = json.loads(aggregator.communicate(timeout=240)[0])

    assert done["third"] is None
    assert outcome["complete"]
    assert [attempt["survivors"] for attempt in outcome["attempts"]] == [list(SITES)] * 4
    assert "privacy unit" in printed[0]
    assert printed[1:] == [f"ε = {space['report']['epsilon']:.3f} at δ = 1e-05, for each record"]
    with Ledger(home / "sites" / "hospital-a" / "ledger.db") as ledger:
        assert ledger.datasets() == ("mri-2026",), "the public evaluation set pays nothing"
        assert len(ledger.spent("mri-2026", "train")) == 2
    moments = done["run"][1]
    assert any("/2" in line for line in moments)
    assert float(moments[-1]) == outcome["evaluations"]["after"]["accuracy"]

    used, shown = run_snippet("use")
    assert used["labels"].shape == (90,)
    assert shown[0].startswith("('a', 'b', 'c') ε = ")

    _, failed = run_snippet("failure")
    assert failed[0].startswith("try again later: FS-1501"), "the aggregator is gone by now"
    check_files(home)


def listed_files() -> set[str]:
    """The tree of docs/architecture.md as paths: two spaces a level, a slash after folders."""
    (tree,) = [block.text for block in blocks(page("architecture.md"), "text") if block.name == "disk"]
    files, folders = set(), [""]
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        path = folders[depth] + name
        folders[depth + 1 :] = [path]
        if not name.endswith("/"):
            files.add(path)
    return files


def check_files(home: Path) -> None:
    """What is on disk is what docs/architecture.md lists, and nothing else."""
    found = set()
    for path in home.rglob("*"):
        if path.is_file() and path.name != "embeddings.npz":
            parts = ["<run>" if re.fullmatch("[0-9a-f]{32}", part) else part for part in path.relative_to(home).parts]
            parts = [re.sub(r"^model-\d+", "model-<n>", part) for part in parts]
            found.add("/".join("<site>" if part in SITES else part for part in parts))
    listed = listed_files()
    assert sorted(found - listed - {f"{path}{end}" for path in listed for end in ("-wal", "-shm")}) == []
    # Neither images, an audit, drawn cohorts, a method with a memory of its own nor an enrolment are in this run.
    ends = ("features.sqlite", "<method>.safetensors", "audit.json", "register.json", "enrolment-address")
    ends += ("/draw", "draw.json")
    seldom = {path for path in listed if path.endswith(ends)}
    assert len(seldom) == len(ends)
    assert sorted(listed - seldom - found) == []


@pytest.mark.parametrize("name", ["plan", "records"])
def test_the_snippets_without_a_run(name: str, home: Path) -> None:
    space, printed = run_snippet(name)
    if name == "plan":
        assert "ε at most" in printed[0]
        assert space["plan"].epsilon <= 8
    else:
        assert printed == ["30 features"] or printed == ["90 features"]


def test_the_snippet_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stand_in(adapter: Path, images: list[Path]) -> list[dict[str, Any]]:
        asked.append((adapter, images))
        return [{"image": str(image), "class": "x", "probability": 0.5} for image in images]

    monkeypatch.setattr("fedsecure.learning.inference.predict_images", stand_in)
    _, printed = run_snippet("images")
    assert printed == ["scan-1.png x 0.500", "scan-2.png x 0.500"]
    assert asked


def test_every_python_block_is_run_here() -> None:
    assert set(SNIPPETS) == {"plan", "records", "loop", "run", "failure", "use", "images"}


def commands() -> list[tuple[str, list[str]]]:
    """Every ``fedsecure …`` line in a shell block of any page."""
    found = []
    for file in sorted(DOCS.glob("*.md")):
        for block in blocks(file.read_text(encoding="utf-8"), "sh"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "fedsecure":
                    found.append((file.name, words[1:]))
    return found


@cache
def program() -> Any:
    return get_command(app)


@pytest.mark.parametrize(
    ("file", "words"), commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_shell_lines_are_commands_the_program_knows(file: str, words: list[str]) -> None:
    command: Any = program()
    context: Any = None
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words
        context = command.make_context(words[0], [], parent=context, resilient_parsing=True)
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words), parent=context)


def test_the_init_line_lays_out_a_federation_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = [words for file, words in commands() if words[0] == "init" and file == "embedding.md"]
    (settings,) = [b.text for b in blocks(page("configuration.md"), "toml") if b.name == "settings.toml"]
    monkeypatch.chdir(tmp_path)
    Path("settings.toml").write_text(settings)
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    federation = load("trial/aggregator/federation.toml", FederationConfig)
    assert federation.encoder.dimension >= 2
    site = load("trial/sites/hospital-a/site.toml", SiteConfig)
    assert site.policy.max_epsilon == federation.privacy.target_epsilon
    assert sorted(path.name for path in Path("trial").iterdir()) == ["aggregator", "ca", "sites"]
    (tree,) = [b.text for b in blocks(page("embedding.md"), "text")]
    for shown in (part.split()[0] for part in tree.splitlines()):
        assert (tmp_path / shown).is_dir(), shown
