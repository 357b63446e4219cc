"""Fixtures and settings for all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Must be set before sollold is imported: it makes frozen dataclasses reject assignments.
os.environ["GUARD_SOLLOLD_FACTS"] = "1"

from sollold.engines.install.find import Llama
from sollold.models.model import Model
from tests.found_llama import found_llama
from tests.gguf.size import Size
from tests.gguf.writer import write

# Daemons started by tests run without the check, as in production.
del os.environ["GUARD_SOLLOLD_FACTS"]

# No deadlines: on a busy machine, generating examples can be slow.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """On SIGTERM, clean up machines, networks and processes as on SIGINT."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def llama() -> Llama:
    """The llama.cpp that ``make setup`` built; skips the test if there is none."""
    found, reason = found_llama()
    if found is None:
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of six layers with random weights."""
    file = write(tmp_path_factory.mktemp("models") / "tiny.gguf", "llama", Size(layers=6))
    return Model("tiny:latest", "d" * 64, "folder", (str(file),), file.stat().st_size, 0.0, layers=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
