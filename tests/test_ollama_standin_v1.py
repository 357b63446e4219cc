"""The stand-in's ``/v1/messages`` and ``/v1/responses``, used by the official clients."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest

from tests.ollama_standin import Known, Standin

pytestmark = pytest.mark.clients

TEXT = "one two three four"


@pytest.fixture
async def standin() -> AsyncIterator[Standin]:
    async with Standin([Known("base:7b", text=TEXT, capabilities=("completion",))]) as server:
        yield server


async def test_messages(standin: Standin) -> None:
    async with anthropic.AsyncAnthropic(base_url=standin.url, api_key="x") as client:
        ask: dict[str, Any] = {
            "model": "base:7b",
            "max_tokens": 50,
            "messages": [{"role": "user", "content": "Hi"}],
        }
        response = await client.messages.create(**ask)
        assert response.content[0].text == TEXT and response.stop_reason == "end_turn"
        assert response.usage.input_tokens and response.usage.output_tokens == 4
        async with client.messages.stream(**ask, system="Be brief.") as stream:
            assert "".join([text async for text in stream.text_stream]) == TEXT
            assert (await stream.get_final_message()).usage.output_tokens == 4
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**{**ask, "model": "none"})
        tool: Any = {"name": "f", "input_schema": {"type": "object", "properties": {}}}
        with pytest.raises(anthropic.BadRequestError, match="does not support tools"):
            await client.messages.create(**ask, tools=[tool])


async def test_responses(standin: Standin) -> None:
    async with openai.AsyncOpenAI(base_url=f"{standin.url}/v1", api_key="x") as client:
        response = await client.responses.create(model="base:7b", input="Hi", instructions="Be brief.")
        assert response.output_text == TEXT and response.status == "completed"
        assert response.usage and response.usage.output_tokens == 4
        items: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
        async with client.responses.stream(model="base:7b", input=items) as stream:
            pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            assert "".join(pieces) == TEXT
            assert (await stream.get_final_response()).output_text == TEXT
