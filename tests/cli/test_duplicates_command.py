"""``fedsecure duplicates`` as a command: what it prints, and a manifest that opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from cli.conftest import Command

from fedsecure.config import DatasetConfig
from fedsecure.data.loading import open_dataset
from fedsecure.data.phantoms import CLASSES


def copy_between(folder: Path) -> None:
    """One scan of site_a is also in site_b and, twice, in site_d."""
    kind = CLASSES[0]
    source = sorted((folder / "site_a" / kind).iterdir())[0]
    for site, name in (("site_b", "copy.png"), ("site_d", "one.png"), ("site_d", "two.png")):
        shutil.copy(source, folder / site / kind / name)


def test_copies_are_counted_and_the_manifest_is_free_of_them(hospitals: Path, tmp_path: Path, command: Command) -> None:
    copy_between(hospitals)
    before = sorted(path for path in hospitals.rglob("*"))
    manifest = tmp_path / "clean.csv"
    ended = command("duplicates", hospitals, "--eval-site", "site_d", "--write", manifest, "--json")
    assert ended.status == 0, ended.err
    found = json.loads(ended.out)
    assert found["sites"]["site_a"] == {"records": 24, "without_duplicates": 24}
    assert found["sites"]["site_b"] == {"records": 25, "without_duplicates": 24}
    assert found["sites"]["site_d"] == {"records": 26, "without_duplicates": 24}
    pairs = {tuple(entry["sites"]): entry["groups"] for entry in found["equal"]}
    assert pairs == {
        ("site_a", "site_b"): 1, ("site_a", "site_d"): 1, ("site_b", "site_d"): 1, ("site_d", "site_d"): 1,
    }  # fmt: skip
    for site in ("site_a", "site_b", "site_c", "site_d"):
        config = DatasetConfig(name=site, path=manifest, split=site)
        assert len(open_dataset(config, classes=tuple(CLASSES))) == 24
    assert sorted(path for path in hospitals.rglob("*")) == before, "nothing is removed"


def test_the_table_names_pairs_of_sites(hospitals: Path, command: Command) -> None:
    assert "every image is there once" in command("duplicates", hospitals).out
    copy_between(hospitals)
    shown = command("duplicates", hospitals, "--near", "2").out
    assert "site_a, site_b" in shown
    assert "inside site_d" in shown
    assert "look alike" in shown


def test_bad_requests_write_nothing(hospitals: Path, tmp_path: Path, command: Command) -> None:
    manifest = tmp_path / "clean.csv"
    assert command("duplicates", tmp_path / "none", "--write", manifest).error() == "FS-1150"
    assert command("duplicates", hospitals, "--eval-site", "site_x", "--write", manifest).error() == "FS-1151"
    assert command("duplicates", hospitals, "--near", "40", "--write", manifest).error() == "FS-1136"
    (hospitals / "site_a" / CLASSES[0] / "torn.png").write_bytes(b"\x89PNG")
    assert command("duplicates", hospitals, "--near", "2", "--write", manifest).error() == "FS-1106"
    assert not manifest.exists()
