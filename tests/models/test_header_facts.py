"""Plausibility checks of headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sollold.models.stores.header_facts import HeaderFactsCache, read_facts
from tests.models.stores import shut, write_gguf

TWO_LAYERS = ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight", "output.weight")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"llama.block_count": 20_000_000}, "declares 20000000 layers but lists tensors of 2"),
        ({"llama.attention.head_count": 0}, "declares no attention heads"),
        ({"llama.attention.head_count": [0, 0]}, "declares no attention heads"),
        ({"llama.attention.head_count": -3}, "declares attention.head_count as -3"),
        ({"llama.attention.head_count_kv": [4, -4]}, "declares attention.head_count_kv as -4"),
        ({"llama.block_count": -1}, "declares block_count as -1"),
        ({"llama.embedding_length": -5}, "declares embedding_length as -5"),
        ({"llama.embedding_length": 1 << 40}, f"declares embedding_length as {1 << 40}"),
        ({"llama.context_length": 1 << 63}, f"declares context_length as {1 << 63}"),
    ],
)
def test_a_header_that_contradicts_its_tensors_is_refused(
    tmp_path: Path, metadata: dict[str, Any], reason: str
) -> None:
    file = write_gguf(tmp_path / "odd.gguf", metadata=metadata, tensors=TWO_LAYERS)
    assert reason in read_facts((str(file),)).unusable


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({"llama.block_count": 2}, TWO_LAYERS),
        # Pruned models have layers without tensors, and layers without attention.
        ({"llama.block_count": 3, "llama.attention.head_count": [4, 0, 0]}, TWO_LAYERS),
        # A model without attention declares no heads.
        (
            {"llama.block_count": 1, "llama.attention.head_count": 0},
            ("token_embd.weight", "blk.0.ssm_in.weight"),
        ),
    ],
)
def test_unusual_but_valid_headers_are_accepted(
    tmp_path: Path, metadata: dict[str, Any], tensors: tuple[str, ...]
) -> None:
    file = write_gguf(tmp_path / "fine.gguf", metadata=metadata, tensors=tensors)
    assert read_facts((str(file),)).unusable == ""


def test_a_file_without_permission_comes_with_the_command_that_permits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    file = write_gguf(tmp_path / "models" / "closed.gguf", metadata={}, tensors=TWO_LAYERS)
    shut(monkeypatch, tmp_path / "models")
    facts = HeaderFactsCache(tmp_path / "cache").of((str(file),), set())
    assert facts.unusable.startswith(f"{file} can't be read: Permission denied. Run: sudo ")
    assert facts.unusable.endswith(f" {tmp_path / 'models'}")
