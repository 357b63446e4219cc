"""How long a source that fails is tried again."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sollold.models.transfer.download import Downloader, SourceError
from sollold.models.transfer.partial_file import Item, PartialFile
from sollold.models.transfer.rate_limit import RateLimit


class Flaky:
    """A source whose first requests fail."""

    name = "the hub"

    def __init__(self, failures: int, *, patience: float, final: bool = False) -> None:
        self.failures, self.patience, self.final = failures, patience, final
        self.requests = 0

    async def read(self, index: int, start: int, end: int) -> AsyncGenerator[bytes]:
        self.requests += 1
        if self.requests <= self.failures:
            raise SourceError("the hub is down", final=self.final)
        yield bytes(end - start)


@pytest.fixture
def partial(tmp_path: Path) -> Iterator[PartialFile]:
    partial = PartialFile(tmp_path, "a" * 32, (Item("model.gguf", 100),))
    partial.open()
    yield partial
    partial.close()


async def run(partial: PartialFile, source: Flaky) -> list[str]:
    """Fetch everything from ``source``; return the reasons of its repetitions."""
    retries: list[str] = []
    with ThreadPoolExecutor(2) as threads:
        await Downloader(partial, [source], RateLimit(0), threads, on_retry=retries.append, pause=0.0).run()
    return retries


async def test_a_source_with_patience_is_tried_again_after_many_failures(partial: PartialFile) -> None:
    assert await run(partial, Flaky(20, patience=60.0)) == ["the hub is down"] * 19
    assert not partial.missing()


async def test_a_source_without_patience_is_given_up_after_some_failures(partial: PartialFile) -> None:
    source = Flaky(20, patience=0.0)
    with pytest.raises(SourceError, match="the hub is down"):
        await run(partial, source)
    assert source.requests < 10


async def test_a_final_refusal_is_not_repeated(partial: PartialFile) -> None:
    source = Flaky(20, patience=60.0, final=True)
    with pytest.raises(SourceError, match="the hub is down"):
        await run(partial, source)
    assert source.requests == 1
