from __future__ import annotations

from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from tests.systemd.packages import build


@pytest.fixture(scope="session")
def packages(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Build the packages with the existing llama.cpp, since a build for all CPUs would take as long again."""
    return build(tmp_path_factory.mktemp("debs"), "--llama", str(llama.server.parent))
