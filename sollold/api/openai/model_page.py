"""The list of models for Anthropic's clients, which may request it in pages. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sollold.errors import Fault, Refusal

_MAX_LIMIT = 1000


def model_page(models: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """Return the page that ``limit``, ``after_id`` and ``before_id`` select; without them up to 1000 models.

    Raises:
        Refusal: BAD_REQUEST.
    """
    limit = query.get("limit", str(_MAX_LIMIT))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 5 and 1 <= int(limit) <= _MAX_LIMIT):
        raise Refusal(Fault.BAD_REQUEST, f"limit must be an integer from 1 to {_MAX_LIMIT}")
    first, last = _boundary(models, query, "after_id", 1), len(models)
    if query.get("before_id"):
        last = _boundary(models, query, "before_id", 0)
        first = max(first, last - int(limit))
        has_more = first > 0
    else:
        last = min(last, first + int(limit))
        has_more = last < len(models)
    page = models[first:last]
    ends = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"data": page, "has_more": has_more, "first_id": ends[0], "last_id": ends[1]}


def _boundary(models: Sequence[Mapping[str, Any]], query: Mapping[str, str], name: str, step: int) -> int:
    """Return the index of the model that the query names, plus ``step``; 0 if it names none."""
    id_ = query.get(name)
    if not id_:
        return 0
    matches = [index for index, model in enumerate(models) if model["id"] == id_]
    if not matches:
        raise Refusal(Fault.BAD_REQUEST, f"{name}: there is no model '{id_[:100]}'")
    return matches[0] + step
