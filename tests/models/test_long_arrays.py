"""Long arrays of a header, which are read on demand and within limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollold.models.gguf import long_arrays as module
from sollold.models.gguf import reader
from sollold.models.gguf.long_arrays import long_arrays
from tests.models.stores import write_gguf

TOKENS = [f"t{number}·" for number in range(100)]


def test_texts_numbers_and_flags_are_read_back(tmp_path: Path) -> None:
    scores = [number / 4 for number in range(5000)]
    flags = [number % 3 == 0 for number in range(5000)]
    written = {"tokenizer.ggml.tokens": TOKENS, "x.scores": scores, "x.flags": flags, "x.few": [1, 2]}
    header = reader.read(write_gguf(tmp_path / "m.gguf", metadata=written))
    del written["x.few"]
    assert long_arrays(header) == written


@pytest.mark.parametrize(("name", "limit"), [("_MAX_BYTES", 2000), ("_MAX_VALUES", 150)])
def test_arrays_beyond_a_limit_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    monkeypatch.setattr(module, name, limit)
    header = reader.read(write_gguf(tmp_path / "m.gguf", metadata={"a": TOKENS, "b": TOKENS}))
    assert list(long_arrays(header)) == ["a"]


def test_a_file_that_became_shorter_raises_an_os_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", metadata={"a": TOKENS})
    header = reader.read(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(OSError, match="shrank"):
        long_arrays(header)
