"""What all tests share: the real llama.cpp, and what a test leaves behind is ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sollold.agent.llama_find import Llama, find
from sollold.config import LlamaSettings


@pytest.fixture(scope="session")
def llama() -> Llama:
    """The llama.cpp that `make test` set up."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sollold"
    found, passed = find(LlamaSettings(), cache)
    if found is None:
        pytest.skip(f"no llama.cpp here: {'; '.join(passed) or 'run `sollold setup`'}")
    return found
