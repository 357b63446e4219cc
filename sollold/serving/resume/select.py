"""Chooses the `Continuation` for a stream."""

from __future__ import annotations

from sollold.serving.request import Call, Engine
from sollold.serving.resume.base import Continuation, JsonObject, NotResumable
from sollold.serving.resume.chat import ChatContinuation
from sollold.serving.resume.ollama import OllamaContinuation
from sollold.serving.resume.text import CompletionContinuation, NativeContinuation


class NoContinuation(Continuation):
    """A stream in a format that can't be continued. Records only whether anything was delivered."""

    def add_events(self, events: list[bytes]) -> None:
        """Record only that there were events."""
        self.delivered = True

    def check(self) -> None:
        """Always raise `NotResumable`."""
        raise NotResumable(f"answers of {self.call.path} can't be continued")

    def _read(self, event: JsonObject) -> None:
        pass

    def _continuation(self) -> Call:
        return self.call

    def _merge(self, event: JsonObject) -> JsonObject | None:
        return event


def continuation_for(engine: Engine, call: Call) -> Continuation:
    """Return a new continuation for the stream of ``call``."""
    path = call.path
    if path == "/v1/chat/completions":
        return ChatContinuation(call, engine)
    if path == "/v1/completions":
        return CompletionContinuation(call, engine)
    if engine is Engine.LLAMA and path in ("/completion", "/completions", "/infill"):
        return NativeContinuation(call)
    if engine is Engine.OLLAMA and path in ("/api/chat", "/api/generate"):
        return OllamaContinuation(call)
    return NoContinuation(call)
