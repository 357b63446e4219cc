"""Computes the context for a request whose prompt an engine refused as too long. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sollold.errors import Refusal

ANSWER_TOKENS = 4096
"""Tokens reserved for the answer when a model is loaded with more context for a long prompt; fewer if the
caller limits the answer."""
LEAST_ANSWER_TOKENS = 256
"""The same if there is not enough memory for that many."""
SETTING = "placement.context"

_PROMPT = re.compile(r"request \((\d+) tokens\) exceeds the available context size")


def larger_context(
    refusal: Refusal, body: Mapping[str, Any], trained: int, answer: int = ANSWER_TOKENS
) -> int:
    """Return the context in tokens that a prompt refused as too long needs.

    0 if it was refused for another reason, or if the model's trained context is too short for the prompt.

    Args:
        refusal: the engine's refusal.
        body: the request's body as sent to the engine.
        trained: the model's trained context in tokens; 0 if unknown.
        answer: tokens reserved for the answer, unless the caller limits it to fewer.
    """
    match = _PROMPT.search(refusal.message)
    if match is None:
        return 0
    prompt = int(match[1])
    if trained and prompt >= trained:
        return 0
    limits = [body.get(name) for name in ("n_predict", "max_tokens", "max_completion_tokens")]
    answer = min([answer, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])
    return min(prompt + answer, trained) if trained else prompt + answer


def too_long(refusal: Refusal, why: str) -> Refusal:
    """Extend an engine's refusal of a long prompt by ``why`` the model can't be loaded with more context."""
    message = f"{refusal.message}; {why.rstrip('.')}. The setting is {SETTING}"
    return Refusal(refusal.fault, message, status=refusal.status)
