"""What a caller gets less of than asked for where tokens are drafted, or are not. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from sollold.cluster.gossip.record import Backend, Drafts, Endpoint
from sollold.leader.wish import PlacementWish
from sollold.placement.request import AUTO, OFF

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


def undrafted_warning(wish: PlacementWish, endpoint: Endpoint) -> str:
    """What a caller is told who named what is to draft, where that does not; empty: nothing is missing.

    ``wish``: with a model's own name.
    """
    wanted, by = wish.speculation, endpoint.drafts.by
    if wanted in ("", OFF, AUTO, by):
        return ""
    now = f"tokens are drafted by {by}" if by else "no tokens are drafted"
    told = f"{now}, though speculation {wanted!r} was asked for"
    if endpoint.backend is Backend.OLLAMA:
        return f"{told}: an Ollama answers"
    if endpoint.reason:
        return f"{told}: {endpoint.reason}"
    words = shlex.join(("sollold", "plan", endpoint.model, "--speculation", wanted))
    return f"{told}; `{words}` says why"
