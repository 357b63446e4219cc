"""Shortens a prompt longer than the engine's context, as Ollama does unless ``truncate`` is false.

A conversation loses its oldest exchanges, each as a whole, but never system messages or the user's last turn;
a last message that is too long by itself keeps its end, as does a plain prompt. A text to embed keeps its
beginning. The answer gets up to a quarter of the context: it can't push out the beginning of the prompt while
it grows (Ollama's ``shift``), but ends with ``length`` instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sollold.api.engine.conversation import Message, oldest_exchanges, without
from sollold.api.engine.retry import RevisingService, with_llama_body
from sollold.api.engine.tokenize import TokenizerClient
from sollold.errors import Fault, Refusal
from sollold.serving.request import Ask, Call, Engine, Service, longest_input

_MAX_CONCURRENT = 8
"""Maximum concurrent tokenizations of texts to embed."""
_MAX_TOKEN_CHARACTERS = 64
"""Maximum characters of a token, but for a few of long whitespace."""
_MARGIN_TOKENS = 8
"""Additional tokens left free at each further try, since cutting a text changes its tokens."""


def room_for_prompt(context: int, predict: int | None) -> int:
    """Return the tokens left for the prompt; the answer gets ``predict`` or a quarter, whichever is less."""
    share = max(1, context // 4)
    reserved = predict if predict is not None and 0 < predict < share else share
    return max(1, context - reserved)


def first_and_last(tokens: Sequence[int], keep: int, room: int) -> list[int]:
    """Return the first ``keep`` tokens (negative: as many as fit) and the last ones, ``room`` in all."""
    if len(tokens) <= room:
        return list(tokens)
    first = room if keep < 0 else min(keep, room)
    return [*tokens[:first], *tokens[len(tokens) - (room - first) :]]


class TruncatingService(RevisingService):
    """A `Service` that retries with a shortened prompt if an engine rejects it as too long."""

    def __init__(self, service: Service, keep: int = 0) -> None:
        """``keep``: Ollama's ``num_keep``, the tokens to keep at the beginning of a plain prompt."""
        super().__init__(service)
        self._keep = keep

    async def _revised(self, ask: Ask, refusal: Refusal, attempt: int) -> Ask | None:
        # More than one try: the next engine may have a smaller context, and a cut text more tokens.
        context = longest_input(refusal.message)
        call = ask.calls.get(Engine.LLAMA)
        if context is None or call is None:
            return None
        try:
            shortened = await self._shortened(ask, call, context, attempt)
        except Refusal as counting:
            if counting.fault is Fault.ENGINE:
                # Its tokens can't be counted: report the first refusal, which the caller can act on.
                return None
            raise
        return None if shortened is None else with_llama_body(ask, shortened)

    def _warnings(self, first: Ask, last: Ask) -> tuple[str, ...]:
        original, shortened = first.calls.get(Engine.LLAMA), last.calls.get(Engine.LLAMA)
        if original is None or shortened is None or original is shortened:
            return ()
        return (f"the prompt is longer than the context: {_omissions(original.body, shortened.body)}",)

    async def _shortened(self, ask: Ask, call: Call, context: int, attempt: int) -> dict[str, Any] | None:
        """Return a field with which ``call`` fits into ``context`` tokens; None if that is impossible."""
        body = call.body
        tokenizer = TokenizerClient(self.service, ask)
        if call.path == "/v1/embeddings":
            return {"input": await _cut_inputs(tokenizer, body["input"], context)}
        room = max(1, room_for_prompt(context, body.get("n_predict")) - attempt * _MARGIN_TOKENS)
        if "messages" in body:
            messages = await _fitting(tokenizer, body, room)
            return None if messages is None else {"messages": messages}
        if "prompt" not in body:
            return None
        prompt = _cut_middle(body["prompt"], room if self._keep < 0 else min(self._keep, room), room)
        tokens = await tokenizer.tokens(prompt, special=True)
        begin_tokens = await tokenizer.tokens("", special=True)
        # The tokens that mark the beginning do not count towards those to keep.
        keep = (
            self._keep + len(begin_tokens)
            if self._keep >= 0 and tokens[: len(begin_tokens)] == begin_tokens
            else self._keep
        )
        return {"prompt": first_and_last(tokens, keep, room)}


