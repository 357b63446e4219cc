"""Decodes JSON that a request contains as a string, such as a schema or the arguments of a tool call. Pure.

The limits of the body (`json_bounds`) do not count what is within strings.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.http.json_bounds import JsonBounds, TooManyValues
from sollold.errors import bad_request

_SMALL_CHARACTERS = 64 * 1024
"""Maximum length of a text that is decoded quickly, whatever it contains."""
_syntax = msgspec.json.Decoder(msgspec.Raw)


def decode_text(text: str) -> Any:
    """Return the value in ``text``.

    Raises:
        msgspec.DecodeError: it is not JSON, or nested too deeply.
        Refusal: BAD_REQUEST: it has more objects, arrays or values than a body may have.
    """
    try:
        if len(text) > _SMALL_CHARACTERS:
            check_values(text.encode())
        return msgspec.json.decode(text)
    except RecursionError:
        raise msgspec.DecodeError("JSON is nested too deeply") from None
    except TooManyValues as error:
        raise bad_request(f"within a string: {error}") from None


def check_values(raw: bytes) -> None:
    """Check that JSON has no more values than a body may have.

    Raises:
        TooManyValues: it has more.
        msgspec.DecodeError: it is not JSON, for which counting could take long.
        RecursionError: it is nested too deeply.
    """
    _syntax.decode(raw)
    bounds = JsonBounds()
    for start in range(0, len(raw), _SMALL_CHARACTERS):
        bounds.feed(raw[start : start + _SMALL_CHARACTERS])
