"""The list of models for Anthropic's clients, in pages if they ask for pages. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sollold.errors import Fault, Refusal

_MOST = 1000


def model_page(shown: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """Return the page that ``limit``, ``after_id`` and ``before_id`` select; without them up to 1000 models.

    Raises:
        Refusal: BAD_REQUEST.
    """
    limit = query.get("limit", str(_MOST))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 5 and 1 <= int(limit) <= _MOST):
        raise Refusal(Fault.BAD_REQUEST, f"limit must be an integer from 1 to {_MOST}")
    first, last = _after(shown, query, "after_id", 1), len(shown)
    if query.get("before_id"):
        last = _after(shown, query, "before_id", 0)
        first = max(first, last - int(limit))
        more = first > 0
    else:
        last = min(last, first + int(limit))
        more = last < len(shown)
    page = shown[first:last]
    ends = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"data": page, "has_more": more, "first_id": ends[0], "last_id": ends[1]}


def _after(shown: Sequence[Mapping[str, Any]], query: Mapping[str, str], name: str, step: int) -> int:
    """Return the index of the model that the query names, plus ``step``; 0 if it names none."""
    wanted = query.get(name)
    if not wanted:
        return 0
    places = [place for place, one in enumerate(shown) if one["id"] == wanted]
    if not places:
        raise Refusal(Fault.BAD_REQUEST, f"{name}: there is no model '{wanted[:100]}'")
    return places[0] + step
