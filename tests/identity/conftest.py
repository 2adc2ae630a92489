"""One provisioned federation, copied for each test that damages it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedsecure.identity.provision import Provisioned, provision

SITES = {"ward-a": "train", "ward-b": "train", "ward-c": "evaluate"}


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Provisioned:
    folder = tmp_path_factory.mktemp("provisioned") / "federation"
    return provision(folder, federation="test", sites=SITES, hosts=["localhost", "127.0.0.1"], days=30)


@pytest.fixture
def site_folder(original: Provisioned, tmp_path: Path) -> Path:
    """A copy of ward-a's identity folder, to be damaged."""
    return Path(shutil.copytree(original.sites["ward-a"], tmp_path / "identity"))
