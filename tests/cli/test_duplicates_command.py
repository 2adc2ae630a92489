"""``fedsecure duplicates`` as a command: what it prints, and a manifest that opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli.conftest import Command
from PIL import Image

from fedsecure.config import DatasetConfig
from fedsecure.data.loading import open_dataset
from fedsecure.data.phantoms import CLASSES


def copy_between(folder: Path) -> None:
    """One scan of site_a is also in site_b and, twice, in site_d."""
    kind = CLASSES[0]
    source = sorted((folder / "site_a" / kind).iterdir())[0]
    for site, name in (("site_b", "copy.png"), ("site_d", "one.png"), ("site_d", "two.png")):
        shutil.copy(source, folder / site / kind / name)


def saved_anew(folder: Path) -> tuple[str, str]:
    """A scan of site_a, and the same scan as JPEG at site_b."""
    source = sorted((folder / "site_a" / CLASSES[0]).iterdir())[0]
    anew = folder / "site_b" / CLASSES[0] / "anew.jpg"
    Image.open(source).convert("RGB").save(anew, quality=90)
    return str(source.relative_to(folder)), str(anew.relative_to(folder))


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
    shown = command("duplicates", hospitals).out
    assert "site_a, site_b" in shown
    assert "inside site_d" in shown
    assert "look alike" in shown
    assert "look alike" not in command("duplicates", hospitals, "--near", "off").out


def test_a_copy_saved_anew_at_another_site_is_told_of_unasked(
    hospitals: Path, tmp_path: Path, command: Command
) -> None:
    source, anew = saved_anew(hospitals)
    manifest = tmp_path / "clean.csv"
    ended = command("duplicates", hospitals, "--write", manifest)
    assert ended.status == 0, ended.err
    assert "pairs of images of different sites that look alike: 1, copies saved anew" in " ".join(ended.out.split())
    assert anew.split("/", 1)[1] in manifest.read_text(), "a warning, and no verdict"
    facts = json.loads(command("duplicates", hospitals, "--json").out)
    assert facts["near_bits"] == 1
    assert facts["equal"] == []
    assert facts["alike"] == [{"sites": ["site_a", "site_b"], "pairs": 1}]
    assert [entry["images"] for entry in facts["near"]] == [[source, anew]]


def test_off_compares_files_only(hospitals: Path, command: Command) -> None:
    saved_anew(hospitals)
    (hospitals / "site_a" / CLASSES[0] / "torn.png").write_bytes(b"\x89PNG")
    assert command("duplicates", hospitals).error() == "FS-1106"
    facts = json.loads(command("duplicates", hospitals, "--near", "off", "--json").out)
    assert facts["near_bits"] is None
    assert facts["near"] == facts["alike"] == facts["equal"] == []
    assert facts["sites"]["site_a"]["records"] == 25


@pytest.mark.parametrize("near", ["none", "1.5", ""])
def test_what_is_no_number_of_bits_is_refused(near: str, hospitals: Path, command: Command) -> None:
    ended = command("duplicates", hospitals, "--near", near)
    assert ended.status == 2
    assert "neither a number of bits nor off" in ended.err


def test_bad_requests_write_nothing(hospitals: Path, tmp_path: Path, command: Command) -> None:
    manifest = tmp_path / "clean.csv"
    assert command("duplicates", tmp_path / "none", "--write", manifest).error() == "FS-1150"
    assert command("duplicates", hospitals, "--eval-site", "site_x", "--write", manifest).error() == "FS-1151"
    assert command("duplicates", hospitals, "--near", "40", "--write", manifest).error() == "FS-1136"
    (hospitals / "site_a" / CLASSES[0] / "torn.png").write_bytes(b"\x89PNG")
    assert command("duplicates", hospitals, "--near", "2", "--write", manifest).error() == "FS-1106"
    assert not manifest.exists()
