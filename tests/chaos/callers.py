"""Callers that send streaming requests in every dialect and check each response word by word."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.daemons import Node

HUNG = 200.0
"""Seconds without a word after which a stream counts as hung: longer than the daemons wait for a recovery."""
CLEAR = (502, 503, 504, 507)
"""Statuses of errors that a fault may cause: interrupted, unavailable, timeout, insufficient memory."""
UNCLEAR = ("internal error", "did not expect", "not found", "not_found", "invalid_request")
"""Words of errors in a stream that no fault may cause."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """The requests and responses of a dialect. ``text`` returns the text of an event, or ""."""

    name: str
    path: str
    body: Callable[[str, int], dict[str, Any]]
    text: Callable[[dict[str, Any]], str]
    sse: bool
    streamed: bool = True


def _messages(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "count"}], **more}


def _options(words: int) -> dict[str, Any]:
    return {"options": {"temperature": 0, "num_predict": words}}


def _openai(words: int) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": words}


def _first(item: dict[str, Any]) -> dict[str, Any]:
    return dict((item.get("choices") or [{}])[0])


def _ollama_text(item: dict[str, Any]) -> str:
    return str(item.get("message", {}).get("content", ""))


def _anthropic_text(item: dict[str, Any]) -> str:
    return str(item["delta"].get("text", "")) if item.get("type") == "content_block_delta" else ""


DIALECTS = (
    Dialect(
        "ollama chat",
        "/api/chat",
        lambda model, words: _messages(model, stream=True, **_options(words)),
        _ollama_text,
        sse=False,
    ),
    Dialect(
        "openai chat",
        "/v1/chat/completions",
        lambda model, words: _messages(model, **_openai(words)),
        lambda item: str(_first(item).get("delta", {}).get("content") or ""),
        sse=True,
    ),
    Dialect(
        "anthropic",
        "/v1/messages",
        lambda model, words: _messages(model, stream=True, temperature=0, max_tokens=words),
        _anthropic_text,
        sse=True,
    ),
    Dialect(
        "ollama generate",
        "/api/generate",
        lambda model, words: {"model": model, "prompt": "count", "stream": True, **_options(words)},
        lambda item: str(item.get("response", "")),
        sse=False,
    ),
    Dialect(
        "openai completions",
        "/v1/completions",
        lambda model, words: {"model": model, "prompt": "count", **_openai(words)},
        lambda item: str(_first(item).get("text") or ""),
        sse=True,
    ),
    Dialect(
        "ollama chat, whole",
        "/api/chat",
        lambda model, words: _messages(model, stream=False, **_options(words)),
        _ollama_text,
        sse=False,
        streamed=False,
    ),
)


@dataclass(slots=True)
class Stream:
    """A response and how it ended.

    Attributes:
        wanted: number of requested words.
        times: when each chunk of text arrived, on the monotonic clock.
        counted: number of tokens according to the response; -1 if it has none.
        error: why it ended early; empty if it did not.
        broken: the connection was lost, so no error could be sent.
        hung: nothing arrived for `HUNG` seconds.
    """

    dialect: Dialect
    node: Node
    wanted: int
    began: float
    words: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    counted: int = -1
    error: str = ""
    broken: bool = False
    hung: bool = False
    done: bool = False
    resumed: int = 0
    ended: float = 0.0
    status: int = 200

    @property
    def clear(self) -> bool:
        """Whether the error is one that a fault of the called node may cause."""
        if self.broken:
            return True
        return self.status in CLEAR if self.status != 200 else not any(word in self.error for word in UNCLEAR)

    def what_is_wrong(self) -> str:
        """Describe the first wrong word, or a wrong number of words; empty if all is correct."""
        expected = [f"w{number:04d}" for number in range(1, len(self.words) + 1)]
        if self.words != expected:
            wrong = next(index for index, word in enumerate(self.words) if word != expected[index])
            return f"word {wrong + 1} is {self.words[wrong]}, after {self.words[max(0, wrong - 3) : wrong]}"
        if self.done and len(self.words) != self.wanted:
            return f"{len(self.words)} words instead of {self.wanted}"
        if self.done and self.counted not in (-1, self.wanted):
            return f"it reports {self.counted} tokens instead of {self.wanted}"
        return ""


class Caller(threading.Thread):
    """Sends requests to one node until it is stopped; ``streams`` are those that ended."""

    def __init__(self, node: Node, dialect: Dialect, model: str, words: tuple[int, int], seed: int) -> None:
        super().__init__(daemon=True, name=f"{node.name} {dialect.name}")
        self.node = node
        self.dialect = dialect
        self.model = model
        self.streams: list[Stream] = []
        self.current: Stream | None = None
        self._words = words
        self._random = random.Random(seed)
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Stop after the current response."""
        self._stopping.set()

    def last_word(self) -> float:
        """The time of the newest word, or of the end of the newest complete response."""
        current = self.current
        times = [stream.ended for stream in self.streams[-1:] if stream.done]
        if current is not None and current.times:
            times.append(current.times[-1])
        return max(times, default=0.0)

    def run(self) -> None:
        while not self._stopping.is_set():
            wanted = self._random.randint(*self._words)
            stream = self.current = Stream(self.dialect, self.node, wanted, time.monotonic())
            self._ask(stream)
            stream.ended = time.monotonic()
            self.streams.append(stream)
            self.current = None
            if stream.error:
                self._stopping.wait(0.5)

    def _ask(self, stream: Stream) -> None:
        body = self.dialect.body(self.model, stream.wanted)
        chunks: list[str] = []
        try:
            with self.node.open("POST", self.dialect.path, body, timeout=HUNG) as response:
                if response.status != 200:
                    stream.status = response.status
                    stream.error = f"{response.status} {response.read()[:400].decode(errors='replace')}"
                    return
                stream.resumed = int(response.headers.get("X-Sollold-Resumed", 0))
                for item in self._items(response, stream):
                    if "error" in item:
                        stream.error = json.dumps(item["error"])[:400]
                        break
                    if chunk := self.dialect.text(item):
                        stream.times.append(time.monotonic())
                        chunks.append(chunk)
                    self._account(stream, item)
        except TimeoutError:
            stream.error, stream.hung = f"no word for {HUNG:.0f} s", True
        except (OSError, http.client.HTTPException) as error:
            stream.error, stream.broken = f"{type(error).__name__}: {error}", True
        except ValueError as error:
            stream.error = f"an event is not JSON: {error}"
        stream.words = "".join(chunks).split()
        if not stream.error and not stream.done:
            stream.error, stream.broken = "the stream has no final event", True

    def _account(self, stream: Stream, item: dict[str, Any]) -> None:
        usage = item.get("usage") or {}
        for counted in (item.get("eval_count"), usage.get("completion_tokens"), usage.get("output_tokens")):
            if counted is not None:
                stream.counted = int(counted)
        if item.get("done") or item.get("type") == "message_stop":
            stream.done = True
        stream.resumed = max(stream.resumed, int((item.get("_routing") or {}).get("resumed", 0)))

    def _items(self, response: http.client.HTTPResponse, stream: Stream) -> Iterator[dict[str, Any]]:
        for line in response:
            line = line.strip()
            if time.monotonic() - max([stream.began, *stream.times[-1:]]) > HUNG:
                raise TimeoutError
            if self.dialect.sse:
                if line.startswith(b": resumed: "):
                    stream.resumed = int(line.split()[2])
                if not line.startswith(b"data:"):
                    continue
                line = line[5:].strip()
                if line == b"[DONE]":
                    yield {"done": True}
                    continue
            if line:
                yield json.loads(line)
