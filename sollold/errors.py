"""Refused requests: `Refusal`, and its kind (`Fault`), which each API dialect renders in its own way."""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """Kinds of refusal. Each dialect maps them to its own status, type and body."""

    BAD_REQUEST = "bad_request"
    NOT_FOUND = "not_found"
    AMBIGUOUS = "ambiguous"
    TOO_BIG = "too_big"
    """The model does not fit; the message carries the arithmetic."""
    UNAVAILABLE = "unavailable"
    """Temporarily: the queue is full, or a load takes longer than the limit. Has a ``retry_after``."""
    TIMEOUT = "timeout"
    ENGINE = "engine"
    """The engine refused or failed; ``status`` is the engine's."""
    INTERRUPTED = "interrupted"
    """A failure in mid-stream after which the answer can't be continued exactly."""


_MAX_CHARACTERS = 8000
"""Maximum length of a message, in characters."""


def system_reason(error: BaseException) -> str:
    """Return the error's text for people: an `OSError` without its number and the file concerned."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def system_words(error: BaseException) -> str:
    """Return `system_reason`, with the file concerned."""
    file = getattr(error, "filename", None)
    return f"{system_reason(error)}: {file}" if file else system_reason(error)


class Refusal(Exception):
    """A request that can't be served. The message says what happened, why, and what to do.

    ``final``: the request must not be retried automatically, although a later attempt might succeed.
    ``field``: the invalid field of the request, if there is one.
    ``code``: OpenAI's code for it, if clients act on that, and ``fault`` does not imply it.
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
        code: str = "",
    ) -> None:
        # The message may quote client input of any length.
        message = message if len(message) <= _MAX_CHARACTERS else message[:_MAX_CHARACTERS] + "…"
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.retry_after = retry_after
        self.status = status
        self.final = final
        self.field = field
        self.code = code


def bad_request(message: str, *, field: str = "", status: int = 0) -> Refusal:
    """Return the refusal of an invalid request; the arguments are those of `Refusal`."""
    return Refusal(Fault.BAD_REQUEST, message, field=field, status=status)


IMAGE_FIELD, INVALID_VALUE = "content.image_url", "invalid_value"
"""Field and code of an image that can't be used. Agents (Codex) then leave it out of their next requests, all
of which would otherwise be refused for it."""


def bad_image(message: str) -> Refusal:
    """Return the refusal of a request for one of its images."""
    return Refusal(Fault.BAD_REQUEST, message, field=IMAGE_FIELD, code=INVALID_VALUE)


def unloaded_by_force(model: str) -> Refusal:
    """Return the refusal of a request that used, or waited for, a model that was unloaded by force.

    It is final: a retry would load the model again.
    """
    return Refusal(
        Fault.INTERRUPTED,
        f"{model} was unloaded with --force, which ended its requests",
        final=True,
    )
