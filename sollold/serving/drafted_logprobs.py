"""What an answer lacks whose tokens were drafted. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sollold.cluster.gossip.record import Drafts

_ASKED = ("n_probs", "logprobs", "top_logprobs")


def logprobs_warning(body: Mapping[str, Any], drafts: Drafts) -> str:
    """What a caller who wants probabilities of tokens is told; empty: nothing is missing.

    llama-server works out none for the tokens of a draft that it accepts, and gives a logprob of 0.0.
    """
    if not drafts.by or not any(body.get(name) for name in _ASKED):
        return ""
    return (
        "tokens that were drafted have no probabilities: their logprob is given as 0.0. "
        "Load the model with speculation off to have them"
    )
