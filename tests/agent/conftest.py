from __future__ import annotations

from pathlib import Path

import pytest

from sollold.agent.llama_find import Llama, find
from sollold.config import LlamaSettings, NodeSettings
from sollold.models.model import Model
from sollold.places import places
from tests.gguf.size import Size
from tests.gguf.writer import write


@pytest.fixture(scope="session")
def llama() -> Llama:
    found, passed = find(LlamaSettings(), places(NodeSettings()).cache)
    if found is None:
        pytest.skip(f"no llama.cpp here (sollold setup makes one): {passed}")
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of six layers with random weights."""
    file = write(tmp_path_factory.mktemp("models") / "tiny.gguf", "llama", Size(layers=6))
    return Model("tiny:latest", "d" * 64, "folder", (str(file),), file.stat().st_size, 0.0, layers=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
