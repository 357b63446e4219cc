"""Fields that several dialects share: the model, ``keep_alive``."""

from __future__ import annotations

from collections.abc import Sequence

from sollold.errors import Fault, Refusal
from sollold.models.model import Model
from sollold.units import parse_seconds


def require_model(name: str, field: str = "model") -> str:
    """``name`` without surrounding white space; it was sent as ``field``.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not name.strip():
        raise Refusal(Fault.BAD_REQUEST, f"{field} is required", field=field)
    if len(name) > 500 or min(name) < " ":
        raise Refusal(Fault.BAD_REQUEST, "invalid model name: it is too long or has control characters")
    return name.strip()


def parse_keep_alive(value: object) -> float | None:
    """Seconds that a model stays after the last request; negative: for ever; ``None``: not named.

    A number is seconds, a string is Go's form of a duration or a number. ``value`` is whatever was sent.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise Refusal(Fault.BAD_REQUEST, "invalid keep_alive: it is neither a number nor a duration")
    try:
        seconds = parse_seconds(value) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError) as error:
        raise Refusal(Fault.BAD_REQUEST, f"invalid keep_alive: {error}") from None
    if seconds != seconds:
        raise Refusal(Fault.BAD_REQUEST, "invalid keep_alive: not a number")
    return -1.0 if seconds < 0 else min(seconds, 10.0 * 365 * 86400)


def need(model: Model, capability: str, what: str) -> None:
    """Require a capability of ``model``; ``what`` names it in the error.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if capability not in model.capabilities:
        raise Refusal(Fault.BAD_REQUEST, f'"{model.name}" does not support {what}')


def no_reranker(model: Model) -> None:
    """Refuse to embed with a model whose vectors are scores.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if "rerank" in model.capabilities:
        raise Refusal(
            Fault.BAD_REQUEST, f'"{model.name}" is a reranker and has no embeddings; use /v1/rerank'
        )


def can_answer(model: Model, what: str) -> None:
    """Refuse to generate text with a model that only embeds or ranks, before it is loaded.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if model.capabilities and "completion" not in model.capabilities:
        raise Refusal(Fault.BAD_REQUEST, f'"{model.name}" does not support {what}')


def stop_list(stop: str | Sequence[str] | None) -> list[str]:
    """The stop sequences; an empty one is none."""
    return [word for word in ([stop] if isinstance(stop, str) else stop or ()) if word]
