"""Fixtures shared by several test modules."""

from tests.models.pulling import three as three
