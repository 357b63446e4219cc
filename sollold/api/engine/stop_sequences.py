"""Finds stop sequences in streamed text. Pure.

llama-server ends at a stop sequence but does not report which one; a dialect that must do so searches itself.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopSequences:
    """Passes text on until a stop sequence, buffering what may be the beginning of one."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(word for word in words if word)
        self._max_length = max((len(word) for word in self._words), default=0)
        self._pending = ""
        self.found: str | None = None
        """The sequence that was found; None if none was yet."""

    def feed(self, text: str) -> str:
        """Return the text that may be passed on now; empty once a sequence is `found`."""
        if self.found is not None:
            return ""
        if not self._words:
            return text
        text = self._pending + text
        first = min(
            ((position, word) for word in self._words if (position := text.find(word)) >= 0),
            default=None,
            key=lambda match: match[0],
        )
        if first is not None:
            self.found = first[1]
            self._pending = ""
            return text[: first[0]]
        keep = 0
        for length in range(min(self._max_length - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(word.startswith(tail) for word in self._words):
                keep = length
                break
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the buffered text, once the stream has ended."""
        pending, self._pending = self._pending, ""
        return pending
