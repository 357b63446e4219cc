"""A prompt longer than the engine's context is shortened, as Ollama does unless ``truncate`` is false.

Of a conversation the oldest turns go, never the system's words and never the last turn; a last turn that is
too long by itself keeps its end, as a plain prompt does. A text to embed keeps its beginning. An answer gets
up to a quarter of the context: here it can't push the beginning out while it is written (Ollama's
``shift``), it ends with ``length`` instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sollold.api.aside import Aside
from sollold.serving.ask import Answer, Ask, Call, Engine, Fault, Refusal, Service, Waiting
from sollold.serving.too_long import longest_input

_TRIES = 3
"""Times that a prompt is shortened: the next engine may have a smaller context, a cut text more tokens."""
_AT_ONCE = 8
"""Texts to embed whose tokens are asked for at a time."""
_SLACK = 8
"""Tokens left free at each further try; where a text is cut its tokens change."""

Message = dict[str, Any]


def without_oldest(messages: Sequence[Message], turns: int) -> list[Message]:
    """``messages`` without so many of the oldest; the system's are no turns, and the last one stays.

    A tool's result whose call is gone goes too: templates fail on it.
    """
    kept: list[Message] = []
    left = turns
    orphan = False
    for place, message in enumerate(messages):
        if message.get("role") in ("system", "developer") or place == len(messages) - 1:
            kept.append(message)
        elif left > 0:
            left -= 1
            orphan = True
        elif not (orphan and message.get("role") == "tool"):
            orphan = False
            kept.append(message)
    return kept


def turns_to_drop(messages: Sequence[Message]) -> int:
    """How many turns could go."""
    return sum(message.get("role") not in ("system", "developer") for message in messages[:-1])


def room_for_prompt(context: int, predict: int | None) -> int:
    """Tokens of the prompt, when ``predict`` are wanted for the answer (none named: what there is)."""
    share = max(1, context // 4)
    wanted = predict if predict is not None and 0 < predict < share else share
    return max(1, context - wanted)


def ends(tokens: Sequence[int], keep: int, room: int) -> list[int]:
    """The first ``keep`` tokens (negative: as many as there is room for) and the last, ``room`` in all."""
    if len(tokens) <= room:
        return list(tokens)
    first = room if keep < 0 else min(keep, room)
    return [*tokens[:first], *tokens[len(tokens) - (room - first) :]]


@dataclass(frozen=True, slots=True)
class Shortening:
    """A `Service` that asks again with less when an engine calls a prompt too long.

    Attributes:
        keep: Ollama's ``num_keep``: tokens at the beginning of a plain prompt that stay.
    """

    service: Service
    keep: int = 0

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        """As `Service.open`.

        Raises:
            Refusal: also when nothing can go and it is too long still.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + ask.deadline
        for attempt in range(_TRIES + 1):
            if ask.deadline > 0:
                ask = replace(ask, deadline=max(0.001, until - loop.time()))
            try:
                return await self.service.open(ask, on_wait)
            except Refusal as refusal:
                context = longest_input(refusal.message) if refusal.fault is Fault.ENGINE else None
                call = ask.calls.get(Engine.LLAMA)
                if context is None or call is None or attempt == _TRIES:
                    raise
                try:
                    shorter = await self._shorter(ask, call, context, attempt)
                except Refusal as other:
                    if other.fault is Fault.ENGINE:
                        # It does not count: what it said first is what the caller can do something about.
                        raise refusal from other
                    raise
                if shorter is None:
                    raise
                ask = replace(ask, calls={**ask.calls, Engine.LLAMA: shorter})
        raise AssertionError("unreachable")

    async def _shorter(self, ask: Ask, call: Call, context: int, attempt: int) -> Call | None:
        """``call`` so short that ``context`` tokens hold it; None when that can't be."""
        aside, body = Aside(self.service, ask), call.body
        if call.path == "/v1/embeddings":
            return Call(call.path, {**body, "input": await _cut_inputs(aside, body["input"], context)})
        room = max(1, room_for_prompt(context, body.get("n_predict")) - attempt * _SLACK)
        if "messages" in body:
            messages = await _fewer(aside, body, room)
            return None if messages is None else Call(call.path, {**body, "messages": messages})
        if "prompt" not in body:
            return None
        tokens = await aside.tokens(body["prompt"], special=True)
        marks = await aside.tokens("", special=True)
        # The mark at the beginning does not count among those to be kept.
        keep = self.keep + len(marks) if self.keep >= 0 and tokens[: len(marks)] == marks else self.keep
        return Call(call.path, {**body, "prompt": ends(tokens, keep, room)})


async def _fewer(aside: Aside, body: dict[str, Any], room: int) -> list[Message] | None:
    """The messages without as few of the oldest as will do."""
    messages: list[Message] = body["messages"]
    too_few, enough = -1, turns_to_drop(messages)
    fewest = without_oldest(messages, enough)
    over = await aside.count({**body, "messages": fewest}) - room
    if over > 0:
        return await _cut_last(aside, fewest, over)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if await aside.count({**body, "messages": without_oldest(messages, middle)}) <= room:
            enough = middle
        else:
            too_few = middle
    return without_oldest(messages, enough)


async def _cut_last(aside: Aside, messages: list[Message], over: int) -> list[Message] | None:
    """The last message without its first ``over`` tokens; None when it has no more than that."""
    last = messages[-1]
    content = last.get("content")
    if not isinstance(content, str) or last.get("role") == "assistant":
        # An answer that was begun goes on from where it stands.
        return None
    tokens = await aside.tokens(content, special=False)
    if len(tokens) <= over:
        return None
    text = await aside.text(tokens[over:])
    # A character that was cut in two.
    return [*messages[:-1], {**last, "content": text.lstrip("\ufffd")}]


async def _cut_inputs(aside: Aside, given: str | list[Any], limit: int) -> list[Any]:
    """Texts to embed (or tokens) of ``limit`` tokens at the most each; one is left for the end mark.

    Raises:
        Refusal: as `Aside`.
    """
    one = isinstance(given, str) or any(isinstance(part, int) for part in given)
    places = asyncio.Semaphore(_AT_ONCE)

    async def cut(text: Any) -> Any:
        if isinstance(text, str) and len(text.encode()) + 2 <= limit:
            # No token is less than a byte; two marks may be added.
            return text
        async with places:
            tokens = await aside.tokens(text, special=isinstance(text, str))
        return text if len(tokens) <= limit else tokens[: max(1, limit - 1)]

    try:
        async with asyncio.TaskGroup() as group:
            cutting = [group.create_task(cut(text)) for text in ([given] if one else given)]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in cutting]
