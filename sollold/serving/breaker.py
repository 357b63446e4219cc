"""Keeps requests away from an endpoint that can't be reached, and tries it again now and then."""

from __future__ import annotations


class Breaker:
    """Closed → open after ``threshold`` errors in a row → one try after the pause → closed or open again."""

    def __init__(self, threshold: int = 3, pause: float = 2.0, longest: float = 15.0) -> None:
        """``pause``: seconds of the first opening; doubled by each further one up to ``longest``."""
        self._threshold = threshold
        self._pause = pause
        self._longest = longest
        self._errors = 0
        self._openings = 0
        self._until = 0.0
        self._trying = False

    def allows(self, now: float) -> bool:
        """Whether a request may be sent now; while half open only one at a time."""
        if self._openings == 0:
            return True
        return now >= self._until and not self._trying

    def sent(self, now: float) -> None:
        """A request is being sent."""
        if self._openings and now >= self._until:
            self._trying = True

    def reached(self) -> None:
        """The endpoint answered, whatever it said."""
        self._errors = self._openings = 0
        self._trying = False

    def given_up(self) -> None:
        """The request was called off before anything was learned."""
        self._trying = False

    def failed(self, now: float) -> None:
        """The endpoint could not be reached, or the connection broke."""
        self._errors += 1
        if self._trying or self._errors >= self._threshold:
            self._until = now + min(self._pause * 2**self._openings, self._longest)
            self._openings = min(self._openings + 1, 16)
            self._errors = 0
        self._trying = False