def _cut_middle(prompt: Any, first: int, last: int) -> Any:
    """Cut out the middle of a long text, which can hold none of its ``first`` or ``last`` tokens.

    Decoding millions of tokens that are not needed would take long.
    """
    start, end = (first + 1) * _MAX_TOKEN_CHARACTERS, last * _MAX_TOKEN_CHARACTERS
    if not isinstance(prompt, str) or len(prompt) <= start + end:
        return prompt
    return prompt[:start] + prompt[-end:]


def _omissions(original: dict[str, Any], shortened: dict[str, Any]) -> str:
    """Describe briefly what a shortened request lacks."""
    if "messages" not in original:
        return "the end of each text was omitted" if "input" in original else "its beginning was omitted"
    omitted = len(original["messages"]) - len(shortened["messages"])
    parts = [f"{omitted} of the older messages were omitted"] if omitted else []
    if original["messages"][-1] != shortened["messages"][-1]:
        parts.append("the beginning of the last message was omitted")
    return " and ".join(parts) or "it was shortened"


async def _fitting(tokenizer: TokenizerClient, body: dict[str, Any], room: int) -> list[Message] | None:
    """Return the messages without as few of the oldest exchanges as possible; None if they can't fit."""
    messages: list[Message] = body["messages"]
    exchanges = oldest_exchanges(messages)
    sizes: dict[int, int | None] = {}

    async def size(count: int) -> int | None:
        """Count tokens without the ``count`` oldest exchanges; None if that fails, so it is no candidate."""
        if count not in sizes:
            kept = without(messages, exchanges[:count])
            try:
                sizes[count] = await tokenizer.count({**body, "messages": kept})
            except Refusal as refusal:
                if refusal.fault not in (Fault.ENGINE, Fault.BAD_REQUEST):
                    raise
                sizes[count] = None
        return sizes[count]

    too_few, enough = -1, len(exchanges)
    while enough > 0 and await size(enough) is None:
        enough -= 1
    minimum = await size(enough)
    if minimum is None:
        return None
    if minimum > room:
        return await _cut_last(tokenizer, body, without(messages, exchanges[:enough]), minimum - room, room)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        tokens = await size(middle)
        if tokens is not None and tokens <= room:
            enough = middle
        else:
            too_few = middle
    return without(messages, exchanges[:enough])


async def _cut_last(
    tokenizer: TokenizerClient, body: dict[str, Any], messages: list[Message], excess: int, room: int
) -> list[Message] | None:
    """Cut the first ``excess`` tokens of the last message, so that ``room`` are left in all; None if it has
    no more than that, or can't be cut."""
    last = messages[-1]
    content = last.get("content")
    if not isinstance(content, str) or last.get("role") == "assistant":
        # The beginning of an answer is continued unchanged.
        return None
    longest = (room + 1) * _MAX_TOKEN_CHARACTERS
    if len(content) > longest:
        # Only this end can be kept: count its tokens, without those of the text before it.
        shortened = [*messages[:-1], {**last, "content": content[-longest:]}]
        content = content[-longest:]
        excess = max(0, await tokenizer.count({**body, "messages": shortened}) - room)
    tokens = await tokenizer.tokens(content, special=False)
    if len(tokens) <= excess:
        return None
    text = await tokenizer.text(tokens[excess:])
    # A character may have been cut in two.
    return [*messages[:-1], {**last, "content": text.lstrip("\ufffd")}]


async def _cut_inputs(tokenizer: TokenizerClient, inputs: str | list[Any], limit: int) -> list[Any]:
    """Cut texts to embed (or tokens) to at most ``limit`` tokens each, leaving one for the end token.

    Raises:
        Refusal: as `TokenizerClient`.
    """
    single = isinstance(inputs, str) or any(isinstance(part, int) for part in inputs)
    slots = asyncio.Semaphore(_MAX_CONCURRENT)

    def fits(text: Any) -> bool:
        # A token has at least one byte; two special tokens may be added.
        return isinstance(text, str) and len(text) < limit and len(text.encode()) + 2 <= limit

    async def cut(text: Any) -> Any:
        if isinstance(text, str):
            text = text[: limit * _MAX_TOKEN_CHARACTERS]
        async with slots:
            tokens = await tokenizer.tokens(text, special=isinstance(text, str))
        return text if len(tokens) <= limit else tokens[: max(1, limit - 1)]

    try:
        async with asyncio.TaskGroup() as group:
            # Usually only a few of thousands of texts are too long.
            texts = [inputs] if single else inputs
            tasks = {
                index: group.create_task(cut(text)) for index, text in enumerate(texts) if not fits(text)
            }
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [tasks[index].result() if index in tasks else text for index, text in enumerate(texts)]
