"""Fixtures of several files."""

from tests.models.pulling import three as three
