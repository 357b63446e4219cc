"""One attempt's body as the events that the caller gets."""

from __future__ import annotations

from sollold.serving.attempts import Attempt
from sollold.serving.event_split import EventSplitter
from sollold.serving.model_names import callers_name
from sollold.serving.resume.base import Continuation

_ERROR = b'{"error"'
"""How an event begins with which an engine says that it failed."""


class EventReader:
    """One attempt's body as the events that the caller gets."""

    def __init__(self, attempt: Attempt, continuation: Continuation) -> None:
        self._events = EventSplitter(attempt.candidate.engine, attempt.call.path)
        self._rename = callers_name(attempt.candidate, attempt.call)
        self._continuation = continuation
        self.started = False
        """Whether the engine has sent anything."""
        self.began = 0.0
        """When that was, on the loop's clock."""
        self.delivered = False
        """Whether the caller got anything of this attempt."""
        self.error = b""
        """An event with which the engine itself says that it failed."""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that are whole now; those before an error, of which `error` tells."""
        return self._to_caller(self._events.feed(chunk))

    def finish(self) -> list[bytes]:
        """The body is over: the last events."""
        return self._to_caller(self._events.finish())

    @property
    def whole(self) -> bool:
        """Whether the body, which is over, came to the end that the engine announces."""
        return self._events.done

    @property
    def over(self) -> bool:
        """Whether the engine has said that there is no more, however the body ended."""
        return self._events.over

    def _to_caller(self, events: list[bytes]) -> list[bytes]:
        for at, event in enumerate(events):
            if event.startswith(_ERROR):
                self.error = event
                events = events[:at]
                break
        if not events:
            return events
        self.started = True
        if self._rename:
            events = [self._rename(event) for event in events]
        continuation = self._continuation
        if continuation.resumed:
            events = [merged for event in events for merged in continuation.merge(event)]
        else:
            # Nearly every token goes this way: nothing is read, nothing is copied.
            continuation.add_events(events)
        if events:
            self.delivered = True
        return events
