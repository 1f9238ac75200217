"""What several modules build on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.sweeps import Killed, kill_on_its_way


@pytest.fixture(scope="session")
def killed_sweep(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Its points are also those of the law that is explored."""
    return kill_on_its_way(tmp_path_factory.mktemp("space"))
