"""Which keeper a stream gets: how it would go on after a fault."""

from __future__ import annotations

from sollold.serving.ask import Call, Engine
from sollold.serving.resume_chat import KeptChat
from sollold.serving.resume_ollama import KeptOllama
from sollold.serving.resume_state import JsonObject, Kept, Unfaithful
from sollold.serving.resume_text import KeptNative, KeptText


class KeptCount(Kept):
    """A stream in a form that is not continued: only whether anything was delivered."""

    @property
    def text(self) -> str:
        """Nothing is known of it."""
        return ""

    def add(self, event: bytes) -> None:
        """As `Kept.add`."""
        self.delivered = True

    def check(self) -> None:
        """As `Kept.check`: never."""
        raise Unfaithful(f"the form of {self.call.path} can't be continued")

    def _read(self, event: JsonObject) -> None:
        pass

    def _continuation(self) -> Call:
        return self.call

    def _merge(self, event: JsonObject) -> JsonObject | None:
        return event


def keeper(engine: Engine, call: Call) -> Kept:
    """A new keeper for the stream that ``call`` begins."""
    path = call.path
    if path == "/v1/chat/completions":
        return KeptChat(call, engine)
    if path == "/v1/completions":
        return KeptText(call, engine)
    if engine is Engine.LLAMA and path in ("/completion", "/completions", "/infill"):
        return KeptNative(call)
    if engine is Engine.OLLAMA and path in ("/api/chat", "/api/generate"):
        return KeptOllama(call)
    return KeptCount(call)
