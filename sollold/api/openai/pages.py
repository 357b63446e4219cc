"""Lists in pages: of models for Anthropic's clients, and of the input of a stored response. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sollold.control.models import NodeNames
from sollold.errors import bad_request
from sollold.models.listing import Listed
from sollold.units import timestamp_text

Item = dict[str, Any]

MODEL_PAGES = (
    ("limit", "With Anthropic's header: maximum number of models, from 1 to 1000; default 1000"),
    ("after_id", "With Anthropic's header: id of the model after which the page begins"),
    ("before_id", "With Anthropic's header: id of the model before which the page ends"),
)
"""Parameters of the query for `model_page`."""
_MAX_MODELS = 1000
_DEFAULT_ITEMS, _MAX_ITEMS = 20, 100
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}


def model_object(listed: Listed, names: NodeNames) -> dict[str, Any]:
    """Return a model as an object of ``/v1/models``."""
    model = listed.model
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.modified),
        "owned_by": "library" if model.source == "ollama" else "sollold",
        "nodes": names(listed),
    }


def anthropic_model_object(listed: Listed) -> dict[str, Any]:
    """Return a model as Anthropic's clients expect it, which use the same path."""
    name = listed.model.name
    created = timestamp_text(listed.model.modified)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created,
        "lifecycle": "active",
    }


def model_page(models: Sequence[Item], query: Mapping[str, str]) -> Item:
    """Return the page that ``limit``, ``after_id`` and ``before_id`` select; without them up to 1000 models.

    Raises:
        Refusal: BAD_REQUEST.
    """
    limit = _limit(query, _MAX_MODELS, _MAX_MODELS)
    first, last = _boundary(models, query, "after_id", "there is no model", 1), len(models)
    if query.get("before_id"):
        last = _boundary(models, query, "before_id", "there is no model", 0)
        first = max(first, last - limit)
        has_more = first > 0
    else:
        last = min(last, first + limit)
        has_more = last < len(models)
    page = models[first:last]
    first_id, last_id = _ends(page)
    return {"data": page, "has_more": has_more, "first_id": first_id, "last_id": last_id}


def item_page(items: Sequence[Item], query: Mapping[str, str]) -> Item:
    """Return the page that ``limit``, ``order`` and ``after`` select of `listed_items`.

    Raises:
        Refusal: BAD_REQUEST.
    """
    limit, order = _limit(query, _DEFAULT_ITEMS, _MAX_ITEMS), query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad_request("order must be asc or desc")
    ordered = items if order == "asc" else items[::-1]
    first = _boundary(ordered, query, "after", "the response has no input item with id", 1)
    page, has_more = ordered[first : first + limit], first + limit < len(ordered)
    first_id, last_id = _ends(page)
    return {"object": "list", "data": page, "first_id": first_id, "last_id": last_id, "has_more": has_more}


def _limit(query: Mapping[str, str], default: int, most: int) -> int:
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and 1 <= int(text) <= most):
        raise bad_request(f"limit must be an integer from 1 to {most}")
    return int(text)


def _boundary(items: Sequence[Item], query: Mapping[str, str], name: str, unknown: str, step: int) -> int:
    """Return the index of the item that the query names, plus ``step``; 0 if it names none."""
    id_ = query.get(name)
    if not id_:
        return 0
    matches = [index for index, item in enumerate(items) if item["id"] == id_]
    if not matches:
        raise bad_request(f"{name}: {unknown} '{id_[:100]}'")
    return matches[0] + step


def _ends(page: Sequence[Item]) -> tuple[str | None, str | None]:
    return (page[0]["id"], page[-1]["id"]) if page else (None, None)


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
