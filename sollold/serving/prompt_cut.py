"""Detects whether Ollama left out part of a prompt: it silently cuts prompts that exceed its context.

It reports the number of prompt tokens that it processed. A prompt that was cut fills the context, or, if
whole messages were left out, has far more characters per processed token than any text has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from sollold.serving.request import Engine, Routing
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.serving")

_MAX_CHARACTERS = 6
"""Maximum characters per token in a long text; English has about 4, code 3."""
_CUT_CHARACTERS = 10
"""Characters per token processed from which on a prompt was certainly cut."""
_SHORT_CHARACTERS = 4000
"""Length in characters up to which a prompt is not cut unless a smaller context was requested."""
_COUNTS = (b'"prompt_eval_count"', b'"prompt_tokens"')


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Counts(msgspec.Struct):
    prompt_eval_count: int = 0
    usage: _Usage | None = None


_counts = msgspec.json.Decoder(_Counts)


def tokens_read(event: bytes) -> int:
    """Return the number of prompt tokens that Ollama reports; 0 if this event does not contain it."""
    if not any(name in event for name in _COUNTS):
        return 0
    try:
        counts = _counts.decode(event)
    except UNDECODABLE:
        return 0
    return counts.prompt_eval_count or (counts.usage.prompt_tokens if counts.usage is not None else 0)


def prompt_size(body: Mapping[str, Any]) -> int:
    """Count the characters of a request's texts; each run of white space counts as one."""
    texts = [body.get("system"), body.get("prompt")]
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else [content]
        texts += [part.get("text") if isinstance(part, dict) else part for part in parts]
    words = [text.split() for text in texts if isinstance(text, str)]
    return sum(sum(map(len, group)) + len(group) for group in words)


def was_cut(size: int, read: int, context: int) -> bool:
    """Whether a prompt of ``size`` characters was cut, if Ollama processed ``read`` tokens of it.

    ``context``: Ollama's context in tokens; 0: unknown.
    """
    if read <= 0:
        return False
    if context <= 0:
        return size > max(_SHORT_CHARACTERS, _CUT_CHARACTERS * read)
    # Up to two tokens are left free for the answer.
    full = read >= context - 2
    return full or size > _MAX_CHARACTERS * context or (size > 3 * context and size > _CUT_CHARACTERS * read)


class CutPrompt:
    """Adds a warning to the routing of an Ollama's answer if the prompt was cut."""

    def __init__(self, routing: Routing, body: Mapping[str, Any], context: Callable[[], int]) -> None:
        """``body``: the request's body; ``context``: returns Ollama's context in tokens, 0 if unknown."""
        self._routing = routing
        self._body = body
        self._context = context

    def look(self, events: list[bytes]) -> None:
        """Look for the token counts in events before they are passed on; the last event contains them."""
        read = max(map(tokens_read, events), default=0)
        if not read or self._routing.engine is not Engine.OLLAMA:
            return
        size, context = prompt_size(self._body), self._context()
        if was_cut(size, read, context):
            warning = cut_warning(read, context)
            log.warning("%s: %s", self._routing.model, warning)
            self._routing.warnings += (warning,)


def cut_warning(read: int, context: int) -> str:
    """The warning for a caller whose prompt was cut."""
    length = f" of {context} tokens" if context > 0 else ""
    return (
        f"the prompt is longer than the context{length} of this Ollama: it processed {read} tokens and left "
        "out the rest; set a larger num_ctx"
    )
