"""Continues ``/v1/completions``, and llama-server's own ``/completion`` and ``/infill``."""

from __future__ import annotations

from typing import Any

from sollold.serving.request import Call, Delivered, Engine
from sollold.serving.resume.base import (
    LIMITS,
    ChunkContinuation,
    Continuation,
    JsonObject,
    NotResumable,
    asked_for,
    reduce_limits,
    total_timings,
)


def _constrain(body: JsonObject, text: str) -> None:
    """Make a grammar or JSON schema continue after ``text``.

    llama-server advances a grammar over ``generation_prompt``: always for schemas, but for a caller's own
    grammar only if its type is ``tool_calls``.
    """
    if asked_for(body, "grammar"):
        body["grammar_type"] = "tool_calls"
    if asked_for(body, "grammar") or "json_schema" in body or "response_format" in body:
        body["generation_prompt"] = text


def _check_single(body: JsonObject, logprobs: bool) -> None:
    """Raise `NotResumable` unless it is one answer to one prompt, without log probabilities."""
    if logprobs or asked_for(body, "n_probs"):
        raise NotResumable("it contains log probabilities")
    if any(isinstance(body.get(key), int) and body[key] > 1 for key in ("n", "best_of", "n_cmpl")):
        raise NotResumable("several answers were requested at once")
    if not _is_single(body.get("prompt", "")):
        raise NotResumable("several prompts were sent at once")


class CompletionContinuation(ChunkContinuation):
    """A streamed completion in OpenAI's chunks, continued by appending the delivered text to the prompt."""

    def check(self) -> None:
        """Raise `NotResumable` if the stream can't be continued exactly."""
        self.fold()
        logprobs = self.call.body.get("logprobs")
        _check_single(self.call.body, isinstance(logprobs, int) and logprobs > 0)
        if self._engine is Engine.OLLAMA and self._content:
            raise NotResumable("Ollama's template for the prompt can't hold the beginning of an answer")

    def _read(self, event: JsonObject) -> None:
        self._note(event)
        for choice in event.get("choices") or ():
            self._add(choice.get("text"))
            if choice.get("finish_reason"):
                self._finished = True

    def _restore(self, delivered: Delivered) -> None:
        self._content = [delivered.content]

    def _continuation(self) -> Call:
        body = dict(self.call.body)
        text, _ = self._joined()
        body["prompt"] = _extended(body.get("prompt"), text)
        # The first engine has already sent the echo of the prompt.
        body.pop("echo", None)
        if text:
            _constrain(body, text)
        self._limit(body, "max_tokens")
        return Call(self.call.path, body)

    def cut_short(self) -> list[bytes]:
        """A last chunk."""
        self.fold()
        return self._last_chunk("text_completion", text="", logprobs=None)

    def _merge(self, event: JsonObject) -> JsonObject | None:
        choices = self._correct(event)
        for choice in choices if self.exhausted else ():
            choice["text"] = ""
            choice["finish_reason"] = "length" if choice.get("finish_reason") else None
        if self._finished:
            # Only the counts can be missing.
            if self._usage or not event.get("usage"):
                return None
            event["choices"] = []
            return event
        if choices and not any(c.get("text") or c.get("finish_reason") for c in choices):
            return None
        return event


class NativeContinuation(Continuation):
    """A stream in llama-server's own format, continued from the token ids that it contains, if complete."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._ids: list[int] = []
        self._pending: list[int] = []
        self._exact = True

    def check(self) -> None:
        """Raise `NotResumable` if the stream can't be continued exactly."""
        self.fold()
        _check_single(self.call.body, asked_for(self.call.body, "logprobs"))

    def _read(self, event: JsonObject) -> None:
        if event.get("stop"):
            self._finished = True
        content = event.get("content") or ""
        tokens = event.get("tokens") or []
        if not event.get("stop"):
            self._pending += tokens
            if event.get("tokens_predicted") != len(self._ids) + len(self._pending):
                # A character of several tokens is sent as one event, without some of their ids.
                self._exact = False
        if content:
            # Text held back for earlier tokens is delivered only now.
            self._ids += self._pending
            self._pending = []
            self._add(content)

    def _restore(self, delivered: Delivered) -> None:
        self._content, self._exact = [delivered.content], False

    def _continuation(self) -> Call:
        body = dict(self.call.body)
        text, _ = self._joined()
        prompt = body.get("prompt", "")
        if self._exact and self._ids and self.call.path != "/infill" and isinstance(prompt, str | list):
            self.tokens = len(self._ids)
            body["prompt"] = [*_parts(prompt), *self._ids]
        else:
            self._exact = False
            body["prompt"] = _extended(prompt, text)
        self._pending = []
        if text:
            _constrain(body, text)
        self.exhausted = reduce_limits(body, LIMITS, self.tokens)
        return Call(self.call.path, body)

    def _merge(self, event: JsonObject) -> JsonObject | None:
        if self._finished:
            return None
        if self.exhausted and not event.get("stop"):
            return None
        total_timings(event.get("timings"), self.tokens, self.spent_ms, self.exhausted)
        if isinstance(event.get("tokens_predicted"), int):
            event["tokens_predicted"] = self.tokens + (0 if self.exhausted else event["tokens_predicted"])
        if self.exhausted:
            event["content"], event["tokens"], event["stop_type"] = "", [], "limit"
        if isinstance(event.get("tokens_evaluated"), int):
            event["tokens_evaluated"] = max(0, event["tokens_evaluated"] - self.tokens)
        if event.get("stop") and "prompt" in event:
            event["prompt"] = self.call.body.get("prompt", "")
        return event


def _is_single(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, list):
        return False
    if any(isinstance(part, dict) for part in prompt):
        # An object with media can't be extended: beside it, further parts would be further prompts.
        return False
    return len(prompt) == 1 or any(isinstance(part, int) for part in prompt)


def _parts(prompt: str | list[Any]) -> list[Any]:
    """The tokens and strings of a single prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if len(prompt) == 1 and isinstance(prompt[0], list):
        return prompt[0]
    return prompt


def _extended(prompt: Any, text: str) -> Any:
    """Append ``text`` to the prompt; a list may mix tokens and strings."""
    if not text:
        return prompt
    if isinstance(prompt, str):
        return prompt + text
    if len(prompt) == 1 and isinstance(prompt[0], str):
        return prompt[0] + text
    if len(prompt) == 1 and isinstance(prompt[0], list):
        return [*prompt[0], text]
    return [*prompt, text]
