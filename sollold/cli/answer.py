"""Streams one answer of a model to the terminal."""

from __future__ import annotations

import sys
from dataclasses import field
from typing import Any

from sollold.cli.asking import console
from sollold.cli.progress import loading
from sollold.cli.streams import harmless
from sollold.client.blocking import BlockingClient
from sollold.facts import dataclass

LIMIT = 32_768
"""Default limit on tokens when the user sets no ``num_predict``, so that every answer ends."""
_MIN_REPEATS = 40
"""Consecutive repetitions of a piece of text that count as a loop."""
_MAX_LOOP = 400


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling options. ``think``: None for the model's default, a string for the effort."""

    think: bool | str | None = None
    verbose: bool = True
    format: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def body(self, model: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The body of the request to ``/api/chat``."""
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "stream": True,
            "options": {"num_predict": LIMIT, **self.options},
        }
        if self.think is not None:
            body["think"] = self.think
        if self.format:
            body["format"] = self.format
        return body


@dataclass(frozen=True, slots=True)
class Told:
    """The printed answer; ``stopped``: whether Ctrl-C ended it early."""

    text: str
    stopped: bool


def answer(daemon: BlockingClient, model: str, messages: list[dict[str, Any]], sampling: Sampling) -> Told:
    """Print an answer as it streams, and return it. On Ctrl-C return what has arrived so far.

    Raises:
        ClientError: the request failed.
        KeyboardInterrupt: Ctrl-C before the first word.
    """
    printed = _Printed()
    final: dict[str, Any] = {}
    stopped = False
    stream = daemon.stream("/api/chat", sampling.body(model, messages))
    try:
        with loading(daemon, model) as waiting:
            for chunk in stream:
                message = chunk.get("message", {})
                if message.get("thinking") or message.get("content"):
                    # First, since text printed beside a bar gets a line of its own.
                    waiting.end()
                printed.add(message)
                if chunk.get("done"):
                    final = chunk
                if printed.looping:
                    break
    except KeyboardInterrupt:
        if not printed.anything:
            raise
        stopped = True
    finally:
        stream.close()
    print()
    if printed.looping:
        print("sollold: the answer repeats itself; stopped", file=sys.stderr)
    elif not stopped and final.get("done_reason") == "length":
        print("sollold: the answer was cut off at its limit (num_predict or context)", file=sys.stderr)
    if final and sampling.verbose:
        _footer(final)
    return Told(printed.text, stopped)


class _Printed:
    """Prints an answer piece by piece, its thoughts first; on a terminal without control characters.

    Attributes:
        looping: the text ends in a loop.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._thinking = False
        # A document in the conversation can make a model write escape sequences.
        self._shown = harmless if sys.stdout.isatty() else str
        self.looping = False

    @property
    def anything(self) -> bool:
        """Whether anything has been printed."""
        return self._thinking or bool(self._parts)

    @property
    def text(self) -> str:
        """The answer so far, without its thoughts."""
        return "".join(self._parts)

    def add(self, message: dict[str, Any]) -> None:
        """Print a piece."""
        thinking, text = message.get("thinking") or "", message.get("content") or ""
        if thinking:
            prefix = "" if self._thinking else "(thinking) "
            print(prefix, self._shown(thinking), sep="", end="", flush=True)
            self._thinking = True
        if text:
            if self._thinking and not self._parts:
                print("\n")
            self._parts.append(text)
            print(self._shown(text), end="", flush=True)
            self.looping = loops("".join(self._parts[-_MAX_LOOP:]))


def loops(text: str) -> bool:
    """Whether ``text`` ends in `_MIN_REPEATS` repetitions of a short piece with a letter or a digit."""
    for length in range(1, 9):
        piece = text[-length:]
        if any(c.isalnum() for c in piece) and text.endswith(piece * _MIN_REPEATS):
            return True
    lines = text.rstrip("\n").split("\n")
    # For repeated whole lines fewer repetitions are enough, since they are longer.
    last = lines[-12:]
    return len(last) == 12 and len(set(last)) == 1 and len(last[0].strip()) > 8


def _footer(final: dict[str, Any]) -> None:
    """Print where the answer came from and how fast, dimmed, on a terminal only."""
    if not sys.stdout.isatty():
        return
    routing = final.get("_routing") or {}
    words = [str(routing.get("backend", "")), f"on {routing['node']}" if routing.get("node") else ""]
    if final.get("eval_count") and final.get("eval_duration"):
        words.append(f"{final['eval_count'] / (final['eval_duration'] / 1e9):.1f} tokens/s")
    if routing.get("resumed"):
        words.append(f"resumed after a fault ({routing.get('gap_ms', 0) / 1000:.1f} s)")
    console().print("  ".join(word for word in words if word), style="dim")
