"""How a request is refused: `Refusal`, of a kind that each dialect shows in its own way (`Fault`)."""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """Kinds of refusal; each dialect has its own status, type and shape for them."""

    BAD_REQUEST = "bad_request"
    NOT_FOUND = "not_found"
    AMBIGUOUS = "ambiguous"
    TOO_BIG = "too_big"
    """The model does not fit; the message carries the arithmetic."""
    UNAVAILABLE = "unavailable"
    """For now: the queue is full, or a load takes longer than the limit. With ``retry_after``."""
    TIMEOUT = "timeout"
    ENGINE = "engine"
    """The engine refused or failed; ``status`` is its own."""
    INTERRUPTED = "interrupted"
    """A fault in mid-stream after which the answer can't be continued exactly."""


_LONGEST = 8000
"""Characters of a message."""


def system_words(error: BaseException) -> str:
    """What an error says to people: one of the system without its number, with the file it is about."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror


class Refusal(Exception):
    """A request that can't be answered. The message says what happened, why, and what to do.

    ``final``: it shall not be asked again, though the same request may well be answered.
    ``field``: the field of the request that is wrong, where it is one.
    """

    def __init__(
        self,
        fault: Fault,
        message: str,
        *,
        retry_after: float = 0.0,
        status: int = 0,
        final: bool = False,
        field: str = "",
    ) -> None:
        # What the caller sent may be named in it, whatever its length.
        message = message if len(message) <= _LONGEST else message[:_LONGEST] + "…"
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.retry_after = retry_after
        self.status = status
        self.final = final
        self.field = field


def unloaded_by_force(model: str) -> Refusal:
    """What a request is told that was in a model, or waited for it, when somebody unloaded it by force.

    Asked again it would load what was to be unloaded.
    """
    return Refusal(
        Fault.INTERRUPTED,
        f"{model} was unloaded by order, with the requests in it (unload --force)",
        final=True,
    )
