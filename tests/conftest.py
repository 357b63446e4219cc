"""What all tests share: the real llama.cpp, and what a test leaves behind is ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sollold.agent.llama_find import Llama, find
from sollold.config import LlamaSettings


def pytest_configure(config: pytest.Config) -> None:
    """A test run that is told to end cleans up as one that is interrupted: machines, networks, processes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def llama() -> Llama:
    """The llama.cpp that `make test` set up."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sollold"
    found, passed = find(LlamaSettings(), cache)
    if found is None:
        pytest.skip(f"no llama.cpp here: {'; '.join(passed) or 'run `sollold setup`'}")
    return found
