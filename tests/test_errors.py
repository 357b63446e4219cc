"""Texts of operating system errors."""

from __future__ import annotations

import errno

import pytest

from sollold.errors import system_reason, system_words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "Permission denied: /a/b"),
        (OSError("a sentence of our own"), "a sentence of our own"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("no number"), "no number"),
    ],
)
def test_system_words_show_the_file_and_no_error_number(error: Exception, words: str) -> None:
    assert system_words(error) == words


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "Permission denied"),
        (OSError("a sentence of our own"), "a sentence of our own"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_system_reason_is_never_empty(error: Exception, reason: str) -> None:
    assert system_reason(error) == reason
