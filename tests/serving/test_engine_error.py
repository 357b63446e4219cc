"""A caller's error gives 400, lowers no score, and is not retried on a second engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sollold.cluster.gossip.record import Backend
from sollold.engines.install.find import Llama
from sollold.errors import Fault, Refusal
from sollold.models.gguf import demo_model
from sollold.models.gguf.demo_model import Recital
from sollold.serving.candidate import EndpointQuery
from sollold.serving.engine_error import engine_refusal, is_callers_fault
from sollold.serving.request import Engine
from tests.api.direct_service import LlamaServer
from tests.api.reciters import CALL, TEMPLATE
from tests.serving.cluster_double import MODEL, Cluster, Node, ask, text_of
from tests.serving.reciter import TEXT, Reciter

CALLERS = (
    "Failed to parse tool call arguments as JSON: [json.exception.parse_error.101] parse error at line 1",
    "Failed to parse tools: [json.exception.type_error.302] type must be string; tools = [\n  {}\n]",
    "Failed to parse tools: Missing tool type: {}; tools = []",
    'Failed to parse messages: Missing \'role\' in message: {"content":"x"}',
    "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
    "[json.exception.type_error.302] type must be string, but is number",
    "vector::_M_range_check: __n (which is 99999999) >= this->size() (which is 268)",
    'option "num_ctx" must be of type integer',
    "json: cannot unmarshal string into Go struct field ChatRequest.options of type map[string]interface {}",
)
ENGINES = (
    "Compute error.",
    "Invalid input batch.",
    "Context size has been exceeded.",
    "failed to process speculative batch",
    "std::bad_alloc",
    "[json.exception.type_error.316] invalid UTF-8 byte at index 3: 0xE2",
    "Failed to parse input at pos 7: <tool_call>",
    "llama runner process has terminated: exit status 2",
    "llama runner process has terminated: error loading model: unknown model architecture: 'newer'",
    "llama runner process has terminated: GGML_ASSERT(n_tokens > 0) failed: Missing input",
    "CUDA error: unknown error",
    "model requires more system memory (3.1 GiB) than is available (1.2 GiB)",
    "cudaMalloc failed: out of memory",
)


def body(message: str) -> bytes:
    return json.dumps({"error": {"code": 500, "message": message, "type": "server_error"}}).encode()


def test_more_choices_than_slots_give_a_helpful_message() -> None:
    refusal = engine_refusal(400, body("Field 'n': Value must be between 1 <= value <= 4, but got 5"))
    assert "loaded for 4 at a time" in refusal.message and "--slots" in refusal.message
    other = "Field 'top_p': Value must be between 0 <= value <= 1, but got 5"
    assert engine_refusal(400, body(other)).message == other


@pytest.mark.parametrize("message", CALLERS)
def test_bad_input_is_a_caller_error(message: str) -> None:
    refusal = engine_refusal(500, body(message))
    assert (refusal.fault, refusal.status) == (Fault.ENGINE, 400)
    assert is_callers_fault(refusal)


@pytest.mark.parametrize("message", ENGINES)
def test_an_engine_failure_is_an_engine_error(message: str) -> None:
    refusal = engine_refusal(500, body(message))
    assert refusal.status == 500 and not is_callers_fault(refusal)


def test_an_unsupported_operation_is_not_an_engine_failure() -> None:
    refusal = engine_refusal(501, body("This server does not support embeddings."))
    assert refusal.status == 501 and is_callers_fault(refusal)


def test_a_template_error_is_reduced_to_one_sentence() -> None:
    trace = (
        "Unable to generate parser for this template. Automatic parser generation failed: \n------------\n"
        "While executing CallExpression at line 1, column 96 in source:\n...{{ raise_exception('Roles\n ^\n"
        "Error: Jinja Exception: Conversation roles must alternate"
    )
    refusal = engine_refusal(400, body(trace))
    assert refusal.message == (
        "the model's chat template refuses this conversation: Conversation roles must alternate"
    )


def test_an_engine_error_nested_in_an_ollama_error_is_read() -> None:
    """Ollama embeds the engine's JSON as a string, in its own error format and in OpenAI's."""
    inner = body("Failed to load image or audio file").decode()
    for outer in ({"error": inner}, {"error": {"message": inner, "type": "invalid_request_error"}}):
        refusal = engine_refusal(400, json.dumps(outer).encode())
        assert refusal.message == "Failed to load image or audio file"
    assert engine_refusal(400, json.dumps({"error": '{"error": 5'}).encode()).message == '{"error": 5'


def test_error_messages_do_not_repeat_the_tools() -> None:
    assert engine_refusal(500, body(CALLERS[2])).message == "Failed to parse tools: Missing tool type: {}"


@pytest.mark.parametrize("nested", [False, True])
def test_error_messages_do_not_quote_the_models_answer(nested: bool) -> None:
    """They are logged, and listed to other callers."""
    raw = body("Failed to parse input at pos 12: Unknown \nschema of my secret")
    raw = json.dumps({"error": raw.decode()}).encode() if nested else raw
    refusal = engine_refusal(500, raw)
    assert refusal.message == "Failed to parse input at pos 12"
    assert not is_callers_fault(refusal)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            'Failed to parse messages: Missing \'role\' in message: {"content": "my secret"}; '
            'messages = ["my secret"]',
            "Failed to parse messages: Missing 'role' in message",
        ),
        (
            "Failed to parse messages: [json.exception.type_error.302] type must be string; "
            'messages = ["my secret"]',
            "Failed to parse messages: [json.exception.type_error.302] type must be string",
        ),
        (
            "Failed to parse tool call arguments as JSON: [json.exception.parse_error.101] parse error at "
            "line 1, column 8: syntax error while parsing value - invalid literal; last read: '\"secret'",
            "Failed to parse tool call arguments as JSON: [json.exception.parse_error.101] parse error at "
            "line 1, column 8: syntax error while parsing value - invalid literal",
        ),
    ],
)
def test_error_messages_do_not_quote_the_conversation(message: str, shown: str) -> None:
    refusal = engine_refusal(500, body(message))
    assert refusal.message == shown
    assert is_callers_fault(refusal)


async def two_engines(cluster: Cluster, backend: Backend) -> tuple[Node, Reciter, Reciter]:
    a, b = await cluster.node("a"), await cluster.node("b")
    first, second = await cluster.reciter(), await cluster.reciter()
    ids = ("ollama:m", "ollama:n") if backend is Backend.OLLAMA else ("d1", "d2")
    a.engines.serve(ids[0], first, backend=backend)
    b.engines.serve(ids[1], second, backend=backend)
    return a, first, second


@pytest.mark.parametrize(("form", "backend"), [("chat", Backend.LOCAL), ("ollama", Backend.OLLAMA)])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_error_reaches_one_engine_and_lowers_no_score(
    cluster: Cluster, form: str, backend: Backend, stream: bool
) -> None:
    a, first, second = await two_engines(cluster, backend)
    for reciter in (first, second):
        reciter.status, reciter.error = 500, CALLERS[0]
    for n in range(5):
        with pytest.raises(Refusal) as refused:
            await a.serving.open(ask(form, stream=stream, id=f"r{n}"), lambda _: None)
        assert refused.value.status == 400
    assert len(first.requests) + len(second.requests) == 5
    query = EndpointQuery(MODEL, frozenset(Engine))
    assert [scored.success for scored in a.router.candidates(a.view.live(), query, 1e9)] == [1.0, 1.0]
    for reciter in (first, second):
        reciter.status = 200
    answer = await a.serving.open(ask(form, stream=True, id="right"), lambda _: None)
    assert text_of([json.loads(event) async for event in answer.events]) == TEXT


async def test_an_engine_failure_lowers_its_score(cluster: Cluster) -> None:
    a, first, second = await two_engines(cluster, Backend.LOCAL)
    for reciter in (first, second):
        reciter.status, reciter.error = 500, ENGINES[0]
    with pytest.raises(Refusal):
        await a.serving.open(ask(), lambda _: None)
    query = EndpointQuery(MODEL, frozenset(Engine))
    assert min(scored.success for scored in a.router.candidates(a.view.live(), query, 1e9)) < 1.0


USER = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


def history(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}, USER]


BAD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": history("")}),
    ("/v1/chat/completions", {"messages": history('{"a":')}),
    ("/v1/chat/completions", {"messages": [USER], "tools": [{"type": "function", "function": {}}]}),
    ("/v1/chat/completions", {"messages": [USER], "tools": [{"function": FUNCTION}]}),
    ("/v1/chat/completions", {"messages": [USER], "tools": [{"type": "function", **FUNCTION}]}),
    ("/v1/chat/completions", {"messages": [USER], "tools": [{"type": "custom", "name": "f"}]}),
    (
        "/v1/chat/completions",
        {"messages": [USER], "tools": [{"type": "function", "function": {**FUNCTION, "description": None}}]},
    ),
    ("/v1/chat/completions", {"messages": [{"content": "x"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    ),
    ("/v1/chat/completions", {"messages": [USER], "grammar": "root ::= ("}),
    ("/v1/chat/completions", {"messages": [USER, *[{"role": "assistant", "content": "a"}] * 2]}),
    ("/completion", {"prompt": "x", "json_schema": {"type": "any"}}),
    ("/completion", {"prompt": [99999999]}),
    ("/v1/completions", {"prompt": None}),
    ("/tokenize", {"content": 5}),
    ("/detokenize", {"tokens": [99999999]}),
    ("/detokenize", {"tokens": "x"}),
)


@pytest.fixture(scope="module")
def server(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file: Path = tmp_path_factory.mktemp("model") / "call.gguf"
    demo_model.write(file, Recital(demo_model.pieces(CALL), name="call", template=TEMPLATE.read_text()))
    with LlamaServer(llama.server, file) as running:
        yield running.url


@pytest.mark.llama
@pytest.mark.parametrize(("path", "request_body"), BAD)
async def test_errors_of_a_real_llama_server_for_bad_input_are_recognized(
    server: str, path: str, request_body: dict[str, Any]
) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.post(server + path, json={"max_tokens": 2, **request_body}) as response:
            answer = await response.read()
    assert response.status >= 400, answer
    assert engine_refusal(response.status, answer).status == 400, answer
