"""What of the schemas in a request is not enforced, as its caller is told: briefly, however much. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from sollold.api.grammar.problem import SchemaProblem

_MOST_PLACES = 4
"""Of one schema: who knows these knows what to change, and a header has no room for all."""
_MOST_TOOLS = 8


def schema_warnings(what: str, problems: Iterable[SchemaProblem]) -> list[str]:
    """One warning for the schema of ``what``; none where all of it is enforced."""
    found = list(dict.fromkeys(str(problem) for problem in problems))
    if not found:
        return []
    further = f" and {len(found) - _MOST_PLACES} more" if len(found) > _MOST_PLACES else ""
    return [f"{what}: not enforced: {', '.join(found[:_MOST_PLACES])}{further}"]


def of_tools(warnings: list[str]) -> list[str]:
    """The warnings of the tools of a request, and how many there are besides."""
    further = len(warnings) - _MOST_TOOLS
    if further <= 0:
        return warnings
    return [*warnings[:_MOST_TOOLS], f"not all is enforced of the schemas of {further} more tools"]
