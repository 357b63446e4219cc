"""Fixtures of the client tests: real daemons and a model that recites a count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from tests.daemons import Cluster

WORDS = 320
BIG = "count"
RECITAL = Recital(counting(WORDS), name=BIG, layers=3, width=256, hidden=40_960, heavy=True)
"""About 100 MB: more than `MEMORY`, so that it needs two machines."""
SMALL = "small"
SMALL_RECITAL = Recital(counting(WORDS), name=SMALL, layers=1, width=256, hidden=40_960, heavy=True)
"""About 33 MB: it fits on one machine, and is slow enough for faults in the middle of an answer."""
MEMORY = "125 MiB"
SETTINGS: dict[str, Any] = {
    "placement.context": 768,
    "placement.slots": 2,
    "placement.ubatch": 32,
    "serving.drain_limit": 3,
    "serving.recover_limit": 100,
}


@pytest.fixture(scope="package")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the big and the small model."""
    folder = tmp_path_factory.mktemp("models")
    write(folder / f"{BIG}.gguf", RECITAL)
    write(folder / f"{SMALL}.gguf", SMALL_RECITAL)
    return folder


def give_models(cluster: Cluster, files: Path) -> None:
    """Link all the models into every node's folder."""
    for node in cluster:
        for file in files.iterdir():
            (node.models / file.name).symlink_to(file)


@pytest.fixture
def cluster(tmp_path: Path, llama: Llama, model_files: Path) -> Iterator[Cluster]:
    """Three daemons on loopback addresses."""
    with Cluster(3, tmp_path, llama, memory=MEMORY, settings=SETTINGS, start=False, loopback=True) as cluster:
        give_models(cluster, model_files)
        for node in cluster:
            node.start()
        cluster.together()
        yield cluster
