"""Checks of fields that several dialects share: the model and its capabilities, ``keep_alive``, ``stop``."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sollold.errors import bad_image, bad_request
from sollold.models.model import Model
from sollold.units import parse_seconds


class CallerFields(msgspec.Struct, kw_only=True):
    """sollold's own fields in a request to a model, in every dialect."""

    priority: int | str | None = None
    timeout: float | str | None = None
    keep_alive: float | str | None = None


def require_model(name: str, field: str = "model") -> str:
    """Return ``name``, which was sent as ``field``, without surrounding whitespace.

    Raises:
        Refusal: BAD_REQUEST if it is empty or invalid.
    """
    if not name.strip():
        raise bad_request(f"{field} is required", field=field)
    if len(name) > 500 or min(name) < " ":
        raise bad_request("invalid model name: it is too long or has control characters")
    return name.strip()


def parse_keep_alive(value: object) -> float | None:
    """Return how long a model stays loaded after its last request, in seconds.

    Negative: forever; ``None``: not given. A number means seconds, a string is a number or a duration in
    Go's format. ``value``: as sent, of any type.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise bad_request("invalid keep_alive: it is neither a number nor a duration")
    try:
        seconds = parse_seconds(value) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError) as error:
        raise bad_request(f"invalid keep_alive: {error}") from None
    if seconds != seconds:
        raise bad_request("invalid keep_alive: not a number")
    return -1.0 if seconds < 0 else min(seconds, 10.0 * 365 * 86400)


def require_capability(model: Model, capability: str, feature: str) -> None:
    """Require a capability of ``model``; ``feature`` names it in the error.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if capability not in model.capabilities:
        refuse = bad_image if capability == "vision" else bad_request
        raise refuse(f'"{model.name}" does not support {feature}')


def refuse_reranker(model: Model) -> None:
    """Refuse to embed with a reranker, whose output is scores.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if "rerank" in model.capabilities:
        raise bad_request(f'"{model.name}" is a reranker and has no embeddings; use /v1/rerank')


def require_completion(model: Model, feature: str) -> None:
    """Refuse to generate text with a model that only embeds or ranks, before it is loaded.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if model.capabilities and "completion" not in model.capabilities:
        raise bad_request(f'"{model.name}" does not support {feature}')


def stop_list(stop: str | Sequence[str] | None) -> list[str]:
    """Return the stop sequences without empty ones."""
    return [word for word in ([stop] if isinstance(stop, str) else stop or ()) if word]
