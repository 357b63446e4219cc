"""After a fault in a stream: decides whether the answer can continue, and finds an engine for the rest."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from sollold.errors import Fault, Refusal
from sollold.serving.attempts import BYPASS_LIMIT, Attempt
from sollold.serving.dispatch import Dispatcher
from sollold.serving.engine_error import is_unparsed
from sollold.serving.protocol import StreamError
from sollold.serving.request import Ask, Call, Delivered, Engine
from sollold.serving.resume.base import Continuation, NotResumable
from sollold.serving.resume.select import continuation_for
from sollold.serving.stream import whole
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.serving")

_STAGE = "recovering"


async def find_rest(
    dispatcher: Dispatcher,
    ask: Ask,
    limit: float,
    engine: Engine,
    without: frozenset[tuple[str, str]],
    continuation: Continuation | None,
) -> Attempt | None:
    """Find an engine that continues an answer begun by another one, within ``limit`` seconds.

    It is of the same kind (``engine``), so that its events have the same format, and not one of ``without``
    if there is any other. If ``continuation`` is None the answer starts over, at an engine of any kind.
    Returns None if only the end of the stream is missing.

    Raises:
        Refusal: as its fault says.
    """
    if continuation is None:
        return await dispatcher.find(ask.calls, limit, _STAGE, without)
    if not continuation.delivered:
        return await dispatcher.find({engine: ask.calls[engine]}, limit, _STAGE, without)
    counter = _TokenCounter(dispatcher, limit, without)
    tokens = await counter.count(continuation) if engine is Engine.LLAMA and continuation.text else None
    call = continuation.resume(tokens)
    if continuation.closing():
        return None
    return await dispatcher.find({engine: call}, limit, _STAGE, without)


def engine_for_rest(delivered: Delivered, calls: dict[Engine, Call], available: set[Engine]) -> Engine:
    """Choose the kind of engine for the rest: that of the beginning if possible.

    Ollama's only if there is one now; ``available``: the kinds for which there are endpoints.
    """
    wanted = delivered.engine
    if wanted not in calls:
        wanted = Engine.OLLAMA if available == {Engine.OLLAMA} else Engine.LLAMA
    # A llama-server can be started, an Ollama can't.
    if wanted is Engine.OLLAMA and Engine.OLLAMA not in available:
        wanted = Engine.LLAMA
    return wanted if wanted in calls else next(iter(calls))


def restored(delivered: Delivered, engine: Engine, call: Call) -> Continuation:
    """Return the continuation of an answer that another node began.

    Raises:
        Refusal: INTERRUPTED, if it can't be continued exactly.
    """
    continuation = continuation_for(engine, call)
    continuation.restore(delivered)
    try:
        continuation.check()
    except NotResumable as error:
        raise Refusal(
            Fault.INTERRUPTED, f"the interrupted answer can't be continued exactly: {error}. Try again"
        ) from None
    return continuation


def must_restart(error: StreamError, continuation: Continuation | None, *, gathered: bool) -> bool:
    """Whether a streamed answer must start over, since it can't be continued exactly.

    ``gathered``: the caller has not delivered any of it yet.

    Raises:
        Refusal: INTERRUPTED, if the beginning has already been delivered; ENGINE, if what follows can't be
            parsed.
    """
    if continuation is None or not continuation.delivered:
        return False
    try:
        continuation.check()
    except NotResumable as cause:
        if not gathered:
            if is_unparsed(error.message):
                # All is delivered except the model's attempt at a tool call.
                raise Refusal(Fault.ENGINE, error.message, status=500) from None
            raise Refusal(
                Fault.INTERRUPTED,
                f"the answer was interrupted ({error}) and can't be continued exactly: {cause}. Try again",
            ) from None
        return True
    return False


class _Tokens(msgspec.Struct):
    """llama-server's response to ``/tokenize``."""

    tokens: list[int | msgspec.Raw]


class _Prompt(msgspec.Struct):
    """llama-server's response to ``/apply-template``."""

    prompt: str


class _TokenCounter:
    """Counts tokens with the model's own tokenizer, at any engine that serves it."""

    def __init__(self, dispatcher: Dispatcher, limit: float, without: frozenset[tuple[str, str]]) -> None:
        self._dispatcher = dispatcher
        self._limit = limit
        self._without = without

    async def count(self, continuation: Continuation) -> int | None:
        """Count the delivered tokens; None if no engine could count them.

        Raises:
            Refusal: there is no engine for the model.
        """
        try:
            pair = continuation.measure()
            if pair is None:
                return await self._count_text(continuation.text, False)
            prompts = []
            for call in pair:
                answer = msgspec.json.decode(await self._answer(call), type=_Prompt)
                prompts.append(await self._count_text(answer.prompt, True))
            return max(0, prompts[1] - prompts[0])
        except (StreamError, TimeoutError, *UNDECODABLE) as error:
            log.info("the engine did not count tokens: %s", error)
        except Refusal as refusal:
            # Not fatal: an engine that hangs will be noticed when it continues the answer.
            if refusal.fault not in (Fault.ENGINE, Fault.TIMEOUT):
                raise
        return None

    async def _count_text(self, text: str, special: bool) -> int:
        call = Call("/tokenize", {"content": text, "add_special": special, "parse_special": True})
        return len(msgspec.json.decode(await self._answer(call), type=_Tokens).tokens)

    async def _answer(self, call: Call) -> bytes:
        """Send a small request, which needs no slot, and return the response.

        Raises:
            StreamError, TimeoutError: it broke off, or there was no response.
        """
        attempt = await self._dispatcher.find({Engine.LLAMA: call}, self._limit, _STAGE, self._without)
        try:
            async with asyncio.timeout(BYPASS_LIMIT):
                return await whole(attempt.stream)
        finally:
            await self._dispatcher.attempts.release(attempt, None)
