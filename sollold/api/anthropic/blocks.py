"""The kinds of content blocks of ``/v1/messages``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sollold.api.anthropic.tool_changes import CHANGES

READ = frozenset(["text", "image", "document", "tool_use", "tool_result", "thinking", "search_result"])
_RESULT_KINDS = frozenset(("tool_reference",))
_HOSTED = frozenset(
    (
        *("redacted_thinking", "server_tool_use", "mcp_tool_use", "mcp_tool_listing"),
        *("container_upload", "compaction", "fallback"),
    )
)
"""Blocks that only Anthropic can read, or that describe what ran there, and the summary of a compaction."""
_KNOWN = READ | _RESULT_KINDS | _HOSTED | {*CHANGES}


def is_known(kind: str) -> bool:
    """Whether the meaning of blocks of this kind is known."""
    return kind in _KNOWN or is_hosted_result(kind)


def is_hosted_result(kind: str) -> bool:
    """Whether blocks of this kind have the result of a tool that ran at Anthropic, or a file stored there."""
    return kind == "container_upload" or (kind.endswith("_tool_result") and kind not in READ)


def block_kinds(messages: object) -> list[str]:
    """Return the kinds of blocks in the messages of the original request, each once."""
    kinds = {str(block.get("type")) for turn in _objects(messages) for block in _blocks(turn.get("content"))}
    return sorted(kinds)


def wants_citations(messages: object) -> bool:
    """Whether a block of the original request asks for answers that cite it."""
    fields = (block.get("citations") for turn in _objects(messages) for block in _blocks(turn.get("content")))
    return any(isinstance(citations, dict) and citations.get("enabled") is True for citations in fields)


def _blocks(content: object) -> Iterator[dict[str, Any]]:
    """Yield the blocks of a message, and those in tool results."""
    for block in _objects(content):
        yield block
        if block.get("type") == "tool_result":
            yield from _objects(block.get("content"))


def _objects(value: object) -> Iterable[dict[str, Any]]:
    return (entry for entry in value if isinstance(entry, dict)) if isinstance(value, list) else ()
