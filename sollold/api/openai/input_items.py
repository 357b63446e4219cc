"""Lists the input of a stored response for ``/v1/responses/{id}/input_items``. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sollold.errors import Fault, Refusal

Item = dict[str, Any]

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
_DEFAULT, _MAX_LIMIT = 20, 100


def listed_items(items: list[Item], new_id: Callable[[str, int], str]) -> list[Item]:
    """Return items in the form that responses use; ``new_id`` makes an id from a prefix and an index."""
    return [_item_object(item, index, new_id) for index, item in enumerate(items)]


def _item_object(item: Item, index: int, new_id: Callable[[str, int], str]) -> Item:
    kind = str(item.get("type") or "message")
    out = {"status": "completed", **item, "type": kind}
    out["id"] = item.get("id") or new_id(_PREFIXES.get(kind, "item"), index)
    content = item.get("content")
    if kind == "message" and isinstance(content, str):
        if item.get("role") == "assistant":
            part: Item = {"type": "output_text", "text": content, "annotations": [], "logprobs": []}
        else:
            part = {"type": "input_text", "text": content}
        out["content"] = [part]
    return out


def page(items: list[Item], query: Mapping[str, str]) -> Item:
    """Return the page of the list that ``limit``, ``order`` and ``after`` select.

    Raises:
        Refusal: BAD_REQUEST.
    """
    limit, order, after = query.get("limit", str(_DEFAULT)), query.get("order", "desc"), query.get("after")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= _MAX_LIMIT):
        raise Refusal(Fault.BAD_REQUEST, f"limit must be an integer from 1 to {_MAX_LIMIT}")
    if order not in ("asc", "desc"):
        raise Refusal(Fault.BAD_REQUEST, "order must be asc or desc")
    ordered = items if order == "asc" else items[::-1]
    if after:
        matches = [index for index, item in enumerate(ordered) if item["id"] == after]
        if not matches:
            raise Refusal(Fault.BAD_REQUEST, f"after: the response has no input item with id '{after[:100]}'")
        ordered = ordered[matches[0] + 1 :]
    data = ordered[: int(limit)]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    has_more = len(data) < len(ordered)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}
