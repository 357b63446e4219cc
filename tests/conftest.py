"""What all tests share: the real llama.cpp, and what a test leaves behind is ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything of it is imported: facts refuse to be changed.
os.environ["GUARD_SOLLOLD_FACTS"] = "1"

from sollold.engines.install.find import Llama
from sollold.models.model import Model
from tests.found_llama import found_llama
from tests.gguf.size import Size
from tests.gguf.writer import write

# The daemons that tests start are as they are at their users'.
del os.environ["GUARD_SOLLOLD_FACTS"]

# A busy machine is slow to make examples, which is no fault of theirs.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """A test run that is told to end cleans up as one that is interrupted: machines, networks, processes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def llama() -> Llama:
    """The llama.cpp that `make test` set up."""
    found, why = found_llama()
    if found is None:
        pytest.skip(why)
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of six layers with random weights."""
    file = write(tmp_path_factory.mktemp("models") / "tiny.gguf", "llama", Size(layers=6))
    return Model("tiny:latest", "d" * 64, "folder", (str(file),), file.stat().st_size, 0.0, layers=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
