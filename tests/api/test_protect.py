"""Requests that would harm an engine, or make it fetch URLs, don't reach it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.engine.protect import FIELDS, protected
from sollold.errors import Refusal
from sollold.serving.request import Call, Engine
from tests.api.api_parts import ScriptedService, chunk, model, parts
from tests.api.conftest import Serve


def protected_body(engine: Engine = Engine.LLAMA, **body: Any) -> dict[str, Any]:
    return protected({engine: Call("/v1/chat/completions", body)})[engine].body


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


def picture(url: object, kind: str = "image_url") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, kind: url}]}]


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize(
    "messages",
    [
        picture({"url": "http://127.0.0.1:11435/api/tags"}),
        picture({"url": "HTTPS://example.com/a.png"}),
        picture({"url": "file:///etc/passwd"}),
        picture({"url": " data:image/png;base64,AA"}),
        picture("http://169.254.169.254/latest"),
        picture({"url": "http://x/a.mp4"}, "video_url"),
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"url": "http://x/a.wav"}}]}],
        [{"role": "tool", "content": [{"type": "image", "image_url": {"file_url": "ftp://x"}}]}],
    ],
)
def test_urls_of_media_are_refused(engine: Engine, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(Refusal, match="URLs are not fetched"):
        protected_body(engine, messages=messages)


def test_inline_media_pass() -> None:
    messages = picture({"url": "data:image/png;base64,AAAA"})
    messages[0]["content"].append({"type": "text", "text": "see http://example.com"})
    assert protected_body(messages=messages)["messages"] == messages


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000}, "longer than"),
        ({"grammar": "root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000}, "grammar is nested"),
        ({"grammar": 'root ::= "a"{1000000}'}, "repeats"),
        ({"grammar": 'root ::= "a"{0,99999999999999999999}'}, "repeats"),
        ({"json_schema": nested(60)}, "json_schema is nested"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": nested(60)}}}, "is nested"),
        ({"tools": [{"function": {"name": "f", "parameters": nested(60)}}]}, "tools is nested"),
        ({"response_format": {"enum": [[]] * 30_000}}, "objects and arrays"),
        ({"logit_bias": {str(token): 1 for token in range(2000)}}, "logit_bias"),
        ({"logit_bias": [[token, 1] for token in range(2000)]}, "logit_bias"),
        ({"n_probs": 100_000}, "n_probs"),
        ({"logprobs": 100_000}, "logprobs"),
        ({"stop": ["a"] * 1000}, "stop"),
        ({"samplers": ["top_k"] * 1000}, "samplers"),
        ({"samplers": "k" * 1000}, "samplers"),
        ({"messages": [0] * 1_000_000}, "messages"),
        ({"messages": [{"content": [0] * 1_000}] * 1_000}, "parts of messages"),
        ({"images": [0] * 1_000_000}, "images"),
        ({"messages": [{"images": [0] * 1_000}] * 1_000}, "images"),
    ],
)
def test_sizes_that_crash_an_engine_are_refused(body: dict[str, Any], why: str) -> None:
    began = time.thread_time()
    with pytest.raises(Refusal, match=why):
        protected_body(**body)
    assert time.thread_time() - began < 0.1


@pytest.mark.parametrize("text", ["[", '"', '\\"', "{ ", "{1", "{,", "{" + " " * 60_000, "(]", "#\n", "[\\"])
def test_grammars_are_checked_in_linear_time(text: str) -> None:
    assert cpu_seconds(lambda: protected_body(grammar="root ::= " + text * (60_000 // len(text)))) < 0.05


@pytest.mark.parametrize("before", ['"\n" ', '"a\\"\n" ', "[\n] ", '[\\]"] ', "# [\n", '# "\r'])
def test_nesting_outside_literals_and_comments_is_counted(before: str) -> None:
    """Literals may span lines; comments end at the end of the line."""
    with pytest.raises(Refusal, match="grammar is nested"):
        protected_body(grammar="root ::= " + before + "(" * 5_000)


@pytest.mark.parametrize("engine", list(Engine))
def test_penalty_windows_are_clamped(engine: Engine) -> None:
    """llama.cpp allocates 8 bytes per token of the window at once."""
    wide = {"repeat_last_n": 2**31 - 1, "dry_penalty_last_n": 1e18, "num_ctx": 4096}
    body = protected_body(engine, **wide, options=wide)
    assert body["repeat_last_n"] == body["dry_penalty_last_n"] == 1 << 22
    if engine is Engine.OLLAMA:
        assert body["options"] == {"repeat_last_n": 1 << 22, "dry_penalty_last_n": 1 << 22, "num_ctx": 4096}
    assert protected_body(engine, repeat_last_n=-1, dry_penalty_last_n=64)["repeat_last_n"] == -1


def cpu_seconds(check: Callable[[], object]) -> float:
    """Minimum CPU time of three runs in seconds, as garbage collection can slow one down."""
    durations = []
    for _ in range(3):
        began = time.thread_time()
        with contextlib.suppress(Refusal):
            check()
        durations.append(time.thread_time() - began)
    return min(durations)


def schema(**more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": more}}}


def pattern(text: str) -> dict[str, Any]:
    return schema(type="string", pattern=text)


FOURFOLD = {f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 4} for n in range(12)}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (pattern("^((((a{0,99}){0,99}){0,99}){0,99})$"), "pattern .* ways"),
        (pattern("^" + "(" * 12 + "a?" + "){0,9}" * 12 + "$"), "ways"),
        (pattern("^" + "(a?){0,80}" * 30 + "b$"), "ways"),
        (pattern("^(a?b?c?d?){0,2000}$"), "ways"),
        (pattern("^x(?:a?b?c?d?){2000}$"), "ways"),
        (pattern("^(" + "|".join(f"a{n}" for n in range(2500)) + ")$"), "ways"),
        (pattern("^" + "a?" * 3000 + "$"), "ways"),
        (pattern("^" + "(a?){0,30}" * 30 + "b$"), "ways"),
        (schema(type=["string"] * 3000), "enumerations"),
        (schema(properties={str(n): {"pattern": "[ab]" * 10} for n in range(1000)}), "patterns have"),
        (schema(enum=[f"v{n}" for n in range(15_000)]), "enumerations"),
        (schema(properties={f"p{n}": {"enum": ["a"] * 100} for n in range(30)}), "enumerations"),
        (schema(properties={f"p{n}": {"type": "string"} for n in range(3000)}), "optional"),
        (schema(anyOf=[{"const": n} for n in range(5000)]), "choices"),
        ({"format": {"$ref": "#/$defs/l0", "$defs": FOURFOLD}}, "choices"),
        ({"tools": [{"function": {"name": "f", "parameters": {"$defs": FOURFOLD}}}]}, "choices"),
        ({"grammar": 'root ::= a{0,99}\na ::= b{0,99}\nb ::= c{0,99}\nc ::= "x"?'}, "ways"),
        ({"grammar": 'root ::= "x" ("a"? "b"?){0,5000}'}, "ways"),
        ({"grammar": "root ::= " + '"a"? ' * 900}, "ways"),
        ({"grammar": "root ::= " + '"a"{2000} ' * 900}, "repeated"),
        ({"grammar": 'root ::= a\na ::= b a "x" | "y"\nb ::= "q"?'}, "begin with itself"),
        ({"grammar": 'root ::= a\na ::= (b* (c a)?) | "y"\nb ::= "q"\nc ::= b? | a'}, "begin with itself"),
        (schema(properties={"a" * n: {} for n in range(480)}, additionalProperties=True), "names"),
        (schema(prefixItems=[{"type": "integer", "minimum": 1, "maximum": 10**15}] * 3000), "bounds more"),
        (schema(prefixItems=[{"type": "string", "maxLength": 1999}] * 1900), "lengths"),
        # llama.cpp would generate rules for these until it is out of memory, 300 MB per second.
        (schema(properties={"a": {"type": "string", "minLength": 5, "maxLength": 3}}), "more than maxLength"),
        (schema(type="array", minItems=3, maxItems=1), "minItems is more than maxItems"),
        (schema(type="string", minLength=5, maxLength=2**32 + 3), "maxLength is more than"),
        (schema(type="integer", minimum=10**16), "the only bound of an integer"),
        (schema(type=["null", "integer"], exclusiveMaximum=-(10**16)), "the only bound of an integer"),
        (pattern("^a{5,3}$"), "minimum above its maximum"),
        (pattern(f"^a{{{'9' * 5000}}}$"), "is repeated"),
        ({"grammar": 'root ::= "a"{5,3}'}, "minimum above its maximum"),
        ({"format": {"type": "string", "minLength": 5, "maxLength": 3}}, "more than maxLength"),
        ({"grammar": "".join(f"r{n} ::= r{n + 1}\n" for n in range(900))}, "refer to one another"),
    ],
)
def test_constraints_that_hang_an_engine_are_refused(body: dict[str, Any], why: str) -> None:
    engine = Engine.OLLAMA if "format" in body else Engine.LLAMA
    with pytest.raises(Refusal, match=why):
        protected_body(engine, **body)
    assert cpu_seconds(lambda: protected_body(engine, **body)) < 0.1


@pytest.mark.parametrize(
    "body",
    [
        pattern(r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:?\d{2})?)?$"),
        pattern(r"^[a-z0-9._%+-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,63}$"),
        pattern("^(a{0,20}){0,20}$"),
        schema(enum=[f"v{n}" for n in range(1500)]),
        schema(type="integer", minimum=-(2**53) + 1, maximum=2**53 - 1),
        schema(type="number", minimum=1e300),
        schema(type="string", minLength=3, maxLength=3),
        pattern("^a{3}b{0}c{,2}d{2,}$"),
        {
            "grammar": 'root ::= item+\nitem ::= "(" root? ")" | "x" item?\n'
            'list ::= "[" (root ("," root)*)? "]"\n'
            'value ::= (list | item) ws # either\nws ::= | " " | "\\n" [ \\t]{0,20}'
        },
        {
            "tools": [
                {"function": {"parameters": {"properties": {"a": {"type": "string", "maxLength": 500}}}}}
            ]
            * 500
        },
        schema(properties={f"p{n}": {"type": "string"} for n in range(300)}),
        schema(properties={"enum": {"type": "string"}, "pattern": {"type": "string"}, "required": {}}),
        schema(
            anyOf=[{"$ref": "#/$defs/a"}, {"type": "null"}], **{"$defs": {"a": {"anyOf": [{"$ref": "#"}]}}}
        ),
        {"tools": [{"function": {"parameters": {"properties": {key: {} for key in "abcdefghij"}}}}] * 500},
        {"grammar": 'root ::= ws "{" (pair ("," ws pair)*)? "}"\npair ::= "a" | "b"\nws ::= [ \\t\\n]{0,20}'},
    ],
)
def test_realistic_schemas_and_grammars_pass(body: dict[str, Any]) -> None:
    assert protected_body(**body) == body


@pytest.mark.parametrize("text", ["a", "a|", "(a)", "a?b", "[a]", "\\d", "a{1}", "(", "x*", "{", "(?:a)"])
def test_patterns_are_checked_in_linear_time(text: str) -> None:
    assert cpu_seconds(lambda: protected_body(**pattern(text * (16_000 // len(text))))) < 0.1
    grammar = "root ::= " + (text + " ") * (60_000 // len(text + " "))
    assert cpu_seconds(lambda: protected_body(grammar=grammar)) < 0.1


def test_realistic_requests_pass() -> None:
    body: dict[str, Any] = {
        "grammar": 'root ::= ("(" | "[" x{0,20} "]")+ # (((((\nx ::= [()]*',
        "tools": [{"type": "function", "function": {"name": "f", "parameters": nested(20)}}] * 100,
        "logit_bias": {"15": -100},
        "logprobs": True,
        "top_logprobs": 20,
        "stop": ["a", "b"],
        "mirostat": 2,
        "samplers": ["top_k", "temperature"],
    }
    assert protected_body(**body) == body


def test_only_listed_fields_reach_llama_server() -> None:
    sent: dict[str, Any] = {
        "prompt": "x",
        "id_slot": 0,
        "lora": [{"id": 0, "scale": 9}],
        "speculative.n_max": 99,
        "new": 1,
    }
    assert protected_body(**sent) == {"prompt": "x"}
    assert not FIELDS & {"id_slot", "lora", "chat_template", "slot_id", "system_prompt"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_a_url_is_refused_in_each_dialect(serve: Serve, http: ClientSession, path: str) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service, model(capabilities=("completion", "vision"))))
    image: dict[str, Any] = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}
    body: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": [image]}]}
    if path == "/v1/messages":
        source = {"type": "url", "url": "http://127.0.0.1:1/"}
        body = {
            "model": "demo",
            "max_tokens": 5,
            "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}],
        }
    elif path == "/v1/responses":
        part = {"type": "input_image", "image_url": "http://127.0.0.1:1/"}
        body = {"model": "demo", "input": [{"role": "user", "content": [part]}]}
    async with http.post(url + path, json=body) as answer:
        assert answer.status == 400 and "not fetched" in (await answer.json())["error"]["message"]
    assert not service.asks


async def test_a_penalty_window_of_minus_one_is_clamped(serve: Serve, http: ClientSession) -> None:
    """Ollama's -1 means the whole context."""
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "options": {"repeat_last_n": -1}}
    async with http.post(url + "/api/chat", json=body) as answer:
        assert answer.status == 200, await answer.text()
    assert service.asks[-1].calls[Engine.LLAMA].body["repeat_last_n"] == 1 << 22
