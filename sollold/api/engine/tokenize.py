"""Tokenizes with a model's llama-server, bypassing its queue."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from sollold.api.engine.chunks import decoded
from sollold.api.http.response import ask_whole
from sollold.facts import dataclass
from sollold.serving.request import Ask, Call, Engine, Service

T = TypeVar("T")


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Text(msgspec.Struct):
    content: str


class _Count(msgspec.Struct):
    input_tokens: int


@dataclass(frozen=True, slots=True)
class TokenizerClient:
    """The tokenizer of the model of ``ask``. All methods raise `Refusal` as `Service.open`."""

    service: Service
    ask: Ask

    async def tokens(self, content: object, *, special: bool) -> list[int]:
        """Tokenize a string (or strings and tokens); ``special``: add the tokens that mark its ends."""
        body = {"content": content, "add_special": special, "parse_special": True}
        return (await self._request("/tokenize", body, _Tokens)).tokens

    async def text(self, tokens: list[int]) -> str:
        """Convert tokens to text."""
        return (await self._request("/detokenize", {"tokens": tokens}, _Text)).content

    async def count(self, body: dict[str, Any]) -> int:
        """Count the prompt tokens of a chat's body."""
        body = {**body, "stream": False}
        return (await self._request("/v1/chat/completions/input_tokens", body, _Count)).input_tokens

    async def _request(self, path: str, body: dict[str, Any], answer: type[T]) -> T:
        ask = replace(self.ask, calls={Engine.LLAMA: Call(path, body)}, stream=False, delivered=None)
        raw, _ = await ask_whole(self.service, ask)
        return decoded(raw, msgspec.json.Decoder(answer), f"response from the engine to {path}")
