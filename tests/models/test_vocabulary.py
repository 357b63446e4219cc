"""Comparison of vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sollold.models.gguf import reader
from sollold.models.gguf.vocabulary import compatible, vocabulary
from sollold.models.gguf.writer import MetadataValue
from sollold.models.stores.header_facts import read_facts
from tests.gguf.size import Size
from tests.gguf.writer import write


def write_vocabulary(path: Path, tokens: int = 3000, layers: int = 1, **more: MetadataValue) -> str:
    keys = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    write(path, "llama", Size(layers=layers, vocab=tokens), more=keys)
    return vocabulary(reader.read(path))


def test_equal_tokens_are_compatible(tmp_path: Path) -> None:
    first = write_vocabulary(tmp_path / "a.gguf")
    assert first.startswith("3000:")
    assert compatible(first, write_vocabulary(tmp_path / "b.gguf", layers=2))
    assert read_facts((str(tmp_path / "b.gguf"),)).vocabulary == first


@pytest.mark.parametrize("text", ["x:ab", ":ab", "9", "\u00b2:ab", "9" * 5000 + ":ab"])
def test_what_is_no_vocabulary_is_incompatible(text: str) -> None:
    assert not compatible(text, text)


def test_a_small_difference_in_padding_is_compatible(tmp_path: Path) -> None:
    first = write_vocabulary(tmp_path / "a.gguf")
    assert compatible(first, write_vocabulary(tmp_path / "b.gguf", 3064))
    assert not compatible(first, write_vocabulary(tmp_path / "c.gguf", 3200)), "more than llama.cpp accepts"
    assert not compatible(first, write_vocabulary(tmp_path / "d.gguf", 2000))


@pytest.mark.parametrize("more", [{"model": "other"}, {"add_eos_token": True}, {"bos_token_id": 7}])
def test_other_special_tokens_are_incompatible(tmp_path: Path, more: dict[str, Any]) -> None:
    assert not compatible(
        write_vocabulary(tmp_path / "a.gguf"), write_vocabulary(tmp_path / "b.gguf", **more)
    )


def test_other_tokens_are_incompatible(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "llama", Size(layers=1, vocab=3000))
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace("\u0120word77".encode(), "\u0120wore77".encode(), 1))
    both = [vocabulary(reader.read(tmp_path / name)) for name in ("a.gguf", "b.gguf")]
    assert both[0].partition(":")[0] == both[1].partition(":")[0]
    assert not compatible(*both)


def test_unknown_vocabularies_are_incompatible() -> None:
    assert not compatible("", "") and not compatible("12:", "12:")
