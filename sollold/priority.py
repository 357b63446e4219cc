"""Request priorities: numbers, their names, and the priorities of roles and tasks."""

from __future__ import annotations

from collections.abc import Mapping

NORMAL = 5

NAMES: Mapping[str, int] = {
    "BATCH": 1,
    "LOWEST": 2,
    "LOW": 3,
    "BELOW_NORMAL": 4,
    "NORMAL": NORMAL,
    "ABOVE_NORMAL": 6,
    "HIGH": 7,
    "HIGHER": 8,
    "URGENT": 9,
    "CRITICAL": 10,
}

ROLES: Mapping[str, int] = {
    "researcher": 8,
    "analyst": 8,
    "assistant": 8,
    "qa": 8,
    "critic": 7,
    "reviewer": 7,
    "editor": 6,
    "summarizer": 5,
    "classifier": 5,
    "extractor": 5,
    "indexer": 3,
    "crawler": 3,
    "background": 2,
    "batch": 1,
}

TASKS: Mapping[str, int] = {
    "interactive": 9,
    "chat": 8,
    "query": 8,
    "analysis": 7,
    "reasoning": 7,
    "generation": 6,
    "summarization": 5,
    "classification": 5,
    "extraction": 5,
    "embedding": 4,
    "indexing": 3,
    "preprocessing": 3,
    "batch": 1,
}
