"""Lists the input of a stored response for ``/v1/responses/{id}/input_items``. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sollold.errors import Fault, Refusal

Item = dict[str, Any]

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
_USUAL, _MOST = 20, 100


def listed_items(items: list[Item], new_id: Callable[[str, int], str]) -> list[Item]:
    """Return items in the form that responses use; ``new_id`` makes an id from a prefix and an index."""
    return [_listed(item, index, new_id) for index, item in enumerate(items)]


def _listed(item: Item, index: int, new_id: Callable[[str, int], str]) -> Item:
    kind = str(item.get("type") or "message")
    shown = {"status": "completed", **item, "type": kind}
    shown["id"] = item.get("id") or new_id(_PREFIXES.get(kind, "item"), index)
    content = item.get("content")
    if kind == "message" and isinstance(content, str):
        if item.get("role") == "assistant":
            part: Item = {"type": "output_text", "text": content, "annotations": [], "logprobs": []}
        else:
            part = {"type": "input_text", "text": content}
        shown["content"] = [part]
    return shown


def page(items: list[Item], query: Mapping[str, str]) -> Item:
    """Return the page of the list that ``limit``, ``order`` and ``after`` select.

    Raises:
        Refusal: BAD_REQUEST.
    """
    limit, order, after = query.get("limit", str(_USUAL)), query.get("order", "desc"), query.get("after")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= _MOST):
        raise Refusal(Fault.BAD_REQUEST, f"limit must be an integer from 1 to {_MOST}")
    if order not in ("asc", "desc"):
        raise Refusal(Fault.BAD_REQUEST, "order must be asc or desc")
    ordered = items if order == "asc" else items[::-1]
    if after:
        places = [index for index, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise Refusal(Fault.BAD_REQUEST, f"after: the response has no input item with id '{after[:100]}'")
        ordered = ordered[places[0] + 1 :]
    found = ordered[: int(limit)]
    first, last = (found[0]["id"], found[-1]["id"]) if found else (None, None)
    more = len(found) < len(ordered)
    return {"object": "list", "data": found, "first_id": first, "last_id": last, "has_more": more}
