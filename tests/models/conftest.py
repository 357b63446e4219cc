"""Fixtures of several files."""

from tests.models.pulling import town as town
