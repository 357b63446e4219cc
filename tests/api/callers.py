"""Official client libraries, and a prompt and a schema to use with them."""

from __future__ import annotations

from typing import Any

import anthropic
import openai

ASK: Any = [{"role": "user", "content": "Who are you?"}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "tall": {"type": "boolean"}},
    "required": ["age", "tall"],
}


def chatgpt(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="ollama", max_retries=0)


def claude(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0)
