"""Whether an Ollama left out part of a prompt: it cuts what its context does not hold and does not say so.

It counts the tokens that it read. A prompt that was cut fills the context, or, where whole messages were left
out, has far more characters for each token read than any text has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from sollold.serving.request import Engine, Routing

log = logging.getLogger("sollold.serving")

_MOST_CHARACTERS = 6
"""Characters that a token stands for in a long text at the most; English has about 4, code 3."""
_NEVER_CHARACTERS = 10
_SHORT = 4000
"""Characters of a prompt that no Ollama cuts unless a smaller context was named."""
_COUNTS = (b'"prompt_eval_count"', b'"prompt_tokens"')


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Counts(msgspec.Struct):
    prompt_eval_count: int = 0
    usage: _Usage | None = None


_counts = msgspec.json.Decoder(_Counts)


def tokens_read(event: bytes) -> int:
    """Tokens of the prompt that an Ollama says it has read; 0: this event does not tell."""
    if not any(name in event for name in _COUNTS):
        return 0
    try:
        counts = _counts.decode(event)
    except msgspec.MsgspecError:
        return 0
    return counts.prompt_eval_count or (counts.usage.prompt_tokens if counts.usage is not None else 0)


def prompt_size(body: Mapping[str, Any]) -> int:
    """Characters of a request's texts, white space counted once."""
    texts = [body.get("system"), body.get("prompt")]
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else [content]
        texts += [part.get("text") if isinstance(part, dict) else part for part in parts]
    return sum(sum(map(len, words)) + len(words) for words in _words(texts))


def _words(texts: list[Any]) -> list[list[str]]:
    return [text.split() for text in texts if isinstance(text, str)]


def was_cut(size: int, read: int, context: int) -> bool:
    """Whether a prompt of ``size`` characters, of which an Ollama read ``read`` tokens, was cut.

    ``context``: tokens; 0: not known.
    """
    if read <= 0:
        return False
    if context <= 0:
        return size > max(_SHORT, _NEVER_CHARACTERS * read)
    # Up to two tokens are left free for the answer.
    full = read >= context - 2
    return (
        full or size > _MOST_CHARACTERS * context or (size > 3 * context and size > _NEVER_CHARACTERS * read)
    )


class CutPrompt:
    """Warns the routing of an Ollama's answer where the prompt was cut."""

    def __init__(self, routing: Routing, body: Mapping[str, Any], context: Callable[[], int]) -> None:
        """``body``: of the request; ``context``: gives the tokens of the Ollama's context, 0 when not
        known."""
        self._routing = routing
        self._body = body
        self._context = context

    def look(self, events: list[bytes]) -> None:
        """Look at events before they are handed on: the last of an answer tells."""
        read = max(map(tokens_read, events), default=0)
        if not read or self._routing.engine is not Engine.OLLAMA:
            return
        size, most = prompt_size(self._body), self._context()
        if was_cut(size, read, most):
            warning = cut_warning(read, most)
            log.warning("%s: %s", self._routing.model, warning)
            self._routing.warnings += (warning,)


def cut_warning(read: int, context: int) -> str:
    """What a caller is told whose prompt was cut."""
    known = f" of {context} tokens" if context > 0 else ""
    return (
        f"the prompt is longer than the context{known} at this Ollama: it read {read} tokens and left out "
        "the rest; name a larger num_ctx"
    )
