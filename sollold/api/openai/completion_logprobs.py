"""Log-probabilities of ``/v1/completions``: OpenAI's columns there, beside the engines' rows. Pure.

A chat has one object for each token (``content``), a completion a list for each field (``tokens``,
``token_logprobs``, ``top_logprobs``, ``text_offset``). Engines give the first form on both routes.
"""

from __future__ import annotations

from typing import Any

import msgspec


class LogprobColumns:
    """Of one answer. ``rivals``: for each token at the most."""

    def __init__(self, rivals: int) -> None:
        self._rivals = rivals
        self._offsets: dict[int, int] = {}
        """Characters that each choice has so far."""

    def event(self, raw: bytes) -> bytes:
        """A chunk, or a whole answer, with the columns; what can't be read is unchanged."""
        if b'"logprobs"' not in raw:
            return raw
        try:
            answer = msgspec.json.decode(raw)
            for choice in answer["choices"]:
                if choice.get("logprobs"):
                    rows = choice["logprobs"]["content"]
                    choice["logprobs"] |= self.columns(rows, choice.get("index", 0))
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
            return raw
        return msgspec.json.encode(answer)

    def columns(self, rows: list[dict[str, Any]], choice: int = 0) -> dict[str, Any]:
        """The fields of the tokens in ``rows``, which come next in a choice.

        Raises:
            KeyError, TypeError: they are no such tokens.
        """
        offsets = []
        for row in rows:
            offsets.append(self._offsets.setdefault(choice, 0))
            self._offsets[choice] += len(row["token"])
        rivals = [
            {rival["token"]: rival["logprob"] for rival in row["top_logprobs"][: self._rivals]}
            for row in rows
        ]
        return {
            "tokens": [row["token"] for row in rows],
            "token_logprobs": [row["logprob"] for row in rows],
            "top_logprobs": rivals if self._rivals else None,
            "text_offset": offsets,
        }
