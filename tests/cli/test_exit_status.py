"""What service managers go by: whether starting the same command again goes on with a run, or begins another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from federation_world import World

from fedsecure.errors import RunError
from fedsecure.simulation.scaffold import lay_out


@pytest.mark.usefixtures("log_state")
@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(("final", "status"), [(True, 3), (False, 1)])
def test_a_run_that_is_over_for_good_has_a_status_of_its_own(
    tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch, final: bool, status: int, log_format: str
) -> None:
    world = World(tmp_path)
    (tmp_path / "out").mkdir()
    layout = lay_out(tmp_path / "out", world.settings, sites={}, listen="127.0.0.1:0", hosts=("127.0.0.1",))

    def serve(*_: Any, **__: Any) -> Any:
        error = RunError("FS-1702", "one round failed 5 times", expected="a round that ends", cure="see the reasons")
        error.final = final
        raise error

    monkeypatch.setattr("fedsecure.aggregator.program.serve", serve)
    ended = command("serve", "--quiet", "--config", layout.federation, "--log-format", log_format)
    assert ended.status == status
    assert "FS-1702" in ended.err
