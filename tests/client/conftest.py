"""What the client's tests share: real daemons, and a model that recites a count."""

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
"""Some 100 MB: more than `MEMORY`, so that two machines are needed."""
SMALL = "small"
SMALL_RECITAL = Recital(counting(WORDS), name=SMALL, layers=1, width=256, hidden=40_960, heavy=True)
"""Some 33 MB: one machine holds it, and its tokens come slowly enough for a fault in the middle to be one."""
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
    """A folder with the big model and the small one."""
    folder = tmp_path_factory.mktemp("models")
    write(folder / f"{BIG}.gguf", RECITAL)
    write(folder / f"{SMALL}.gguf", SMALL_RECITAL)
    return folder


def give_models(cluster: Cluster, files: Path) -> None:
    """Every node has all the models, as links."""
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
