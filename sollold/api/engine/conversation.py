"""Rewrites conversations for strict chat templates, and leaves out their oldest exchanges. Pure.

Messages are OpenAI's: ``role``, ``content``, ``tool_calls``, ``tool_call_id``, ``reasoning_content``. No
function changes its argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

Message = dict[str, Any]

_SYSTEM = ("system", "developer")
_ID_LENGTH = 9


def merge_answers(messages: Sequence[Message]) -> list[Message]:
    """Return ``messages`` with an assistant's text merged into the assistant message after it.

    llama-server rejects two of them at the end, and no template treats them separately.
    """
    roles = [message.get("role") for message in messages]
    if ("assistant", "assistant") not in itertools.pairwise(roles):
        return list(messages)
    return _merge(messages, lambda role: role == "assistant", named=False)


def results_in_order(messages: Sequence[Message]) -> list[Message]:
    """Return ``messages`` with the results of parallel tool calls in the order of the calls.

    Agents (Claude Code) send them in the order in which the tools finished. Most templates write no ids, so
    the model would take the first result for that of the first call.
    """
    ordered = list(messages)
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            continue
        order = {str(call.get("id")): position for position, call in enumerate(calls)}
        if len(order) < len(calls):
            continue
        end = index + 1
        while end < len(messages) and str(messages[end].get("tool_call_id")) in order:
            end += 1
        ordered[index + 1 : end] = sorted(messages[index + 1 : end], key=partial(_call_position, order))
    return ordered


def _call_position(order: dict[str, int], result: Message) -> int:
    return order[str(result["tool_call_id"])]


def tidy(messages: Sequence[Message]) -> list[Message]:
    """Return ``messages`` in the order that strict templates require, with the same content.

    System messages are merged into one, the first; adjacent user or assistant messages are merged; the first
    turn is the user's (an empty one if the assistant began); a tool result without its call, or a message of
    unknown role, becomes the user's; the ids of calls have nine letters and digits.
    """
    messages = _with_short_ids(messages)
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
    first = (
        [{"role": "system", "content": join_contents(*(message.get("content") for message in system))}]
        if system
        else []
    )
    return [*first, *_merge(turns, lambda role: role in ("user", "assistant"), named=False)]


def _with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Return ``messages`` with the only ids of calls that Mistral's templates accept."""
    ids: dict[str, str] = {}

    def short(id_: object) -> str:
        text = str(id_)
        if len(text) == _ID_LENGTH and text.isascii() and text.isalnum():
            return text
        return ids.setdefault(text, f"call{len(ids):05}")

    out = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": [{**call, "id": short(call.get("id"))} for call in calls]}
        if "tool_call_id" in message:
            message = {**message, "tool_call_id": short(message["tool_call_id"])}
        out.append(message)
    return out


def flatten(messages: Sequence[Message]) -> list[Message]:
    """`tidy` for templates that know only user and assistant: everything else becomes their text."""
    turns: list[Message] = []
    system = ""
    for message in tidy(messages):
        role = message.get("role")
        if role == "system":
            system = message["content"]
        elif role == "tool":
            turns.append({"role": "user", "content": message.get("content") or ""})
        elif message.get("tool_calls"):
            calls = [msgspec.json.encode(call.get("function")).decode() for call in message["tool_calls"]]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            turns.append({**rest, "content": join_contents(message.get("content") or "", "\n".join(calls))})
        else:
            turns.append(message)
    if system:
        if not turns or turns[0].get("role") != "user":
            turns.insert(0, {"role": "user", "content": ""})
        turns[0] = {**turns[0], "content": join_contents(system, turns[0].get("content") or "")}
    return _merge(turns, lambda role: True, named=True)


def oldest_exchanges(messages: Sequence[Message]) -> list[list[int]]:
    """Return the exchanges that may be left out of ``messages``, as lists of indexes, oldest first.

    An exchange is a user's turn with everything that answers it. System messages and the last user turn
    are in none; of the steps that answer that turn (a call with its results), all but the last are included.
    """
    last = max((index for index, message in enumerate(messages) if message.get("role") == "user"), default=-1)
    exchanges: list[list[int]] = []
    for index, message in enumerate(messages[: max(last, 0)]):
        role = message.get("role")
        if role in _SYSTEM:
            continue
        follows = bool(exchanges) and messages[exchanges[-1][-1]].get("role") == "user"
        if not exchanges or (role == "user" and not follows):
            exchanges.append([])
        exchanges[-1].append(index)
    steps: list[list[int]] = []
    for index in range(last + 1, len(messages)):
        role = messages[index].get("role")
        if role in _SYSTEM:
            continue
        if not steps or role != "tool":
            steps.append([])
        steps[-1].append(index)
    return exchanges + steps[:-1]


def without(messages: Sequence[Message], exchanges: Sequence[Sequence[int]]) -> list[Message]:
    """Return ``messages`` without those of ``exchanges``."""
    excluded = {index for exchange in exchanges for index in exchange}
    return [message for index, message in enumerate(messages) if index not in excluded]


def _merge(messages: Sequence[Message], merges: Callable[[Any], bool], *, named: bool) -> list[Message]:
    """Merge adjacent messages; ``named``: also messages with a ``name``, which is dropped if they differ."""
    runs: list[list[Message]] = []
    for message in messages:
        if runs and merges(message.get("role")) and _can_merge(runs[-1][-1], message, named=named):
            runs[-1].append(message)
        else:
            runs.append([message])
    return [run[0] if len(run) == 1 else _merged(run) for run in runs]


def _merged(messages: Sequence[Message]) -> Message:
    """Return one message with the fields of all; their contents are joined once, since each join copies."""
    merged: Message = {}
    for message in messages:
        merged |= message
    merged["content"] = join_contents(*(message.get("content") for message in messages))
    thoughts = [m["reasoning_content"] for m in messages if m.get("reasoning_content")]
    if thoughts:
        merged["reasoning_content"] = "\n\n".join(thoughts)
    if any(message.get("name") != messages[0].get("name") for message in messages):
        merged.pop("name", None)
    return merged


def _can_merge(last: Message, message: Message, *, named: bool) -> bool:
    """Whether two messages may be merged; not after calls, which are followed by their results.

    Fields unknown to templates (``id``, ``annotations`` …) do not keep messages apart.
    """
    same_role = last.get("role") == message.get("role")
    has_name = not named and (last.get("name") or message.get("name"))
    return same_role and not has_name and not last.get("tool_calls")


def join_contents(*contents: Any) -> Any:
    """Join contents: strings with an empty line between them, else the parts of all."""
    filled = [content for content in contents if content]
    if len(filled) < 2:
        return filled[0] if filled else ""
    texts = list(map(_as_text, filled))
    first = list(itertools.takewhile(lambda text: isinstance(text, str), texts))
    joined = "\n\n".join(first)
    if len(first) == len(texts):
        return joined
    parts = _parts(joined) if first else []
    return [*parts, *(part for text in texts[len(first) :] for part in _parts(text))]


def _as_text(content: Any) -> Any:
    """Return a single text part as a string; other content unchanged."""
    if isinstance(content, list) and len(content) == 1 and content[0].get("type") == "text":
        return content[0].get("text") or ""
    return content


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
