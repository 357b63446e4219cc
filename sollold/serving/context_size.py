"""How much context a request needs whose prompt an engine refused as too long. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sollold.errors import Refusal

ANSWER_TOKENS = 4096
"""Tokens kept free for an answer beside a prompt for which a model is loaded with more context; fewer where
the caller limits the answer."""
LEAST_ANSWER_TOKENS = 256
"""The same where there is no room for so many."""
SETTING = "placement.context"

_PROMPT = re.compile(r"request \((\d+) tokens\) exceeds the available context size")


def larger_context(
    refusal: Refusal, body: Mapping[str, Any], trained: int, answer: int = ANSWER_TOKENS
) -> int:
    """Tokens of context with which the prompt that an engine refused as too long could be answered.

    0 when it was refused for something else, or the model was trained with no more than the prompt has.

    Args:
        refusal: the engine's.
        body: the request's, as the engine got it.
        trained: tokens that the model was trained with; 0 when unknown.
        answer: tokens kept free for the answer, unless the caller limits it to fewer.
    """
    found = _PROMPT.search(refusal.message)
    if found is None:
        return 0
    prompt = int(found[1])
    if trained and prompt >= trained:
        return 0
    limits = [body.get(name) for name in ("n_predict", "max_tokens", "max_completion_tokens")]
    answer = min([answer, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])
    return min(prompt + answer, trained) if trained else prompt + answer


def too_long(refusal: Refusal, why: str) -> Refusal:
    """An engine's refusal of a prompt as too long; ``why``: the model is not loaded with more context."""
    message = f"{refusal.message}; {why.rstrip('.')}. The setting is {SETTING}"
    return Refusal(refusal.fault, message, status=refusal.status)
