"""How errors of the system are told."""

from __future__ import annotations

import errno

import pytest

from sollold.errors import system_words


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
def test_no_number_is_shown_and_the_file_is(error: Exception, words: str) -> None:
    assert system_words(error) == words
