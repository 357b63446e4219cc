"""Which continuation_for a stream gets: how it would go on after a fault."""

from __future__ import annotations

from sollold.serving.request import Call, Delivered, Engine
from sollold.serving.resume.base import Continuation, JsonObject, NotResumable
from sollold.serving.resume.chat import ChatContinuation
from sollold.serving.resume.ollama import OllamaContinuation
from sollold.serving.resume.text import CompletionContinuation, NativeContinuation


class NoContinuation(Continuation):
    """A stream in a form that is not continued: only whether anything was delivered."""

    @property
    def text(self) -> str:
        """Nothing is known of it."""
        return ""

    def add_events(self, events: list[bytes]) -> None:
        """Only that there were any."""
        self.delivered = True

    def check(self) -> None:
        """Raises always: there is no form for it."""
        raise NotResumable(f"answers of {self.call.path} can't be continued")

    def _read(self, event: JsonObject) -> None:
        pass

    def _restore(self, delivered: Delivered) -> None:
        pass

    def _continuation(self) -> Call:
        return self.call

    def _merge(self, event: JsonObject) -> JsonObject | None:
        return event


def continuation_for(engine: Engine, call: Call) -> Continuation:
    """A new continuation_for for the stream that ``call`` begins."""
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
