"""The demo model, which recites a fixed text."""

from __future__ import annotations

import itertools
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sollold.models.gguf import demo_model
from sollold.models.gguf import reader as gguf
from sollold.models.gguf.demo_model import Recital
from sollold.models.gguf.header import Array
from tests.doubles import free_port
from tests.gguf import llama_run


def _tokenize(recital: Recital, text: str) -> list[str]:
    """Tokenize a text as llama.cpp's greedy tokenizer does: the longest token at each position."""
    longest = max(map(len, recital.pieces))
    vocabulary, tokens = set(recital.pieces), []
    while text:
        size = next((size for size in range(longest, 1, -1) if text[:size] in vocabulary), 1)
        tokens.append(text[:size])
        text = text[size:]
    return tokens


def test_the_greeting_is_tokenized_into_its_pieces() -> None:
    recital = Recital(demo_model.pieces(demo_model.GREETING))
    assert recital.text == demo_model.GREETING
    assert _tokenize(recital, demo_model.GREETING) == list(recital.pieces)
    assert len(recital.pieces) > 30


@given(st.lists(st.sampled_from(["a", "an", "the", "then", "x.", "and", "on"]), min_size=2, max_size=30))
def test_any_text_with_repeated_words_is_cut_into_distinct_pieces(words: list[str]) -> None:
    text = " ".join(words)
    pieces = demo_model.pieces(text)
    assert "".join(pieces) == text
    assert _tokenize(Recital(pieces), text) == list(pieces)


def test_counting_gives_numbered_words() -> None:
    assert demo_model.counting(3) == ("w0001 ", "w0002 ", "w0003 ")
    assert demo_model.counting(2, first=99_999) == ("w099999 ", "w100000 ")


@pytest.mark.parametrize(
    "options",
    [
        {"pieces": ()},
        {"pieces": ("a",)},
        {"pieces": ("ab", "abc")},
        {"pieces": ("ab", "ab")},
        {"pieces": ("ab",), "layers": 0},
        {"pieces": ("ab",), "width": 100},
        {"pieces": ("ab",), "hidden": 33},
    ],
)
def test_invalid_recitals_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"piece|recital"):
        Recital(**options)


def test_the_file_is_small_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "demo.gguf"
    demo_model.write(path)
    assert path.stat().st_size < 4 << 20
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo.gguf"]
    header = gguf.read(path)
    assert header.architecture == "llama"
    assert header.text("tokenizer.chat_template") == demo_model.TEMPLATE
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Array)
    assert tokens.length == 256 + 5 + len(demo_model.pieces(demo_model.GREETING))


def test_blocks_of_a_heavy_model_are_allocated_on_disk(tmp_path: Path) -> None:
    light, heavy = tmp_path / "light.gguf", tmp_path / "heavy.gguf"
    demo_model.write(light, Recital(("ab", "cd"), layers=4, hidden=8192))
    demo_model.write(heavy, Recital(("ab", "cd"), layers=4, hidden=8192, heavy=True))
    assert light.stat().st_size == heavy.stat().st_size
    assert light.read_bytes() == heavy.read_bytes()
    assert heavy.stat().st_blocks * 512 >= heavy.stat().st_size


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = llama_run.binary("llama-server")
    if program is None:
        pytest.skip("llama.cpp is not built")
    folder = tmp_path_factory.mktemp("demo")
    demo_model.write(folder / "a.gguf", Recital(demo_model.counting(600), width=256))
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "-m", folder / "a.gguf", "--port", str(port), "-c", "4096", "-np", "1", "-t", "1"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                llama_run.pause()
        yield address
    finally:
        process.kill()
        process.wait()


def _post(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address + path, json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer: dict[str, Any] = json.load(reply)["choices"][0]
        return answer


def _words(first: int, last: int) -> str:
    return "".join(demo_model.counting(last - first + 1, first))


@pytest.mark.llama
@pytest.mark.parametrize("temperature", [0, 0.8, 3])
def test_a_chat_recites_the_whole_text(server: str, temperature: float) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "w0042 w0043? äöü"}]
    answer = _post(server, "/v1/chat/completions", {"messages": messages, "temperature": temperature})
    assert answer["message"]["content"] == _words(1, 600)
    assert answer["finish_reason"] == "stop"


@pytest.mark.llama
def test_a_prompt_from_the_text_is_continued_and_any_other_starts_it(server: str) -> None:
    for prompt, first in (("What is this?", 1), (_words(1, 17), 18), (_words(1, 599), 600)):
        body = {"prompt": prompt, "max_tokens": 5, "temperature": 1}
        answer = _post(server, "/v1/completions", body)
        assert answer["text"] == _words(first, min(first + 4, 600))


@pytest.mark.llama
def test_a_truncated_answer_is_continued_exactly(server: str) -> None:
    recited = ""
    for limit in itertools.repeat(97):
        messages = [{"role": "user", "content": "Count."}]
        if recited:
            messages.append({"role": "assistant", "content": recited})
        answer = _post(server, "/v1/chat/completions", {"messages": messages, "max_tokens": limit})
        text: str = answer["message"]["content"]
        # llama-server repeats the given part of the answer.
        assert text.startswith(recited)
        recited = text
        if answer["finish_reason"] == "stop":
            break
    assert recited == _words(1, 600)
