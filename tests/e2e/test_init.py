"""``fedsecure init`` and then nothing but the commands it prints: a trial federation that completes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from e2e.processes import fedsecure

from fedsecure.data.phantoms import CLASSES, write_federation

# As someone would write it: the encoder is named, and measured by init.
SETTINGS = """
name = "trial"
classes = ["no_lesion", "solid_mass", "ring_lesion", "multifocal_lesions"]

[encoder]
model = "fedsecure-tiny"
pretrained = "bundled"

[method]
name = "linear"
rounds = 5

[privacy]
target_epsilon = 8.0
delta = 1e-5
unit = "record"
max_records_per_unit = 1

[rounds]
start_seconds = 120.0

[sites.north]
max_units = 80
evaluation_units = 40
evaluation_public = true

[sites.east]
max_units = 80

[sites.west]
max_units = 80
"""
SITES = ("north", "east", "west")


@pytest.mark.slow
def test_a_federation_made_by_init_completes(tmp_path: Path) -> None:
    assert tomllib.loads(SETTINGS)["classes"] == list(CLASSES)
    (tmp_path / "settings.toml").write_text(SETTINGS)
    folder = tmp_path / "trial"
    made = fedsecure("init", folder, "--settings", tmp_path / "settings.toml", "--listen", "127.0.0.1:0")
    assert made.returncode == 0, made.stderr
    assert "private key" in made.stdout

    # The records go where each site.toml says.
    write_federation(tmp_path / "scans", sites=3, per_class=20, test_per_class=10, seed=5)
    for name, scans in zip(SITES, sorted((tmp_path / "scans").iterdir()), strict=True):
        configured = tomllib.loads((folder / "sites" / name / "site.toml").read_text())
        (scans / "train").rename(configured["train"]["path"])
        if name == "north":
            (scans / "test").rename(configured["evaluation"]["path"])
        else:
            assert "evaluation" not in configured

    commands = re.findall(r"^  fedsecure (serve|join) --config (.+)$", made.stdout, re.MULTILINE)
    assert [what for what, _ in commands] == ["serve", "join", "join", "join"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}

    def start(what: str, file: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fedsecure", what, "--config", file, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    aggregator = start(*commands[0])
    try:
        assert aggregator.stderr is not None
        address = re.match(r"listening on (127\.0\.0\.1:\d+), run [0-9a-f]{8}$", aggregator.stderr.readline().strip())
        assert address
        for _, file in commands[1:]:
            text = Path(file).read_text()
            Path(file).write_text(text.replace('aggregator = "127.0.0.1:0"', f'aggregator = "{address[1]}"'))
        sites = [start(*each) for each in commands[1:]]
        ends = [child.communicate(timeout=200) for child in (*sites, aggregator)]
        for child, (out, err) in zip((*sites, aggregator), ends, strict=True):
            assert child.returncode == 0, err
            assert isinstance(json.loads(out), dict)
    finally:
        for child in (aggregator, *locals().get("sites", ())):
            if child.poll() is None:
                child.kill()
                child.wait()
            for stream in (child.stdout, child.stderr):
                if stream is not None:
                    stream.close()
    outcome = json.loads(ends[-1][0])
    assert outcome["rounds"] == 5
    assert outcome["evaluations"]["after"]["accuracy"] > 0.25
    for name, (out, _) in zip(SITES, ends[:3], strict=True):
        report = json.loads(out)
        assert report["site"] == name
        assert 0 < report["epsilon"] <= 8
        (adapter,) = (folder / "sites" / name / "state" / "runs").glob("*/adapter.safetensors")
    scan = next((folder / "sites" / "north" / "evaluation").rglob("*.png"))
    assert fedsecure("predict", "--adapter", adapter, scan).returncode == 0
