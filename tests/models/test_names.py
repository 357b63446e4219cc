"""Parsing and resolution of model names."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sollold.models.names import Name, NameIndex, canonical, exact, of_file, parse, quantization_in, resolve


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("llama3.1", "registry.ollama.ai/library/llama3.1:latest"),
        ("llama3.1:70b", "registry.ollama.ai/library/llama3.1:70b"),
        ("mike/mario", "registry.ollama.ai/mike/mario:latest"),
        ("hf.co/user/Repo-GGUF:Q4_K_M", "hf.co/user/Repo-GGUF:Q4_K_M"),
        ("https://hf.co/user/repo", "hf.co/user/repo:latest"),
        ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
        ("  phi3 ", "registry.ollama.ai/library/phi3:latest"),
    ],
)
def test_names_are_parsed_with_defaults(text: str, full: str) -> None:
    assert parse(text).full == full


@pytest.mark.parametrize(
    "text", ["", ":", "a:", "/a", "a//b", "a/b/c/d", "../x", "a b", "x:y:z", "é", "a" * 400]
)
def test_invalid_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="name"):
        parse(text)


def test_the_error_of_a_name_with_a_login_does_not_contain_it() -> None:
    with pytest.raises(ValueError, match="no login") as refused:
        parse("https://user:secret@mirror.example/model.gguf")
    assert "secret" not in str(refused.value)


def test_canonical_names_omit_the_defaults() -> None:
    assert canonical("registry.ollama.ai/library/phi3") == "phi3:latest"
    assert canonical("registry.ollama.ai/mike/mario:v2") == "mike/mario:v2"
    assert canonical("hf.co/u/r:Q8_0") == "hf.co/u/r:Q8_0"


def test_cloud_tags_are_recognized() -> None:
    assert parse("gpt-oss:120b-cloud").cloud
    assert parse("glm:cloud").cloud
    assert not parse("cloudy:latest").cloud


@pytest.mark.parametrize(
    ("stem", "model", "tag"),
    [
        ("Llama-3-8B-Instruct-Q4_K_M", "Llama-3-8B-Instruct", "Q4_K_M"),
        ("tiny.Q8_0", "tiny", "Q8_0"),
        ("Qwen3-30B-A3B-UD-Q4_K_XL", "Qwen3-30B-A3B", "UD-Q4_K_XL"),
        ("model-bf16", "model", "BF16"),
        ("gpt-oss-20b-mxfp4", "gpt-oss-20b", "MXFP4"),
        ("m-IQ2_XXS", "m", "IQ2_XXS"),
        ("plain", "plain", "latest"),
        ("my model (1)", "my-model-1", "latest"),
    ],
)
def test_file_names_give_model_and_tag(stem: str, model: str, tag: str) -> None:
    assert of_file(stem) == (model, tag)


def test_quantization_of_a_folder_name() -> None:
    assert quantization_in("Q4_K_M") == "Q4_K_M"
    assert quantization_in("snapshots") == ""


@given(st.text(max_size=60))
def test_any_file_name_gives_a_valid_name(stem: str) -> None:
    model, tag = of_file(stem)
    assert parse(f"{model}:{tag}").tag == tag


NAMES = (
    "llama3.1:latest",
    "llama3.1:70b",
    "Qwen:Q4_K_M",
    "hf.co/a/tiny:Q8_0",
    "hf.co/b/tiny:Q8_0",
    "hf.co/b/many:Q8_0",
    "hf.co/b/many:latest",
    "solo:4b",
)


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("llama3.1", "llama3.1:latest"),
        ("LLAMA3.1:70B", "llama3.1:70b"),
        ("registry.ollama.ai/library/llama3.1", "llama3.1:latest"),
        ("qwen", "Qwen:Q4_K_M"),
        ("Qwen-Q4_K_M.gguf", "Qwen:Q4_K_M"),
        ("solo", "solo:4b"),
        ("hf.co/b/tiny", "hf.co/b/tiny:Q8_0"),
        ("https://huggingface.co/b/tiny", "hf.co/b/tiny:Q8_0"),
        ("huggingface.co/b/Tiny:q8_0", "hf.co/b/tiny:Q8_0"),
        ("huggingface.co/b/many", "hf.co/b/many:latest"),
    ],
)
def test_names_are_resolved(query: str, name: str) -> None:
    assert resolve(query, NAMES).name == name


@pytest.mark.parametrize(
    ("query", "name", "suggested"),
    [
        ("LLAMA3.1:70B", "llama3.1:70b", ()),
        ("llama3.1", "llama3.1:latest", ()),
        ("mine", "solo:4b", ()),
        ("solo", "", ("solo:4b",)),
        ("hf.co/b/tiny", "", ("hf.co/b/tiny:Q8_0",)),
        ("tiny:Q8_0", "", ("hf.co/a/tiny:Q8_0", "hf.co/b/tiny:Q8_0")),
        ("", "", ()),
    ],
)
def test_exact_names_are_not_guessed(query: str, name: str, suggested: tuple[str, ...]) -> None:
    answer = exact(query, NAMES, {"mine": "solo:4b"})
    assert (answer.name, answer.suggestions) == (name, suggested)


def test_an_ambiguous_name_gives_the_candidates() -> None:
    answer = resolve("tiny", NAMES)
    assert answer.name == ""
    assert answer.candidates == ("hf.co/a/tiny:Q8_0", "hf.co/b/tiny:Q8_0")
    assert "hf.co/a/tiny:Q8_0, hf.co/b/tiny:Q8_0" in answer.message


def test_an_equal_default_tag_does_not_make_names_similar() -> None:
    assert resolve("nosuch", ["demo:latest", "llama:latest"]).suggestions == ()
    assert resolve("dmeo", ["demo:latest"]).suggestions == ("demo:latest",)


def test_an_unknown_name_gives_similar_suggestions() -> None:
    answer = resolve("lama3.1:70b", NAMES)
    assert answer.name == ""
    assert "llama3.1:70b" in answer.suggestions
    assert "did you mean" in answer.message


@pytest.mark.parametrize("asked", ["org27/Some-Modle-77-Instruct:Q5_K_M", "x" * 300, "Some Modle 77.gguf"])
def test_an_unknown_name_among_10_000_is_resolved_within_a_turn_of_the_loop(asked: str) -> None:
    names = NameIndex(f"org{n % 50}/Some-Model-{n}-Instruct:Q{n % 8}_K_M" for n in range(10_000))
    assert resolve("ORG27/some-model-77-instruct:q5_k_m", names).name == "org27/Some-Model-77-Instruct:Q5_K_M"
    seconds = []
    for _ in range(3):
        began = time.thread_time()
        answer = resolve(asked, names)
        seconds.append(time.thread_time() - began)
        assert answer.name == ""
    assert min(seconds) < 0.05
    assert ("org27/Some-Model-77-Instruct:Q5_K_M" in answer.suggestions) == asked.startswith("org27")


def test_a_missing_tag_is_not_replaced() -> None:
    assert resolve("llama3.1:8b", NAMES).name == ""


def test_aliases_are_resolved() -> None:
    aliases = {"gpt-4": "llama3.1:70b", "Mine:x": "qwen"}
    assert resolve("GPT-4", NAMES, aliases).name == "llama3.1:70b"
    assert resolve("gpt-4:latest", NAMES, aliases).name == "llama3.1:70b"
    assert resolve("mine:x", NAMES, aliases).name == "Qwen:Q4_K_M"


@given(st.text(max_size=80))
def test_any_text_gives_a_name_or_a_message(query: str) -> None:
    answer = resolve(query, NAMES)
    assert bool(answer.name) != bool(answer.message)


def test_name_key_ignores_case() -> None:
    assert Name("HF.co", "U", "R", "T").key == parse("hf.co/u/r:t").key


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("my model v2-Q4_K_M.gguf", "my-model-v2:Q4_K_M"),
        ("My Model V2-q4_k_m.GGUF", "my-model-v2:Q4_K_M"),
        ("some folder/my model v2-Q4_K_M.gguf", "my-model-v2:Q4_K_M"),
        ("my model v2", "my-model-v2:Q4_K_M"),
        ("my-model-v2-Q4_K_M:latest", "my-model-v2:Q4_K_M"),
        ("café-Q8_0.gguf", "cafe:Q8_0"),
        ("模型-7B-Q4_K_M.gguf", "7B:Q4_K_M"),
    ],
)
def test_a_file_name_resolves_to_its_model(query: str, name: str) -> None:
    assert resolve(query, ["my-model-v2:Q4_K_M", "cafe:Q8_0", "7B:Q4_K_M", "other:latest"]).name == name


def test_a_name_without_ascii_letters_is_suggested_and_not_guessed() -> None:
    answer = resolve("模型.gguf", ["model:latest", "other:latest"])
    assert (answer.name, answer.suggestions) == ("", ("model:latest",))
    assert resolve("no such model.gguf", ["other:latest"]).name == ""
    assert resolve("/.gguf", ["other:latest"]).suggestions == ()
