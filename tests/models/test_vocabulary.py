"""Vocabularies are compared by what is in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollold.models.gguf import reader
from sollold.models.gguf.vocabulary import compatible, vocabulary
from sollold.models.gguf.writer import MetadataValue
from sollold.models.stores.header_facts import read_facts
from tests.gguf.size import Size
from tests.gguf.writer import write


def written(path: Path, tokens: int = 3000, layers: int = 1, **more: MetadataValue) -> str:
    named = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    write(path, "llama", Size(layers=layers, vocab=tokens), more=named)
    return vocabulary(reader.read(path))


def test_the_same_tokens_in_another_model(tmp_path: Path) -> None:
    one = written(tmp_path / "a.gguf")
    assert one.startswith("3000:")
    assert compatible(one, written(tmp_path / "b.gguf", layers=2))
    assert read_facts((str(tmp_path / "b.gguf"),)).vocabulary == one


def test_padding_may_differ_by_some_tokens(tmp_path: Path) -> None:
    one = written(tmp_path / "a.gguf")
    assert compatible(one, written(tmp_path / "b.gguf", 3064))
    assert not compatible(one, written(tmp_path / "c.gguf", 3200)), "more than llama.cpp takes"
    assert not compatible(one, written(tmp_path / "d.gguf", 2000))


@pytest.mark.parametrize("more", [{"model": "other"}, {"add_eos_token": True}, {"bos_token_id": 7}])
def test_other_texts_or_ends(tmp_path: Path, more: dict[str, MetadataValue]) -> None:
    assert not compatible(written(tmp_path / "a.gguf"), written(tmp_path / "b.gguf", **more))


def test_other_words(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "llama", Size(layers=1, vocab=3000))
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace("\u0120word77".encode(), "\u0120wore77".encode(), 1))
    both = [vocabulary(reader.read(tmp_path / name)) for name in ("a.gguf", "b.gguf")]
    assert both[0].partition(":")[0] == both[1].partition(":")[0]
    assert not compatible(*both)


def test_what_is_not_known_is_like_nothing() -> None:
    assert not compatible("", "") and not compatible("12:", "12:")
