"""What was delivered of a stream, how it is to be continued, and the new events made to fit the old stream.

Pure. A `Continuation` takes the engine's events as raw JSON while all goes well and looks into none of them,
but now and then reduces them to what they say, so that a long answer does not grow the daemon. After a fault
`resume` gives the request that makes another engine go on where the stream stopped: what was delivered is
given to it as the beginning of its own answer (prefill). `merge` turns that engine's events into ones that
continue the old stream: same id, no second role, counts and times of the whole.

Why nothing is lost or doubled: an engine sends text only as whole characters, and holds back what might be
the beginning of a stop string; what it held back was not delivered and is made again. Where the rest of an
answer depends on more than its text, `check` says that it can't be continued faithfully.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import msgspec

from sollold.serving.request import Call, Delivered

_UNREAD = 512
"""Events that are kept unread at the most."""

JsonObject = dict[str, Any]


class NotResumable(Exception):
    """The stream can't be continued exactly; the sentence says why."""


class Continuation(ABC):
    """The delivered part of one stream."""

    def __init__(self, call: Call) -> None:
        self.call = call
        """The request as it was asked first."""
        self.resumed = False
        """Whether events must go through `merge` now."""
        self.delivered = False
        """Whether the caller has anything at all."""
        self.events = 0
        """Events with text in them so far: a measure of tokens where the engine gives none."""
        self.tokens = 0
        """Tokens in what was delivered before the last fault."""
        self.exhausted = False
        """Nothing may be made any more: the new engine is asked only for the end of the stream."""
        self.spent_ms = 0.0
        """Milliseconds for which engines that are gone made tokens; the reader of the streams adds them."""
        self._unread: list[bytes] = []

    def add_events(self, events: list[bytes]) -> None:
        """The caller got these."""
        self._unread += events
        self.delivered = True
        if len(self._unread) >= _UNREAD:
            self.fold()

    def restore(self, delivered: Delivered) -> None:
        """The caller got this from another node; nothing was added here yet."""
        self.delivered = True
        self.events = delivered.events
        self.spent_ms = delivered.spent_ms
        self._restore(delivered)

    def fold(self) -> None:
        """Read the events that were kept unread."""
        events, self._unread = self._unread, []
        for raw in events:
            event = read(raw)
            if event is not None:
                self._read(event)

    def resume(self, tokens: int | None) -> Call:
        """The request that continues the stream. From now on events go through `merge`.

        ``tokens``: how many tokens `text` is, if the engine could tell.
        """
        self.fold()
        self.tokens = self.events if tokens is None else tokens
        self.resumed = True
        return self._continuation()

    def closing(self) -> list[bytes]:
        """The last events, when they are all that is lacking and no engine is needed for them."""
        return []

    def cut_short(self) -> list[bytes]:
        """The last events of an answer that an Ollama ended without any, as when it repeats itself."""
        return []

    def merge(self, raw: bytes) -> list[bytes]:
        """An event of the new engine as the events that continue the old stream."""
        event = read(raw)
        if event is None:
            return []
        merged = self._merge(event)
        if merged is None:
            return []
        # Its counts are the whole's; what it says is folded in for the next fault.
        self._read(merged)
        self.delivered = True
        return [msgspec.json.encode(merged)]

    def measure(self) -> tuple[Call, Call] | None:
        """Two requests whose prompts differ by what was delivered, where `text` does not tell all of it."""
        return None

    @property
    @abstractmethod
    def text(self) -> str:
        """What the engine made and was delivered; for counting its tokens."""

    @abstractmethod
    def check(self) -> None:
        """Look whether the stream can be continued exactly.

        Raises:
            NotResumable: it can't.
        """

    @abstractmethod
    def _read(self, event: JsonObject) -> None:
        """Take in what an event says that the caller has got."""

    @abstractmethod
    def _restore(self, delivered: Delivered) -> None: ...

    @abstractmethod
    def _continuation(self) -> Call: ...

    @abstractmethod
    def _merge(self, event: JsonObject) -> JsonObject | None: ...


def read(raw: bytes) -> JsonObject | None:
    """An event as an object; None when it is none."""
    try:
        event = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return None
    return event if isinstance(event, dict) else None


LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
"""Names of the limit on tokens in llama-server's and OpenAI's forms."""


def less(body: JsonObject, keys: tuple[str, ...], made: int) -> bool:
    """Take tokens that were made already off the limit, under whichever of its names it has.

    Answers whether nothing is left. Then the limit is 1: an engine makes one token in any case.
    """
    exhausted = False
    for key in keys:
        limit = body.get(key)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0:
            exhausted = exhausted or limit <= made
            body[key] = max(1, limit - made)
    return exhausted


def asked_for(body: JsonObject, key: str) -> bool:
    """Whether an option is on: there, and not false, zero or empty."""
    return bool(body.get(key))


def whole_usage(usage: Any, tokens: int, exhausted: bool) -> None:
    """Make a continuation's counts the whole's: what it read of the answer was made, not asked."""
    if not isinstance(usage, dict):
        return
    prompt, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if isinstance(prompt, int) and isinstance(made, int):
        usage["prompt_tokens"] = max(0, prompt - tokens)
        usage["completion_tokens"] = tokens if exhausted else made + tokens
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
        details["cached_tokens"] = min(details["cached_tokens"], usage.get("prompt_tokens", 0))


def whole_timings(timings: Any, tokens: int, spent_ms: float, exhausted: bool) -> None:
    """The same for llama-server's ``timings``."""
    if not isinstance(timings, dict):
        return
    if isinstance(timings.get("predicted_n"), int):
        fresh_n, fresh_ms = timings["predicted_n"], float(timings.get("predicted_ms") or 0.0)
        made = timings["predicted_n"] = tokens if exhausted else tokens + fresh_n
        spent = timings["predicted_ms"] = spent_ms if exhausted else spent_ms + fresh_ms
        timings["predicted_per_token_ms"] = spent / made if made else 0.0
        timings["predicted_per_second"] = made * 1000 / spent if spent else 0.0
    if isinstance(timings.get("prompt_n"), int):
        cached = timings.get("cache_n") if isinstance(timings.get("cache_n"), int) else 0
        fresh = timings["prompt_n"]
        timings["prompt_n"] = max(0, fresh - tokens)
        timings["cache_n"] = max(0, (cached or 0) - max(0, tokens - fresh))
