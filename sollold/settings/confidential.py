"""Redacts secrets within settings that are not secret as a whole: passwords in URLs, keys in arguments."""

from __future__ import annotations

import re

HIDDEN = "…"
_USER = re.compile(r"(?<=://)[^/?#@\s\"']*@")
_QUERY = re.compile(r"(?<=[?&])([\w.-]*(?:key|token|secret|password|auth|signature)=)[^&#\s\"']+", re.I)
_OPTION = re.compile(r"-(?:hft|.*-?(?:key|token|secret|password))", re.IGNORECASE)


def hidden_in(value: object) -> object:
    """Return a setting's value with its secrets redacted."""
    if isinstance(value, str):
        return hidden_in_text(value)
    if isinstance(value, tuple):
        return tuple(_redact_arguments(value))
    if isinstance(value, dict):
        return {name: hidden_in(item) for name, item in value.items()}
    return value


def hidden_in_text(text: str) -> str:
    """Redact users, passwords and keys in the URLs of ``text``."""
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


def _redact_arguments(words: tuple[object, ...]) -> list[object]:
    """Redact command-line arguments: ``--api-key`` is followed by a secret, or contains one after ``=``."""
    found: list[object] = []
    secret = False
    for word in words:
        if secret or not isinstance(word, str):
            found.append(HIDDEN if secret else word)
            secret = False
            continue
        option, sign, _ = word.partition("=")
        named = _OPTION.fullmatch(option) is not None
        found.append(f"{option}={HIDDEN}" if named and sign else hidden_in_text(word))
        secret = named and not sign
    return found
