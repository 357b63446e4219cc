"""Conversations in forms that more chat templates accept, and their oldest exchanges left out. Pure.

Messages are OpenAI's: ``role``, ``content``, ``tool_calls``, ``tool_call_id``, ``reasoning_content``. No
function changes its argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

Message = dict[str, Any]

_SYSTEM = ("system", "developer")


def merge_answers(messages: Sequence[Message]) -> list[Message]:
    """``messages`` with an assistant's text joined to the assistant's message after it.

    llama-server refuses two of them at the end, and no template gives them a meaning of their own.
    """
    return _merge(messages, lambda role: role == "assistant", named=False)


def tidy(messages: Sequence[Message]) -> list[Message]:
    """``messages`` in the order that strict templates require, with the same content.

    The system's texts are one message, the first; neighbours of one role are merged; the first turn is the
    user's (an empty one where the assistant began); a tool's result without its call, or an unknown role, is
    the user's.
    """
    system = [message for message in messages if message.get("role") in _SYSTEM]
    turns: list[Message] = []
    calls: set[str] = set()
    for message in messages:
        role = message.get("role")
        if role in _SYSTEM:
            continue
        if role == "assistant":
            calls = {str(call.get("id")) for call in message.get("tool_calls") or ()} or calls
        elif role == "user":
            calls = set()
        elif role != "tool" or not calls:
            message = {"role": "user", "content": message.get("content") or ""}
        turns.append(message)
    if turns and turns[0].get("role") == "assistant":
        turns.insert(0, {"role": "user", "content": ""})
    first = [{"role": "system", "content": _text_of(system)}] if system else []
    return [*first, *_merge(turns, lambda role: role in ("user", "assistant"), named=False)]


def flatten(messages: Sequence[Message]) -> list[Message]:
    """`tidy` for templates that know user and assistant alone: all else becomes their text."""
    turns: list[Message] = []
    system = ""
    for message in tidy(messages):
        role = message.get("role")
        if role == "system":
            system = message["content"]
        elif role == "tool":
            turns.append({"role": "user", "content": message.get("content") or ""})
        elif message.get("tool_calls"):
            written = [msgspec.json.encode(call.get("function")).decode() for call in message["tool_calls"]]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            turns.append({**rest, "content": _join(message.get("content") or "", "\n".join(written))})
        else:
            turns.append(message)
    if system:
        if not turns or turns[0].get("role") != "user":
            turns.insert(0, {"role": "user", "content": ""})
        turns[0] = {**turns[0], "content": _join(system, turns[0].get("content") or "")}
    return _merge(turns, lambda role: True, named=True)


def oldest_exchanges(messages: Sequence[Message]) -> list[list[int]]:
    """What may be left out of ``messages``, as indexes, the oldest first.

    An exchange is a user's turn with all that answers it. System texts and the last user's turn are in none;
    of what answers that turn all but the last step (a call with its results) may go too.
    """
    last = max((place for place, one in enumerate(messages) if one.get("role") == "user"), default=-1)
    exchanges: list[list[int]] = []
    for place, message in enumerate(messages[: max(last, 0)]):
        role = message.get("role")
        if role in _SYSTEM:
            continue
        follows = bool(exchanges) and messages[exchanges[-1][-1]].get("role") == "user"
        if not exchanges or (role == "user" and not follows):
            exchanges.append([])
        exchanges[-1].append(place)
    steps: list[list[int]] = []
    for place in range(last + 1, len(messages)):
        role = messages[place].get("role")
        if role in _SYSTEM:
            continue
        if not steps or role != "tool":
            steps.append([])
        steps[-1].append(place)
    return exchanges + steps[:-1]


def without(messages: Sequence[Message], exchanges: Sequence[Sequence[int]]) -> list[Message]:
    """``messages`` without those of ``exchanges``."""
    gone = {place for exchange in exchanges for place in exchange}
    return [message for place, message in enumerate(messages) if place not in gone]


def _merge(messages: Sequence[Message], merges: Callable[[Any], bool], *, named: bool) -> list[Message]:
    """``named``: also those that are said to be of somebody, whose name then goes."""
    merged: list[Message] = []
    for message in messages:
        before = merged[-1] if merged else None
        if before is not None and merges(message.get("role")) and _can_merge(before, message, named=named):
            both = {**before, **message, "content": _join(before.get("content"), message.get("content"))}
            thoughts = [one["reasoning_content"] for one in (before, message) if one.get("reasoning_content")]
            if thoughts:
                both["reasoning_content"] = "\n\n".join(thoughts)
            if before.get("name") != message.get("name"):
                both.pop("name", None)
            merged[-1] = both
        else:
            merged.append(message)
    return merged


def _can_merge(before: Message, message: Message, *, named: bool) -> bool:
    """A message with calls is followed by their results, so only text may come before it.

    Fields that templates do not know (``id``, ``annotations`` …) tell nothing apart.
    """
    alike = before.get("role") == message.get("role")
    apart = not named and (before.get("name") or message.get("name"))
    return alike and not apart and not before.get("tool_calls")


def _join(before: Any, after: Any) -> Any:
    """Two contents as one: texts with an empty line between, else the parts of both."""
    if not before or not after:
        return before or after or ""
    before, after = _as_text(before), _as_text(after)
    if isinstance(before, str) and isinstance(after, str):
        return f"{before}\n\n{after}"
    return [*_parts(before), *_parts(after)]


def _as_text(content: Any) -> Any:
    """One part that is a text is that text."""
    if isinstance(content, list) and len(content) == 1 and content[0].get("type") == "text":
        return content[0].get("text") or ""
    return content


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text_of(messages: Sequence[Message]) -> Any:
    content: Any = ""
    for message in messages:
        content = _join(content, message.get("content"))
    return content
