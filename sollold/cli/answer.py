"""One answer of a model on the terminal, as it comes."""

from __future__ import annotations

import sys
from dataclasses import field
from typing import Any

from sollold.cli.asking import console
from sollold.cli.progress import loading
from sollold.client.blocking import BlockingClient
from sollold.facts import dataclass

LIMIT = 32_768
"""Tokens of an answer where the user sets no ``num_predict``: an answer without an end has one."""
_REPEATS = 40
"""The same piece of text so often in a row is a loop."""
_LONGEST_LOOP = 400


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the model is to answer; ``think`` None: as the model does by itself, a text: how much."""

    think: bool | str | None = None
    verbose: bool = True
    format: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def body(self, model: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The request for ``/api/chat``."""
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
    """What was printed of an answer; ``stopped``: by Ctrl-C, before its end."""

    text: str
    stopped: bool


def answer(daemon: BlockingClient, model: str, messages: list[dict[str, Any]], sampling: Sampling) -> Told:
    """Print an answer as it comes and return it. Ctrl-C stops it: what came so far is returned.

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
            for item in stream:
                message = item.get("message", {})
                if message.get("thinking") or message.get("content"):
                    # First: what is printed beside a bar gets a line of its own.
                    waiting.end()
                printed.add(message)
                if item.get("done"):
                    final = item
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
    """What was printed of an answer, its thoughts first.

    Attributes:
        looping: the text ends in a loop.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._thinking = False
        self.looping = False

    @property
    def anything(self) -> bool:
        """Whether a word was printed."""
        return self._thinking or bool(self._parts)

    @property
    def text(self) -> str:
        """The answer so far, without thoughts."""
        return "".join(self._parts)

    def add(self, message: dict[str, Any]) -> None:
        """Print a piece."""
        thought, text = message.get("thinking") or "", message.get("content") or ""
        if thought:
            print("" if self._thinking else "(thinking) ", thought, sep="", end="", flush=True)
            self._thinking = True
        if text:
            if self._thinking and not self._parts:
                print("\n")
            self._parts.append(text)
            print(text, end="", flush=True)
            self.looping = loops("".join(self._parts[-_LONGEST_LOOP:]))


def loops(text: str) -> bool:
    """Whether ``text`` ends in `_REPEATS` repetitions of a short piece that has a letter or a digit in it."""
    for length in range(1, 9):
        piece = text[-length:]
        if any(sign.isalnum() for sign in piece) and text.endswith(piece * _REPEATS):
            return True
    lines = text.rstrip("\n").split("\n")
    # Whole lines that repeat: fewer are enough, since they are longer.
    last = lines[-12:]
    return len(last) == 12 and len(set(last)) == 1 and len(last[0].strip()) > 8


def _footer(final: dict[str, Any]) -> None:
    """Where the answer came from and how fast, dim, on a terminal only."""
    if not sys.stdout.isatty():
        return
    routing = final.get("_routing") or {}
    words = [str(routing.get("backend", "")), f"on {routing['node']}" if routing.get("node") else ""]
    if final.get("eval_count") and final.get("eval_duration"):
        words.append(f"{final['eval_count'] / (final['eval_duration'] / 1e9):.1f} tokens/s")
    if routing.get("resumed"):
        words.append(f"resumed after a fault ({routing.get('gap_ms', 0) / 1000:.1f} s)")
    console().print("  ".join(word for word in words if word), style="dim")
