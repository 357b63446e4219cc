"""Small questions to a model's llama-server, about tokens; they take no turn from anybody."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from sollold.api.reply import ask_whole
from sollold.serving.ask import Ask, Call, Engine, Fault, Refusal, Service

T = TypeVar("T")


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Text(msgspec.Struct):
    content: str


class _Count(msgspec.Struct):
    input_tokens: int


@dataclass(frozen=True, slots=True)
class Aside:
    """Asks beside ``ask``, of the same model. All methods raise `Refusal` as `Service.open`."""

    service: Service
    ask: Ask

    async def tokens(self, content: object, *, special: bool) -> list[int]:
        """The tokens of a text (or of texts and tokens); ``special``: with the marks at its ends."""
        body = {"content": content, "add_special": special, "parse_special": True}
        return (await self._question("/tokenize", body, _Tokens)).tokens

    async def text(self, tokens: list[int]) -> str:
        """The text of tokens."""
        return (await self._question("/detokenize", {"tokens": tokens}, _Text)).content

    async def count(self, body: dict[str, Any]) -> int:
        """Tokens of the prompt that the body of a chat makes."""
        body = {**body, "stream": False}
        return (await self._question("/v1/chat/completions/input_tokens", body, _Count)).input_tokens

    async def _question(self, path: str, body: dict[str, Any], answer: type[T]) -> T:
        small = replace(self.ask, calls={Engine.LLAMA: Call(path, body)}, stream=False)
        raw, _ = await ask_whole(self.service, small)
        try:
            return msgspec.json.decode(raw, type=answer)
        except msgspec.MsgspecError as error:
            raise Refusal(Fault.ENGINE, f"the engine's answer to {path} can't be read: {error}") from None
