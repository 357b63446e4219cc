"""Official clients with real llama.cpp, per feature, streamed and not. See `client_table`."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import ollama
import openai
import pytest

from sollold.models.gguf.demo_model import GREETING
from tests.api.callers import ASK, SCHEMA, chatgpt, claude
from tests.api.conftest import OLLAMAS
from tests.api.reciters import CONCLUSION, THOUGHT, TOOL

pytestmark = [pytest.mark.llama, pytest.mark.clients, pytest.mark.timeout(90)]

# --- ollama


async def test_ollama_chat(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    whole = await client.chat("demo", ASK)
    assert whole.message.content == GREETING
    assert whole.done and whole.done_reason == "stop" and whole.eval_count and whole.eval_count > 10
    assert whole.total_duration and whole.eval_duration and whole.prompt_eval_count
    parts = [part async for part in await client.chat("demo", ASK, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == GREETING
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count


async def test_ollama_generate_and_context(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    whole = await client.generate("demo", "Hi", options={"num_predict": 3})
    assert whole.response is not None and GREETING.startswith(whole.response)
    assert whole.done_reason == "length" and whole.eval_count == 3
    assert whole.context
    continued = await client.generate("demo", "more", context=whole.context, options={"num_predict": 3})
    assert (continued.prompt_eval_count or 0) > (whole.prompt_eval_count or 0)
    parts = [part async for part in await client.generate("demo", "Hi", stream=True)]
    assert "".join(part.response or "" for part in parts) == GREETING
    raw = await client.generate("demo", "Hello!", raw=True, options={"num_predict": 2})
    assert raw.response is not None and GREETING.startswith("Hello!" + raw.response)
    assert raw.context is None
    shaped = await client.generate("demo", "x", template="{{ .Prompt }}Hello!", options={"num_predict": 2})
    assert shaped.response == raw.response


async def test_ollama_tools(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    whole = await client.chat("call", ASK, tools=[TOOL])
    assert whole.message.tool_calls
    assert whole.message.tool_calls[0].function.name == "get_time"
    assert whole.message.tool_calls[0].function.arguments == {"zone": "utc"}
    calls: list[ollama.Message.ToolCall] = []
    async for part in await client.chat("call", ASK, tools=[TOOL], stream=True):
        calls += part.message.tool_calls or []
    assert [(call.function.name, dict(call.function.arguments)) for call in calls] == [
        ("get_time", {"zone": "utc"})
    ]
    history = [*ASK, whole.message, {"role": "tool", "content": "noon", "tool_name": "get_time"}]
    answer = await client.chat("call", history, tools=[TOOL])
    assert answer.done


async def test_ollama_thinking(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    whole = await client.chat("think", ASK, think=True)
    assert (whole.message.thinking or "").strip() == THOUGHT and whole.message.content == CONCLUSION
    thought = content = ""
    async for part in await client.chat("think", ASK, think="low", stream=True):
        thought += part.message.thinking or ""
        content += part.message.content or ""
    assert thought.strip() == THOUGHT and content == CONCLUSION
    written = await client.generate("think", "why", think=True)
    assert (written.thinking or "").strip() == THOUGHT and written.response == CONCLUSION
    with pytest.raises(ollama.ResponseError, match="does not support thinking") as refused:
        await client.chat("demo", ASK, think=True)
    assert refused.value.status_code == 400


async def test_ollama_schema(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    whole = await client.chat("random", ASK, format=SCHEMA)
    assert set(json.loads(whole.message.content or "")) == {"age", "tall"}
    written = await client.generate("random", "x", format=SCHEMA, raw=True)
    assert set(json.loads(written.response or "")) == {"age", "tall"}


async def test_ollama_logprobs(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    whole = await client.chat("demo", ASK, logprobs=True, top_logprobs=2, options={"num_predict": 2})
    assert whole.logprobs and len(whole.logprobs) == 2 and whole.logprobs[0].top_logprobs


async def test_ollama_embed(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    answer = await client.embed("embed", ["one", "two " * 300])
    assert len(answer.embeddings) == 2
    assert sum(x * x for x in answer.embeddings[0]) == pytest.approx(1.0, abs=1e-4)
    short = await client.embed("embed", "one", dimensions=8)
    assert len(short.embeddings[0]) == 8
    assert sum(x * x for x in short.embeddings[0]) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ollama.ResponseError):
        await client.embed("embed", "two " * 300, truncate=False)
    old = await client.embeddings("embed", "one")
    assert len(old.embedding) == len(answer.embeddings[0])


async def test_ollama_list_show_load(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    assert "demo:latest" in [found.model for found in (await client.list()).models]
    details = await client.show("demo")
    assert details.capabilities == ["completion"] and details.modelinfo
    await client.ps()
    loaded = await client.generate("demo", keep_alive="5m")
    assert loaded.done_reason == "load" and loaded.response == ""
    unloaded = await client.generate("demo", keep_alive=0)
    assert unloaded.done_reason == "unload"
    with pytest.raises(ollama.ResponseError, match="not found") as refused:
        await client.chat("nothing", ASK)
    assert refused.value.status_code == 404


# --- openai


async def test_openai_chat(url: str) -> None:
    async with chatgpt(url) as client:
        whole = await client.chat.completions.create(model="demo", messages=ASK)
        assert whole.choices[0].message.content == GREETING and whole.choices[0].finish_reason == "stop"
        assert whole.usage and whole.usage.completion_tokens > 10
        short = await client.chat.completions.create(model="demo", messages=ASK, max_completion_tokens=3)
        assert (
            short.choices[0].finish_reason == "length" and short.usage and short.usage.completion_tokens == 3
        )
        text, usage = "", None
        stream = await client.chat.completions.create(
            model="demo",
            messages=ASK,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for part in stream:
            usage = part.usage or usage
            text += (part.choices[0].delta.content or "") if part.choices else ""
        assert text == GREETING and usage and usage.total_tokens > 10


async def test_openai_several_answers_and_logprobs(url: str, way: str) -> None:
    async with chatgpt(url) as client:
        whole = await client.chat.completions.create(
            model="demo",
            messages=ASK,
            n=2,
            seed=7,
            max_tokens=2,
            logprobs=True,
            top_logprobs=1,
        )
        # Ollama has no ``n``; it gives one answer.
        assert len(whole.choices) == (1 if way == OLLAMAS else 2)
        assert whole.choices[0].message.content == whole.choices[-1].message.content
        logprobs = whole.choices[0].logprobs
        assert logprobs and logprobs.content and len(logprobs.content) == 2


async def test_openai_tools(url: str) -> None:
    async with chatgpt(url) as client:
        tools: Any = [TOOL]
        choice: Any = {"type": "function", "function": {"name": "get_time"}}
        for wanted in ("auto", "required", choice):
            whole = await client.chat.completions.create(
                model="call", messages=ASK, tools=tools, tool_choice=wanted
            )
            (call,) = whole.choices[0].message.tool_calls or []
            assert call.type == "function" and json.loads(call.function.arguments) == {"zone": "utc"}
        name = arguments = ""
        stream = await client.chat.completions.create(model="call", messages=ASK, tools=tools, stream=True)
        async for part in stream:
            for piece in (part.choices[0].delta.tool_calls or []) if part.choices else []:
                name += (piece.function.name or "") if piece.function else ""
                arguments += (piece.function.arguments or "") if piece.function else ""
        assert name == "get_time" and json.loads(arguments) == {"zone": "utc"}
        with pytest.raises(openai.BadRequestError, match="does not support tools"):
            await client.chat.completions.create(model="demo", messages=ASK, tools=[TOOL])  # type: ignore[list-item]


async def test_openai_thinking_under_both_names(url: str) -> None:
    async with chatgpt(url) as client:
        whole = await client.chat.completions.create(model="think", messages=ASK)
        message: Any = whole.choices[0].message
        assert message.reasoning.strip() == message.reasoning_content.strip() == THOUGHT
        first = second = ""
        async for part in await client.chat.completions.create(model="think", messages=ASK, stream=True):
            delta: Any = part.choices[0].delta
            first += getattr(delta, "reasoning", None) or ""
            second += getattr(delta, "reasoning_content", None) or ""
        assert first.strip() == second.strip() == THOUGHT


async def test_openai_schema(url: str) -> None:
    async with chatgpt(url) as client:
        shape: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        whole = await client.chat.completions.create(model="random", messages=ASK, response_format=shape)
        assert set(json.loads(whole.choices[0].message.content or "")) == {"age", "tall"}


async def test_openai_completions_and_embeddings(url: str) -> None:
    async with chatgpt(url) as client:
        # Both engines get a raw prompt, so the answer continues it.
        prefix = "Hello!"
        whole = await client.completions.create(model="demo", prompt="Hello!", max_tokens=2)
        assert whole.choices[0].text and GREETING.startswith(prefix + whole.choices[0].text)
        text = ""
        async for part in await client.completions.create(model="demo", prompt="Hello!", stream=True):
            text += part.choices[0].text
        assert prefix + text == GREETING
        vectors = await client.embeddings.create(model="embed", input=["one", "two"])
        assert len(vectors.data) == 2 and len(vectors.data[0].embedding) > 8
        short = await client.embeddings.create(model="embed", input="one", dimensions=8)
        assert len(short.data[0].embedding) == 8


async def test_openai_models_and_errors(url: str) -> None:
    async with chatgpt(url) as client:
        assert "demo:latest" in [found.id async for found in await client.models.list()]
        assert (await client.models.retrieve("demo:latest")).id == "demo:latest"
        with pytest.raises(openai.NotFoundError, match="not found"):
            await client.chat.completions.create(model="nothing", messages=ASK)


async def test_openai_responses(url: str) -> None:
    async with chatgpt(url) as client:
        whole = await client.responses.create(model="demo", input="Who are you?")
        assert whole.output_text == GREETING and whole.status == "completed"
        assert whole.usage and whole.usage.output_tokens > 10
        text, kinds = "", []
        async for event in await client.responses.create(model="demo", input=ASK, stream=True):
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
        assert text == GREETING and kinds[0] == "response.created" and kinds[-1] == "response.completed"


# --- anthropic


async def test_anthropic_messages(url: str) -> None:
    async with claude(url) as client:
        whole = await client.messages.create(model="demo", max_tokens=200, messages=ASK)
        assert whole.content[0].type == "text" and whole.content[0].text == GREETING
        assert (
            whole.stop_reason == "end_turn"
            and whole.usage.output_tokens > 10
            and whole.usage.input_tokens > 0
        )
        short = await client.messages.create(model="demo", max_tokens=3, system="Be brief", messages=ASK)
        assert short.stop_reason == "max_tokens" and short.usage.output_tokens == 3
        async with client.messages.stream(model="demo", max_tokens=200, messages=ASK) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == GREETING and final.stop_reason == "end_turn"
        assert final.usage.output_tokens == whole.usage.output_tokens


async def test_anthropic_stop_sequences(url: str) -> None:
    async with claude(url) as client:
        whole = await client.messages.create(
            model="demo",
            max_tokens=200,
            messages=ASK,
            stop_sequences=["nowhere", "demo model"],
        )
        assert whole.stop_reason == "stop_sequence" and whole.stop_sequence == "demo model"
        assert whole.content[0].type == "text" and whole.content[0].text == GREETING.split("demo model")[0]
        assert whole.usage.output_tokens > 2


async def test_anthropic_tools(url: str) -> None:
    function = TOOL["function"]
    tool: Any = {
        "name": function["name"],  # type: ignore[index]
        "description": "x",
        "input_schema": function["parameters"],  # type: ignore[index]
    }
    async with claude(url) as client:
        whole = await client.messages.create(model="call", max_tokens=200, messages=ASK, tools=[tool])
        assert whole.stop_reason == "tool_use"
        used = whole.content[0]
        assert used.type == "tool_use" and used.name == "get_time" and used.input == {"zone": "utc"}
        async with client.messages.stream(
            model="call",
            max_tokens=200,
            messages=ASK,
            tools=[tool],
            tool_choice={"type": "any"},
        ) as stream:
            final = await stream.get_final_message()
        assert final.content[0].type == "tool_use" and final.content[0].input == {"zone": "utc"}
        result: Any = {"type": "tool_result", "tool_use_id": used.id, "content": "noon"}
        messages: Any = [
            *ASK,
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [result]},
        ]
        answer = await client.messages.create(model="call", max_tokens=50, messages=messages, tools=[tool])
        assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) > 20


async def test_anthropic_thinking(url: str) -> None:
    async with claude(url) as client:
        thinking_enabled: Any = {"type": "enabled", "budget_tokens": 1024}
        whole = await client.messages.create(
            model="think", max_tokens=2000, messages=ASK, thinking=thinking_enabled
        )
        assert [block.type for block in whole.content] == ["thinking", "text"]
        assert whole.content[0].type == "thinking" and whole.content[0].thinking.strip() == THOUGHT
        assert whole.content[1].type == "text" and whole.content[1].text == CONCLUSION
        async with client.messages.stream(
            model="think", max_tokens=2000, messages=ASK, thinking=thinking_enabled
        ) as stream:
            final = await stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text"]
        assert final.content[0].type == "thinking" and final.content[0].thinking.strip() == THOUGHT
        omitted: Any = {**thinking_enabled, "display": "omitted"}
        whole = await client.messages.create(model="think", max_tokens=2000, messages=ASK, thinking=omitted)
        async with client.messages.stream(
            model="think", max_tokens=2000, messages=ASK, thinking=omitted
        ) as stream:
            final = await stream.get_final_message()
        for message in (whole, final):
            assert [block.type for block in message.content] == ["thinking", "text"]
            assert message.content[0].type == "thinking"
            assert not message.content[0].thinking and message.content[0].signature
        # Claude Code requests thinking of every model.
        plain = await client.messages.create(
            model="demo", max_tokens=200, messages=ASK, thinking=thinking_enabled
        )
        assert [block.type for block in plain.content] == ["text"]


async def test_anthropic_counting_and_errors(url: str) -> None:
    async with claude(url) as client:
        counts = await client.messages.count_tokens(model="demo", messages=ASK)
        assert counts.input_tokens > 0
        with pytest.raises(anthropic.NotFoundError) as refused:
            await client.messages.create(model="nothing", max_tokens=9, messages=ASK)
        body: Any = refused.value.body
        assert body["type"] == "error" and body["error"]["type"] == "not_found_error"


# --- libraries built on them


async def test_langchain(url: str) -> None:
    from langchain_ollama import ChatOllama, OllamaEmbeddings

    chat = ChatOllama(model="demo", base_url=url)
    assert (await chat.ainvoke("Who are you?")).content == GREETING
    pieces = [piece.content async for piece in chat.astream("Who are you?")]
    assert "".join(str(piece) for piece in pieces) == GREETING
    caller = ChatOllama(model="call", base_url=url).bind_tools([TOOL])
    called = await caller.ainvoke("What time is it?")
    assert called.tool_calls[0]["name"] == "get_time" and called.tool_calls[0]["args"] == {"zone": "utc"}
    calls = [call async for piece in caller.astream("What time is it?") for call in piece.tool_calls]
    assert [(call["name"], call["args"]) for call in calls] == [("get_time", {"zone": "utc"})]
    vectors = await OllamaEmbeddings(model="embed", base_url=url).aembed_documents(["one", "two"])
    assert len(vectors) == 2


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Disable garbage collection during the test.

    litellm does not close streams that it has read. If one is collected while the thread is in httpcore's
    pool, closing it waits forever for a lock that this thread holds.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.parametrize("route", ["ollama_chat", "openai", "anthropic"])
async def test_litellm(url: str, route: str, uncollected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    # litellm adds a format that its own client for Ollama rejects.
    monkeypatch.setattr(litellm, "drop_params", True)

    base = {"ollama_chat": url, "openai": f"{url}/v1", "anthropic": url}[route]
    options: dict[str, Any] = {"messages": ASK, "api_base": base, "api_key": "none", "max_tokens": 200}

    def chat() -> tuple[str, str]:
        whole = litellm.completion(model=f"{route}/demo", **options)
        parts = litellm.completion(model=f"{route}/demo", **options, stream=True)
        return whole.choices[0].message.content, "".join(
            part.choices[0].delta.content or "" for part in parts
        )

    def call() -> tuple[str, str]:
        # Its gateway for MCP servers needs a package that is not installed.
        tools: dict[str, Any] = {"tools": [TOOL], "_skip_mcp_handler": True}
        whole = litellm.completion(model=f"{route}/call", **options, **tools)
        parts = litellm.completion(model=f"{route}/call", **options, **tools, stream=True)
        pieces = [delta for part in parts for delta in part.choices[0].delta.tool_calls or ()]
        return whole.choices[0].message.tool_calls[0].function.arguments, "".join(
            delta.function.arguments or "" for delta in pieces
        )

    def embed() -> int:
        kind = "ollama" if route == "ollama_chat" else route
        response = litellm.embedding(
            model=f"{kind}/embed",
            input=["one", "two"],
            api_base=base,
            api_key="none",
            encoding_format="float",
        )
        return len(response.data)

    # In a thread, since it calls /api/show synchronously from its callbacks.
    assert await asyncio.to_thread(chat) == (GREETING, GREETING)
    assert [json.loads(arguments) for arguments in await asyncio.to_thread(call)] == [{"zone": "utc"}] * 2
    if route != "anthropic":
        assert await asyncio.to_thread(embed) == 2


async def test_openai_responses_tools_and_thinking(url: str) -> None:
    function: Any = {"type": "function", **TOOL["function"], "strict": False}  # type: ignore[dict-item]
    async with chatgpt(url) as client:
        whole = await client.responses.create(model="call", input="What time is it?", tools=[function])
        (call,) = whole.output
        assert call.type == "function_call" and json.loads(call.arguments) == {"zone": "utc"}
        history: Any = [
            {"role": "user", "content": "What time is it?"},
            call.model_dump(),
            {"type": "function_call_output", "call_id": call.call_id, "output": "noon"},
        ]
        assert (
            await client.responses.create(model="call", input=history, tools=[function])
        ).status == "completed"
        async with client.responses.stream(model="think", input="why") as stream:
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == ["reasoning", "message"]
        assert final.output_text == CONCLUSION
