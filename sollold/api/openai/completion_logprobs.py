"""Log-probabilities of ``/v1/completions``: adds OpenAI's columns to the engines' rows. Pure.

A chat has one object per token (``content``), a completion one list per field (``tokens``,
``token_logprobs``, ``top_logprobs``, ``text_offset``). Engines give the first form on both routes.
"""

from __future__ import annotations

from typing import Any

from sollold.api.engine.chunks import edit_each


class LogprobColumns:
    """Adds the columns to one answer. ``alternatives``: maximum number per token."""

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._offsets: dict[int, int] = {}
        """Length of each choice's text so far, in characters."""

    def event(self, raw: bytes) -> bytes:
        """Return a chunk or a whole answer with the columns added; unchanged if it can't be parsed."""
        return edit_each(raw, self._add) if b'"logprobs"' in raw else raw

    def _add(self, choice: dict[str, Any]) -> None:
        if choice.get("logprobs"):
            choice["logprobs"] |= self.columns(choice["logprobs"]["content"], choice.get("index", 0))

    def columns(self, rows: list[dict[str, Any]], choice: int = 0) -> dict[str, Any]:
        """Return the columns for ``rows``, the next tokens of a choice.

        Raises:
            KeyError, TypeError: the rows are malformed.
        """
        offsets = []
        for row in rows:
            offsets.append(self._offsets.setdefault(choice, 0))
            self._offsets[choice] += len(row["token"])
        top = [
            {entry["token"]: entry["logprob"] for entry in row["top_logprobs"][: self._alternatives]}
            for row in rows
        ]
        return {
            "tokens": [row["token"] for row in rows],
            "token_logprobs": [row["logprob"] for row in rows],
            "top_logprobs": top if self._alternatives else None,
            "text_offset": offsets,
        }
